"""Losses of discrete diffusion, in nats a sequence: each entry is one draw of a bound on -log p(x0).

    vlb_loss      any process, T steps: T KL(q(x_s | x_t, x0) || p(x_s | x_t)) at a random step (VQ-Diffusion's eq. 9)
                  and its auxiliary -log p(x0 | x_t); s = 0 gives the decoder term. The prior's term is 0: u(1) = 1
    masked_loss   absorbing diffusion in continuous time: cross-entropy of the masked tokens, weighted

Times, corruptions and places depend on the key and on the sample's global index alone, as in `jdiff.losses`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from jdiff.discrete.draw import categorical, exponential
from jdiff.discrete.process import MaskReplace
from jdiff.losses import uniforms

TINY = 1e-30


def _indices(index: Array | None, n: int) -> Array:
    return jnp.arange(n, dtype=jnp.int32) if index is None else index


def _nats(logits: Array, x0: Array) -> Array:
    """-log p(x0) of each token, float32."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    return -jnp.take_along_axis(log_p, x0[..., None], -1)[..., 0]


def vlb_loss(
    apply: Callable[..., Array], process: MaskReplace, *, steps: int = 100, auxiliary: float = 5e-4
) -> Callable[..., Float[Array, " batch"]]:
    """loss(params, key, x0, index=None) -> (batch,); its mean is sum_t L_t + auxiliary * sum_t E[-log p(x0 | x_t)].

    apply(params, x_t, t) -> logits (batch, length, K) of the clean tokens; t (batch, 1) float32. steps: T, uniform in t
    and drawn uniformly; the official code draws a step in proportion to the root of its mean squared loss.
    """

    def loss(
        params: Any, key: Array, x0: Integer[Array, "batch length"], index: Int[Array, " batch"] | None = None
    ) -> Float[Array, " batch"]:
        index = _indices(index, len(x0))
        time_key, noise_key = jax.random.split(key)
        i = jnp.floor(uniforms(time_key, index) * steps)[:, None]
        s, t = i / steps, (i + 1.0) / steps
        log_q = jnp.log(process.marginal(x0, t))
        x = jax.vmap(lambda i, log_q: categorical(jax.random.fold_in(noise_key, i), log_q))(index, log_q)
        logits = apply(params, x, t)
        p = process.posterior(x, jax.nn.softmax(logits.astype(jnp.float32), -1), s, t)
        q = process.posterior(x, jax.nn.one_hot(x0, process.classes, dtype=jnp.float32), s, t)
        kl = q * (jnp.log(jnp.maximum(q, TINY)) - jnp.log(jnp.maximum(p, TINY)))
        return steps * (kl.sum((-2, -1)) + auxiliary * _nats(logits, x0).sum(-1))

    return loss


def masked_loss(
    apply: Callable[..., Array],
    mask: int,
    *,
    form: str = "time",
    normalise: str = "nominal",
    block: int | None = None,
    time: Callable[[Array], Array] = lambda u: u,
) -> Callable[..., Float[Array, " batch"]]:
    """loss(params, key, x0, index=None) -> (batch,): sum over the masked tokens of -log p(x0_i | x_t), weighted.

    form       "time": t = time(u), each token masked with probability t, weight 1 / t (MDLM: Sahoo et al. 2024)
               "count": n uniform in 1 .. L, a uniform set of n masks, weight L / n. Their expectations are equal
               (Zheng et al. 2024, section 3.1) and so time-free; "count" has no 1 / t
    block      a time of its own for each block of so many tokens (SDAR-VL's asynchronous block noise); None: one block
    normalise  "realised": weight block / (masks in it) instead of 1 / t (SDAR-VL's effective ratio). Blocks without a
               mask add 0, so its expectation is that of "nominal" only given a mask
    time       maps uniform numbers to t, for "time"; the weight stays 1 / t

    apply(params, x_t, t) -> logits (batch, length, K); t (batch, length) float32, of "count" the realised ratio. With
    `block`: apply(params, x_t, t, x0), and a block may look at x0 of earlier blocks alone, in place of their x_t.
    ValueError for a block that does not divide L.
    """
    if form not in ("time", "count") or normalise not in ("nominal", "realised"):
        raise ValueError(f"expected form 'time' or 'count', normalise 'nominal' or 'realised'; got {form}, {normalise}")

    def loss(
        params: Any, key: Array, x0: Integer[Array, "batch length"], index: Int[Array, " batch"] | None = None
    ) -> Float[Array, " batch"]:
        n, length = x0.shape
        size = length if block is None else block
        if length % size:
            raise ValueError(f"masked_loss: blocks of {size} do not divide {length} tokens")
        index = _indices(index, n)
        time_key, noise_key = jax.random.split(key)
        columns = [uniforms(jax.random.fold_in(time_key, b), index) for b in range(length // size)]
        u = jnp.stack(columns, 1)[..., None]  # (batch, blocks, 1)
        clocks = jax.vmap(lambda i: exponential(jax.random.fold_in(noise_key, i), (length // size, size)))(index)
        if form == "count":
            t = (jnp.floor(u * size) + 1.0) / size
            rank = jnp.argsort(jnp.argsort(clocks, -1), -1)
            hidden = rank < jnp.round(t * size).astype(rank.dtype)
        else:
            t = time(u)
            hidden = clocks < -jnp.log1p(-jnp.minimum(t, 1.0 - 2.0**-24))
        ratio = hidden.mean(-1, keepdims=True, dtype=jnp.float32) if normalise == "realised" else t
        weight = jnp.where(hidden, 1.0 / jnp.where(ratio > 0, ratio, 1.0), 0.0).reshape(n, length)
        x = jnp.where(hidden.reshape(n, length), jnp.asarray(mask, x0.dtype), x0)
        t = jnp.broadcast_to(t, hidden.shape).reshape(n, length)
        clean = () if block is None else (x0,)
        return (weight * _nats(apply(params, x, t, *clean), x0)).sum(-1)

    return loss
