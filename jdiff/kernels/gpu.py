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
BLOCK_DKV = (64, mosaic_gpu.OWNED)  # fewer are met: two sums, of dk and of dv, are in registers besides the scores
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
    """`reference.attention` on a Hopper GPU, of bfloat16 or float16 and a head dimension of at most 128.

    keys: of a block, one of KEYS; default by `keys_of_a_block`. interpret: a `plgpu.InterpretGPUParams` runs the
    kernel's Python on a CPU.
    """
    options = make_options(q, k, mask, scale, keys, interpret)
    return flash.attention(forward, backward, options, q, k, v, bias, segment_ids)


def make_options(
    q: Array, k: Array, mask: Mask | None, scale: float | None, keys: int | None, interpret: Any
) -> Options:
    mask = masks.full(q.shape[1], k.shape[1]) if mask is None else mask
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return Options(mask, scale, (mosaic_gpu.OWNED, keys or keys_of_a_block(mask)), interpret)


def keys_of_a_block(mask: Mask) -> int:
    """So that least is computed, a block counted as 32 keys longer than it is. (The 32 has not been measured.)"""
    blocks = lambda keys: int((masks.blocks(mask, mosaic_gpu.OWNED, keys).kind != masks.EMPTY).sum())
    return KEYS[0] if mask.whole else min(KEYS, key=lambda keys: blocks(keys) * (keys + 32))


def _inputs(q: Array, k: Array, v: Array, bias: Array | None, segs: Any) -> dict[str, Array]:
    n, m = (whole(a.shape[1], mosaic_gpu.OWNED) for a in (q, k))
    d = whole(q.shape[-1], HEAD)
    inputs = {"q": pad(q, {1: n, 3: d}), "k": pad(k, {1: m, 3: d}), "v": pad(v, {1: m, 3: d})}
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
    n, d, padded = q.shape[1], q.shape[3], inputs["q"].shape
    inputs["dout"] = pad(dout, {1: padded[1], 3: padded[3]})
    inputs["lse"] = pad(jnp.where(lse == -jnp.inf, jnp.inf, lse), {2: padded[1]})
    inputs["delta"] = pad(delta.astype(jnp.float32), {2: padded[1]})
    (dq,) = mosaic_gpu.call(mosaic_gpu.dq_kernel, options, "q", inputs, {"dq": q.dtype})
    if bias is not None:
        inputs["bias"] = inputs["bias"].swapaxes(2, 3)
    outputs = {"dk": k.dtype, "dv": v.dtype}
    dk, dv = mosaic_gpu.call(mosaic_gpu.dkv_kernel, options._replace(block=BLOCK_DKV), "k", inputs, outputs)
    return dq[:, :n, :, :d], dk[:, : k.shape[1], :, :d], dv[:, : k.shape[1], :, :d]
