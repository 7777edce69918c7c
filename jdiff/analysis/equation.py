"""The Fokker-Planck equation as a test of a learned potential or score, and as a term of its loss.

The densities of dx = f x dt + g dW satisfy, for phi = log p_t and s = grad phi,

    d phi / dt + d f + f <x, s> - g^2 / 2 (div s + |s|^2) = 0          (d: dimensions)
    d s / dt = grad [g^2 / 2 (div s + |s|^2) - f <x, s>]

Deveney et al. 2023 (arXiv 2311.15996): the distance between the laws of ODE and SDE is bounded by the first's residual.
Lai et al. 2023 (arXiv 2210.04296, FP-Diffusion): the second, for networks that are a score and no potential.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jdiff import losses
from jdiff.denoiser import cast_like
from jdiff.predict import check_kind, convert, wide
from jdiff.process import Process

from .divergence import divergence, inner


def _checked(process: Process) -> None:
    if not process.gaussian:
        raise ValueError(f"fokker_planck: {process} has no SDE whose densities it noises data to")


def _flux(score: Callable[[Array], Array], process: Process, x: Array, t: Array, key: Any, probes: int) -> Array:
    """g^2 / 2 (div s + |s|^2) - f <x, s>, (batch,)."""
    flat = lambda c: jnp.broadcast_to(c, (len(x), *[1] * (x.ndim - 1))).reshape(len(x))
    s = score(x)
    pressure = divergence(score, x, key, probes) + inner(s, s)
    return 0.5 * flat(process.diffusion(t)) ** 2 * pressure - flat(process.drift(t)) * inner(x, s)


def fokker_planck(
    potential: Callable[[Array, Array], Float[Array, " batch"]], process: Process, x: Float[Array, "batch ..."],
    t: Any, key: Array | None = None, probes: int = 1,
) -> Float[Array, " batch"]:  # fmt: skip
    """The residual of phi = potential(x, t), a log-density, at each sample, (batch,); 0 for log p_t.

    x (batch, ...); t in (0, t_max), a scalar or (batch, 1, ..): where alpha = 0 the drift is infinite. The Laplacian is
    exact, or with a key Hutchinson's (see `divergence`). ValueError for a process without Gaussian noise.
    """
    _checked(process)
    t = jnp.asarray(t, x.dtype)
    score = lambda x: jax.grad(lambda x: jnp.sum(potential(x, t)))(x)
    rate = jax.jvp(lambda t: potential(x, t), (t,), (jnp.ones_like(t),))[1]
    drift = jnp.broadcast_to(process.drift(t), (len(x), *[1] * (x.ndim - 1))).reshape(len(x))
    return rate + x[0].size * drift - _flux(score, process, x, t, key, probes)


def score_fokker_planck(
    score: Callable[[Array, Array], Array], process: Process, x: Float[Array, "batch ..."], t: Any,
    key: Array | None = None, probes: int = 1,
) -> Float[Array, "batch ..."]:  # fmt: skip
    """The residual of s = score(x, t), like x: d s / dt - grad [g^2 / 2 (div s + |s|^2) - f <x, s>], as above."""
    _checked(process)
    t = jnp.asarray(t, x.dtype)
    rate = jax.jvp(lambda t: score(x, t), (t,), (jnp.ones_like(t),))[1]
    return rate - jax.grad(lambda x: jnp.sum(_flux(lambda y: score(y, t), process, x, t, key, probes)))(x)


def fokker_planck_loss(
    apply: Callable[..., PyTree], process: Process, prediction: str, *, time: losses.TimeSampler | None = None,
    probes: int | None = 1, power: int = 2,
) -> losses.Loss:  # fmt: skip
    """The function loss(params, key, x0, y=None, index=None) -> (batch,) of |residual of the score|^power / d.

    Arguments as in `losses.denoising_loss`, to which it is added with a weight of the user's. probes: Hutchinson's, or
    None for the exact divergence. power: 2 (FP-Diffusion) or 1. For the same key x_t is that of the other loss.
    ValueError for another power.
    """
    check_kind(prediction)
    _checked(process)
    if power not in (1, 2):
        raise ValueError(f"fokker_planck_loss: power is {power}; expected 1 or 2")
    sampler = losses.uniform(process) if time is None else time

    def loss(
        params: PyTree, key: Array, x0: Float[Array, "batch ..."], y: Int[Array, " batch"] | None = None,
        index: Int[Array, " batch"] | None = None,
    ) -> Float[Array, " batch"]:  # fmt: skip
        index = jnp.arange(len(x0), dtype=jnp.int32) if index is None else index
        time_key, noise_key, probe_key = (jax.random.fold_in(key, i) for i in (0, 1, 3))
        t = sampler(losses.uniforms(time_key, index, False, wide(x0.dtype))).reshape(-1, *[1] * (x0.ndim - 1))
        x = process.mix(x0, process.kernel(noise_key, x0, index), t)

        def score(x: Array, t: Array) -> Array:
            return convert(process, x, t, cast_like(apply(params, x, t, y), x), prediction, "score")

        how = (None, 1) if probes is None else (probe_key, probes)
        r = score_fokker_planck(score, process, x, t, *how)
        square = inner(r, r) / x0[0].size
        return square if power == 2 else jnp.sqrt(square + jnp.finfo(x0.dtype).tiny)

    return loss
