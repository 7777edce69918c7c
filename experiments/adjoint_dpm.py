"""AdjointDPM (Pan et al. 2023): gradients through sampling at constant memory, against backpropagation.

    jdiff reproduce adjoint-dpm

A mixture of four modes on EDM's process, sigma 20 to 0.01, a linear loss. All rows sample with DPM-Solver++(2M) on the
same times. The error is that of the gradient with respect to the noise and to the mode means, together, relative to
the gradient through 2000 steps; the memory is what XLA plans for the compiled gradient.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import exact, gradients, process, solvers, times
from jdiff.experiments import _models
from jdiff.experiments._claims import Claim, Exact, Measure, Run, Settings, table

FINE = 2000


@dataclass(frozen=True, eq=False)
class Gradient(Exact):
    """Gradients of a linear loss of the sample, taken in one way."""

    way: str = "direct"
    order: int = 0  # of the adjoint's solver

    def gradient(self, tableau: jdiff.Tableau, grid: np.ndarray) -> Any:
        """A function (denoiser, x) -> gradients of both."""
        weights = jnp.asarray([1.0, -0.5])

        def loss(denoiser: jdiff.Denoiser, x: jax.Array) -> jax.Array:
            if self.way == "adjoint":
                out = gradients.adjoint(denoiser, tableau, x, grid, order=self.order)
            else:
                out = gradients.sample(denoiser, tableau, x, gradient=self.way)
            return jnp.sum(out @ weights)

        return jax.jit(jax.grad(loss, (0, 1)))

    def prepare(self, settings: Settings) -> Measure:
        p = self.process

        def both(found: Any) -> np.ndarray:
            means = jax.tree.leaves(found[0])[1]
            return np.concatenate([np.ravel(means), np.ravel(found[1])])

        with jax.enable_x64(True):
            n = min(settings.n, 32)
            x = _models.noise(self.model, p, settings.seed, n) * (self.start or p.t_max) / p.t_max
            fine = times.karras(p, FINE, start=self.start, end=self.end)
            precise = Gradient(self.model, p, self.start, self.end, "checkpoint")
            den = self.model.denoiser(p)
            want = both(precise.gradient(solvers.dpm_solver_pp(2)(p, fine), fine)(den, x))

        def measure(tableau: jdiff.Tableau) -> dict[str, Any]:
            with jax.enable_x64(True):
                program = self.gradient(tableau, np.append(np.asarray(tableau.t), self.end)).lower(den, x).compile()
                got = both(program(den, x))
            error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            return {"gradient error": error, "bytes": program.memory_analysis().temp_size_in_bytes, "n": n}

        return measure


MODES = exact.mixture([0.3, 0.2, 0.4, 0.1], [[1.0, 0.0], [0.0, 1.0], [-1.0, -0.2], [0.1, -1.0]], [0.1, 0.2, 0.15, 0.1])
WAYS = {
    "backpropagation": ("direct", 0),
    "backpropagation, checkpointed": ("checkpoint", 0),
    "AdjointDPM, Euler": ("adjoint", 1),
    "AdjointDPM, Heun": ("adjoint", 2),
}
HEUN, EULER, PLAIN = "AdjointDPM, Heun", "AdjointDPM, Euler", "backpropagation"

TABLE = table(
    "adjoint-dpm",
    "Error and memory of gradients through sampling.",
    rows={
        name: Run("dpm_solver_pp(order=2)", Gradient(MODES, process.edm(), 20.0, 0.01, *way), "karras")
        for name, way in WAYS.items()
    },
    nfe=(25, 50, 100, 200),
    metric="gradient error",
    claims=(
        Claim("Heun's error at 50 steps", lambda e: e(HEUN, 50), 0.01),
        Claim("Heun's error at 100 steps", lambda e: e(HEUN, 100), 0.002),
        Claim("Heun, 100 steps over 200: second order is 4", lambda e: e(HEUN, 100) / e(HEUN, 200), None, 3.4),
        Claim("Euler's error over Heun's at 200 steps", lambda e: e(EULER, 200) / e(HEUN, 200), None, 10.0),
        Claim("the adjoint's memory, 200 steps over 25", lambda e: e(HEUN, 200, "bytes") / e(HEUN, 25, "bytes"), 1.1),
        Claim("backpropagation's, 200 over 25", lambda e: e(PLAIN, 200, "bytes") / e(PLAIN, 25, "bytes"), None, 4.0),
    ),
    notes=(
        "Backpropagation is exact for the table: its rows show the sampler's own error, which the adjoint has too. "
        "The cells hold the planned bytes (table.csv). The paper prints no such numbers.",
        "",
        "![error against steps](plot.png)",
    ),
)
