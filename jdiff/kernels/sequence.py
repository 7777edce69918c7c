"""Attention over more tokens than one device holds: tokens split over the mesh's "sequence" axis.

    ring      keys and values go round the devices, queries stay: P steps, of which each merges a part of the softmax
              (Ring Attention, 2310.01889). The memory of a device is that of its own tokens, forward and backward.
    ulysses   two exchanges: tokens for heads, whole attention over some heads, heads for tokens (2309.14509).
              Takes every mask and bias, and the kernels skip their blocks; needs heads that divide.

Both are called with whole arrays under `jdiff.mesh.on(mesh, ...)`, as `attention` is, and go into nets in its place.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from jdiff.mesh import BATCH

from . import dispatch, formulas, reference, softmax, tpu
from .masks import Mask
from .reference import Segments

AXIS = "sequence"


def ring(
    q: Array, k: Array, v: Array, *, segment_ids: Segments | None = None, scale: float | None = None
) -> Float[Array, "b n h d"]:
    """`attention` without mask and bias, tokens and keys split over "sequence".

    Arguments and result as in `attention`. ValueError if "sequence" does not divide the tokens. Sums over parts are
    kept in float32.
    """
    dispatch.check(q, k, v, None, None, segment_ids)
    sizes = _sizes()
    if sizes.get(AXIS, 1) == 1:
        return dispatch.attention(q, k, v, segment_ids=segment_ids, scale=scale)
    _divides("tokens", q.shape[1], sizes[AXIS])
    _divides("keys", k.shape[1], sizes[AXIS])
    batch, heads = _axes(sizes, BATCH, q.shape[0]), _axes(sizes, ("tensor",), q.shape[2])
    spec, ids = PartitionSpec(batch, AXIS, heads, None), PartitionSpec(batch, AXIS)
    fn = functools.partial(_ring, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    specs = (spec, spec, spec, None if segment_ids is None else (ids, ids))
    return jax.shard_map(fn, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, segment_ids)


def ulysses(
    q: Array,
    k: Array,
    v: Array,
    *,
    bias: Array | None = None,
    mask: Mask | None = None,
    segment_ids: Segments | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "b n h d"]:
    """`attention`, tokens and keys split over "sequence" outside of it and heads inside.

    Arguments and result as in `attention`. ValueError if "sequence" does not divide the tokens and, with "tensor", the
    heads.
    """
    dispatch.check(q, k, v, bias, mask, segment_ids)
    options: dict[str, Any] = {"mask": mask, "scale": scale, "implementation": implementation}
    sizes = _sizes()
    if sizes.get(AXIS, 1) == 1:
        return dispatch.attention(q, k, v, bias=bias, segment_ids=segment_ids, **options)
    _divides("tokens", q.shape[1], sizes[AXIS])
    _divides("keys", k.shape[1], sizes[AXIS])
    _divides("heads", q.shape[2], sizes[AXIS] * sizes.get("tensor", 1))
    batch, heads = _axes(sizes, BATCH, q.shape[0]), _axes(sizes, ("tensor",), q.shape[2])

    def local(q: Array, k: Array, v: Array, bias: Array | None, ids: Segments | None) -> Array:
        q, k, v = (lax.all_to_all(a, AXIS, split_axis=2, concat_axis=1, tiled=True) for a in (q, k, v))
        out = dispatch.attention(q, k, v, bias=bias, segment_ids=ids, **options)
        return lax.all_to_all(out, AXIS, split_axis=1, concat_axis=2, tiled=True)

    spec, ids = PartitionSpec(batch, AXIS, heads, None), PartitionSpec(batch)
    b2, h2 = (1, 1) if bias is None else bias.shape[:2]
    split = PartitionSpec(batch if b2 > 1 else None, (*(heads or ()), AXIS) if h2 > 1 else None)
    specs = (spec, spec, spec, None if bias is None else split, None if segment_ids is None else (ids, ids))
    return jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, bias, segment_ids)


for _fn in (ring, ulysses):
    vars(_fn)["tokens"] = AXIS  # a net leaves tokens split for it: see `nets.layers.SelfAttention`


def _sizes() -> dict[str, int]:
    """The axes of the mesh in force that the compiler splits, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    each = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in each if kind == AxisType.Auto}


def _axes(sizes: dict[str, int], names: tuple[str, ...], n: int) -> tuple[str, ...] | None:
    names = tuple(a for a in names if a in sizes)
    return names if names and n % math.prod(sizes[a] for a in names) == 0 else None


def _divides(what: str, n: int, size: int) -> None:
    if n % size:
        nearest = max(round(n / size), 1) * size
        axes = "tensor x sequence" if what == "heads" else AXIS
        raise ValueError(f"attention over the mesh: {what} {n} is not divisible by {axes} = {size}; nearest: {nearest}")


# -------------------------------------------------------------------------------------- the ring, as one device sees it
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(scale: float, q: Array, k: Array, v: Array, ids: Any) -> Array:
    return _ring_fwd(scale, q, k, v, ids)[0]


def _rotate(tree: Any) -> Any:
    """Everything to the next device."""
    size = lax.axis_size(AXIS)
    pairs = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda a: lax.ppermute(a, AXIS, pairs), tree)


def _ring_fwd(scale: float, q: Array, k: Array, v: Array, ids: Any) -> tuple[Array, Any]:
    mine, theirs = (None, None) if ids is None else ids
    kind = formulas.wide(q.dtype)

    def turn(carry: Any, _: None) -> tuple[Any, None]:
        lse, out, (k, v, theirs) = carry
        part, part_lse = _part(scale, q, k, v, None if theirs is None else (mine, theirs))
        lse, out = softmax.merge(lse, out, part_lse, part.swapaxes(1, 2))
        return (lse, out, _rotate((k, v, theirs))), None

    b, n, h, d = q.shape
    start = jnp.full((b, h, n), -jnp.inf, kind), jnp.zeros((b, h, n, d), kind), (k, v, theirs)
    (lse, out, _), _ = lax.scan(turn, start, length=lax.axis_size(AXIS))
    out = out.swapaxes(1, 2)
    return out.astype(q.dtype), (q, k, v, ids, out, lse)


def _ring_bwd(scale: float, saved: Any, dout: Array) -> tuple[Any, ...]:
    q, k, v, ids, out, lse = saved
    mine, theirs = (None, None) if ids is None else ids
    delta = formulas.row_sums(out, dout)

    def turn(carry: Any, _: None) -> tuple[Any, None]:
        dq, (k, v, theirs, dk, dv) = carry
        parts = _part_gradients(scale, q, k, v, None if theirs is None else (mine, theirs), lse, delta, dout)
        dq, dk, dv = (total + part for total, part in zip((dq, dk, dv), parts, strict=True))
        return (dq, _rotate((k, v, theirs, dk, dv))), None  # after all turns, gradients are back where k and v are

    zeros = [jnp.zeros(a.shape, formulas.wide(a.dtype)) for a in (q, k, v)]
    (dq, (_, _, _, dk, dv)), _ = lax.scan(turn, (zeros[0], (k, v, theirs, *zeros[1:])), length=lax.axis_size(AXIS))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_fwd, _ring_bwd)


def _on_tpu(q: Array, k: Array) -> bool:
    return dispatch.choice(q.shape, k.shape, q.dtype, platform="tpu").path == "tpu"


def _part(scale: float, q: Array, k: Array, v: Array, ids: Any) -> tuple[Array, Array]:
    """Attention over the keys that are here, in the wide dtype, and its lse."""

    def plain(q: Array, k: Array, v: Array, ids: Any) -> tuple[Array, Array]:
        return reference.attention_lse(q, k, v, segment_ids=ids, scale=scale)

    def kernel(q: Array, k: Array, v: Array, ids: Any) -> tuple[Array, Array]:
        out, lse = tpu.forward(tpu.make_options(q, k, None, scale, None, False), q, k, v, None, ids)
        return out.astype(jnp.float32), lse

    if not _on_tpu(q, k):
        return plain(q, k, v, ids)
    return lax.platform_dependent(q, k, v, ids, tpu=kernel, default=plain)


def _part_gradients(
    scale: float, q: Array, k: Array, v: Array, ids: Any, lse: Array, delta: Array, dout: Array
) -> tuple[Array, ...]:
    """What the keys that are here add to dq, and the queries that are here to dk and dv."""

    def plain(q: Array, k: Array, v: Array, ids: Any, lse: Array, delta: Array, dout: Array) -> tuple[Array, ...]:
        logits = formulas.logits(q, k, scale, formulas.same(ids))
        return formulas.gradients(logits, scale, q, k, v, lse, delta, dout)

    def kernel(q: Array, k: Array, v: Array, ids: Any, lse: Array, delta: Array, dout: Array) -> tuple[Array, ...]:
        options = tpu.make_options(q, k, None, scale, None, False)
        return tuple(a.astype(jnp.float32) for a in tpu.backward(options, q, k, v, None, ids, lse, delta, dout))

    args = (q, k, v, ids, lse, delta, dout)
    return lax.platform_dependent(*args, tpu=kernel, default=plain) if _on_tpu(q, k) else plain(*args)
