"""Solver schedules found by search (USF, S3), on an exact mixture: against fixed solvers, and random search.

    jdiff reproduce usf

The claim of Liu et al. 2023: at few evaluations a schedule of step sizes, orders, prediction kinds and correctors
found for a model betters every fixed solver. Abstract: CIFAR-10 Fréchet distance 2.69 at 10 evaluations, 6.86 at 5.
"""

import jdiff
from jdiff import fit, process
from jdiff.experiments import _models
from jdiff.experiments._claims import Claim, Exact, Run, table
from jdiff.experiments._searched import Searched, trajectories
from jdiff.fit.search import evolution
from jdiff.fit.spaces import compile_schedule, known_schedules, schedules
from jdiff.reproduce import Published

MODEL, VP = _models.survey("gmm2"), process.vp_linear()
BUDGET, POPULATION, SET = 320, 40, 128
FIXED = {
    "DDIM": "ddim",
    "DPM-Solver++(2M)": "dpm_solver_pp",
    "DPM-Solver++(3M)": "dpm_solver_pp(order=3)",
    "UniPC-2": "unipc(order=2)",
    "UniPC-3": "unipc(order=3)",
}


def _s3(nfe: int) -> jdiff.Tableau:
    found = fit.s3(MODEL.denoiser(VP), nfe, trajectories(MODEL, VP, SET), budget=BUDGET, population=POPULATION)
    return found[0]


def _random(nfe: int) -> jdiff.Tableau:
    """As many evaluations of random schedules, the known ones among them."""
    d, ref = MODEL.denoiser(VP), trajectories(MODEL, VP, SET)
    space = schedules(nfe)
    every = lambda many: fit.score(d, [compile_schedule(VP, a) for a in many], ref)
    found = evolution(space, every, initial=known_schedules(VP, nfe), budget=BUDGET, population=BUDGET)
    return compile_schedule(VP, found.best)


PROBLEM = Exact(MODEL, VP)
ROWS: dict[str, Run] = {
    f"{name}, {grid}": Run(text, PROBLEM, grid) for name, text in FIXED.items() for grid in ("logsnr", "uniform")
}
ROWS |= {"S3": Run(Searched(_s3), PROBLEM), "random search": Run(Searched(_random), PROBLEM)}  # type: ignore
BEST = lambda e, n: min(e(f"{name}, {grid}", n) for name in FIXED for grid in ("logsnr", "uniform"))

TABLE = table(
    "usf",
    "S3 against fixed solvers and random search of the same budget on a mixture of 25 sharp modes.",
    rows=ROWS,
    nfe=(5, 6, 8, 10),
    claims=[
        Claim("S3, of the best fixed solver's error at NFE 5", lambda e: e("S3", 5) / BEST(e, 5), 0.8),
        Claim("S3, of the best fixed solver's error at NFE 10", lambda e: e("S3", 10) / BEST(e, 10), 0.9),
        Claim("S3, of random search's error at NFE 5", lambda e: e("S3", 5) / e("random search", 5), 1.0),
        Claim("S3, of random search's error at NFE 10", lambda e: e("S3", 10) / e("random search", 10), 1.0),
    ],
    notes=[f"Searched on {SET} trajectories of seed 1001, {BUDGET} schedules a search; errors are of other noise."],
    published=(Published.load("usf_cifar10.toml"),),
)
