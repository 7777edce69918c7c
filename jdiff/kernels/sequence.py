"""Attention over more tokens than one device holds: tokens split over the mesh's "sequence" axis.

    ring      keys and values go round the devices, queries stay: P steps, of which each merges a part of the softmax
              (Ring Attention, 2310.01889). The memory of a device is that of its own tokens, forward and backward.
    ulysses   two exchanges: tokens for heads, whole attention over some heads, heads for tokens (2309.14509).
              Takes every mask and bias, and the kernels skip their blocks; needs heads that divide.

Both are called with whole arrays under `jdiff.mesh.on(mesh, ...)`, as `attention` is, and go into nets in its place.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from jdiff.mesh import BATCH

from . import dispatch, elsewhere, formulas, reference, softmax, tpu
from .masks import Mask
from .reference import Segments

AXIS = "sequence"
PATHS = ("reference", "tpu", "mosaic_gpu")  # that tell the lse, and whose gradient takes that of all keys


def ring(
    q: Array,
    k: Array,
    v: Array,
    *,
    segment_ids: Segments | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "b n h d"]:
    """`attention` without mask and bias, tokens and keys split over "sequence".

    Arguments and result as in `attention`; implementation: one of PATHS, default the kernel on a TPU and the reference
    elsewhere, which holds the logits of a device's queries and the keys that are there. ValueError if "sequence" does
    not divide the tokens. Sums over parts are kept in float32.
    """
    dispatch.check(q, k, v, None, None, segment_ids)
    sizes = _sizes()
    if sizes.get(AXIS, 1) == 1:
        return dispatch.attention(q, k, v, segment_ids=segment_ids, scale=scale, implementation=implementation)
    _divides("tokens", q.shape[1], sizes[AXIS])
    _divides("keys", k.shape[1], sizes[AXIS])
    batch, heads = _axes(sizes, BATCH, q.shape[0]), _axes(sizes, ("tensor",), q.shape[2])
    spec, ids = PartitionSpec(batch, AXIS, heads, None), PartitionSpec(batch, AXIS)
    if implementation is not None:
        if implementation in dispatch.IMPLEMENTATIONS and implementation not in PATHS:
            raise ValueError(
                f"ring attention has no {implementation!r}, whose gradient does not take the log-sum-exp of all keys; "
                f"one of {', '.join(PATHS)}"
            )
        q_here, k_here = ((b, n // sizes[AXIS], h, d) for b, n, h, d in (q.shape, k.shape))
        home = dispatch.HOMES.get(implementation, "cpu")
        dispatch.choice(q_here, k_here, q.dtype, platform=home, implementation=implementation)  # or it says why not
    how = How(1 / math.sqrt(q.shape[-1]) if scale is None else scale, implementation)
    fn = functools.partial(_ring, how)
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
class How(NamedTuple):
    """scale: of the logits. implementation: as in `ring`. interpret: run a kernel's Python on any device."""

    scale: float
    implementation: str | None
    interpret: Any = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(how: How, q: Array, k: Array, v: Array, ids: Any) -> Array:
    return _ring_fwd(how, q, k, v, ids)[0]


def _rotate(tree: Any) -> Any:
    """Everything to the next device."""
    size = lax.axis_size(AXIS)
    pairs = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda a: lax.ppermute(a, AXIS, pairs), tree)


def _ring_fwd(how: How, q: Array, k: Array, v: Array, ids: Any) -> tuple[Array, Any]:
    mine, theirs = (None, None) if ids is None else ids
    kind = formulas.wide(q.dtype)

    def turn(carry: Any, _: None) -> tuple[Any, None]:
        lse, out, (k, v, theirs) = carry
        part, part_lse = _part(how, q, k, v, None if theirs is None else (mine, theirs))
        lse, out = softmax.merge(lse, out, part_lse, part.swapaxes(1, 2))
        return (lse, out, _rotate((k, v, theirs))), None

    b, n, h, d = q.shape
    start = jnp.full((b, h, n), -jnp.inf, kind), jnp.zeros((b, h, n, d), kind), (k, v, theirs)
    (lse, out, _), _ = lax.scan(turn, start, length=lax.axis_size(AXIS))
    out = out.swapaxes(1, 2)
    return out.astype(q.dtype), (q, k, v, ids, out, lse)


def _ring_bwd(how: How, saved: Any, dout: Array) -> tuple[Any, ...]:
    q, k, v, ids, out, lse = saved
    mine, theirs = (None, None) if ids is None else ids
    delta = formulas.row_sums(out, dout)

    def turn(carry: Any, _: None) -> tuple[Any, None]:
        dq, (k, v, theirs, dk, dv) = carry
        parts = _part_gradients(how, q, k, v, None if theirs is None else (mine, theirs), lse, delta, dout)
        dq, dk, dv = (total + part for total, part in zip((dq, dk, dv), parts, strict=True))
        return (dq, _rotate((k, v, theirs, dk, dv))), None  # after all turns, gradients are back where k and v are

    zeros = [jnp.zeros(a.shape, formulas.wide(a.dtype)) for a in (q, k, v)]
    (dq, (_, _, _, dk, dv)), _ = lax.scan(turn, (zeros[0], (k, v, theirs, *zeros[1:])), length=lax.axis_size(AXIS))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_fwd, _ring_bwd)


def _run(how: How, plain: Callable[..., Any], kernel: Callable[..., Any], *args: Any) -> Any:
    """plain(*args), or kernel(module, options, *args), as `how` says for the platform of lowering."""
    q, k = args[:2]

    def flash(path: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if path == "mosaic_gpu":
                from . import gpu as module  # not every JAX has what it needs
            else:
                module = tpu
            options = module.make_options(q, k, None, how.scale, None, how.interpret)
            return jax.tree.map(lambda a: a.astype(jnp.float32), kernel(module, options, *args))

        return run

    def refusal(platform: str) -> Callable[..., Any]:
        message = dispatch.not_at_home(how.implementation or "", home or "", platform)
        refuse = lambda a: elsewhere.refuse(message, jnp.zeros(a.shape, a.dtype))
        return lambda *args: jax.tree.map(refuse, jax.eval_shape(plain, *args))

    home = dispatch.HOMES.get(how.implementation or "")
    if how.interpret:
        return flash(how.implementation or "tpu")(*args)
    if home is not None:
        branches = {p: flash(str(how.implementation)) if p == home else refusal(p) for p in dispatch.PLATFORMS}
        return lax.platform_dependent(*args, default=branches.pop("cpu"), **branches)
    if how.implementation is None and dispatch.choice(q.shape, k.shape, q.dtype, platform="tpu").path == "tpu":
        return lax.platform_dependent(*args, tpu=flash("tpu"), default=plain)
    return plain(*args)


def _part(how: How, q: Array, k: Array, v: Array, ids: Any) -> tuple[Array, Array]:
    """Attention over the keys that are here, in the wide dtype, and its lse."""

    def plain(q: Array, k: Array, v: Array, ids: Any) -> tuple[Array, Array]:
        return reference.attention_lse(q, k, v, segment_ids=ids, scale=how.scale)

    def kernel(module: Any, options: Any, q: Array, k: Array, v: Array, ids: Any) -> tuple[Array, Array]:
        return module.forward(options, q, k, v, None, ids)

    return _run(how, plain, kernel, q, k, v, ids)


def _part_gradients(
    how: How, q: Array, k: Array, v: Array, ids: Any, lse: Array, delta: Array, dout: Array
) -> tuple[Array, ...]:
    """What the keys that are here add to dq, and the queries that are here to dk and dv."""

    def plain(q: Array, k: Array, v: Array, ids: Any, lse: Array, delta: Array, dout: Array) -> tuple[Array, ...]:
        logits = formulas.logits(q, k, how.scale, formulas.same(ids))
        return formulas.gradients(logits, how.scale, q, k, v, lse, delta, dout)

    def kernel(module: Any, options: Any, q: Array, k: Array, v: Array, ids: Any, *rest: Array) -> tuple[Array, ...]:
        return module.backward(options, q, k, v, None, ids, *rest)

    return _run(how, plain, kernel, q, k, v, ids, lse, delta, dout)
