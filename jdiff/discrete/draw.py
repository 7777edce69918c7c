"""Categorical draws that stay exact where a step reveals a token with probability 1e-5, in float32.

The Gumbel trick takes the largest of log p_k + G_k, that is the first of exponential clocks E_k / p_k. The common
float32 form E = -log(U), U a multiple of 2^-24 in [0, 1), has no clock between 0 and 6e-8: a class of probability
below that can never be first, and rare ones are drawn too seldom (Zheng et al. 2024, arXiv 2409.02908, section 5). Here
U has 64 random bits and small ones keep 24 significant bits, so clocks reach down to 1e-20 without a gap.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def clock(high: Array, low: Array) -> Array:
    """-log(1 - U) of the 64-bit fraction U = 0.high low, from its uint32 halves; float32."""
    u = high.astype(jnp.float32) * 2.0**-32 + (low.astype(jnp.float32) + 0.5) * 2.0**-64
    return -jnp.log1p(-jnp.minimum(u, 1.0 - 2.0**-24))


def exponential(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Standard exponential numbers, float32, of relative precision 1e-7 down to 1e-19; none above 16.7."""
    high, low = jax.random.split(key)
    return clock(jax.random.bits(high, shape, jnp.uint32), jax.random.bits(low, shape, jnp.uint32))


def categorical(key: Array, log_p: Float[Array, "*shape k"]) -> Int32[Array, "*shape"]:
    """Draws from exp(log_p) along the last axis (need not be normalised; -inf is never drawn)."""
    clocks = jnp.log(exponential(key, log_p.shape))
    return jnp.argmax(log_p.astype(jnp.float32) - clocks, -1).astype(jnp.int32)
