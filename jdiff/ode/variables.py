"""The independent variables of the probability flow, and its slope in each (the table in `jdiff.ode`)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jdiff.denoiser import Denoiser, cast_like
from jdiff.predict import convert
from jdiff.process import Process

VARIABLES = ("angle", "lam", "sigma", "t")


def position(p: Process, variable: str, t: float) -> float:
    """u at the time t, on the host; infinite where the variable is."""
    a, s = float(p.alpha(t)), float(p.sigma(t))
    with np.errstate(divide="ignore"):
        values = {"angle": np.arctan2(s, a), "lam": np.log(a) - np.log(s), "sigma": np.divide(s, a), "t": t}
    return float(values[variable])


def scale(p: Process, variable: str, t: Any) -> Any:
    """c of z = x / c at the time t."""
    if variable == "t":
        return np.float64(1.0)
    a, s = p.alpha(t), p.sigma(t)
    return a if variable == "sigma" else (jnp if isinstance(t, jax.Array) else np).hypot(a, s)


def time_of(p: Process, variable: str, u: Array) -> Array:
    """The time at u."""
    if variable == "t":
        return u
    lam = {"lam": lambda: u, "sigma": lambda: -jnp.log(u)}.get(variable, lambda: _log_cot(u))()
    return jnp.clip(p.t_of_lam(lam), 0.0, p.t_max)


def _log_cot(u: Array) -> Array:
    """log(1 / tan u), with the ends -inf at pi/2 (which float32 rounds up) and +inf at 0."""
    return jnp.log(jnp.maximum(jnp.cos(u), 0.0)) - jnp.log(jnp.sin(u))


def flow_slope(denoiser: Denoiser, variable: str, u: Array, z: Array) -> Array:
    """dz/du; u a scalar, or (batch, 1, ...)."""
    p, t = denoiser.process, time_of(denoiser.process, variable, u)
    x = jnp.asarray(scale(p, variable, t), z.dtype) * z
    out = cast_like(denoiser.apply(x, t, denoiser.init(x))[0], x)
    to = lambda kind: convert(p, x, t, out, denoiser.prediction, kind)
    if variable in ("sigma", "t"):
        return to("eps" if variable == "sigma" else "velocity")
    phi = u if variable == "angle" else jnp.arctan(jnp.exp(-u))
    along = jnp.cos(phi) * to("eps") - jnp.sin(phi) * to("x0")
    return along if variable == "angle" else -jnp.sin(phi) * jnp.cos(phi) * along
