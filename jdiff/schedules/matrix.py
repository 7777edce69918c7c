"""Schedule matrices, and any tableau solver under any of them.

A schedule is an integer matrix M (N + 1, *elements): M[k, e] counts the evaluations of its own solver that element e
has behind it before network call k. It starts at 0, grows by 0 or 1 a call, and ends at all of them, K. What rests
keeps its registers, so a multistep solver's history is as long as if the element were alone; the network sees it at
the time of its own next evaluation, or at the data end when it is done.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jdiff.process import System
from jdiff.tableau import Tableau, stack


# Matrices -----------------------------------------------------------------------------------------------------------
def synchronous(frames: int, evaluations: int) -> np.ndarray:
    """All frames together: the scalar sampler."""
    return staircase(frames, evaluations, 0)


def autoregressive(frames: int, evaluations: int, block: int = 1) -> np.ndarray:
    """A frame (or a block of frames) after the other: each starts when the one before is done."""
    return staircase(frames, evaluations, evaluations, block)


def staircase(frames: int, evaluations: int, lag: int, block: int = 1) -> np.ndarray:
    """Frame f starts `lag` evaluations after frame f - 1: (evaluations + lag (blocks - 1) + 1, frames).

    AR-Diffusion's AD sampler (Sun et al. 2025, arXiv 2503.07418; lag 0 .. K is its s) and SkyReels-V2's forcing matrix
    (Chen et al. 2025, arXiv 2504.13074; lag is ar_step, and `block` frames move together); lag = 1 is the pyramid of
    FIFO and rolling diffusion; lag = K, autoregressive. ValueError for counts below 1, or lag outside 0 .. K.
    """
    if min(frames, evaluations, block) < 1 or frames % block:
        raise ValueError(f"staircase: expected counts of 1 and more, block dividing frames; {frames=}, {block=}")
    if not 0 <= lag <= evaluations:
        raise ValueError(f"staircase: lag is {lag}; expected 0 (together) to {evaluations} (one after the other)")
    start = lag * (np.arange(frames) // block)
    calls = evaluations + start[-1]
    return np.clip(np.arange(calls + 1)[:, None] - start, 0, evaluations)


def given(M: np.ndarray, known: Any) -> np.ndarray:
    """M with the known elements done from the start: first frames (image to video), both ends (interpolation), history.

    known: boolean, shaped like M's elements. Their clean values go into the starting noise in their places, and come
    out untouched (FVDM, Liu et al. 2024, arXiv 2410.03160). Calls in which nothing else moves are dropped.
    """
    M, known = np.asarray(M), np.asarray(known)
    elements = M.shape[1:]
    if known.dtype != bool or known.shape != elements:
        raise ValueError(f"given: known is {known.dtype} of shape {known.shape}; expected bool of shape {elements}")
    if known.all():
        raise ValueError("given: all elements are known; there is nothing to sample")
    M = np.where(known, M[-1], M)  # its own last count: elements may have solvers of several lengths
    moves = np.any(np.diff(M, axis=0).reshape(len(M) - 1, -1) > 0, axis=1)
    return np.concatenate([M[:1], M[1:][moves]])


def check(M: Any, evaluations: Any) -> np.ndarray:
    """M as integers. ValueError where a count falls, jumps, is not done at the end, or a call moves nothing.

    evaluations: K, or one an element.
    """
    M = np.asarray(M)
    if M.ndim < 2 or len(M) < 2 or not np.issubdtype(M.dtype, np.integer):
        raise ValueError(f"a schedule has integers of shape (calls + 1, *elements); got {M.dtype} of shape {M.shape}")
    step = np.diff(M, axis=0)
    if ((step < 0) | (step > 1)).any():
        k, *e = (int(i) for i in np.argwhere((step < 0) | (step > 1))[0])
        raise ValueError(
            f"the schedule goes from {M[(k, *e)]} to {M[(k + 1, *e)]} at call {k + 1}, element {e}; in one network "
            "call an element makes one evaluation or none"
        )
    last = np.broadcast_to(evaluations, M.shape[1:])
    if (M[-1] != last).any() or M.min() < 0:
        e = tuple(int(i) for i in np.argwhere((M[-1] != last) | (M.min(0) < 0))[0])
        raise ValueError(
            f"element {list(e)} of the schedule goes from {M[(0, *e)]} to {M[(-1, *e)]} evaluations; its solver has "
            f"{last[e]}, and every element must reach the data"
        )
    if bad := np.argwhere((M[0] != 0) & (M[0] != last)).tolist():
        raise ValueError(
            f"element {bad[0]} starts after {M[(0, *bad[0])]} evaluations: it has none of their history. Elements that "
            "start at a lower noise level get a solver of their own, built on the rest of the grid (see `scheduled`)"
        )
    idle = ~np.any(step.reshape(len(step), -1) > 0, axis=1)
    if idle.any():
        raise ValueError(f"call {int(np.argmax(idle)) + 1} of the schedule moves no element; leave it out")
    return M


def active(M: np.ndarray) -> np.ndarray:
    """How many elements each call moves, (calls,): the work of a network that computes those alone."""
    return (np.diff(M, axis=0) > 0).reshape(len(M) - 1, -1).sum(1)


def latency(M: np.ndarray) -> np.ndarray:
    """Calls until each element is done, shaped like the elements."""
    return np.argmax(M[-1] == M, axis=0)


# Solvers under them -------------------------------------------------------------------------------------------------
def scheduled(tables: Tableau | Sequence[Tableau], M: Any, which: Any = 0, *, end: Any = 0.0) -> Tableau:
    """The tableau whose element e makes its own evaluations when M says so.

    tables   a scalar tableau (solver(process, times)), or several: element e runs tables[which[e]]. So elements may
             start at other noise levels: `solver(process, times[j:])` from x at times[j], as warped pixels do that are
             to be revised and holes that are to be filled (WorldWarp), beside others from pure noise
    M        (calls + 1, *elements); see `check`. Elements known from the start (`given`) hold their value
    end      the time at which the network sees elements that are done or given; a number, or one an element. Given ones
             that `process.diffuse` noised to that time are history with a little noise (SkyReels-V2's 0.02, which keeps
             errors from piling up); with noise in their places and end = process.t_max they say nothing: the others
             get their marginal law (UniDiffuser)
    Of a `process.system` the elements are its parts, sorted by name: M is (calls + 1, parts), and the network is told
    a dict of times. ValueError for a matrix that does not fit, tables of several processes or with coefficients an
    element already.
    """
    tables = list(tables) if isinstance(tables, Sequence) else [tables]
    if other := [T for T in tables if not isinstance(T, Tableau)]:
        raise TypeError(f"scheduled: {type(other[0]).__name__} is no tableau; build one, solver(process, times)")
    if isinstance(system := tables[0].record.process, System):
        parts = np.arange(len(system.parts))
        if np.shape(M)[1:] != parts.shape:
            names = ", ".join(name for name, _ in system.parts)
            raise ValueError(f"scheduled: a column each of {names} is expected; the matrix has shape {np.shape(M)}")
        tables = [T.part(int(i)) for T in tables for i in parts]
        which = len(parts) * np.asarray(which) + parts
    if bad := [T.record.name for T in tables if np.ndim(T.t) > 1 or np.ndim(T.A) > 3]:
        raise ValueError(f"scheduled: {bad[0]} has coefficients an element already; expected scalar tableaux")
    if len({(T.record.process, T.record.prediction) for T in tables}) > 1:
        raise ValueError("scheduled: the tableaux are of several processes or outputs; expected one")
    R, Z = max(T.registers for T in tables), max(T.noises for T in tables)
    tables = [T.pad(R, Z) for T in tables]
    elements = np.shape(M)[1:]
    index, ends = (_of_each(name, v, elements) for name, v in (("which", which), ("end", end)))
    if index.min() < 0 or index.max() >= len(tables):
        raise ValueError(
            f"scheduled: which goes from {index.min()} to {index.max()}, and there are {len(tables)} tables"
        )
    M = check(M, np.asarray([T.nfe for T in tables])[index])
    ends, seen = np.unique(ends.astype(np.float64), return_inverse=True)
    columns = np.concatenate([index.reshape(1, -1), seen.reshape(1, -1), M.reshape(len(M), -1)]).T
    each = {tuple(c): _stretched(tables[c[0]], c[2:], float(ends[c[1]])) for c in np.unique(columns, axis=0)}
    out = stack([each[tuple(c)] for c in columns], elements)
    first, calls = tables[0].record, len(M) - 1
    names = tuple(("x",) + ("u",) * (R - 1) for _ in range(calls + 1))
    label = lambda k: f"{int(np.sum(M[k + 1] > M[k]))} of {index.size} elements"
    return out.replace(record=replace(first, labels=tuple(label(k) for k in range(calls)), names=names)).validate()


def _of_each(name: str, value: Any, elements: tuple[int, ...]) -> np.ndarray:
    try:
        return np.broadcast_to(np.asarray(value), elements)
    except ValueError:
        raise ValueError(
            f"scheduled: {name} has shape {np.shape(value)}; expected a number, or one for each of {elements} elements"
        ) from None


def _stretched(T: Tableau, column: np.ndarray, end: float) -> Tableau:
    """One element's table, with rows of rest between its own."""
    K, R = T.nfe, T.registers
    moves, at = np.diff(column) > 0, np.minimum(column[:-1], K - 1)
    rest = lambda value, mine: np.where(moves.reshape(-1, *[1] * (np.ndim(mine) - 1)), np.asarray(mine)[at], value)
    t = np.where(column[:-1] < K, np.asarray(T.t)[at], end)
    start = {}
    if column[0] == K:  # known: what is passed in is the sample
        start = {"h0": np.eye(R)[0], "c0": np.zeros_like(T.c0)}
    E = None if T.E is None else rest(0.0, T.E)
    return T.replace(t=t, A=rest(np.eye(R), T.A), B=rest(0.0, T.B), C=rest(0.0, T.C), E=E, **start)


def along(table: Tableau, axis: int, rank: int) -> Tableau:
    """The tableau of one element axis laid along `axis` of a sample with `rank` axes (without its batch).

    along(table, 0, rank=4): frames of a video (frames, h, w, c). ValueError where the axis is none of the sample's.
    """
    if not -rank <= axis < rank or np.ndim(table.t) != 2:
        raise ValueError(
            f"along: expected one element axis and an axis within {rank}, got {axis=}, {np.shape(table.t)=}"
        )
    tail = (1,) * (rank - 1 - axis % rank)
    wide = lambda v: None if v is None else np.reshape(v, (*np.shape(v), *tail))
    arrays = {name: wide(getattr(table, name)) for name in ("t", "A", "B", "C", "h0", "c0", "E")}
    return table.replace(**arrays)
