"""DPM-OT (Li et al. 2023, arXiv 2307.11308): optimal transport straight to an intermediate level, against DDIM.

    jdiff reproduce dpm-ot

Eight modes on the unit circle, standard deviation 0.02, exact score. The paper's point is mode mixture: samples between
the modes, more than four standard deviations from every one of them.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import exact, process, starts
from jdiff.experiments._claims import Claim, Measure, Run, Settings, table

STD, LEVEL = 0.02, 0.1
ANGLES = np.arange(8) * np.pi / 4
MODES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
RING = exact.mixture(np.full(8, 0.125), MODES, [STD**2] * 8)


@dataclass(frozen=True)
class Ring:
    """`n` samples of the ring, from the prior or through a transport to `targets` of its draws noised at LEVEL."""

    transport: bool = False
    source: str = "normal"
    k: int = 1  # targets that are interpolated, within `angle` radians
    angle: float = 0.15
    targets: int = 256
    n: int = 20_000
    end: float = 0.0

    @property
    def process(self) -> process.Process:
        return process.edm(sigma_max=10.0)

    @property
    def start(self) -> float | None:
        return LEVEL if self.transport else None

    def prepare(self, settings: Settings) -> Measure:
        keys = jax.random.split(jax.random.key(settings.seed), 4)
        shape, extra = (self.n, 2), {}
        x = self.process.prior(keys[0], shape)
        if self.transport:
            latents = self.process.diffuse(keys[1], RING.sample(keys[2], self.targets), LEVEL)
            ot = starts.semidiscrete_ot(keys[3], latents, source=self.source)
            z = x / self.process.prior_std
            x = ot(z) if self.k == 1 else ot.interpolate(z, self.k, self.angle)
            share = np.bincount(np.asarray(ot.cell(z)), minlength=self.targets) / self.n
            extra = {"cell total variation": float(0.5 * np.abs(share - 1 / self.targets).sum())}

        def measure(tableau: jdiff.Tableau) -> dict[str, Any]:
            found = np.asarray(jdiff.sample(RING.denoiser(self.process), tableau, jnp.asarray(x)))
            far = np.linalg.norm(found[:, None] - MODES, axis=-1)
            hit = np.bincount(far.argmin(1), minlength=8) / self.n
            return {
                "mode mixture": float(np.mean(far.min(1) > 4 * STD)),
                "mode total variation": float(0.5 * np.abs(hit - 0.125).sum()),
                "spread": float(np.sqrt(np.mean(far.min(1) ** 2) / 2) / STD),  # 1 where a mode is filled as it should
                "distinct": len(np.unique(found.round(6), axis=0)),
                **extra,
            }

        return measure


PLAIN, OT = Ring(), Ring(transport=True)
TABLE = table(
    "dpm-ot",
    "DPM-OT against solvers from the prior: the share of samples between the modes of a ring of eight.",
    rows={
        "DDIM": Run("ddim", PLAIN, "karras"),
        "DPM-Solver++(2M)": Run("dpm_solver_pp(order=2)", PLAIN, "karras"),
        "OT, then DDIM": Run("ddim", OT, "karras"),
        "OT, then DPM-Solver++(2M)": Run("dpm_solver_pp(order=2)", OT, "karras"),
        "OT of 3 targets, then DDIM": Run("ddim", Ring(transport=True, k=3), "karras"),
        "OT of 3 at any angle, then DDIM": Run("ddim", Ring(transport=True, k=3, angle=np.pi), "karras"),
        "OT fitted to uniform noise, then DDIM": Run("ddim", Ring(transport=True, source="uniform"), "karras"),
    },
    nfe=(5, 6, 8, 10),
    metric="mode mixture",
    claims=(
        Claim("OT and 5 steps: mode mixture", lambda e: e("OT, then DDIM", 5), at_most=0.01),
        Claim("DDIM at NFE 6: mode mixture", lambda e: e("DDIM", 6), at_least=0.08),
        Claim("DDIM at NFE 8: mode mixture", lambda e: e("DDIM", 8), at_least=0.02),
        Claim("the transport's cells: total variation", lambda e: e("OT, then DDIM", 5, "cell total variation"), 0.06),
        Claim(
            "modes as often as they should be: total variation, OT less DDIM's at NFE 10",
            lambda e: e("OT, then DDIM", 5, "mode total variation") - e("DDIM", 10, "mode total variation"),
            at_most=0.0,
        ),
        Claim(
            "more distinct samples than targets, without interpolation",
            lambda e: e("OT, then DDIM", 5, "distinct") / OT.targets,
            at_least=1.01,
        ),
        Claim(
            "interpolation within 0.15 radians: distinct samples, of 20,000",
            lambda e: e("OT of 3 targets, then DDIM", 5, "distinct"),
            at_least=10_000,
        ),
        Claim(
            "fitted to uniform noise, as in the official code: cell total variation",
            lambda e: e("OT fitted to uniform noise, then DDIM", 5, "cell total variation"),
            at_most=0.06,
        ),
    ),
    notes=(
        "NFE counts the steps below sigma = 0.1 where transport comes first: its own cost is one product with the 256 "
        "targets. A deterministic solver after the plain map returns at most one sample a target, and modes as often "
        "as the 256 drawn targets hold them.",
    ),
)
