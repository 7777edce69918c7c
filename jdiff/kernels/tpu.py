"""Flash attention for TPU in Pallas (Mosaic), forward and backward: FlashAttention-2 (2307.08691) in other layouts.

The grid is (batch, heads, steps). A step is a (query block, key block) pair that the mask does not empty, from a table
made on the host and prefetched to scalar memory: a skipped block costs neither arithmetic nor a copy. Scores are kept
transposed, (keys, queries): maxima and sums over keys run along sublanes, the statistics of queries are rows, and the
output is written as (d, queries), which the transposition back to (b, n, h, d) takes in.

Padding is part of the mask: no key behind the last is attended to. Matrix products of bfloat16 accumulate in float32;
those of float32 are full float32 products.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from . import formulas, masks, softmax
from .masks import EMPTY, FULL, Mask
from .reference import Segments


class Options(NamedTuple):
    """What is known when the program is built."""

    mask: Mask
    scale: float
    block: tuple[int, int]
    interpret: Any


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
    return _attention(options, q, k, v, bias, segment_ids)


def make_options(
    q: Array, k: Array, mask: Mask | None, scale: float | None, block: tuple[int, int] | None, interpret: Any
) -> Options:
    n, m = q.shape[1], k.shape[1]
    mask = masks.full(n, m) if mask is None else mask
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return Options(mask, scale, block or block_sizes(mask), interpret)


def block_sizes(mask: Mask) -> tuple[int, int]:
    """Of queries and keys, so that least is computed, a block counted as 32 tokens longer and wider than it is: large
    blocks where they pad little, small ones where more of them can be skipped. (The 32 has not been measured.)"""
    if mask.whole:
        pick = lambda n: min((512, 384, 256, 128), key=lambda size: (-(-n // size) * (size + 32), -size))
        return pick(mask.n), pick(mask.m)
    kinds = {size: masks.blocks(mask, size, size).kind for size in (256, 128)}
    size = min(kinds, key=lambda size: int((kinds[size] != EMPTY).sum()) * (size + 32) ** 2)
    return size, size


# ------------------------------------------------------------------------------------------- what is visited, and when
MAX_STEPS = 32768  # of which the lists take 512 kB; a TPU has 1 MB of scalar memory


class Steps(NamedTuple):
    """The block pairs in the order in which they are visited, int32. outer has a sentinel before and after."""

    outer: np.ndarray
    inner: np.ndarray
    kind: np.ndarray
    pattern: np.ndarray  # that of the last partial block, so that a full one asks for no copy


def steps(kind: np.ndarray) -> Steps:
    """Row by row the blocks of `kind` that are not empty; a row without one has one step, which writes zeros."""
    outer, inner = np.nonzero(
        (kind != EMPTY) | ((kind == EMPTY).all(1, keepdims=True) & (np.arange(kind.shape[1]) == 0))
    )
    found = kind[outer, inner]
    last = np.maximum.accumulate(np.where(found >= 0, np.arange(len(found)), 0))
    return Steps(*(np.asarray(a, np.int32) for a in (np.r_[-1, outer, -1], inner, found, np.maximum(found[last], 0))))


def visits(mask: Mask) -> int:
    """How many steps the mask takes with the blocks of `block_sizes`."""
    return len(steps(masks.blocks(mask, *block_sizes(mask)).kind).inner)


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _visit(table: Any, refs: dict[str, Any], scale: float, init: Callable, update: Callable, finish: Callable) -> None:
    """One step: `update(scores)` unless the block is empty; init before the first of a row, finish after its last."""
    outer, _, kinds, _ = table
    t = pl.program_id(2)
    here, kind = outer[t + 1], kinds[t]

    def scores() -> Array:
        s = _dot(refs["k"][...], refs["q"][...], (1, 1)) * scale
        if "bias" in refs:
            s = s + refs["bias"][...].astype(jnp.float32)
        if "k_segments" in refs:
            s = jnp.where(refs["k_segments"][...] == refs["q_segments"][...], s, -jnp.inf)
        return s

    pl.when(outer[t] != here)(init)

    @pl.when(kind == FULL)
    def _() -> None:
        update(scores())

    if "pattern" in refs:

        @pl.when(kind >= 0)
        def _() -> None:
            update(jnp.where(refs["pattern"][...].astype(jnp.int32) != 0, scores(), -jnp.inf))

    pl.when(outer[t + 2] != here)(finish)


# ----------------------------------------------------------------------------------------------------------- kernels
def _forward_kernel(table: Any, refs: dict[str, Any], scale: float) -> None:
    m, l, acc = refs["m"], refs["l"], refs["acc"]

    def init() -> None:
        m[...] = jnp.full_like(m, -jnp.inf)
        l[...] = jnp.zeros_like(l)
        acc[...] = jnp.zeros_like(acc)

    def update(s: Array) -> None:
        v = refs["v"][...]
        m[...], l[...], p, c = softmax.step(m[...], l[...], s, axis=0)
        acc[...] = c * acc[...] + _dot(v, p.astype(v.dtype), (0, 0))

    def finish() -> None:
        refs["out"][...] = softmax.normalise(l[...], acc[...]).astype(refs["out"].dtype)
        refs["lse"][...] = softmax.logsumexp(m[...], l[...])

    _visit(table, refs, scale, init, update, finish)


def _ds(refs: dict[str, Any], s: Array, scale: float) -> tuple[Array, Array]:
    """The probabilities of a block of logits, and the gradient by q k'."""
    p = jnp.exp(s - refs["lse"][...])
    dp = _dot(refs["v"][...], refs["dout"][...], (1, 1))
    return p, p * (dp - refs["delta"][...]) * scale


def _dq_kernel(table: Any, refs: dict[str, Any], scale: float) -> None:
    acc = refs["acc"]

    def init() -> None:
        acc[...] = jnp.zeros_like(acc)

    def update(s: Array) -> None:
        k = refs["k"][...]
        acc[...] += _dot(k, _ds(refs, s, scale)[1].astype(k.dtype), (0, 0))

    def finish() -> None:
        refs["dq"][...] = acc[...].astype(refs["dq"].dtype)

    _visit(table, refs, scale, init, update, finish)


def _dkv_kernel(table: Any, refs: dict[str, Any], scale: float) -> None:
    dk, dv = refs["dk_acc"], refs["dv_acc"]

    def init() -> None:
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def update(s: Array) -> None:
        q, dout = refs["q"][...], refs["dout"][...]
        p, ds = _ds(refs, s, scale)
        dk[...] += _dot(ds.astype(q.dtype), q, (1, 0))
        dv[...] += _dot(p.astype(dout.dtype), dout, (1, 0))

    def finish() -> None:
        refs["dk"][...] = dk[...].astype(refs["dk"].dtype)
        refs["dv"][...] = dv[...].astype(refs["dv"].dtype)

    _visit(table, refs, scale, init, update, finish)


# --------------------------------------------------------------------------------------------------------- the calls
# Layouts: which index each dimension follows. b, h and p (patterns) are not in a block; d, 1, K and Q are there whole.
_LAYOUTS = {
    **dict.fromkeys(("q", "dout"), "bhqd"),
    **dict.fromkeys(("k", "v", "dk", "dv"), "bhkd"),
    **dict.fromkeys(("out", "dq"), "bhdq"),
    **dict.fromkeys(("lse", "delta"), "bh1q"),
    "bias": "bhkq",
    "q_segments": "b1q",
    "k_segments": "bk1",
    "pattern": "pKQ",
}


def _call(
    kernel: Callable[..., None],
    options: Options,
    by: str,
    inputs: dict[str, Array],
    outputs: dict[str, DTypeLike],
    scratch: dict[str, tuple[int, ...]],
) -> Sequence[Array]:
    """Run `kernel` on padded inputs, over the mask's blocks row by row (by = "q") or column by column (by = "k")."""
    (bq, bk), cut = options.block, masks.blocks(options.mask, *options.block)
    table = steps(cut.kind if by == "q" else cut.kind.T)
    (b, h, n, d), m = inputs["q"].shape, inputs["k"].shape[2]
    if len(cut.patterns):
        inputs = inputs | {"pattern": jnp.asarray(cut.patterns.swapaxes(1, 2), jnp.int8)}
    sizes, in_block = (
        {"b": b, "h": h, "q": n, "k": m, "d": d, "1": 1},
        {"q": bq, "k": bk, "Q": bq, "K": bk, "d": d, "1": 1},
    )
    shapes = {name: tuple(sizes[a] for a in _LAYOUTS[name]) for name in outputs}
    names = [*inputs, *outputs, *scratch]

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        def index(i: Any, j: Any, t: Any, outer: Any, inner: Any, _: Any, pattern: Any) -> tuple[Any, ...]:
            x, y = outer[t + 1], inner[t]
            at = {"b": i, "h": j, "p": pattern[t], "q": x if by == "q" else y, "k": y if by == "q" else x}
            whole = jnp.int32(0)  # a bias may have one head, or one sample, for all
            return tuple(at.get(a, whole) if size > 1 else whole for a, size in zip(_LAYOUTS[name], shape, strict=True))

        return pl.BlockSpec(tuple(in_block.get(a) for a in _LAYOUTS[name]), index)

    def body(*refs: Any) -> None:
        kernel(refs[:4], dict(zip(names, refs[4:], strict=True)), options.scale)

    visited = b * h * int((cut.kind != EMPTY).sum()) * bq * bk
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(b, h, len(table.inner)),
            in_specs=[spec(name, a.shape) for name, a in inputs.items()],
            out_specs=[spec(name, shapes[name]) for name in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        ),
        out_shape=[jax.ShapeDtypeStruct(shapes[name], dtype) for name, dtype in outputs.items()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * PRODUCTS[kernel.__name__] * visited * d,
            transcendentals=visited,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in inputs.values()),
        ),
        interpret=options.interpret,
        name=f"jdiff_attention{kernel.__name__.removesuffix('_kernel')}",
    )(*(jnp.asarray(a) for a in table), *inputs.values())


PRODUCTS = {"_forward_kernel": 2, "_dq_kernel": 3, "_dkv_kernel": 4}  # matrix products a block


def _pad(a: Array, **to: int) -> Array:
    """The axes given by name, axis_2=512, filled with zeros at the end."""
    width = [(0, 0)] * a.ndim
    for name, size in to.items():
        axis = int(name[5:])
        width[axis] = (0, size - a.shape[axis])
    return jnp.pad(a, width)


def _inputs(options: Options, q: Array, k: Array, v: Array, bias: Array | None, segs: Any) -> dict[str, Array]:
    """Heads before tokens, padded to whole blocks; bias and segments transposed as scores are."""
    n, m = (-(-size // block) * block for size, block in zip((q.shape[1], k.shape[1]), options.block, strict=True))
    inputs = {
        name: _pad(a.swapaxes(1, 2), axis_2=n if name == "q" else m) for name, a in zip("qkv", (q, k, v), strict=True)
    }
    if bias is not None:
        inputs["bias"] = _pad(bias.swapaxes(2, 3), axis_2=m, axis_3=n)
    if segs is not None:
        ids = [a.astype(jnp.int32) for a in segs]
        inputs["q_segments"] = _pad(ids[0], axis_1=n)[:, None, :]
        inputs["k_segments"] = _pad(ids[1], axis_1=m)[:, :, None]
    return inputs


def forward(
    options: Options, q: Array, k: Array, v: Array, bias: Array | None, segment_ids: Segments | None
) -> tuple[Float[Array, "b n h d"], Float[Array, "b h n"]]:
    """Attention and the logarithm of the sum of exp(logits), which the gradient and ring attention need."""
    inputs = _inputs(options, q, k, v, bias, segment_ids)
    bq, d, n = options.block[0], q.shape[-1], q.shape[1]
    scratch = {"m": (1, bq), "l": (1, bq), "acc": (d, bq)}
    out, lse = _call(_forward_kernel, options, "q", inputs, {"out": q.dtype, "lse": jnp.float32}, scratch)
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
    inputs["dout"] = _pad(dout.swapaxes(1, 2), axis_2=padded)
    inputs["lse"] = _pad(jnp.where(lse == -jnp.inf, jnp.inf, lse), axis_2=padded)[:, :, None]
    inputs["delta"] = _pad(delta.astype(jnp.float32), axis_2=padded)[:, :, None]
    (dq,) = _call(_dq_kernel, options, "q", inputs, {"dq": q.dtype}, {"acc": (d, bq)})
    scratch = {"dk_acc": (bk, d), "dv_acc": (bk, d)}
    dk, dv = _call(_dkv_kernel, options, "k", inputs, {"dk": k.dtype, "dv": v.dtype}, scratch)
    return dq[..., :n].transpose(0, 3, 1, 2), dk[:, :, :m].swapaxes(1, 2), dv[:, :, :m].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, q: Array, k: Array, v: Array, bias: Array | None, segment_ids: Any) -> Array:
    return forward(options, q, k, v, bias, segment_ids)[0]


def _attention_fwd(options: Options, *args: Any) -> tuple[Array, tuple[Any, ...]]:
    out, lse = forward(options, *args)
    return out, (*args, out, lse)


def _attention_bwd(options: Options, saved: tuple[Any, ...], dout: Array) -> tuple[Any, ...]:
    q, k, v, bias, segment_ids, out, lse = saved
    delta = formulas.row_sums(out, dout)
    gradients = backward(options, q, k, v, bias, segment_ids, lse, delta, dout)
    if bias is None:
        return *gradients, None, None
    dbias = formulas.bias_gradient(q, k, v, bias, segment_ids, lse, delta, dout, options.mask, options.scale)
    return *gradients, dbias, None


_attention.defvjp(_attention_fwd, _attention_bwd)
