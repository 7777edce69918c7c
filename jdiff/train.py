"""Training: one pure step, compiled once; data, noise and labels derived from (seed, step); exact resume.

    result = jdiff.train.train(TrainConfig(out="runs/digits", steps=2000))
    model = jdiff.train.denoiser_from("runs/digits", ema=0.1, labels=jnp.arange(10))

Killed at any moment and started again with the same configuration, a run ends in bitwise the same parameters as
one that never stopped (same machine, mesh and versions): a checkpoint holds all state, the batch of a step is a
pure function of (seed, step), its noise of (seed, step, index in the batch), and unfinished saves do not count.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, UInt32

from jdiff import checkpoint, ema, losses, pod, recipe, runlog
from jdiff import mesh as meshes
from jdiff import process as process_lib
from jdiff.denoiser import Denoiser, denoiser
from jdiff.recipe import NetCall as NetCall
from jdiff.recipe import TrainConfig as TrainConfig

if TYPE_CHECKING:
    import optax

COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "images_per_second", "seconds_per_step")


class TrainState(NamedTuple):
    """All that a step changes: a pytree of arrays. ema: one average a profile; step: () int32, steps done."""

    params: PyTree
    opt_state: PyTree
    ema: tuple[PyTree, ...]
    step: Int[Array, ""]


class Meter(NamedTuple):
    """Sums since the last row of metrics, and the first step (from 1) with a non-finite loss or gradient, or -1."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    steps: Int[Array, ""]
    first_bad: Int[Array, ""]


class TrainResult(NamedTuple):
    """A finished run: its last state, the net's graph (`flax.nnx.merge(graph, params)`), and its meta."""

    state: TrainState
    graph: Any
    meta: dict[str, Any]
    out: Path


# ------------------------------------------------------------------------------------------- the pure functions
def meter() -> Meter:
    """An empty meter."""
    zero = jnp.zeros((), jnp.float32)
    return Meter(zero, zero, jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32))


def init_state(params: PyTree, optimizer: "optax.GradientTransformation", sigma_rels: tuple[float, ...]) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), ema.init(params, sigma_rels), jnp.zeros((), jnp.int32))


def make_train_step(
    loss: losses.Loss, optimizer: "optax.GradientTransformation", sigma_rels: tuple[float, ...] = ema.SIGMA_RELS
) -> Callable[[TrainState, Meter, Mapping[str, Array], UInt32[Array, ""]], tuple[TrainState, Meter]]:
    """The pure step(state, meter, batch, seed) -> (state, meter); jit it once, with state donated.

    loss: as `losses.denoising_loss` returns. batch: {"image": (b, ...) float32, "label": (b,) int32 or a `nets.Text`,
    if any}.
    The step's key is fold_in(key(seed), state.step); nothing random is carried. loss and gradient norm (before
    clipping) are float32.
    """
    import optax

    each = meshes.auto(loss, meshes.BATCH)

    def step(
        state: TrainState, meter: Meter, batch: Mapping[str, Array], seed: UInt32[Array, ""]
    ) -> tuple[TrainState, Meter]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        mean = lambda params: each(params, key, batch["image"], batch.get("label")).mean()
        value, grads = jax.value_and_grad(mean)(state.params)
        norm = optax.tree.norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats, which strict mode refuses
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        done = state.step + 1
        bad = ~(jnp.isfinite(value) & jnp.isfinite(norm)) & (meter.first_bad < 0)
        return (
            TrainState(params, opt_state, ema.update(state.ema, params, done, sigma_rels), done),
            Meter(
                meter.loss + value.astype(jnp.float32),
                meter.grad_norm + norm.astype(jnp.float32),
                meter.steps + 1,
                jnp.where(bad, done, meter.first_bad),
            ),
        )

    return step


# -------------------------------------------------------------------------------------------------- a whole run
class Program(NamedTuple):
    """What a configuration compiles to on a mesh; not compiled yet. `jdiff.plan` compiles the same ahead of time.

    net: shapes alone. init: jitted, seed () uint32 -> (state, empty meter). step: jitted, as of `make_train_step`.
    state, meter: shapes with shardings. batch: the sharding of images and labels. inputs: names of a batch's arrays.
    """

    net: Any
    call: NetCall
    loss: losses.Loss
    init: Any
    step: Any
    state: TrainState
    meter: Meter
    batch: Any
    inputs: tuple[str, ...]


def program(config: TrainConfig, images: Any, mesh: Any) -> Program:
    """The programs of `train`. images: has shape (height, width, channels) and num_classes, as a `jdiff.data.Dataset`;
    and text, embeddings a text, for nets that are told one: batches then have a `nets.Text` as their label.

    ValueError for a configuration that does not fit together or does not divide by the mesh.
    """
    from flax import nnx

    build = lambda seed: recipe.build_net(config, images, nnx.Rngs(jax.random.key(seed)))
    net = nnx.eval_shape(lambda: build(0))  # the one trace of its construction, until init runs
    call = NetCall(nnx.graphdef(net), recipe.make_process(config), recipe.sigma_data_of(config))
    loss = recipe.make_loss(config, call, net.null_label if net.num_classes and config.label_dropout else None)
    optimizer = recipe.make_optimizer(config)

    def around(net: Any) -> tuple[TrainState, Meter]:
        return init_state(nnx.to_pure_dict(nnx.state(net)), optimizer, config.ema), meter()

    shapes = jax.eval_shape(around, net)
    meshes.check(mesh, net, config.batch, shapes[0].params)
    mesh = meshes.explicit(mesh)
    everywhere = meshes.everywhere(mesh)
    laid = meshes.shardings(mesh, net, shapes[0]), jax.tree.map(lambda _: everywhere, shapes[1])
    state, sums = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, laid)
    step = meshes.on(mesh, make_train_step(loss, optimizer, config.ema))
    return Program(
        net,
        call,
        loss,
        jax.jit(lambda seed: around(build(seed)), out_shardings=laid),
        jax.jit(step, donate_argnums=0),
        state,
        sums,
        meshes.batch(mesh),
        ("image", "label") if net.num_classes or getattr(net, "context", None) else ("image",),
    )


def train(
    config: TrainConfig,
    callback: Callable[[int, dict[str, float]], None] | None = None,
    *,
    dataset: Any = None,
    quiet: bool = False,
) -> TrainResult:
    """Train as config says, or go on where the run in config.out was stopped; return its last state.

    callback(step, metrics) is called at each row of metrics. dataset: a `jdiff.data.Dataset` instead of loading
    config.data. quiet: no progress on the terminal.
    config.mesh lays the state and the batches out on the devices (`jdiff.mesh`); a run may go on on another mesh.
    Before anything is compiled: ValueError for a configuration that does not fit together (names, batch and
    mesh, net and images), CheckpointError where config.out holds a run of another configuration or damaged files.
    FloatingPointError at a non-finite loss or gradient names its step; the last checkpoint before it is kept.
    pod.Preempted after SIGTERM: the steps in flight are done and the last is saved; the same command goes on from it.
    Of several processes (`pod.start`) each calls this with the same config; ValueError where they differ.
    """
    from jdiff import data

    pod.agree(**asdict(config), jax=jax.__version__)
    recipe.check(config)
    mesh = meshes.make(config.mesh)
    recipe.make_process(config)  # a wrong name is reported before data are read
    if dataset is None:
        part = "train" if config.split is None and config.data == "digits" else config.split
        dataset = data.load(config.data, split=part, size=config.size, data_dir=config.data_dir)
    data.batch_indices(len(dataset), config.batch, config.seed, 0)  # reports a batch larger than the data set
    run = program(config, dataset, mesh)
    rate, meta = jax.jit(recipe.learning_rate(config)), recipe.meta(config, run.net, dataset)
    pod.agree(data=len(dataset))
    seed = np.uint32(config.seed)  # an argument of both programs: a constant would be folded, slowly
    state, empty = run.init(seed)
    graph = run.call.graph

    out = Path(config.out)
    state, sums, start = _resume(out, config, state, empty)
    if start == config.steps:
        return TrainResult(meshes.on_auto(mesh, state), graph, meta, out)

    snapshot_every = config.snapshot_every or max(config.steps // 16, 1)
    held = pod.rows(run.batch, config.batch)
    stream = data.batches(dataset, config.batch, seed=config.seed, start_step=start, rows=held)
    in_flight, clock = sums, _Clock()
    with (
        checkpoint.writer(out / "checkpoints", config.keep) as checkpoints,
        checkpoint.writer(out / "snapshots") as snapshots,
        runlog.open_log(
            out, COLUMNS, start=start, steps=config.steps, tensorboard=config.tensorboard, quiet=quiet
        ) as log,
        pod.stopping() as stop,
    ):
        for done in range(start + 1, config.steps + 1):
            host = next(stream)
            batch = {k: pod.place(host[k], held, run.batch, config.batch) for k in run.inputs}
            before, (state, sums) = sums, run.step(state, sums, batch, seed)
            jax.block_until_ready(in_flight)  # at most two steps in flight: batches must not pile up
            in_flight = before
            clock.step(sums)
            log.tick(done)

            due = lambda every, done=done: done % every == 0 or done == config.steps
            stopped = stop(done)
            if not (stopped or due(config.log_every) or due(config.checkpoint_every) or due(snapshot_every)):
                continue
            read = jax.device_get(sums)
            if read.first_bad >= 0:
                checkpoints.manager.wait_until_finished()
                raise FloatingPointError(_bad(int(read.first_bad), out))
            if due(config.log_every):
                seconds = clock.read()
                metrics = {
                    "loss": float(read.loss / read.steps),
                    "grad_norm": float(read.grad_norm / read.steps),
                    "learning_rate": float(rate(done - 1)),
                    "images_per_second": config.batch / seconds,
                    "seconds_per_step": seconds,
                }
                log.row(done, metrics)
                sums = empty
                if callback:
                    callback(done, metrics)
            if due(snapshot_every) and config.ema:
                checkpoint.save(snapshots, done, {"ema": state.ema}, meta | {"step": done})
            if stopped or due(config.checkpoint_every):
                # A finished checkpoint promises all that came before it: rows are flushed, snapshots on disk.
                snapshots.manager.wait_until_finished()
                checkpoint.save(checkpoints, done, _items(state, sums), meta | {"step": done})
            if stopped and done < config.steps:
                checkpoints.manager.wait_until_finished()
                raise pod.Preempted(f"stopped by SIGTERM at step {done}, which is saved in {out}")
    return TrainResult(meshes.on_auto(mesh, state), graph, meta, out)


class _Clock:
    """Seconds a step since the last reading; the first step, which compiles, is waited for and left out."""

    def __init__(self):
        self.since, self.steps = 0.0, 0

    def step(self, result: PyTree) -> None:
        if not self.since:
            jax.block_until_ready(result)
            self.since = time.perf_counter()
        else:
            self.steps += 1

    def read(self) -> float:
        now = time.perf_counter()
        seconds = (now - self.since) / self.steps if self.steps else float("nan")  # nothing but the first step yet
        self.since, self.steps = now, 0
        return seconds


def _items(state: TrainState, sums: Meter) -> dict[str, PyTree]:
    rest = {"opt_state": state.opt_state, "step": state.step, "meter": sums}
    return {"params": state.params, "train": rest, **({"ema": state.ema} if state.ema else {})}


def _resume(out: Path, config: TrainConfig, state: TrainState, empty: Meter) -> tuple[TrainState, Meter, int]:
    """The last finished checkpoint in `out`, or the fresh state; CheckpointError for another configuration."""
    claim = out / "config.json"
    if claim.exists():
        checkpoint.check_same(json.loads(claim.read_text()), recipe.frozen(config), str(out))
    out.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        checkpoint.write_json(claim, recipe.frozen(config))
    step = checkpoint.latest_step(out / "checkpoints")
    pod.agree(**{f"the last checkpoint in {out} (do all see that folder?)": step})
    if step is None:
        return state, empty, 0
    if step > config.steps:
        raise checkpoint.CheckpointError(f"{out} is at step {step} already, past the {config.steps} steps asked for")
    found = checkpoint.restore(out / "checkpoints", step, _items(state, empty))
    rest = found["train"]
    state = TrainState(found["params"], rest["opt_state"], found.get("ema", ()), rest["step"])
    return state, rest["meter"], step


def _bad(step: int, out: Path) -> str:
    last = checkpoint.latest_step(out / "checkpoints")
    kept = "there is no checkpoint yet" if last is None else f"the checkpoint of step {last} is kept"
    return (
        f"non-finite loss or gradient at step {step} of {out}; {kept}. Try a lower learning rate, a longer warm-up, "
        "a smaller clip, or float32 activations, in a new `out` folder"
    )


def denoiser_from(
    source: TrainResult | str | os.PathLike, ema: float | None = 0.10, labels: Int[Array, " batch"] | None = None
) -> Denoiser:
    """The trained model as a Denoiser: of a result, of a run's folder, or of a .safetensors file.

    ema: sigma_rel of the average to use (see `checkpoint.load_params`), or None for the raw parameters; a
    .safetensors file has one kind of parameters only: pass what it was exported with.
    labels: a class a sample, (batch,) int32, for a net that takes labels; None: without label.
    """
    path = source.out if isinstance(source, TrainResult) else source
    if isinstance(source, TrainResult) and (ema is None or ema in source.meta["ema"]):
        graph, meta = source.graph, source.meta
        params = source.state.params if ema is None else source.state.ema[meta["ema"].index(ema)]
    else:
        from flax import nnx

        net, params, meta = checkpoint.load_params(path, ema)
        graph = nnx.graphdef(net)
    if labels is not None and not meta["net"]["num_classes"]:
        raise ValueError(f"labels were given, but the net of {path} was trained without labels")
    name, options = meta["process"]
    process = process_lib.ALL[name](**options)
    return denoiser(
        NetCall(graph, process, meta["sigma_data"]), process, meta["prediction"], params=params, cond=labels
    )
