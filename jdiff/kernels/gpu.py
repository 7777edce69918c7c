"""Flash attention for Hopper GPUs in Pallas (Mosaic GPU), forward and backward.

Tokens are padded to whole blocks and head dimensions to multiples of 64; padding of keys is part of the mask. The
kernels are in `mosaic_gpu`.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from . import flash, mosaic_gpu
from .flash import Options, pad, whole_blocks
from .masks import Mask
from .reference import Segments

BLOCK = 128  # queries, and keys
MET = 64  # queries of a block when dk and dv are computed: both sums and two blocks of scores are in registers


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    *,
    bias: Float[Array, "b2 h2 n m"] | None = None,
    mask: Mask | None = None,
    segment_ids: Segments | None = None,
    scale: float | None = None,
    interpret: Any = False,
) -> Float[Array, "b n h d"]:
    """`reference.attention` on a Hopper GPU. interpret: a `plgpu.InterpretGPUParams` runs the kernel on a CPU."""
    options = Options(flash.full_mask(q, k, mask), flash.default_scale(q, scale), (BLOCK, BLOCK), interpret)
    import sys
    return flash.attention(sys.modules[__name__], options, q, k, v, bias, segment_ids)


def _inputs(q: Array, k: Array, v: Array, bias: Array | None, segs: Any, by: str) -> dict[str, Array]:
    n, m = (whole_blocks(a.shape[1], BLOCK) for a in (q, k))
    d = whole_blocks(q.shape[-1], 64)
    inputs = {"q": pad(q, {1: n, 3: d}), "k": pad(k, {1: m, 3: d}), "v": pad(v, {1: m, 3: d})}
    if bias is not None:
        inputs["bias"] = pad(bias, {2: n, 3: m}) if by == "q" else pad(bias.swapaxes(2, 3), {2: m, 3: n})
    if segs is not None:
        inputs["q_segments"] = pad(segs[0].astype(jnp.int32), {1: n})
        inputs["k_segments"] = pad(segs[1].astype(jnp.int32), {1: m})
    return inputs


def forward(
    options: Options, q: Array, k: Array, v: Array, bias: Array | None, segment_ids: Segments | None
) -> tuple[Float[Array, "b n h d"], Float[Array, "b h n"]]:
    """Attention and the logarithm of the sum of exp(logits)."""
    inputs = _inputs(q, k, v, bias, segment_ids, "q")
    outputs = {"out": q.dtype, "lse": jnp.float32}
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

    def run(by: str, kernel: Any, block: tuple[int, int], outputs: dict[str, Any]) -> tuple[Array, ...]:
        inputs = _inputs(q, k, v, bias, segment_ids, by)
        _, n, _, d = inputs["q"].shape
        inputs["dout"] = pad(dout, {1: n, 3: d})
        inputs["lse"] = pad(jnp.where(lse == -jnp.inf, jnp.inf, lse), {2: n})
        inputs["delta"] = pad(delta.astype(jnp.float32), {2: n})
        return mosaic_gpu.call(kernel, options._replace(block=block), by, inputs, outputs)

    (dq,) = run("q", mosaic_gpu.dq_kernel, options.block, {"dq": q.dtype})
    dk, dv = run("k", mosaic_gpu.dkv_kernel, (MET, BLOCK), {"dk": k.dtype, "dv": v.dtype})
    n, m, d = q.shape[1], k.shape[1], q.shape[3]
    return dq[:, :n, :, :d], dk[:, :m, :, :d], dv[:, :m, :, :d]
