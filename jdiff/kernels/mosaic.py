"""The kernels of flash attention on a TPU, and the call that runs one over the blocks of a mask; see `tpu`.

The grid is (batch, heads, steps). A step is a (query block, key block) pair that the mask does not empty, from a table
made on the host and prefetched to scalar memory: a skipped block costs neither arithmetic nor a copy. Scores are kept
transposed, (keys, queries): maxima and sums over keys run along sublanes, the statistics of queries are rows, and the
output is written as (d, queries), which the transposition back to (b, n, h, d) takes in.

Matrix products of bfloat16 accumulate in float32; those of float32 are full float32 products.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array

from . import flash, grid, masks, softmax
from .flash import Options
from .masks import EMPTY, FULL


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
def forward_kernel(table: Any, refs: dict[str, Any], scale: float) -> None:
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


def dq_kernel(table: Any, refs: dict[str, Any], scale: float) -> None:
    acc = refs["acc"]

    def init() -> None:
        acc[...] = jnp.zeros_like(acc)

    def update(s: Array) -> None:
        k = refs["k"][...]
        acc[...] += _dot(k, _ds(refs, s, scale)[1].astype(k.dtype), (0, 0))

    def finish() -> None:
        refs["dq"][...] = acc[...].astype(refs["dq"].dtype)

    _visit(table, refs, scale, init, update, finish)


def dkv_kernel(table: Any, refs: dict[str, Any], scale: float) -> None:
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


def call(
    kernel: Callable[..., None],
    options: Options,
    by: str,
    inputs: dict[str, Array],
    outputs: dict[str, DTypeLike],
    scratch: dict[str, tuple[int, ...]],
) -> Sequence[Array]:
    """Run `kernel` on padded inputs, over the mask's blocks row by row (by = "q") or column by column (by = "k")."""
    (bq, bk), cut = options.block, masks.blocks(options.mask, *options.block)
    table = grid.steps(cut.kind if by == "q" else cut.kind.T)
    (b, h, n, d), m = inputs["q"].shape, inputs["k"].shape[2]
    if len(cut.patterns):
        inputs = inputs | {"pattern": jnp.asarray(cut.patterns.swapaxes(1, 2), jnp.int8)}
    sizes = {"b": b, "h": h, "q": n, "k": m, "d": d, "1": 1}
    in_block = {"q": bq, "k": bk, "Q": bq, "K": bk, "d": d, "1": 1}
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

    pairs = b * h * int((cut.kind != EMPTY).sum()) * bq * bk
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
        cost_estimate=flash.cost(kernel, pairs, d, inputs),
        interpret=options.interpret,
        name=f"jdiff_attention_{kernel.__name__.removesuffix('_kernel')}",
    )(*(jnp.asarray(a) for a in table), *inputs.values())
