"""Attention of a part of the keys and its gradient, in jax.numpy: what XLA runs where a kernel does not.

    p = exp(logits - lse)        ds = p (dout v' - delta)        delta = sum(out dout)
    dv = p' dout                 dq = scale ds k                 dk = scale ds' q                 dbias = ds

With lse and delta of all keys, the formulas hold for any part of the keys: ring attention adds up the parts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .masks import Mask


def wide(dtype: DTypeLike) -> np.dtype:
    """float64 for float64, else float32: what logits and sums are in."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def row_sums(out: Float[Array, "b n h d"], dout: Float[Array, "b n h d"]) -> Float[Array, "b h n"]:
    """delta, float32 or better."""
    kind = wide(out.dtype)
    return jnp.einsum("bnhd,bnhd->bhn", out.astype(kind), dout.astype(kind), precision="highest")


def logits(q: Array, k: Array, scale: float, allowed: Array | None, bias: Array | None = None) -> Array:
    """(b, h, n, m), float32 or better, -inf where `allowed` (broadcasts; None: everywhere) is False."""
    kind = wide(q.dtype)
    s = jnp.einsum("bnhd,bmhd->bhnm", q.astype(kind), k.astype(kind), precision="highest") * scale
    s = s if bias is None else s + bias.astype(kind)
    return s if allowed is None else jnp.where(allowed, s, -jnp.inf)


def same(segment_ids: Any) -> Array | None:
    """Boolean (b, 1, n, m): queries and keys of one segment."""
    return None if segment_ids is None else segment_ids[0][:, None, :, None] == segment_ids[1][:, None, None, :]


def both(a: Array | None, b: Array | None) -> Array | None:
    """a and b, None standing for True everywhere."""
    return b if a is None else a if b is None else a & b


def probabilities(s: Array, lse: Array, delta: Array, v: Array, dout: Array) -> tuple[Array, Array]:
    """p and ds (b, h, n, m) of logits s. A query that attends to nothing has lse = -inf: zeros."""
    p = jnp.exp(s - jnp.where(lse == -jnp.inf, jnp.inf, lse)[..., None])
    dp = jnp.einsum("bnhd,bmhd->bhnm", dout.astype(s.dtype), v.astype(s.dtype), precision="highest")
    return p, p * (dp - delta[..., None])


def gradients(s: Array, scale: float, q: Array, k: Array, v: Array, lse: Array, delta: Array, dout: Array) -> tuple:
    """dq, dk and dv of the keys whose logits are s, float32 or better."""
    p, ds = probabilities(s, lse, delta, v, dout)
    dq = jnp.einsum("bhnm,bmhd->bnhd", ds * scale, k.astype(s.dtype), precision="highest")
    dk = jnp.einsum("bhnm,bnhd->bmhd", ds * scale, q.astype(s.dtype), precision="highest")
    return dq, dk, jnp.einsum("bhnm,bnhd->bmhd", p, dout.astype(s.dtype), precision="highest")


def bias_gradient(
    q: Array,
    k: Array,
    v: Array,
    bias: Float[Array, "b2 h2 n m"],
    segment_ids: Any,
    lse: Array,
    delta: Array,
    dout: Array,
    mask: Mask,
    scale: float,
) -> Float[Array, "b2 h2 n m"]:
    """ds summed over what the bias is shared by; a sample at a time, so in the memory of one sample's (h, n, m)."""
    b2, h2 = bias.shape[:2]
    kept = None if mask.whole else jnp.asarray(mask.dense())

    def one(total: Array, sample: Any) -> tuple[Array, Array | None]:
        q, k, v, bias_here, ids, lse, delta, dout = jax.tree.map(lambda a: a[None], sample)
        s = logits(q, k, scale, both(kept, same(ids)), bias if b2 == 1 else bias_here)
        ds = probabilities(s, lse, delta, v, dout)[1]
        ds = ds.sum(axis=1, keepdims=True) if h2 == 1 else ds
        return (total + ds, None) if b2 == 1 else (total, ds[0])

    kind = wide(q.dtype)
    start = jnp.zeros((1, h2, *bias.shape[2:]) if b2 == 1 else (), kind)
    own = None if b2 == 1 else bias
    total, each = jax.lax.scan(one, start, (q, k, v, own, segment_ids, lse, delta, dout))
    return (total if each is None else each).astype(bias.dtype)
