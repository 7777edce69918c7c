"""DPM-Solver (Lu et al. 2022, arXiv 2206.00927) against DDIM: error to the true flow on smooth and on sharp mixtures.

    jdiff reproduce dpm-solver

The paper's claim is good samples in around ten evaluations; the trajectory error says when. Eight modes in eight
dimensions, standard deviation 1 ("smooth") or 0.15 ("sharp"); steps even in log-SNR from t = 1 to 1e-3, as the paper's.
The digits rows have their own measure, below: the distance that DPM-Solver-fast has at 12 evaluations and at 96.
"""

import numpy as np

from jdiff import exact, process
from jdiff.experiments._claims import Claim, Digits, Exact, Run, table
from jdiff.reproduce import Published

MEANS = np.random.default_rng(0).normal(size=(8, 8))
SMOOTH, SHARP = (Exact(exact.mixture(np.full(8, 1 / 8), MEANS, [s**2] * 8), process.vp_linear(), end=1e-3)
                 for s in (1.0, 0.15))  # fmt: skip
SOLVERS = {
    "DDIM": "ddim",
    "DPM-Solver-2": "dpm_solver(order=2, method='singlestep')",
    "DPM-Solver-3": "dpm_solver(order=3, method='singlestep')",
    "DPM-Solver-fast": "dpm_solver",
    "DPM-Solver++(2M)": "dpm_solver_pp",
}
ROWS = {f"{kind}: {name}": Run(text, problem) for kind, problem in (("smooth", SMOOTH), ("sharp", SHARP))
        for name, text in SOLVERS.items()}  # fmt: skip
ROWS["digits: DPM-Solver-fast"] = Run("dpm_solver", Digits("vp_linear", end=1e-3))


def ratio(row: str, nfe: int, to: str = "DDIM"):
    kind = row.split(":")[0]
    return lambda e: e(row, nfe) / e(f"{kind}: {to}", nfe)


TABLE = table(
    "dpm-solver",
    "DPM-Solver against DDIM: rms error to the true flow on exact mixtures, smooth and sharp.",
    rows=ROWS,
    nfe=(12, 24, 48, 96),
    metric="rms",
    claims=(
        Claim("smooth, NFE 12: order 3 over DDIM", ratio("smooth: DPM-Solver-3", 12), 0.15),
        Claim("sharp, NFE 24: order 3 over DDIM", ratio("sharp: DPM-Solver-3", 24), 0.6),
        Claim("sharp, NFE 48: order 3 over DDIM", ratio("sharp: DPM-Solver-3", 48), 0.15),
        Claim("sharp, NFE 12: order 3 is no better than DDIM", ratio("sharp: DPM-Solver-3", 12), at_least=1.0),
        Claim("sharp, NFE 12: 2M over DDIM", ratio("sharp: DPM-Solver++(2M)", 12), 0.6),
        Claim("smooth: slope of order 2, NFE 48 to 96",
              lambda e: np.log2(e("smooth: DPM-Solver-2", 48) / e("smooth: DPM-Solver-2", 96)), at_least=1.8),
        Claim("smooth: slope of order 3, NFE 48 to 96",
              lambda e: np.log2(e("smooth: DPM-Solver-3", 48) / e("smooth: DPM-Solver-3", 96)), at_least=2.8),
        Claim("digits: Fréchet distance at NFE 12 over that at 96",
              lambda e: e("digits: DPM-Solver-fast", 12, "Fréchet distance")
              / e("digits: DPM-Solver-fast", 96, "Fréchet distance"), 1.1),
    ),
    published=(Published.load("dpm_solver_cifar10.toml"),),
)  # fmt: skip
