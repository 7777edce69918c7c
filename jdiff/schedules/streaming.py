"""Streams: frames without end, a chunk from each push; a pure (init, push) machine.

A buffer holds N chunks of frames, each chunk at its own noise level, the oldest and cleanest first. A push appends a
chunk of fresh noise, calls the network `micro` times on the whole buffer, in which every chunk moves one of the N
segments of the solver's table of K = N micro rows, and takes out the chunk that reached the data: pushed N - 1 calls
ago.

    machine = schedules.stream(denoiser, table)
    state = machine.init(noise)                                       # one frame's noise, (1, h, w, c), for its shape
    push = jax.jit(machine.push)
    state, frame, ready = push(key, state, noise)                     # ready from the N-th push on

Elements in the batch axis are independent: StreamDiffusion's stream batch (Kodaira et al. 2023, arXiv 2312.12491). In
an axis of the sample (axis=1: frames) the network sees the whole window: FIFO-Diffusion (Kim et al. 2024, arXiv
2405.11473) has chunks of one frame and one call a push; StreamDiT (Kodaira et al. 2025, arXiv 2507.03745) any `chunk`
and `micro` steps, and `clean` finished chunks before the others. Of a fixed length that is the matrix
`staircase(frames, K, lag=micro, block=chunk)`.
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
    """The registers of all places of the buffer, oldest first, and how many pushes there were."""

    registers: tuple[Array, ...]
    pushes: Int[Array, ""]


class Stream(NamedTuple):
    """init(like) -> window; push(key, window, noise) -> (window, chunk, ready). Pure; jit push once."""

    init: Callable[[Array], Window]
    push: Callable[[Array | None, Window, Array], tuple[Window, Array, Array]]


def stream(
    denoiser: Denoiser, table: Tableau, axis: int = 0, *, chunk: int = 1, micro: int = 1, clean: int = 0
) -> Stream:
    """The machine of a scalar tableau.

    axis   that of the elements in what the network sees: 0, the batch; or an axis of the sample, counted with the batch
    chunk  elements that come and go together, at one noise level; a push's noise has that length along `axis`
    micro  network calls a push; divides the table's rows
    clean  finished chunks that stay in the buffer, at the data end, for the others to follow
    A solver that draws noise needs a key a push; an element's draws depend on the pushes' keys and on its place.
    Places that nothing was pushed into yet are zeros, and the network is told that they are pure noise (t_max).
    ValueError for a table an element, or a denoiser that remembers (caches, momentum): its memory would belong to
    places, not to frames.
    """
    if np.ndim(table.t) != 1 or np.ndim(table.A) != 3:
        raise ValueError(f"stream: {table.record.name} has coefficients an element; expected a scalar tableau")
    if table.record.process != denoiser.process:
        raise ValueError(f"stream: the tableau is of {table.record.process}, the denoiser of {denoiser.process}")
    K, R = table.nfe, table.registers
    if min(chunk, micro) < 1 or clean < 0 or K % micro:
        raise ValueError(f"stream: expected chunk >= 1, clean >= 0, micro dividing {K} rows; {chunk=}, {micro=}")
    N = K // micro
    length = (clean + N) * chunk
    # chunk i makes rows (N - 1 - i) micro + j; index K is rest: clean ones, and places that are empty still
    own = (N - 1 - np.arange(N))[:, None] * micro + np.arange(micro)
    which = np.repeat(np.concatenate([np.full((clean, micro), K), own]), chunk, 0).T.astype(np.int32)  # (micro, length)

    def init(like: Array) -> Window:
        if jax.tree.leaves(denoiser.init(like)):
            raise ValueError("stream: this denoiser remembers what it saw, and frames move through the buffer")
        if like.ndim <= axis or like.shape[axis] != chunk:
            raise ValueError(f"stream: a push's noise has length {chunk} along axis {axis}; got shape {like.shape}")
        empty = jnp.zeros((*like.shape[:axis], length, *like.shape[axis + 1 :]), like.dtype)
        return Window((empty,) * R, jnp.zeros((), jnp.int32))

    def push(key: Array | None, window: Window, z: Array) -> tuple[Window, Array, Array]:
        rows = execute.rows(table, z.dtype)
        rest = jax.tree.map(lambda v: jnp.zeros_like(v[:1]), rows)._replace(A=jnp.eye(R, dtype=rows.A.dtype)[None])
        rows = jax.tree.map(lambda *v: jnp.concatenate(v), rows, rest)
        filled = jnp.arange(length, dtype=jnp.int32) >= length - (window.pushes + 1) * chunk
        index = jnp.where(filled, which, K)
        lay = lambda v: jnp.moveaxis(v[index], 1, -1).reshape(micro, *v.shape[1:], length, *[1] * (z.ndim - 1 - axis))
        laid = jax.tree.map(lay, rows)
        wide = filled.reshape(-1, *[1] * (z.ndim - 1 - axis))
        laid = laid._replace(t=jnp.where(wide, laid.t, jnp.asarray(denoiser.process.t_max, laid.t.dtype)))
        h0, c0 = (jnp.asarray(v).astype(z.dtype) for v in (table.h0, table.c0))
        draws = [noise.normal(jax.random.fold_in(execute._key(key), 1000 + j), z) for j in range(table.noises)]
        new = [h0[r] * z + sum(c0[r, j] * d for j, d in enumerate(draws)) for r in range(R)]
        cut = lambda a, start, stop: jax.lax.slice_in_dim(a, start, stop, axis=axis)
        shifted = [jnp.concatenate([cut(a, chunk, None), n], axis) for a, n in zip(window.registers, new, strict=True)]
        _, step = execute.stepper(denoiser, h0, c0, prediction=table.record.prediction)
        fold = lambda j: None if key is None else jax.random.fold_in(key, j)

        def one(state: execute.State, j_row: Any) -> tuple[execute.State, None]:
            return step(fold(j_row[0]), state, j_row[1])[0], None

        start = execute.State(tuple(shifted), denoiser.init(shifted[0]))
        state, _ = jax.lax.scan(one, start, (jnp.arange(micro, dtype=jnp.int32), laid))
        pushes = window.pushes + 1
        done = cut(state.x, clean * chunk, (clean + 1) * chunk)
        return Window(state.registers, pushes), done, pushes >= N

    return Stream(init, push)


def run(machine: Stream, z: Any, key: Array | None = None) -> tuple[Array, Array]:
    """Push z (n, *a push's shape) in one scan: (chunks (n, ..), ready (n,)); the last n - N + 1 chunks are whole."""
    fold = lambda k: None if key is None else jax.random.fold_in(key, k)

    def body(window: Window, k_z: tuple[Array, Array]) -> tuple[Window, tuple[Array, Array]]:
        window, frame, ready = machine.push(fold(k_z[0]), window, k_z[1])
        return window, (frame, ready)

    return jax.lax.scan(body, machine.init(z[0]), (jnp.arange(len(z), dtype=jnp.int32), z))[1]
