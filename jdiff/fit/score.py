"""One compiled program scores every deterministic solver of a number of evaluations, many at a time."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jdiff.tableau import Tableau

from .free import Coefficients, rollout
from .newton import objective
from .reference import Reference, Source, as_argument, model_at


def unroll(T: Tableau) -> Coefficients:
    """A deterministic tableau as the weights of x_T and of all past outputs in each point."""
    if T.stochastic or np.ndim(T.A) > 3 or T.E is not None or T.record.outputs > 1 or T.record.prediction != "x0":
        raise ValueError(f"{T.record.name}: expected a deterministic tableau with scalar coefficients")
    U = T.unrolled()
    if abs(U[0, 0] - 1.0) > 1e-12:
        raise ValueError(f"{T.record.name}: expected a first evaluation at the initial noise itself")
    return Coefficients(np.asarray(T.t), U[1:, 0], U[1:, 1:])


@jax.jit
def _many(source: Any, co: Coefficients, x: Array, target: Array, index: Array) -> Array:
    denoiser = model_at(source, index)

    def one(co: Coefficients) -> Array:
        end = rollout(denoiser, co, x)[0][-1]
        return jnp.mean((end - target) ** 2, axis=tuple(range(1, x.ndim)))

    return jax.lax.map(one, co)


def squares(source: Source, tables: Sequence[Tableau], ref: Reference, at_once: int = 16) -> np.ndarray:
    """Mean squared error of each table (of one number of evaluations) on each trajectory: (tables, n) float64."""
    found, dtype = [], jnp.asarray(ref.x).dtype
    data = (jnp.asarray(ref.x), jnp.asarray(ref.target), jnp.asarray(ref.index))
    for first in range(0, len(tables), at_once):
        some = [unroll(T) for T in tables[first : first + at_once]]
        full = some + some[:1] * (at_once - len(some))  # one shape, one compilation
        co = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), dtype), *full)
        found.append(np.asarray(_many(as_argument(source), co, *data), np.float64)[: len(some)])
    return np.concatenate(found)


def score(source: Source, tables: Sequence[Tableau], ref: Reference, weight: float = 1.0) -> np.ndarray:
    """The objective (`jdiff.fit.objective`) of each table: (tables,); infinite where it is not finite."""
    return np.array([objective(e, weight) for e in squares(source, tables, ref)])
