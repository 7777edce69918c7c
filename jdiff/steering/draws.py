"""Several draws of x0 for an intermediate reward, by a short chain from where each particle stands."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from jdiff import execute, times
from jdiff.denoiser import Denoiser
from jdiff.steering.smc import Step
from jdiff.tableau import Tableau


def posterior_draws(
    denoiser: Denoiser,
    tableau: Tableau,
    solver: Callable[..., Tableau],
    m: int = 4,
    steps: int = 4,
    grid: Callable[..., np.ndarray] = times.logsnr,
) -> Partial:
    """`draws` for `fk`: m samples of x0 from each particle, by `steps` steps of a stochastic solver, (m, batch, ...).

    They start where the particle goes on, at the next row's time, so the reward is that of the particle itself and not
    of its parent; it costs m * steps network evaluations a particle at each step that may resample (Singhal et al.
    2025, "many x0 samples"). solver: a builder such as `solvers.ddpm()`; with steps = 1 all draws are equal.
    Raises ValueError for m or steps below 1, or a tableau with a time an element; TypeError for a solver that is none.
    """
    if not callable(solver):
        raise TypeError(f"posterior_draws: solver is {solver!r}; expected a builder such as solvers.ddpm()")
    if m < 1 or steps < 1:
        raise ValueError(f"posterior_draws: m is {m} and steps {steps}; expected at least 1 of each")
    if np.ndim(tableau.t) != 1:
        raise ValueError("posterior_draws: the tableau has a time an element; expected one time a row")
    p = denoiser.process
    tables = [solver(p, grid(p, steps, start=float(t))) for t in tableau.t[1:]]
    kind = tables[0].record.prediction
    stacked = jax.tree.map(lambda *a: np.stack(a), *(t.replace(record=tables[0].record) for t in tables))
    return Partial(_Draws(m, kind), denoiser, stacked)


@dataclass(frozen=True)
class _Draws:
    m: int
    kind: str

    def __call__(self, denoiser: Denoiser, tables: Tableau, key: Array, step: Step) -> PyTree:
        x = step.after.x
        dtype, batch = jax.tree.leaves(x)[0].dtype, jax.tree.leaves(x)[0].shape[0]
        here: Any = jax.tree.map(lambda a: jnp.asarray(a)[jnp.minimum(step.k - 1, len(a) - 1)], tables)
        start = [here.h0.astype(dtype), here.c0.astype(dtype)]
        many = jax.tree.map(lambda a: jnp.concatenate([a] * self.m), x)
        chain = execute.stepper(denoiser, *start, prediction=self.kind)
        state, _ = execute.run(chain, execute.rows(here, dtype), many, key)
        return jax.tree.map(lambda a: a.reshape(self.m, batch, *a.shape[1:]), state.x)
