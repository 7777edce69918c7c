"""The online softmax: sums over keys that come a block at a time (Milakov & Gimelshein, 1805.02867).

One pure step, shared by the kernels and by ring attention. Logits are float32; -inf is "does not attend". A query that
attends to nothing has l = 0, and its result is 0.
"""

import jax.numpy as jnp
from jax import Array, lax


def step(m: Array, l: Array, s: Array, axis: int) -> tuple[Array, Array, Array, Array]:
    """The maxima m and sums l so far, and logits s of more keys along `axis`.

    m and l have s's shape with 1 along `axis`, or without that axis: a TPU's registers want the one, a GPU's the other.

    Returns (m, l, p, c): the new maxima and sums, p = exp(s - m), and the factor c of what was summed before:
    result = c result + p v.
    """
    kept = m.ndim == s.ndim
    m_new = jnp.maximum(m, s.max(axis=axis, keepdims=kept))
    centre = finite(m_new)
    p = jnp.exp(s - (centre if kept else spread(centre, s.shape, axis)))
    c = jnp.exp(m - centre)
    return m_new, c * l + p.sum(axis=axis, keepdims=kept), p, c


def spread(a: Array, shape: tuple[int, ...], axis: int) -> Array:
    """a, which has `shape` without `axis`, in that shape."""
    return lax.broadcast_in_dim(a, shape, [i for i in range(len(shape)) if i != axis % len(shape)])


def finite(m: Array) -> Array:
    """m, and 0 where it is -inf: no key has been attended to, and exp(-inf - 0) = 0 where exp(-inf + inf) is NaN."""
    return jnp.where(m == -jnp.inf, jnp.zeros_like(m), m)


def normalise(l: Array, result: Array) -> Array:
    """result / l, and 0 where l = 0."""
    return result / jnp.where(l == 0, jnp.ones_like(l), l)


def logsumexp(m: Array, l: Array) -> Array:
    """log of the sum of exp(logits), -inf for a query that attends to nothing."""
    return finite(m) + jnp.log(l)


def merge(lse: Array, out: Array, lse2: Array, out2: Array) -> tuple[Array, Array]:
    """Attention over two sets of keys from that over each: (lse, out) with lse (..., n), out (..., n, d), float32."""
    centre = finite(jnp.maximum(lse, lse2))
    w, w2 = jnp.exp(lse - centre), jnp.exp(lse2 - centre)
    return centre + jnp.log(w + w2), normalise((w + w2)[..., None], w[..., None] * out + w2[..., None] * out2)
