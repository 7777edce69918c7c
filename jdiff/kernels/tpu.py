"""Flash attention for TPU in Pallas (Mosaic), forward and backward: FlashAttention-2 (2307.08691) in other layouts.

Padding to whole blocks is part of the mask: no key behind the last is attended to. The kernels are in `mosaic`.
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from . import flash, grid, masks, mosaic
from .flash import Options, pad, whole
from .masks import Mask
from .reference import Segments


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    *,
    bias: Float[Array, "b2 h2 n m"] | None = None,
    mask: Mask | None = None,
    segment_ids: Segments | None = None,
    scale: float | None = None,
    block: tuple[int, int] | None = None,
    interpret: Any = False,
) -> Float[Array, "b n h d"]:
    """`reference.attention` on a TPU. block: queries, a multiple of 128, and keys, a multiple of 32, of a block.

    interpret: run the kernel's Python on any device: True, or a `pltpu.InterpretParams`.
    """
    options = make_options(q, k, mask, scale, block, interpret)
    return flash.attention(forward, backward, options, q, k, v, bias, segment_ids)


def make_options(
    q: Array, k: Array, mask: Mask | None, scale: float | None, block: tuple[int, int] | None, interpret: Any
) -> Options:
    n, m = q.shape[1], k.shape[1]
    mask = masks.full(n, m) if mask is None else mask
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return Options(mask, scale, block or grid.block_sizes(mask), interpret)


def _inputs(options: Options, q: Array, k: Array, v: Array, bias: Array | None, segs: Any) -> dict[str, Array]:
    """Heads before tokens, padded to whole blocks; bias and segments transposed as scores are."""
    n, m = (whole(a.shape[1], block) for a, block in zip((q, k), options.block, strict=True))
    inputs = {
        "q": pad(q.swapaxes(1, 2), {2: n}),
        "k": pad(k.swapaxes(1, 2), {2: m}),
        "v": pad(v.swapaxes(1, 2), {2: m}),
    }
    if bias is not None:
        inputs["bias"] = pad(bias.swapaxes(2, 3), {2: m, 3: n})
    if segs is not None:
        ids = [a.astype(jnp.int32) for a in segs]
        inputs["q_segments"] = pad(ids[0], {1: n})[:, None, :]
        inputs["k_segments"] = pad(ids[1], {1: m})[:, :, None]
    return inputs


def forward(
    options: Options, q: Array, k: Array, v: Array, bias: Array | None, segment_ids: Segments | None
) -> tuple[Float[Array, "b n h d"], Float[Array, "b h n"]]:
    """Attention and the logarithm of the sum of exp(logits), which the gradient and ring attention need."""
    inputs = _inputs(options, q, k, v, bias, segment_ids)
    bq, d, n = options.block[0], q.shape[-1], q.shape[1]
    scratch = {"m": (1, bq), "l": (1, bq), "acc": (d, bq)}
    out, lse = mosaic.call(mosaic.forward_kernel, options, "q", inputs, {"out": q.dtype, "lse": jnp.float32}, scratch)
    return out[..., :n].transpose(0, 3, 1, 2), lse[:, :, 0, :n]


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
    inputs = _inputs(options, q, k, v, bias, segment_ids)
    (bq, bk), d, n, m = options.block, q.shape[-1], q.shape[1], k.shape[1]
    padded = inputs["q"].shape[2]
    inputs["dout"] = pad(dout.swapaxes(1, 2), {2: padded})
    inputs["lse"] = pad(jnp.where(lse == -jnp.inf, jnp.inf, lse), {2: padded})[:, :, None]
    inputs["delta"] = pad(delta.astype(jnp.float32), {2: padded})[:, :, None]
    (dq,) = mosaic.call(mosaic.dq_kernel, options, "q", inputs, {"dq": q.dtype}, {"acc": (d, bq)})
    scratch = {"dk_acc": (bk, d), "dv_acc": (bk, d)}
    dk, dv = mosaic.call(mosaic.dkv_kernel, options, "k", inputs, {"dk": k.dtype, "dv": v.dtype}, scratch)
    return dq[..., :n].transpose(0, 3, 1, 2), dk[:, :, :m].swapaxes(1, 2), dv[:, :, :m].swapaxes(1, 2)
