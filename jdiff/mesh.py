"""An explicit mesh of devices with named axes, and how parameters, optimizer state, averages and batches lie on it.

    data      a part of the batch each, parameters alike (and with them everything that has no axis below)
    fsdp      a part of the batch each, and a part of every large parameter, gathered where it is used
    tensor    a part of the heads and of the MLPs' hidden width each
    sequence  a part of the tokens each, outside attention

    mesh = jdiff.mesh.make("data=2,fsdp=4")                       # 8 devices; data=-1 takes what is left
    params = jax.device_put(params, jdiff.mesh.shardings(mesh, net, params))
    x = jax.device_put(x, jdiff.mesh.batch(mesh))
    step = jax.jit(jdiff.mesh.on(mesh, step))                     # activations are constrained as well

A net has one rule set, `RULES`: pairs of a pattern of a parameter's path and the axes of its last dimensions. It serves
everything that is laid out like the parameters: optimizer state, averages, checkpoints. The same program runs on one
device, many, or several processes, with the same numbers up to the order of sums: random numbers are keyed by sample.
jit over a mesh is what `pmap` has become: put the batch on the mesh, and drop the leading device axis.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH = ("data", "fsdp")  # the axes over which a batch is split

Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def make(axes: str | Mapping[str, int] = "", devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh "data=2,fsdp=4": all of AXES are there, those not named have size 1; one size may be -1, the rest.

    devices: default `jax.devices()`; "" puts all on "data". On a TPU the devices are ordered along its links.
    ValueError for an unknown axis, or sizes that do not multiply to the number of devices.
    """
    from jax.experimental import mesh_utils

    devices = list(jax.devices() if devices is None else devices)
    sizes = dict.fromkeys(AXES, 1) | (parse(axes) or {"data": -1})
    if (open_axes := [name for name, n in sizes.items() if n == -1]) and len(open_axes) == 1:
        rest = math.prod(n for n in sizes.values() if n != -1)
        sizes[open_axes[0]] = len(devices) // rest if len(devices) % rest == 0 else 0
    if math.prod(sizes.values()) != len(devices) or min(sizes.values()) < 1:
        asked = parse(axes) or sizes
        shown = " x ".join(f"{name} {n}" for name, n in asked.items())
        rest = {name: math.prod(abs(n) for other, n in asked.items() if other != name) for name in asked}
        fits = [f"{name}={len(devices) // k}" for name, k in rest.items() if len(devices) % k == 0 and not open_axes]
        near = f" ({' or '.join(fits)} would)" if fits else ""
        raise ValueError(
            f"mesh {shown} does not multiply to the {len(devices)} devices{near}; write one size as -1 for what is left"
        )
    shape = tuple(sizes.values())
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse(axes: str | Mapping[str, int]) -> dict[str, int]:
    """{"data": 2, "fsdp": 4} from "data=2,fsdp=4". ValueError for an unknown axis or a size that is no number."""
    if isinstance(axes, str):
        pairs = [part.partition("=")[::2] for part in axes.replace(" ", "").split(",") if part]
        if bad := [f"{name}={n}" for name, n in pairs if not re.fullmatch(r"-1|[1-9]\d*", n)]:
            raise ValueError(f"mesh: cannot read {bad[0]!r}; expected axis=size, such as data=2,fsdp=4")
        axes = {name: int(n) for name, n in pairs}
    if unknown := [name for name in axes if name not in AXES]:
        raise ValueError(f"mesh: unknown axis {unknown[0]!r}; expected one of {', '.join(AXES)}")
    return dict(axes)


# ----------------------------------------------------------------------------------------------- where arrays lie
def batch(mesh: Mesh) -> NamedSharding:
    """Of arrays with the batch in front: split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(tuple(a for a in BATCH if a in mesh.axis_names)))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Of arrays that every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(mesh: Mesh, net: Any, tree: PyTree) -> PyTree:
    """The NamedSharding of every array in `tree`: parameters, or whatever holds arrays under the parameters' paths.

    net: has RULES, each (pattern, axes): the pattern is looked for at the end of the path "blocks/mlp_in/kernel", the
    first that fits counts, and its axes are those of the last dimensions. Arrays of no rule (norms, biases, counters)
    lie everywhere. ValueError lists the dimensions that an axis does not divide, with the nearest size that does: no
    large array is replicated in silence.
    """
    if wrong := _undivided(mesh, net, tree):
        raise ValueError(f"{'. '.join(wrong)}; put the rest of the devices in data")
    rules = getattr(net, "RULES", ())
    spec = lambda path, leaf: NamedSharding(mesh, PartitionSpec(*_spec(rules, _name(path), np.ndim(leaf))))
    return jax.tree_util.tree_map_with_path(spec, tree)


def _undivided(mesh: Mesh, net: Any, tree: PyTree) -> list[str]:
    """A line for each dimension and axis that does not divide it."""
    wrong: dict[tuple[int, str], list[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        for n, axis in zip(np.shape(leaf), _spec(getattr(net, "RULES", ()), _name(path), np.ndim(leaf)), strict=True):
            if axis is not None and n % mesh.shape[axis]:
                wrong.setdefault((n, axis), []).append(f"{_name(path)} {np.shape(leaf)}")
    more = lambda where: f", and {len(where) - 2} more" if len(where) > 2 else ""
    return [
        f"the mesh does not divide {n} by {axis} = {mesh.shape[axis]} ({axis} = {_near(n, axis, mesh)} would), of "
        f"{', '.join(where[:2])}{more(where)}"
        for (n, axis), where in wrong.items()
    ]


def _name(path: Any) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _spec(rules: Rules, name: str, ndim: int) -> tuple[str | None, ...]:
    for pattern, axes in rules:
        if len(axes) <= ndim and re.search(rf"(^|/)(?:{pattern})$", name):
            return (None,) * (ndim - len(axes)) + axes
    return (None,) * ndim


def _near(n: int, axis: str, mesh: Mesh) -> int:
    """The largest size of an axis, up to its own, that divides n and the number of devices."""
    return max(k for k in range(1, mesh.shape[axis] + 1) if n % k == 0 and mesh.size % k == 0)


def explicit(mesh: Mesh) -> Mesh:
    """The mesh with sharding in the types of arrays: they lie where a program says, or it is an error while tracing."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names))


def on_auto(mesh: Mesh, tree: PyTree) -> PyTree:
    """Arrays of an `explicit` mesh as arrays of `mesh`, where any function takes them; nothing is copied."""

    def same(a: Any) -> Any:
        to = NamedSharding(mesh, a.sharding.spec)
        return jax.make_array_from_single_device_arrays(a.shape, to, [s.data for s in a.addressable_shards])

    return jax.tree.map(same, tree)


def check(mesh: Mesh, net: Any, batch: int, tree: PyTree = None) -> None:
    """ValueError that names every number of the run that the mesh does not divide, with the nearest that it does.

    The batch by data x fsdp, of a transformer its heads by tensor and its tokens by sequence, and what `shardings`
    would refuse of `tree`.
    """
    counts: list[tuple[str, int, tuple[str, ...]]] = [("batch", batch, BATCH)]
    if len(heads := set(getattr(net, "attention_heads", ()))) == 1:
        counts.append(("heads", heads.pop(), ("tensor",)))
    if (grid := getattr(net, "grid", None)) is not None:
        counts.append(("tokens", math.prod(grid), ("sequence",)))
    wrong = []
    for name, n, axes in counts:
        size = math.prod(mesh.shape.get(axis, 1) for axis in axes)
        if n < 1 or n % size:
            nearest = max(round(n / size), 1) * size
            of = f"the mesh's {size} devices" if axes == BATCH and size == mesh.size else f"{' x '.join(axes)} = {size}"
            wrong.append(f"{name} {n} is not divisible by {of}; the nearest is {nearest}")
            wrong[-1] += "" if name == "batch" else f", or {axes[0]} = {_near(n, axes[0], mesh)}"
    if wrong := wrong + _undivided(mesh, net, tree):
        raise ValueError(". ".join(wrong))


# ----------------------------------------------------------------------------------------------------- activations
def on(mesh: Mesh, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, to be jitted, with its activations laid out on the mesh: what `constrain` in a net looks for."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args, **kwargs)

    return run


def auto(fn: Callable[..., Any], *out: str | tuple[str, ...] | None) -> Callable[..., Any]:
    """`fn` as a part of a program over an `explicit` mesh: within, the compiler lays out what `constrain` leaves open.

    out: the axes of the dimensions of its result, which is typed by them; so are gradients by its arguments' types. On
    any other mesh, or none: fn itself.
    """

    def run(*args: Any) -> Any:
        if not (axes := jax.sharding.get_abstract_mesh().explicit_axes):
            return fn(*args)
        return jax.sharding.auto_axes(fn, axes=axes, out_sharding=PartitionSpec(*out))(*args)

    return run


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """x with its dimensions on these mesh axes, of which those that do not divide are left out; no mesh: x itself.

    Without it the compiler may split features over fsdp and move the whole batch at every layer.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    if not any(n > 1 for n in shape.values()):
        return x
    kept = []
    for n, names in zip(x.shape, axes, strict=True):
        names = tuple(a for a in ((names,) if isinstance(names, str) else names or ()) if a in shape)
        kept.append(names if n % math.prod(shape[a] for a in names) == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))


# ------------------------------------------------------------------------------------- products with split kernels
def rows_split(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` of rows x (n, d) and a kernel (d, k) whose d lies on fsdp, n on data and fsdp.

    Every device gathers the kernel, and for the backward pass again; the sum of its gradient over the devices is split
    as it is made. Written out, for the compiler of TPUs makes whole sums of it, twice the bytes, where a device's part
    of d is no multiple of a tile's rows (1152 over 128: 9): rows of 128 numbers are sent, behind an axis of devices.
    Where fsdp is the whole mesh, in two steps of as many bytes: it makes whole sums of any that spans a whole torus.
    Where fsdp does not divide, or tensor or sequence have a part in it, the compiler is left to it.
    """
    return _gathered(0, x, kernel, *args, **options)


def columns_split(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    """As `rows_split`, of a kernel whose k lies on fsdp."""
    return _gathered(1, x, kernel, *args, **options)


def _gathered(axis: int, x: Array, kernel: Array, dims: Any, **options: Any) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    fsdp, parts = mesh.shape.get("fsdp", 1), math.prod(mesh.shape.get(a, 1) for a in BATCH)
    plain = fsdp == 1 or parts != mesh.size or mesh.are_all_axes_explicit or mesh.manual_axes
    if plain or x.ndim != 2 or x.shape[0] % parts or kernel.shape[axis] % fsdp:
        return jax.lax.dot_general(x, kernel, dims, **options)
    other = kernel.shape[1 - axis]
    part = kernel.shape[axis] // fsdp, other
    sent = (-1, 128) if math.prod(part) % 128 == 0 else part

    a = max(k for k in range(1, math.isqrt(fsdp) + 1) if fsdp % k == 0)
    grid = np.arange(fsdp).reshape(a, fsdp // a)
    steps = (grid.tolist(), grid.T.tolist()) if fsdp == mesh.size and a > 1 else (None,)

    def local(x: Array, kernel: Array) -> Array:
        whole = (kernel if axis == 0 else kernel.T).reshape(sent)
        for groups in steps:
            whole = jax.lax.all_gather(whole, "fsdp", axis_index_groups=groups)
        whole = whole.reshape(-1, other)
        return jax.lax.dot_general(x, whole, (((1,), (axis,)), ((), ())), **options)

    split = PartitionSpec(*(("fsdp", None) if axis == 0 else (None, "fsdp")))
    again = jax.checkpoint(local, prevent_cse=False)  # else the gathered kernel would wait for the backward pass
    rows = PartitionSpec(BATCH)
    return jax.shard_map(again, in_specs=(rows, split), out_specs=rows, check_vma=False)(x, kernel)
