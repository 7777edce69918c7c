"""Streams: frames without end from one network call each, a pure (init, push) machine.

A buffer holds K elements, each at its own row of the solver's table. A push appends fresh noise, calls the network once
on the whole buffer, and takes out the element that made its last evaluation: the frame that was pushed K - 1 calls ago.

    machine = schedules.stream(denoiser, table)
    state = machine.init(noise)                                       # one frame's noise, (1, h, w, c), for its shape
    push = jax.jit(machine.push)
    state, frame, ready = push(key, state, noise)                     # ready from the K-th push on

Elements in the batch axis are independent: StreamDiffusion's stream batch (Kodaira et al. 2023, arXiv 2312.12491). In
an axis of the sample (axis=1: frames) the network sees the whole window, the oldest and cleanest first: FIFO-Diffusion
(Kim et al. 2024, arXiv 2405.11473), StreamDiT with chunks of one frame.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jdiff import execute, noise
from jdiff.denoiser import Denoiser
from jdiff.tableau import Tableau


class Window(NamedTuple):
    """The registers of K elements, oldest first, and how many pushes there were."""

    registers: tuple[Array, ...]
    pushes: Int[Array, ""]


class Stream(NamedTuple):
    """init(like) -> window; push(key, window, noise) -> (window, frame, ready). Pure; jit push once."""

    init: Callable[[Array], Window]
    push: Callable[[Array | None, Window, Array], tuple[Window, Array, Array]]


def stream(denoiser: Denoiser, table: Tableau, axis: int = 0) -> Stream:
    """The machine of a scalar tableau.

    axis   that of the elements in what the network sees: 0, the batch; or an axis of the sample, counted with the batch
    Noise of one frame has length 1 there. A solver that draws noise needs a key a push; an element's draws depend on
    the pushes' keys and on its place. ValueError for a table an element, or a denoiser that remembers (caches,
    momentum): its memory would belong to places, not to frames. The buffer starts with zeros: where frames see each
    other, the first K - 1 whole frames had empty places beside them for a while.
    """
    if np.ndim(table.t) != 1 or np.ndim(table.A) != 3:
        raise ValueError(f"stream: {table.record.name} has coefficients an element; expected a scalar tableau")
    if table.record.process != denoiser.process:
        raise ValueError(f"stream: the tableau is of {table.record.process}, the denoiser of {denoiser.process}")
    K, R = table.nfe, table.registers

    def init(like: Array) -> Window:
        if jax.tree.leaves(denoiser.init(like)):
            raise ValueError("stream: this denoiser remembers what it saw, and frames move through the buffer")
        if like.ndim <= axis or like.shape[axis] != 1:
            raise ValueError(f"stream: one frame's noise has length 1 along axis {axis}; got shape {like.shape}")
        empty = jnp.zeros((*like.shape[:axis], K, *like.shape[axis + 1 :]), like.dtype)
        return Window((empty,) * R, jnp.zeros((), jnp.int32))

    def push(key: Array | None, window: Window, z: Array) -> tuple[Window, Array, Array]:
        # the oldest element, at place 0, makes row K - 1: the table backwards, along the elements
        lay = lambda v: jnp.moveaxis(v[::-1], 0, -1).reshape(*v.shape[1:], K, *[1] * (z.ndim - 1 - axis))
        rows = execute.rows(table, z.dtype)
        row = jax.tree.map(lay, rows)
        h0, c0 = (jnp.asarray(v).astype(z.dtype) for v in (table.h0, table.c0))
        draws = [noise.normal(jax.random.fold_in(execute._key(key), 1000 + j), z) for j in range(table.noises)]
        new = [h0[r] * z + sum(c0[r, j] * d for j, d in enumerate(draws)) for r in range(R)]
        take = lambda a, i: jax.lax.slice_in_dim(a, i, i + 1 if i == 0 else None, axis=axis)
        shifted = tuple(jnp.concatenate([take(a, 1), n], axis) for a, n in zip(window.registers, new, strict=True))
        _, step = execute.stepper(denoiser, h0, c0, prediction=table.record.prediction)
        state, _ = step(key, execute.State(shifted, denoiser.init(shifted[0])), row)
        pushes = window.pushes + 1
        return Window(state.registers, pushes), take(state.x, 0), pushes >= K

    return Stream(init, push)


def run(machine: Stream, z: Any, key: Array | None = None) -> tuple[Array, Array]:
    """Push z (n, *one frame's shape) in one scan: (frames (n, ..), ready (n,)); the last n - K + 1 frames are whole."""
    fold = lambda k: None if key is None else jax.random.fold_in(key, k)

    def body(window: Window, k_z: tuple[Array, Array]) -> tuple[Window, tuple[Array, Array]]:
        window, frame, ready = machine.push(fold(k_z[0]), window, k_z[1])
        return window, (frame, ready)

    return jax.lax.scan(body, machine.init(z[0]), (jnp.arange(len(z), dtype=jnp.int32), z))[1]
