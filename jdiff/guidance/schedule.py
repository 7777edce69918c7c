"""Weights that depend on the time: a number, an array, or a function of t, for every rule that takes a scale.

`linear`, `cosine` and `beta` keep the mean excess over 1, `sine` adds a bump, and `at_steps` is a table for one time
grid. The last one is also how rules that move the state inside a solver's step become functions of a denoiser:

    DDIM and flow Euler:  x1 = (s1 / s0) x + k D,   k = a1 - a0 s1 / s0 = a1 (1 - e^-h)

so adding delta / k to the output D adds delta to the state after the step. `step_gain` holds 1 / k.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jdiff.predict import wide
from jdiff.process import Process
from jdiff.process.base import reciprocal

Weight = Any  # a number, an array that broadcasts against the sample, or a function of t that returns one


def as_weight(value: Weight, name: str = "scale") -> Any:
    """A weight as a pytree: numbers become float32 arrays, functions Partials. ValueError for NaN and infinity."""
    if callable(value):
        return value if isinstance(value, Partial) else Partial(value)
    if isinstance(value, (int, float)):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; expected a finite number, an array or a function of t")
        return jnp.asarray(value, jnp.float32)
    return value


def at(weight: Any, t: Any, x: jax.Array) -> jax.Array:
    """The weight at time t, in the dtype of x."""
    return jnp.asarray(weight(t) if callable(weight) else weight).astype(x.dtype)


# --- smooth schedules
@dataclass(frozen=True)
class _Shape:
    """How the excess over 1 varies with u in [0, 1], the share of the noise that is left."""

    process: Process
    clock: str
    name: str

    def __call__(self, scale: jax.Array, options: tuple[jax.Array, ...], t: Any) -> jax.Array:
        scale, *rest = (v.astype(t.dtype) for v in (scale, *options))
        u = self._left(t)
        if self.name == "linear":
            return 1.0 + (scale - 1.0) * 2.0 * (1.0 - u)
        if self.name == "cosine":
            return 1.0 + (scale - 1.0) * (1.0 + jnp.cos(jnp.pi * u))
        if self.name == "sine":
            return scale * (1.0 + rest[0] * jnp.sin(jnp.pi * u))
        return 1.0 + (scale - 1.0) * jax.scipy.stats.beta.pdf(u, *rest)

    def _left(self, t: Any) -> Any:
        p = self.process
        if self.clock == "t":
            return t / p.t_max
        most, least = float(p.lam(p.t_min)), float(p.lam(p.t_max))
        least = least if np.isfinite(least) else float(p.lam(p.t_max - p.t_min))
        return jnp.clip((most - p.lam(t)) / (most - least), 0.0, 1.0)


def _smooth(name: str, process: Process, scale: Any, clock: str, *options: float) -> Partial:
    if clock not in ("t", "lam"):
        raise ValueError(f"{name}: clock is {clock!r}; expected 't' (the process's time) or 'lam' (log-SNR)")
    return Partial(_Shape(process, clock, name), as_weight(scale), tuple(as_weight(float(v)) for v in options))


def linear(process: Process, scale: Any, clock: str = "t") -> Partial:
    """1 + 2 (scale - 1)(1 - u): rises from 1 at noise to 2 scale - 1 at data (Wang et al. 2024, "linear").

    u is the share of the way that is left: t / t_max, or with clock="lam" the share of the log-SNR between t_max and
    t_min (the one to use on `edm`, whose time is the noise level). The mean over u is `scale`.
    """
    return _smooth("linear", process, scale, clock)


def cosine(process: Process, scale: Any, clock: str = "t") -> Partial:
    """1 + (scale - 1)(1 + cos(pi u)): from 1 at noise to 2 scale - 1 at data (Wang et al. 2024). u as in `linear`."""
    return _smooth("cosine", process, scale, clock)


def beta(process: Process, scale: Any, a: float = 2.0, b: float = 2.0, clock: str = "t") -> Partial:
    """1 + (scale - 1) Beta(u; a, b): none at both ends, most between (Malarz et al. 2025). u as in `linear`."""
    if not (a >= 1 and b >= 1):
        raise ValueError(f"beta: a, b are {a}, {b}; expected at least 1 each, so that the scale stays finite")
    return _smooth("beta", process, scale, clock, a, b)


def sine(process: Process, scale: Any, gamma: float = 1.0, clock: str = "t") -> Partial:
    """scale (1 + gamma sin(pi u)): EluCD's bump (Ma et al. 2023) for classifier guidance. u as in `linear`."""
    return _smooth("sine", process, scale, clock, gamma)


# --- tables for one grid
def at_steps(times: Any, values: Any) -> Partial:
    """values[i] where t is nearest to times[i] (n,): for solvers that evaluate at the grid's own times alone."""
    times, values = np.asarray(times, np.float64), np.asarray(values, np.float64)
    if times.ndim != 1 or values.shape[:1] != times.shape:
        raise ValueError(f"at_steps: times {times.shape} and values {values.shape}; expected one value a time, (n,)")
    return Partial(_nearest, jnp.asarray(times, jnp.float32), jnp.asarray(values, jnp.float32))


def _nearest(times: jax.Array, values: jax.Array, t: Any) -> jax.Array:
    t = jnp.asarray(t)
    off = jnp.abs(times.astype(wide(t.dtype)).reshape(-1, *[1] * t.ndim) - t)
    return values[jnp.argmin(off, 0)]


def step_gain(process: Process, times: Any) -> np.ndarray:
    """1 / k a step of DDIM (flow Euler) on `times`, (n,) float64: what turns a change of the state into one of D."""
    t = process.check_times(times)
    a, s = process.alpha(t), process.sigma(t)
    return 1.0 / (a[1:] - a[:-1] * s[1:] / s[:-1])


def score_units(process: Process, scale: Weight) -> Partial:
    """scale sigma^2 / alpha: a weight in units of the score, as one of x0. 0 where alpha is 0."""
    return Partial(_Score(process), as_weight(scale))


@dataclass(frozen=True)
class _Score:
    process: Process

    def __call__(self, scale: Any, t: Any) -> jax.Array:
        a, s = self.process.alpha(t), self.process.sigma(t)
        return at(scale, t, t) * (s * s * reciprocal(a))


Schedule = Callable[[Any], jax.Array]
