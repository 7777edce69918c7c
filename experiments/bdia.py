"""BDIA (Zhang et al. 2023): exact inversion at DDIM's cost, and a smaller error. Beside it EDICT and DDIM inversion.

    jdiff reproduce bdia

A mixture of six modes, whose flow is known, on uniform times of the linear VP process. "rms" is the sampling error;
the round trip goes from noise to a sample and back to noise, and is the rms of what differs, in two precisions.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import exact, process, solvers
from jdiff.experiments import _models
from jdiff.experiments._claims import Claim, Exact, Measure, Run, Settings, table


@dataclass(frozen=True, eq=False)
class RoundTrip(Exact):
    """`Exact`, and the way back: by `jdiff.invert` where the table allows it, else by DDIM inversion."""

    def prepare(self, settings: Settings) -> Measure:
        error, p, den = super().prepare(settings), self.process, self.model.denoiser(self.process)

        def there_and_back(tableau: jdiff.Tableau, x: jax.Array) -> float:
            if tableau.registers > 1:
                back = jdiff.invert(den, tableau, jdiff.registers(den, tableau, x))
            else:
                times = np.append(np.asarray(tableau.t), self.end)
                back = jdiff.sample(den, solvers.ddim_inversion(p, times), jdiff.sample(den, tableau, x))
            return float(jnp.sqrt(jnp.mean((back - x) ** 2)))

        def measure(tableau: jdiff.Tableau) -> dict[str, Any]:
            with jax.enable_x64(True):
                x = _models.noise(self.model, p, settings.seed, settings.n)
                trips = {"round trip": there_and_back(tableau, x)}
                trips["round trip, float32"] = there_and_back(tableau, x.astype(jnp.float32))
            return {**error(tableau), **trips}

        return measure


angle = np.arange(6) * np.pi / 3
MODES = exact.mixture(np.full(6, 1 / 6), np.stack([np.cos(angle), np.sin(angle)], 1), [0.04] * 6)
PROBLEM = RoundTrip(MODES, process.vp_linear(), end=1e-3)
ONE, HALF, EDM = "BDIA, gamma = 1", "BDIA, gamma = 0.5", "BDIA-EDM, gamma = 0.5"

TABLE = table(
    "bdia",
    "Sampling error and round trip of BDIA, EDICT and DDIM.",
    rows={
        "DDIM, DDIM inversion": Run("ddim", PROBLEM, "uniform"),
        ONE: Run("bdia", PROBLEM, "uniform"),
        HALF: Run("bdia(gamma=0.5)", PROBLEM, "uniform"),
        "EDICT": Run("edict", PROBLEM, "uniform"),
        "EDM (Heun)": Run("heun", Exact(MODES, process.vp_linear(), end=1e-3), "uniform"),
        "BDIA-EDM, gamma = 1": Run("bdia(base='edm')", PROBLEM, "uniform"),
        EDM: Run("bdia(gamma=0.5, base='edm')", PROBLEM, "uniform"),
    },
    nfe=(10, 20, 40, 80, 160),
    metric="rms",
    claims=(
        Claim("round trip of gamma = 1 at NFE 80, float64", lambda e: e(ONE, 80, "round trip"), 1e-10),
        Claim("the same in float32", lambda e: e(ONE, 80, "round trip, float32"), 1e-4),
        Claim("round trip of EDICT at NFE 80, float64", lambda e: e("EDICT", 80, "round trip"), 1e-10),
        Claim("round trip of gamma = 0.5 at NFE 20, float64", lambda e: e(HALF, 20, "round trip"), 1e-9),
        Claim(
            "DDIM's round trip at NFE 80 is not exact",
            lambda e: e("DDIM, DDIM inversion", 80, "round trip"),
            None,
            0.01,
        ),
        Claim("rms of gamma = 1 over DDIM's at NFE 20", lambda e: e(ONE, 20) / e("DDIM, DDIM inversion", 20), 0.3),
        Claim("rms of gamma = 1, NFE 40 over 80: second order is 4", lambda e: e(ONE, 40) / e(ONE, 80), None, 3.4),
        Claim(
            "rms of the better gamma over DDIM's at NFE 10",
            lambda e: min(e(ONE, 10), e(HALF, 10)) / e("DDIM, DDIM inversion", 10),
            1.0,
        ),
        Claim("round trip of BDIA-EDM, gamma = 0.5, at NFE 40, float64", lambda e: e(EDM, 40, "round trip"), 1e-9),
        Claim("rms of BDIA-EDM, gamma = 0.5, over EDM's at NFE 40", lambda e: e(EDM, 40) / e("EDM (Heun)", 40), 1.0),
        Claim("the same at NFE 160", lambda e: e(EDM, 160) / e("EDM (Heun)", 160), 1.0),
    ),
    notes=(
        "The cells hold the round trips too (table.csv). The way back divides by gamma at every step, so gamma = 0.5 "
        "amplifies rounding by 2 a step. No number of the paper is set beside these: it has Fréchet distances of large "
        "models alone.",
        "",
        "![error against evaluations](plot.png)",
    ),
)
