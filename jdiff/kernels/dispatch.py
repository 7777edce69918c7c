"""One attention for every back end: which path is taken, and why, can be asked before anything is compiled."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jdiff.mesh import BATCH

from . import elsewhere, formulas, grid, masks, reference, tpu
from .masks import Mask
from .reference import Segments

IMPLEMENTATIONS = ("reference", "xla", "cudnn", "tpu", "mosaic_gpu")
PLATFORMS = ("cpu", "tpu", "cuda")
HOMES = {"cudnn": "cuda", "tpu": "tpu", "mosaic_gpu": "cuda"}  # the platform of those that have one
MOSAIC_GPU_SINCE = (0, 12)  # JAX whose Mosaic GPU, which changes from week to week, compiles the kernel


class Choice(NamedTuple):
    """path: one of IMPLEMENTATIONS. reason: a clause that says why."""

    path: str
    reason: str


def choice(
    q_shape: Sequence[int],
    k_shape: Sequence[int] | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    platform: str,
    mask: Mask | None = None,
    masked: bool = False,
    implementation: str | None = None,
) -> Choice:
    """What `attention` does for q (b, n, h, d) and k (b, m, h, d) on "cpu", "tpu" or "cuda", and why.

    masked: segment ids or a bias are given as well. ValueError if `implementation` cannot do what it is asked for: an
    explicit request fails, a default falls back and says so here.
    """
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"attention: unknown implementation {implementation!r}; one of {', '.join(IMPLEMENTATIONS)}"
            )
        if (home := HOMES.get(implementation, platform)) != platform:
            raise ValueError(not_at_home(implementation, home, platform))
        if reason := _refusal(implementation, q_shape, k_shape, dtype, mask, masked):
            raise ValueError(f"attention: implementation {implementation!r} was asked for, but {reason}")
        return Choice(implementation, "it was asked for")
    if jnp.dtype(dtype) == jnp.float64:
        return Choice("reference", "float64 has no kernel")
    if platform == "cpu":
        return Choice("reference", "kernels are for accelerators")
    kernel = "tpu" if platform == "tpu" else "cudnn"
    if reason := _refusal(kernel, q_shape, k_shape, dtype, mask, masked):
        return Choice("xla", f"{reason}: XLA's attention is taken")
    return Choice(kernel, "the Pallas kernel serves it" if kernel == "tpu" else "cuDNN's flash attention serves it")


def not_at_home(implementation: str, home: str, platform: str) -> str:
    return (
        f"attention: implementation {implementation!r} was asked for, but it is for {home} and the program is for"
        f" {platform}; leave `implementation` out there, or compile for {home}"
    )


def _refusal(
    path: str, q_shape: Sequence[int], k_shape: Any, dtype: DTypeLike, mask: Mask | None, masked: bool
) -> str | None:
    """Why `path` cannot compute this; None if it can."""
    d, n, m, kind = q_shape[-1], q_shape[1], (k_shape or q_shape)[1], jnp.dtype(dtype)
    if path == "tpu":
        if kind not in (jnp.float32, jnp.bfloat16):
            return f"dtype {kind} has no kernel (float32 and bfloat16 have)"
        if d % 8 or d > 256:
            return f"head dimension {d} has no kernel (multiples of 8 up to 256 have)"
        if (pairs := grid.visits(mask or masks.full(n, m))) > grid.MAX_STEPS:
            return f"{n} x {m} tokens are {pairs} pairs of blocks, and the kernel's list holds {grid.MAX_STEPS}"
    if path == "cudnn":
        if kind not in (jnp.float16, jnp.bfloat16):
            return f"cuDNN has no flash attention in {kind} (float16 and bfloat16 have)"
        if d % 8 or d > 128:
            return f"head dimension {d} has no cuDNN kernel (multiples of 8 up to 128 have)"
        if (masked or mask is not None) and (n % 2 or m % 2):
            return f"cuDNN takes a mask with even numbers of tokens only, not {n} x {m}"
        if not _has_cudnn():
            return "cuDNN is not in this process"
    if path == "mosaic_gpu":
        if kind not in (jnp.float16, jnp.bfloat16, jnp.float32):
            return f"dtype {kind} has no kernel for Hopper (float16, bfloat16 and float32 have)"
        if d > 128:
            return f"head dimension {d} has no kernel for Hopper (1 to 128 have)"
        return _lacks_hopper()
    return None


def _lacks_hopper() -> str | None:
    """What this process lacks for Mosaic GPU. It need not have a GPU: it may compile for one that is elsewhere."""
    if jax.__version_info__ < MOSAIC_GPU_SINCE:
        return f"it needs JAX {'.'.join(map(str, MOSAIC_GPU_SINCE))} or newer, and this is {jax.__version__}"
    if not _has_cuda():
        return "JAX's CUDA plugin is not here: pip install 'jdiff[cuda]', or 'jdiff[aot-gpu]' to compile without a GPU"
    if wrong := sorted(_capabilities() - {"9.0"}):
        return f"it is for Hopper, compute capability 9.0, and a GPU here has {', '.join(wrong)}"
    return None


def _has_cuda() -> bool:
    try:
        from jax._src.lib import cuda_versions  # no public door

        return cuda_versions is not None
    except ImportError:
        return False


def _capabilities() -> set[str]:
    """The compute capabilities of this process's GPUs."""
    try:
        return {device.compute_capability for device in jax.devices("cuda")}
    except RuntimeError:
        return set()


@functools.cache
def _has_cudnn() -> bool:
    """Tracing JAX's cuDNN attention fails where the library is missing, even if another branch will run."""
    try:
        from jax._src.lib import cuda_versions  # no public door

        return cuda_versions is not None and cuda_versions.cudnn_get_version() > 0
    except (ImportError, RuntimeError):
        return False


def attention(
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
    """`reference.attention` by the fastest path of the platform for which it is compiled; see `choice`.

    The platform is that of lowering (`lax.platform_dependent`), not the default backend: compiled ahead of time for a
    TPU on a machine without one, it is the kernel. Under a mesh (`jdiff.mesh.on`) each device computes its samples
    (data, fsdp) and heads (tensor), where these divide.

    Args:
        q, k, v: (b, n, h, d), and twice (b, m, h, d), of one dtype.
        bias: added to the logits, a sample or 1 for all, a head or 1 for all; differentiable.
        mask: a `masks.Mask` of n queries and m keys; blocks that it empties are skipped by the kernel.
        segment_ids: (queries' (b, n), keys' (b, m)), integers: only equal ids attend.
        scale: of the logits; default 1 / sqrt(d).
        implementation: one of IMPLEMENTATIONS; it fails where it cannot run, at the latest when the program is lowered
            for another platform.

    Returns:
        q's shape and dtype; 0 for a query that attends to nothing.

    Raises:
        ValueError: shapes that do not fit, an unknown implementation, or one that cannot compute this.
    """
    check(q, k, v, bias, mask, segment_ids)
    kind = {"mask": mask, "masked": bias is not None or segment_ids is not None, "implementation": implementation}
    home = HOMES.get(implementation or "")
    paths = {p: choice(q.shape, k.shape, q.dtype, platform=home or p, **kind).path for p in PLATFORMS}

    def run(q: Array, k: Array, v: Array, bias: Array | None, segment_ids: Segments | None) -> Array:
        def branch(path: str) -> Callable[..., Array]:
            return lambda q, k, v, bias, segment_ids: _PATHS[path](
                q, k, v, bias=bias, mask=mask, segment_ids=segment_ids, scale=scale
            )

        def refusal(platform: str) -> Callable[..., Array]:
            message = not_at_home(paths[platform], str(home), platform)
            return lambda q, *_: elsewhere.refuse(message, q)

        args = (q, k, v, bias, segment_ids)
        if home is None and len(set(paths.values())) == 1:
            return branch(paths["cpu"])(*args)
        branches = {p: branch(paths[p]) if home in (None, p) else refusal(p) for p in PLATFORMS}
        return jax.lax.platform_dependent(*args, default=branches.pop("cpu"), **branches)

    return on_mesh(run, q, k, v, bias, segment_ids)


def on_mesh(run: Callable[..., Array], q: Array, *args: Any) -> Array:
    """run(q, k, v, bias, segment_ids) on each device's part of the batch and the heads: a kernel cannot be split by
    the compiler. Without a mesh, or inside a shard_map, run itself."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = {
        a: n for a, n, t in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True) if t == AxisType.Auto
    }
    if math.prod(automatic.values()) == 1:
        return run(q, *args)

    def axes(names: tuple[str, ...], size: int) -> tuple[str, ...] | None:
        names = tuple(a for a in names if a in automatic)
        return names if names and size % math.prod(automatic[a] for a in names) == 0 else None

    batch, heads = axes(BATCH, q.shape[0]), axes(("tensor",), q.shape[2])
    k, v, bias, segment_ids = args
    whole = PartitionSpec(batch, None, heads, None)
    shared = (
        None
        if bias is None
        else PartitionSpec(*(a if n > 1 else None for a, n in zip((batch, heads), bias.shape[:2], strict=True)))
    )
    ids = None if segment_ids is None else (PartitionSpec(batch), PartitionSpec(batch))
    specs = (whole, whole, whole, shared, ids)
    return jax.shard_map(run, in_specs=specs, out_specs=whole, check_vma=False)(q, k, v, bias, segment_ids)


def _jax(q: Array, k: Array, v: Array, *, implementation: Literal["xla", "cudnn"], **kind: Any) -> Array:
    """jax.nn.dot_product_attention, with 0 for queries that attend to nothing."""
    mask = kind["mask"]
    allowed = formulas.both(
        None if mask is None else jnp.asarray(mask.dense())[None, None], formulas.same(kind["segment_ids"])
    )
    bias = None if kind["bias"] is None else kind["bias"].astype(q.dtype)
    out = jax.nn.dot_product_attention(q, k, v, bias, allowed, scale=kind["scale"], implementation=implementation)
    if allowed is None:
        return out
    return jnp.where(allowed.any(axis=-1)[:, 0, :, None, None], out, jnp.zeros_like(out))


def _mosaic_gpu(*args: Any, **kind: Any) -> Array:
    from . import gpu  # Mosaic GPU is imported where it is asked for: not every JAX has what it needs

    return gpu.attention(*args, **kind)


_PATHS: dict[str, Callable[..., Array]] = {
    "reference": reference.attention,
    "xla": functools.partial(_jax, implementation="xla"),
    "cudnn": functools.partial(_jax, implementation="cudnn"),
    "tpu": tpu.attention,
    "mosaic_gpu": _mosaic_gpu,
}


def check(q: Array, k: Array, v: Array, bias: Any, mask: Mask | None, segment_ids: Any) -> None:
    """ValueError that names the shape that does not fit."""
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape}; expected (batch, n, heads, d), and (batch, m, heads, d)"
            " of k and v"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype")
    (b, n, h, _), m = q.shape, k.shape[1]
    if mask is not None and (mask.n, mask.m) != (n, m):
        raise ValueError(f"attention: the mask is of {mask.n} x {mask.m} tokens, q and k have {n} x {m}")
    if bias is not None and (
        bias.ndim != 4 or bias.shape[0] not in (1, b) or bias.shape[1] not in (1, h) or bias.shape[2:] != (n, m)
    ):
        raise ValueError(f"attention: bias {bias.shape}; expected ({b} or 1, {h} or 1, {n}, {m})")
    if segment_ids is not None and [a.shape for a in segment_ids] != [(b, n), (b, m)]:
        raise ValueError(f"attention: segment ids {[a.shape for a in segment_ids]}; expected [({b}, {n}), ({b}, {m})]")


def flops(q_shape: Sequence[int], k_shape: Sequence[int] | None = None, mask: Mask | None = None) -> int:
    """Of the two matrix products of a forward pass, 4 d for each head and each pair that attends. Backward: twice that
    by the usual count; a flash kernel does 2.5 times, for it computes the logits again (here 3.5: in two passes)."""
    b, n, h, d = q_shape
    pairs = mask.pairs if mask is not None else n * (k_shape or q_shape)[1]
    return 4 * b * h * d * pairs
