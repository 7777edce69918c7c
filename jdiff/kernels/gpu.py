"""Flash attention for Hopper GPUs in Pallas (Mosaic GPU), forward and backward. It has not been run on one.

Tokens are padded to whole blocks and head dimensions to a multiple of 64; padding to whole blocks is part of the mask,
as on a TPU. The kernels are in `mosaic_gpu`.
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from . import flash, masks, mosaic_gpu
from .flash import Options, pad, whole
from .masks import Mask
from .reference import Segments

KEYS = (128, 64)  # of a block of the forward pass and of dq's: the second where a mask lets more of them be skipped
KEYS_FLOAT32 = {64: 64, 128: 32}  # by head dimension: the terms of more do not fit shared memory
MET_DKV = 64  # queries that dk and dv meet, at most: two sums are in registers besides the scores
HEAD = 64  # what the head dimension is padded to a multiple of: a row of 128 bytes of shared memory


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    *,
    bias: Float[Array, "b2 h2 n m"] | None = None,
    mask: Mask | None = None,
    segment_ids: Segments | None = None,
    scale: float | None = None,
    keys: int | None = None,
    interpret: Any = False,
) -> Float[Array, "b n h d"]:
    """`reference.attention` on a Hopper GPU, of bfloat16, float16 or float32 and a head dimension of at most 128.

    keys: of a block of 16-bit numbers, one of KEYS; default by `keys_of_a_block`. interpret: a
    `plgpu.InterpretGPUParams` runs the kernel's Python on a CPU.
    """
    options = make_options(q, k, mask, scale, keys, interpret)
    return flash.attention(forward, backward, options, q, k, v, bias, segment_ids)


def make_options(
    q: Array, k: Array, mask: Mask | None, scale: float | None, keys: int | None, interpret: Any
) -> Options:
    mask = masks.full(q.shape[1], k.shape[1]) if mask is None else mask
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if q.dtype == jnp.float32:
        keys = KEYS_FLOAT32[whole(q.shape[-1], HEAD)]
    return Options(mask, scale, (mosaic_gpu.OWNED, keys or keys_of_a_block(mask)), interpret)


def keys_of_a_block(mask: Mask) -> int:
    """So that least is computed, a block counted as 32 keys longer than it is. (The 32 has not been measured.)"""
    blocks = lambda keys: int((masks.blocks(mask, mosaic_gpu.OWNED, keys).kind != masks.EMPTY).sum())
    return KEYS[0] if mask.whole else min(KEYS, key=lambda keys: blocks(keys) * (keys + 32))


def _terms(a: Array, n: int) -> Array:
    """(terms, b, n, h, d), padded: a, or of float32 terms of bfloat16 that sum to it."""
    a = pad(a, {1: n, 3: whole(a.shape[3], HEAD)})
    return jnp.stack([*mosaic_gpu.split(a, mosaic_gpu.TERMS, jnp.bfloat16)]) if a.dtype == jnp.float32 else a[None]


def _inputs(q: Array, k: Array, v: Array, bias: Array | None, segs: Any) -> dict[str, Array]:
    n, m = (whole(a.shape[1], mosaic_gpu.OWNED) for a in (q, k))
    inputs = {"q": _terms(q, n), "k": _terms(k, m), "v": _terms(v, m)}
    if bias is not None:
        inputs["bias"] = pad(bias, {2: n, 3: m})
    if segs is not None:
        inputs["q_segments"] = pad(segs[0].astype(jnp.int32), {1: n})
        inputs["k_segments"] = pad(segs[1].astype(jnp.int32), {1: m})
    return inputs


def forward(
    options: Options, q: Array, k: Array, v: Array, bias: Array | None, segment_ids: Segments | None
) -> tuple[Float[Array, "b n h d"], Float[Array, "b h n"]]:
    """Attention and the logarithm of the sum of exp(logits)."""
    inputs, outputs = _inputs(q, k, v, bias, segment_ids), {"out": q.dtype, "lse": jnp.float32}
    out, lse = mosaic_gpu.call(mosaic_gpu.forward_kernel, options, "q", inputs, outputs)
    return out[:, : q.shape[1], :, : q.shape[3]], lse[:, :, : q.shape[1]]


def backward(
    options: Options,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    segment_ids: Segments | None,
    lse: Array,
    delta: Array,
    dout: Array,
) -> tuple[Array, Array, Array]:
    """The gradients by q, k and v. lse as `forward` returns it; delta (b, h, n): sum of out dout."""
    inputs = _inputs(q, k, v, bias, segment_ids)
    terms, _, n, _, d = inputs["q"].shape
    inputs["dout"] = _terms(dout, n)
    inputs["lse"] = pad(jnp.where(lse == -jnp.inf, jnp.inf, lse), {2: n})
    inputs["delta"] = pad(delta.astype(jnp.float32), {2: n})
    own, keys = options.block
    if terms * d > 256:
        own = mosaic_gpu.TILE  # a second warpgroup's own buffers do not fit shared memory
    (dq,) = mosaic_gpu.call(mosaic_gpu.dq_kernel, options._replace(block=(own, keys)), "q", inputs, {"dq": q.dtype})
    if bias is not None:
        inputs["bias"] = inputs["bias"].swapaxes(2, 3)
    options = options._replace(block=(min(keys, MET_DKV), own))
    dk, dv = mosaic_gpu.call(mosaic_gpu.dkv_kernel, options, "k", inputs, {"dk": k.dtype, "dv": v.dtype})
    cut = lambda a, like: a[:, : like.shape[1], :, : like.shape[3]]
    return cut(dq, q), cut(dk, k), cut(dv, v)
