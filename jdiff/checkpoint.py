"""Checkpoints: a thin layer over Orbax (asynchronous, atomic), and one-file export to safetensors.

A run's folder holds

    config.json                 the configuration; the same command goes on with it, another one is refused
    checkpoints/<step>/         params, ema, train (optimizer state, step, meters), meta: all that resume needs
    snapshots/<step>/           ema alone, kept for ever, so that the EMA's length can be chosen after training

Orbax writes a step into a folder of another name and renames it when everything is on disk: a step that has its
own name is finished. `meta` is JSON and says how to build the net, its process and its prediction.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, UInt32

from jdiff import ema as ema_lib
from jdiff.predict import wide


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, unfinished, damaged, or of another configuration."""


# -------------------------------------------------------------------------------------------------- write, read
class Writer(NamedTuple):
    """What `save` writes with: Orbax's manager, its folder, and how many steps stay there (None: all)."""

    manager: Any
    directory: Path
    keep: int | None


@contextmanager
def writer(directory: str | os.PathLike, keep: int | None = None) -> Iterator[Writer]:
    """A Writer for a local folder; removes what killed saves have left there, and waits for its own at the end."""
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    for rest in directory.glob("*.deleted") if jax.process_index() == 0 else ():
        shutil.rmtree(rest)
    options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True)
    with ocp.CheckpointManager(directory, options=options) as manager:
        yield (made := Writer(manager, directory, keep))
    _prune(made)


def save(to: Writer, step: int, items: Mapping[str, PyTree], meta: Mapping[str, Any]) -> None:
    """Start to write `items` and `meta` as `step`. Returns once the arrays are copied: they may be donated next.

    A step that is there already is left alone (a resumed run comes by its old snapshots again).
    """
    import orbax.checkpoint as ocp

    if step in to.manager.all_steps():
        return
    sums = {name: checksums(tree) for name, tree in items.items()}
    items = {name: jax.tree.map(_one_copy, tree) for name, tree in items.items()}
    trees = {name: ocp.args.StandardSave({"tree": tree, "sums": sums[name]}) for name, tree in items.items()}
    to.manager.save(step, args=ocp.args.Composite(**trees, meta=ocp.args.JsonSave(dict(meta))), force=True)
    _prune(to)


def _one_copy(x: Any) -> Any:
    """One device's copy of a small replicated array: Orbax would fetch a slice from every device, a program each."""
    small = isinstance(x, jax.Array) and x.nbytes < 2**20 and jax.process_count() == 1
    return x.addressable_data(0) if small and x.is_fully_replicated else x


def _prune(to: Writer) -> None:
    """Remove all but the last finished steps. Renamed first: a kill must not leave half a step under its name."""
    if to.keep is None or jax.process_index():
        return
    for step in steps(to.directory)[: -to.keep]:
        gone = to.directory / f"{step}.deleted"
        os.replace(to.directory / str(step), gone)
        shutil.rmtree(gone)


@jax.jit
def checksums(tree: PyTree) -> UInt32[Array, " leaves"]:
    """One number a leaf that any changed bit changes: sum of words times odd places, modulo 2^32.

    On the device, and the same however the array lies on the mesh. TensorStore has no checksum of its own for data.
    """

    def leaf(x: Array) -> Array:
        x = x.astype(jnp.uint8) if x.dtype == bool else x
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
        place = jnp.ones(bits.shape, jnp.uint32)
        for axis, stride in enumerate(np.cumprod([2, *bits.shape[:0:-1]])[::-1][: bits.ndim]):
            place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        return jnp.sum(bits * place, dtype=jnp.uint32)

    return jnp.stack([leaf(x) for x in jax.tree.leaves(tree)])


def steps(directory: str | os.PathLike) -> list[int]:
    """The finished steps in `directory`, ascending; unfinished saves and missing folders count as nothing."""
    if not Path(directory).is_dir():
        return []
    import orbax.checkpoint as ocp

    return sorted(found.step for found in ocp.step.standard_name_format().find_all(Path(directory).absolute()))


def latest_step(directory: str | os.PathLike) -> int | None:
    """The last finished step in `directory`, or None."""
    return max(steps(directory), default=None)


def restore(directory: str | os.PathLike, step: int, like: Mapping[str, PyTree]) -> dict[str, Any]:
    """The items named in `like` of a finished step, and "meta".

    Each leaf of like has the shape and dtype to expect, and a sharding to put the array on (`jax.Array`, or
    `jax.ShapeDtypeStruct` with a sharding). CheckpointError says what could not be read and what to do.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    meshes = [s.mesh for x in jax.tree.leaves(like) if isinstance(s := getattr(x, "sharding", None), NamedSharding)]
    everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    sums = lambda tree: jax.ShapeDtypeStruct((len(jax.tree.leaves(tree)),), jnp.uint32, sharding=everywhere)
    like = {name: {"tree": tree, "sums": sums(tree)} for name, tree in like.items()}
    trees = {name: ocp.args.StandardRestore(_abstract(item)) for name, item in like.items()}
    folder = epath.Path(Path(directory).absolute() / str(step))
    try:
        for name, item in like.items():
            saved = ocp.StandardCheckpointHandler().metadata(folder / name)
            _check_arrays(f"{folder}/{name}", getattr(saved, "tree", saved)["tree"], item["tree"])
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            found = reader.restore(folder, args=ocp.args.Composite(**trees, meta=ocp.args.JsonRestore()))
        for name in like:
            bad = np.asarray(checksums(found[name]["tree"])) != np.asarray(found[name]["sums"])
            if bad.any():
                raise ValueError(f"wrong checksum of {', '.join(np.array(_names(like[name]['tree']))[bad][:5])}")
        return {name: found[name]["tree"] for name in like} | {"meta": found["meta"]}
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and TensorStore raise whatever they like
        others = [s for s in steps(directory) if s != step]
        hint = f"; delete {Path(directory) / str(step)} to go on from step {max(others)}" if others else ""
        reason = str(error).strip().split("\n")[0][:300]
        raise CheckpointError(
            f"checkpoint {Path(directory) / str(step)} cannot be read: it is damaged "
            f"({type(error).__name__}: {reason}){hint}"
        ) from error


def _check_arrays(where: str, found: Any, like: PyTree) -> None:
    """CheckpointError that names the arrays in which a saved tree (Orbax's metadata) and `like` differ."""
    describe = lambda tree: {
        name: f"{x.dtype}{list(x.shape)}" for name, x in zip(_names(tree), jax.tree.leaves(tree), strict=True)
    }
    a, b, nothing = describe(found), describe(like), "not there"
    wrong = [n for n in sorted({*a, *b}) if a.get(n) != b.get(n)]
    if wrong:
        text = "; ".join(f"{n} is {a.get(n, nothing)}, expected {b.get(n, nothing)}" for n in wrong[:5])
        raise CheckpointError(f"{where} is of another configuration: {len(wrong)} arrays differ: {text}")


def _names(tree: PyTree) -> list[str]:
    """One dotted name a leaf; dictionary keys, list places and field names look alike."""
    part = lambda k: str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))))
    return [".".join(map(part, path)) for path, _ in jax.tree.leaves_with_path(tree)]


def _abstract(tree: PyTree) -> PyTree:
    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, tree)


# --------------------------------------------------------------------------------------------- one configuration
def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON so that a reader, or a kill, sees the old file or the new one, never half of one."""
    temporary = Path(path).with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """CheckpointError that names the entries in which two configurations differ, with both values."""
    found, wanted = (json.loads(json.dumps(dict(c))) for c in (found, wanted))
    nothing = "not there"
    pairs = {k: (found.get(k, nothing), wanted.get(k, nothing)) for k in sorted({*found, *wanted})}
    wrong = [f"{k} is {a!r} there, {b!r} in this command" for k, (a, b) in pairs.items() if a != b]
    if wrong:
        raise CheckpointError(
            f"{where} belongs to another configuration: {'; '.join(wrong)}. Give the old values to go on with it, "
            "or another `out` folder to start anew"
        )


# ------------------------------------------------------------------------------------------------ for sampling
def load_params(
    path: str | os.PathLike, ema: float | None = None, step: int | None = None
) -> tuple[Any, PyTree, dict[str, Any]]:
    """(net, params, meta) of a run's folder, or of a .safetensors file: what sampling needs.

    net: the NNX module, holding params; params: nested dict of arrays, as `nnx.to_pure_dict(nnx.state(net))`.
    ema: None for the raw parameters, or the sigma_rel of an average: one that was tracked is read, any other is
    rebuilt from the snapshots (`jdiff.ema.posthoc`). step: default the last finished one.
    Raises CheckpointError for a folder without a finished checkpoint, damaged files, or an average that is not
    to be had.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _import_safetensors(path, ema, step)
    directory = path / "checkpoints"
    available = steps(directory)
    if not available:
        raise CheckpointError(_nothing_finished(path))
    step = available[-1] if step is None else step
    if step not in available:
        raise CheckpointError(f"{directory} has no finished step {step}; it has {', '.join(map(str, available))}")
    meta = restore(directory, step, {})["meta"]
    graph, like = _skeleton(meta)
    if ema is None:
        params = restore(directory, step, {"params": like})["params"]
    else:
        params = _average(path, step, ema, meta, like)
    return _merge(graph, params), params, meta


def _nothing_finished(path: Path) -> str:
    if not path.exists():
        return f"there is no run at {path}; expected the `out` folder of a training run, or a .safetensors file"
    unfinished = sorted(p.name for p in (path / "checkpoints").glob("*tmp*")) if path.is_dir() else []
    if unfinished:
        return f"{path} holds only an unfinished save ({', '.join(unfinished)}): start the same training command again"
    found = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else "a file"
    return f"{path} holds no checkpoint (found: {found or 'nothing'}); expected the `out` folder of a training run"


def _average(path: Path, step: int, sigma_rel: float, meta: Mapping[str, Any], like: PyTree) -> PyTree:
    tracked = meta["ema"]
    if not tracked:
        raise CheckpointError(f"{path} was trained without averages; ask for ema=None, the raw parameters")
    average = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, wide(x.dtype)), like)
    averages = {"ema": tuple(average for _ in tracked)}
    if sigma_rel in tracked:
        found = restore(path / "checkpoints", step, averages)["ema"][tracked.index(sigma_rel)]
    else:
        times = [s for s in steps(path / "snapshots") if s <= step]
        try:
            ema_lib.posthoc_weights(times, sigma_rel, tracked, at=step)
        except ValueError as error:
            raise CheckpointError(f"{path}: no average of sigma_rel {sigma_rel} at step {step}: {error}") from error
        snapshots = [restore(path / "snapshots", s, averages)["ema"] for s in times]
        found = ema_lib.posthoc(snapshots, times, sigma_rel, tracked, at=step)
    return jax.tree.map(lambda x, p: x.astype(p.dtype), found, like)


def _skeleton(meta: Mapping[str, Any]) -> tuple[Any, PyTree]:
    """The graph of the net that meta describes, and its parameters' shapes; nothing is computed."""
    from flax import nnx

    from jdiff import nets

    graph, state = nnx.split(nnx.eval_shape(lambda: nets.build(**meta["net"], rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def _merge(graph: Any, params: PyTree) -> Any:
    from flax import nnx

    return nnx.merge(graph, params)


# ------------------------------------------------------------------------------------------------- one-file form
def export_safetensors(
    path: str | os.PathLike, file: str | os.PathLike, ema: float | None = None, step: int | None = None
) -> None:
    """Write the parameters of a run (see `load_params`) to one .safetensors file, `meta` in its header."""
    if Path(file).suffix != ".safetensors":
        raise ValueError(f"the file is {str(file)!r}; expected a name that ends in .safetensors")
    _, params, meta = load_params(path, ema, step)
    _write_safetensors(file, params, {**meta, "average": ema})


def write_net(net: Any, file: str | os.PathLike, **notes: Any) -> None:
    """Write a net that no run of jdiff trained to one .safetensors file, for `load_params`; notes: into its header."""
    from flax import nnx

    meta = {"format": 1, "net": dict(net.config), "step": 0, "average": None, "ema": [], **notes}
    _write_safetensors(file, nnx.to_pure_dict(nnx.state(net)), meta)


def _write_safetensors(file: str | os.PathLike, params: PyTree, meta: Mapping[str, Any]) -> None:
    """Whole or not at all: under another name first."""
    from safetensors.flax import save_file

    temporary = f"{os.fspath(file)}.tmp"
    save_file(dict(zip(_names(params), jax.tree.leaves(params), strict=True)), temporary, {"jdiff": json.dumps(meta)})
    os.replace(temporary, file)


def _import_safetensors(path: Path, ema: float | None, step: int | None) -> tuple[Any, PyTree, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, "flax") as file:
            meta = json.loads((file.metadata() or {}).get("jdiff", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: it is damaged or not a safetensors file ({error})") from error
    if meta is None:
        raise CheckpointError(
            f"{path} was not written by jdiff (no 'jdiff' entry in its header): its net is unknown; "
            "`jdiff convert` makes a file of ours from weights of others"
        )
    if ema not in (None, meta["average"]) or step not in (None, meta["step"]):
        raise CheckpointError(
            f"{path} holds step {meta['step']} with ema={meta['average']} alone; asked for {step=}, {ema=}"
        )
    graph, like = _skeleton(meta)
    names = _names(like)
    bad = sorted({*names} ^ {*tensors}) or [
        n for n, x in zip(names, jax.tree.leaves(like), strict=True) if tensors[n].shape != x.shape
    ]
    if bad:
        raise CheckpointError(f"{path} does not fit its own net {meta['net']['name']}: {', '.join(bad[:8])}")
    params = jax.tree.unflatten(jax.tree.structure(like), [tensors[n] for n in names])
    return _merge(graph, params), params, meta
