"""Every solver on real digits: Fréchet distance against network evaluations, with standard errors over three models.

    jdiff reproduce digits-solvers

Three small DiTs (seeds 0, 1, 2 of training and of sampling; the model of fast-sampling) are trained if runs/models does
not hold them yet, some three minutes each on two cores; each solver of `jdiff.solvers.ALL` samples each of them from
the same noise, on evenly spaced times.
"""

from jdiff import solvers
from jdiff.experiments._claims import Digits, Run, table
from jdiff.reproduce import Published

DIGITS = Digits("flow")
EXTRA = {
    "deis in log-SNR": "deis(variable='lam')",
    "dpm_solver_pp 3M": "dpm_solver_pp(order=3)",
    "dpm_solver_pp 2M SDE": "dpm_solver_pp(order=2, eta=1.0)",
    "heun in t": "heun(variable='t')",
    "unipc 2": "unipc(order=2)",
}

TABLE = table(
    "digits-solvers",
    "Fréchet distance of digits for all solvers against NFE, with standard errors over three trained models.",
    rows={row: Run(text, DIGITS, "uniform") for row, text in ({name: name for name in solvers.ALL} | EXTRA).items()},
    nfe=(5, 10, 20, 50),
    claims=(),
    metric="Fréchet distance",
    notes=(
        "500 samples of each model against 899 held-out digits, features of the classifier in jdiff/metrics (32 "
        "dimensions); mean ± standard error over the models. A dash: the solver needs more evaluations.",
    ),
    published=(Published.load("dpm_solver_v3_table1.toml"),),
)
