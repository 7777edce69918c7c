"""Optimal linear subspace search: least squares along the accelerated trajectory, on an exact mixture.

    jdiff reproduce olss

The claim of Duan et al. 2023: a few complete runs of DDIM (here 64 of 200 steps) give coefficients that stay near to
the complete run in 5 to 10 evaluations, and a search of the steps betters them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import jdiff
from jdiff import fit, process, solvers, times
from jdiff.experiments import _models
from jdiff.experiments._claims import Claim, Exact, Run, Settings, table
from jdiff.experiments._searched import Searched, noise

MODEL, VP = _models.survey("gmm2"), process.vp_linear()


@dataclass(frozen=True, eq=False)
class Complete(Exact):
    """Errors against the complete run: 200 steps of DDIM, from the same noise."""

    def prepare(self, settings: Settings) -> Callable[[jdiff.Tableau], dict[str, Any]]:
        with jax.enable_x64(True):
            x = _models.noise(self.model, self.process, settings.seed, settings.n)
            d = self.model.denoiser(self.process)
            goal = np.asarray(jdiff.sample(d, solvers.ddim()(self.process, times.uniform(self.process, 200)), x))

        def measure(tableau: jdiff.Tableau) -> dict[str, Any]:
            with jax.enable_x64(True):
                return _models.errors(d, tableau, x, goal)

        return measure


def _olss(searched: bool) -> Searched:
    def make(nfe: int) -> jdiff.Tableau:
        t = None if searched else times.uniform(VP, 200)[np.round(np.linspace(0, 200, nfe + 1)).astype(int)]
        return fit.olss(MODEL.denoiser(VP), nfe, noise(MODEL, VP, 64), times=t).tableau

    return Searched(make)


FULL = Complete(MODEL, VP)
ROWS: dict[str, Run] = {
    "DDIM": Run("ddim", FULL, "uniform"),
    "DPM-Solver++(2M)": Run("dpm_solver_pp", FULL, "uniform"),
    "DEIS-3": Run("deis", FULL, "uniform"),
    "OLSS, uniform steps": Run(_olss(False), FULL, "uniform"),  # type: ignore
    "OLSS, searched steps": Run(_olss(True), FULL, "uniform"),  # type: ignore
}
BOUNDS = {5: 0.5, 8: 0.3, 10: 0.2}
CLAIMS = [
    Claim(f"searched, of DDIM's at NFE {n}", lambda e, n=n: e("OLSS, searched steps", n) / e("DDIM", n), most)
    for n, most in BOUNDS.items()
] + [
    Claim(f"uniform, of DDIM's at NFE {n}", lambda e, n=n: e("OLSS, uniform steps", n) / e("DDIM", n), most)
    for n, most in BOUNDS.items()
]
CLAIMS += [
    Claim(f"searched steps, of uniform ones' error at NFE {n}",
          lambda e, n=n: e("OLSS, searched steps", n) / e("OLSS, uniform steps", n), 1.0)
    for n in BOUNDS
]  # fmt: skip

TABLE = table(
    "olss",
    "OLSS against DDIM, DPM-Solver++ and DEIS on a mixture of 25 sharp modes: distance to 200 steps of DDIM.",
    rows=ROWS,
    nfe=(5, 6, 8, 10),
    claims=CLAIMS,
    metric="rms",
    notes=[
        "OLSS is fitted on 64 trajectories of seed 1001; errors are measured on other noise. "
        "No number of the paper is set beside these: its tables are of Stable Diffusion, and were not seen."
    ],
)
