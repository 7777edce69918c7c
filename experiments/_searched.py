"""Solvers that are fitted or searched when a cell is computed, as rows of the tables of `_claims`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import exact, fit
from jdiff.experiments import _models
from jdiff.process import Process

FIT_SEED = 1001  # of the noise that solvers are fitted on; errors are measured on the noise of the settings' seed


@dataclass(frozen=True, eq=False)
class Searched:
    """`make(nfe)` -> Tableau in the place of a solver; the times that it is given only say how many."""

    make: Callable[[int], jdiff.Tableau]

    def steps(self, nfe: int) -> int:
        return nfe

    def __call__(self, process: Process, t: np.ndarray) -> jdiff.Tableau:
        with jax.enable_x64(True):
            return self.make(len(t) - 1)


def trajectories(model: exact.Mixture, p: Process, n: int, seed: int = FIT_SEED) -> fit.Reference:
    """n trajectories of an exact model to fit on, float64; not of the settings' seed."""
    with jax.enable_x64(True):
        x = _models.noise(model, p, seed, n)
        return fit.Reference(x, np.asarray(_models.flow(model, p, x)), np.arange(n), seed)


def noise(model: exact.Mixture, p: Process, n: int) -> Any:
    """The noise of `trajectories` alone."""
    return jnp.asarray(_models.noise(model, p, FIT_SEED, n))
