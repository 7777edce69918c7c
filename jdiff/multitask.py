"""MT-Diffusion (Chen et al. 2024, arXiv 2407.17571): several kinds of data in one latent z, a head for each.

The forward process puts every task's encoding into z, z_t = a z_0 + b(t) sum_i E_i(x_i) + s eps: an anchored process
whose anchor y is that sum (`jdiff.anchored.ALL["mt_diffusion"]`). The network predicts eps from z_t and, by a head a
task, the tasks' data; generation re-encodes what the heads say, and what is known is given in their place.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jdiff.anchored import Anchored, check_anchor
from jdiff.denoiser import cast_like
from jdiff.execute import Stepper, _key
from jdiff.losses import uniforms
from jdiff.predict import model_time, wide


class Task(NamedTuple):
    """encode(params, x) -> like z; loss(output, x) -> (batch,), -log p(x | z_t); decode(output) -> x for generation."""

    encode: Callable[[Any, PyTree], PyTree]
    loss: Callable[[PyTree, PyTree], Array]
    decode: Callable[[PyTree], PyTree]
    weight: float = 1.0


Apply = Callable[..., tuple[PyTree, Mapping[str, PyTree]]]


def aggregate(tasks: Mapping[str, Task], params: Any, data: Mapping[str, PyTree], z: PyTree) -> PyTree:
    """The anchor: sum_i E_i(x_i), shaped like z. ValueError for data without a task, a task without data, a misfit."""
    if sorted(tasks) != sorted(data):
        raise ValueError(f"multitask: data are given for {sorted(data)}, and the tasks are {sorted(tasks)}")
    total = jax.tree.map(jnp.zeros_like, z)
    for name, task in tasks.items():
        code = task.encode(params, data[name])
        check_anchor(z, code)
        total = jax.tree.map(jnp.add, total, code)
    return total


def loss(apply: Apply, process: Anchored, tasks: Mapping[str, Task]) -> Callable[..., Float[Array, " batch"]]:
    """loss(params, key, z, data, index=None) -> (batch,): |eps - eps'|^2 + sum_i weight_i loss_i, the multi-task bound
    with the usual flat weight on its first part.

    apply(params, z_t, t, None) -> (eps, {task: output}); z clean latents (batch, ...), data {task: x}. Times and noise
    are those of `losses.denoising_loss` (uniform on [t_min, t_max]), which this is where b = 0 and the weights are 0.
    """
    p = process.process

    def of(
        params: Any, key: Array, z: Array, data: Mapping[str, PyTree], index: Array | None = None
    ) -> Float[Array, " batch"]:
        index = jnp.arange(len(z), dtype=jnp.int32) if index is None else index
        u = uniforms(jax.random.fold_in(key, 0), index, dtype=wide(z.dtype))
        t = (p.t_min + u * (p.t_max - p.t_min)).reshape(-1, *[1] * (z.ndim - 1))
        eps = p.noise(jax.random.fold_in(key, 1), z, index)
        z_t = process.unshift(p.mix(z, eps, t), aggregate(tasks, params, data, z), t)
        found, outputs = apply(params, z_t, t, None)
        total = jnp.square(cast_like(found, z) - eps).reshape(len(z), -1).mean(1)
        for name, task in tasks.items():
            total = total + task.weight * task.loss(outputs[name], data[name])
        return total

    return of


class State(NamedTuple):
    """x: the latent z_t, unshifted; data: what the heads last said, or what is known."""

    x: PyTree
    data: Mapping[str, PyTree]


class Row(NamedTuple):
    """A step: its time, and of the posterior the factors of z_t, z_0 and y, and the standard deviation."""

    t: Any
    x: Any
    x0: Any
    y: Any
    std: Any
    a: Any
    b: Any
    s: Any


def rows(process: Anchored, times: Any, dtype: Any = np.float32) -> Row:
    """The rows over a grid from noise to data, alpha > 0 at its start; float64 on the host, then `dtype`."""
    p = process.process
    t = p.check_times(times)
    q = process.posterior(t[1:], t[:-1])
    table = Row(t[:-1], q.x, q.x0, q.y, np.sqrt(q.var), p.alpha(t[:-1]), process.b(p, t[:-1]), p.sigma(t[:-1]))
    return jax.tree.map(lambda v: jnp.asarray(v, wide(dtype)), table)


def stepper(
    apply: Apply, process: Anchored, tasks: Mapping[str, Task], params: Any, known: Mapping[str, PyTree] | None = None
) -> Stepper:
    """Ancestral sampling of z and of all tasks; `known`: {task: x} given in place of what its head says.

    `jdiff.run(stepper, rows(process, times), z, key)` from standard normal z (batch, ...), to which b(t_max) y is added
    where y is known. The last state's x is z_0, its `data` what the heads said last.
    """
    p, known = process.process, dict(known or {})
    if extra := sorted(set(known) - set(tasks)):
        raise ValueError(f"multitask: {extra} are known, and the tasks are {sorted(tasks)}")

    def look(z: Array, t: Array) -> tuple[Array, dict[str, PyTree]]:
        eps, outputs = apply(params, z, model_time(t, z), None)
        return cast_like(eps, z), {n: known[n] if n in known else task.decode(outputs[n]) for n, task in tasks.items()}

    def init(key: Array | None, z: Array) -> State:
        return State(z, jax.tree.map(jnp.zeros_like, look(z, jnp.asarray(p.t_max))[1]))

    def step(key: Array | None, state: State, row: Row) -> tuple[State, Array]:
        z = state.x
        eps, data = look(z, row.t)
        y = aggregate(tasks, params, data, z)
        z0 = (z - row.b * y - row.s * eps) / row.a
        new = row.x * z + row.x0 * z0 + row.y * y + row.std * p.noise(jax.random.fold_in(_key(key), 0), z)
        return State(new, data), z0

    return Stepper(init, step)
