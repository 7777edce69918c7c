"""What attention is here, in plain jax.numpy: the one definition that every kernel is held to.

    logits = scale q k' + bias, -inf where the mask or different segments forbid
    out    = softmax(logits) v, and 0 for a query that attends to nothing

Logits, softmax and sums are in float32 (float64 for float64); out has q's dtype.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from . import formulas, softmax
from .masks import Mask

Segments = tuple[Integer[Array, "b n"], Integer[Array, "b m"]]
"""Segment ids of queries and of keys: tokens of different segments do not attend to each other."""


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    *,
    bias: Float[Array, "b2 h2 n m"] | None = None,
    mask: Mask | None = None,
    segment_ids: Segments | None = None,
    scale: float | None = None,
) -> Float[Array, "b n h d"]:
    """bias: added to the logits, a sample or 1 for all, a head or 1 for all. scale: default 1 / sqrt(d)."""
    return attention_lse(q, k, v, bias=bias, mask=mask, segment_ids=segment_ids, scale=scale)[0].astype(q.dtype)


def attention_lse(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    *,
    bias: Float[Array, "b2 h2 n m"] | None = None,
    mask: Mask | None = None,
    segment_ids: Segments | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b h n"]]:
    """`attention` in the wide dtype, and the logarithm of the sum of exp(logits) of each query (-inf: of no key)."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    allowed = formulas.both(None if mask is None else jnp.asarray(mask.dense()), formulas.same(segment_ids))
    logits = formulas.logits(q, k, scale, allowed, bias)
    m = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    p = jnp.exp(logits - softmax.finite(m))
    l = p.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bhnm,bmhd->bhnd", softmax.normalise(l, p), v.astype(p.dtype), precision="highest")
    return out.swapaxes(1, 2), softmax.logsumexp(m, l)[..., 0]
