"""The quadratic objectives of a field: L_f = E[|f(x_t, t)|^2 / 2 - f . target], without the target's own square.

    field   target               (Albergo et al. 2023, section 2, in jdiff's time)
    b       dI/dt + gamma' z
    v       dI/dt
    s       -z / gamma
    eta     z

Their minima are -E|f|^2 / 2, not 0. Near the ends gamma' z and z / gamma have infinite variance; over an antithetic
pair, z and -z, the loss has a finite one, as f changes little where gamma is small.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jdiff import noise
from jdiff.denoiser import cast_like
from jdiff.losses import TimeSampler, uniform, uniforms
from jdiff.predict import wide
from jdiff.process import Process

from .paths import FIELDS, Interpolant


def objective(
    interpolant: Interpolant,
    field: str,
    apply: Callable[..., PyTree],
    *,
    time: TimeSampler | None = None,
    stratified: bool = False,
    antithetic: bool | None = None,
) -> Callable[..., Float[Array, " batch"]]:
    """A loss(params, key, x0, x1, y=None, index=None) -> (batch,), the mean over a sample's elements.

    apply(params, x_t, t, y) -> the field, shaped like x0; t is (batch, 1, ..., 1). x0, x1: (batch, ...), the pairs of
    the coupling (independent: two shuffled batches); x1 = None where x1 takes no part. y is handed on. An entry
    depends on (key, index[i], x0[i], x1[i], y[i]) alone, index the global one (default 0, 1, ..).

    time         uniform numbers to times; default uniform on (0, 1), on [t_min, t_max] of a one-sided process
    antithetic   the mean over z and -z, at two evaluations. Default, as in the official code: for b and s, and of a
                 one-sided interpolant for s alone
    ValueError for an unknown field, s or eta without latent noise, pairs that differ in shape.
    """
    if field not in FIELDS:
        raise ValueError(f"unknown field {field!r}; expected one of {', '.join(FIELDS)}")
    process = interpolant.path if isinstance(interpolant.path, Process) else None
    if field in ("s", "eta") and process is None and (interpolant.gamma == "none" or interpolant.a == 0):
        raise ValueError(f"{interpolant} has no latent noise: there is no {field} to learn; take gamma > 0")
    if antithetic is None:
        antithetic = field == "s" or (field == "b" and process is None)
    sampler = time if time is not None else uniform(process) if process else lambda u: u

    def loss(
        params: PyTree,
        key: Array,
        x0: Float[Array, "batch ..."],
        x1: Float[Array, "batch ..."] | None = None,
        y: Any = None,
        index: Int[Array, " batch"] | None = None,
    ) -> Float[Array, " batch"]:
        index = jnp.arange(len(x0), dtype=jnp.int32) if index is None else index
        time_key, noise_key = (jax.random.fold_in(key, i) for i in range(2))
        times = sampler(uniforms(time_key, index, stratified, wide(x0.dtype)))
        t = times.reshape(-1, *[1] * (x0.ndim - 1))
        z = noise.normal(noise_key, x0, index)
        I, dI = interpolant.mean(t, x0, x1)
        gamma, dgamma, _ = interpolant.noise(t)

        def half(z: Array) -> Array:
            f = cast_like(apply(params, x := I + gamma * z, t, y), x)
            target = {"b": lambda: dI + dgamma * z, "v": lambda: dI, "s": lambda: -z / gamma, "eta": lambda: z}[field]()
            return jnp.mean((0.5 * f * f - f * target).reshape(len(x), -1), -1)

        return 0.5 * (half(z) + half(-z)) if antithetic else half(z)

    return loss
