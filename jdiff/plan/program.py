"""The programs that a plan compiles, the step of `jdiff.train` or sampling by `jdiff.sample`, and their counts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jdiff import ema as ema_lib
from jdiff import mesh as meshes


@dataclass(frozen=True)
class PlanConfig:
    """What to plan. Names and defaults are those of `jdiff train` and `jdiff sample`, but for latents of ImageNet."""

    net: str = "DiT-XL/2"  # a name in `jdiff list nets`
    net_options: dict[str, int | float | bool | str] = field(default_factory=dict)  # win over the preset's
    topology: str = "v5e:4x4"  # chips: v5e:16x16, v5p:8x8x8, v6e:4x4, ..., or cpu:8, simulated devices
    mesh: str = ""  # devices an axis, such as data=4,fsdp=64; "": all on data
    batch: int = 256  # images a step, over all devices
    remat: str = "none"  # what the backward pass computes again: none, full, dots; leave none for nets without
    size: int = 32  # height and width of what the net sees: 32 for latents of 256 x 256 images
    channels: int = 4  # its channels
    classes: int = 1000  # labels; 0: none
    text: int = 77  # embeddings of a text, for nets that are told one in place of labels
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations; parameters stay float32
    optimizer: Literal["adamw", "adam", "lion", "sgd"] = "adamw"  # update rule
    ema: tuple[float, ...] = ema_lib.SIGMA_RELS  # tracked averages of the parameters
    sample: int | None = None  # plan sampling with so many network evaluations instead of a training step
    solver: str = "unipc"  # of --sample


class Counts(NamedTuple):
    """flops: of all devices together, rematerialised ones counted again; useful: without those, as MFU counts.

    kept: see `forward`; None of sampling.
    """

    flops: float
    useful: float
    kept: float | None


class Built(NamedTuple):
    """traced: to be lowered and compiled. parts: {what: bytes on one device} of arguments.

    counted: what a plan tells beside the program, and a run has no use for; it takes a trace of its own.
    """

    traced: Any
    mesh: Any
    parts: dict[str, float]
    counted: Callable[[], Counts]


def build(config: PlanConfig, devices: list[Any]) -> Built:
    """Trace for these devices. ValueError for what does not fit together or does not divide."""
    from jdiff import recipe, train

    if config.sample is not None and config.sample < 1:
        raise ValueError(f"sample is {config.sample}; expected at least 1 network evaluation")
    settings = train.TrainConfig(
        net=config.net,
        net_options=config.net_options | ({"remat": config.remat} if config.remat != "none" else {}),
        batch=config.batch,
        dtype=config.dtype,
        optimizer=config.optimizer,
        ema=config.ema,
        mesh=config.mesh,
    )
    recipe.check(settings)
    mesh = meshes.explicit(meshes.make(config.mesh, devices))
    shape = config.size, config.size, config.channels
    images = SimpleNamespace(shape=shape, num_classes=config.classes, text=config.text)
    program = train.program(settings, images, mesh)
    return _sampling(config, program, mesh) if config.sample else _training(config, program, mesh)


def _training(config: PlanConfig, program: Any, mesh: Any) -> Built:
    state, shape = program.state, (config.size, config.size, config.channels)
    image, told = _struct((config.batch, *shape), jnp.float32, program.batch), _told(config, program)
    batch = {"image": image, **({} if told is None else {"label": told})}
    traced = program.step.trace(state, program.meter, batch, _struct((), jnp.uint32, meshes.everywhere(mesh)))
    parts = {
        "parameters": _bytes(state.params),
        "optimizer state": _bytes(state.opt_state),
        "averages": _bytes(state.ema),
    }

    def count() -> Counts:
        macs, kept = forward(program, batch)
        kept /= math.prod(mesh.shape[a] for a in meshes.BATCH)
        return Counts(2 * products(traced.jaxpr.jaxpr), 6 * macs, kept)

    return Built(traced, mesh, parts, count)


def _sampling(config: PlanConfig, program: Any, mesh: Any) -> Built:
    import jdiff
    from jdiff import nets, solvers, times

    assert config.sample
    solver, process = solvers.parse(config.solver), program.call.process
    table = solver(process, times.logsnr(process, solver.steps(config.sample)))
    everywhere, params = meshes.everywhere(mesh), program.state.params

    def run(params: PyTree, x: Any, y: Any, key: Any) -> Any:
        model = jdiff.denoiser(program.call, process, "x0", params=params, cond=y)
        return jdiff.sample(model, table, x, key)

    x = _struct((config.batch, config.size, config.size, config.channels), jnp.float32, program.batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = jax.jit(meshes.on(mesh, meshes.auto(run, meshes.BATCH))).trace(
        params, x, _told(config, program), jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
    )
    useful = lambda: 2.0 * table.nfe * config.batch * nets.macs(program.net, text=config.text)
    count = lambda: Counts(2 * products(traced.jaxpr.jaxpr), useful(), None)
    return Built(traced, mesh, {"parameters": _bytes(params)}, count)


def _told(config: PlanConfig, program: Any) -> Any:
    """What the net is told, as shapes: labels, a text, or None."""
    from jdiff import nets

    given: Any = lambda *shape, kind=jnp.float32: _struct((config.batch, *shape), kind, program.batch)
    if context := getattr(program.net, "context", None):
        pooled = getattr(program.net, "pooled", None)
        tokens = given(getattr(program.net, "context_length", config.text), context)
        return nets.Text(tokens, pooled and given(pooled))
    return given(kind=jnp.int32) if program.net.num_classes else None


def _struct(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _bytes(tree: PyTree) -> float:
    """Bytes of a laid-out tree on one device."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def forward(program: Any, batch: dict[str, Any]) -> tuple[float, float]:
    """Of the forward pass on the whole batch, read off its trace: multiply-accumulates, and bytes that the backward
    pass is given by it.

    Bytes of what depends on the batch alone, not parameters in another form; the compiler may keep less, by fusing, or
    more.
    """
    loss = program.loss
    n = batch["image"].shape[0]

    def residuals(params: PyTree, images: Any, labels: Any) -> Any:
        key = jax.random.key(0)
        return jax.vjp(lambda p: loss(p, key, images, labels).mean(), params)[1]

    bare = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (program.state.params, batch))
    args = bare[0], bare[1]["image"], bare[1].get("label")
    traced, kept = jax.make_jaxpr(residuals, return_shape=True)(*args)
    return products(traced.jaxpr), sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(kept) if n in a.shape)


def products(jaxpr: Any) -> float:
    """Multiply-accumulates of matrix products and convolutions in a trace; of a conditional the dearest branch."""
    from jdiff.nets.macs import count

    always, branches = count(jaxpr)
    return float(always + sum(max(b) for b in branches))
