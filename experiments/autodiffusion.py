"""AutoDiffusion's search of time steps, on an exact mixture in law: searched subsets against uniform and others.

    jdiff reproduce autodiffusion

The claim of Li et al. 2023: few steps chosen by evolution, without training, are far better than uniform ones.
Abstract: ImageNet-64 in 4 steps, Fréchet distance 17.86 against DDIM's 138.66.
"""

from collections.abc import Sequence

import jax
import numpy as np

import jdiff
from jdiff import fit, metrics, process, solvers
from jdiff.experiments import _models
from jdiff.experiments._claims import Claim, Law, Run, table
from jdiff.experiments._searched import Searched
from jdiff.reproduce import Published

MODEL, VP = _models.survey("gmm2"), process.vp_linear()
TOTAL, BUDGET, SAMPLES = 100, 300, 1000


def _times(subset: Sequence[int]) -> np.ndarray:
    """t_max, the chosen ones of TOTAL uniform times, and 0."""
    return np.concatenate([[VP.t_max], (np.array(subset) + 1.0) / (TOTAL + 1.0) * VP.t_max, [0.0]])


def _searched(nfe: int) -> jdiff.Tableau:
    d, keys = MODEL.denoiser(VP), jax.random.split(jax.random.key(1001), 3)
    x, draws = VP.prior(keys[0], (SAMPLES, 2)), np.asarray(MODEL.sample(keys[1], SAMPLES))

    def fitness(many: Sequence[fit.Subset]) -> np.ndarray:
        ends = [np.asarray(jdiff.sample(d, solvers.ddim()(VP, _times(m[0])), x)) for m in many]
        return np.array([float(metrics.sliced_wasserstein(keys[2], end, draws).value) for end in ends])

    found = fit.evolution(fit.subsets(TOTAL, nfe - 1), fitness, budget=BUDGET, population=30)
    return solvers.ddim()(VP, _times(found.best[0]))


PROBLEM = Law(MODEL, VP)
ROWS: dict[str, Run] = {f"DDIM, {grid}": Run("ddim", PROBLEM, grid) for grid in ("uniform", "quadratic", "logsnr")}
ROWS["DDIM, searched steps"] = Run(Searched(_searched), PROBLEM)  # type: ignore
RATIO = lambda e, n, grid: e("DDIM, searched steps", n) / e(f"DDIM, {grid}", n)

TABLE = table(
    "autodiffusion",
    "Time steps of DDIM found by evolution on a mixture of 25 sharp modes, in law.",
    rows=ROWS,
    nfe=(4,),
    claims=[
        Claim("searched, of uniform steps' distance at NFE 4", lambda e: RATIO(e, 4, "uniform"), 0.7),
        Claim("searched, of the best of quadratic's and log-SNR's at NFE 4",
              lambda e: max(RATIO(e, 4, "quadratic"), RATIO(e, 4, "logsnr")), 1.0),
    ],
    metric="sliced Wasserstein",
    notes=[
        f"Fitness: sliced Wasserstein distance of {SAMPLES} samples of another seed; {BUDGET} sets of {TOTAL} times. "
        "The second stage, masks of layers, needs a network and is not in this table."
    ],
    published=(Published.load("autodiffusion_imagenet64.toml"),),
)  # fmt: skip
