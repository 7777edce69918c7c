"""Reading a table backwards: from the registers at the end to the noise at the start, exactly.

Row k maps registers S to S' = A S + B f, with f the output at the point S[0]. The row can be undone where

    1. the point follows from S' without f:    w . S' = S[0],        w . B = 0
    2. S follows from S' and f:                S = M (S' - B f),     M A = 1

on the registers that a sampler can reach (a dead register need not come back). Then f is evaluated once more, at the
same point as on the way there, and nothing is lost but rounding. Rows that cannot be undone alone may be undone
together: of m rows the first point must follow from the registers after them, the second from these and the first
output, and so on; so a step of two stages is read backwards, if the state before it was kept. All weights are found
from the table, on the host. BDIA and EDICT qualify, and so does any table of your own with a second register that
keeps the point; DDIM, Heun and multistep methods move the point by f itself, so that it would have to be solved for:
they are refused.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from jdiff.denoiser import Denoiser, cast_like
from jdiff.execute import _checked, rows, run, stepper
from jdiff.predict import convert, model_time, wide
from jdiff.tableau import Tableau

LONGEST = 3  # rows that are undone together, at most


class Inverse(NamedTuple):
    """The way back as a method of its own, in the order of its evaluations: t (K,), w (K, Q), A (K, Q, Q), B (K, Q).

    f at the point w . S, then S <- A S + B f, on Q values: the R registers, and outputs of rows undone together.
    """

    t: Any
    w: Any
    A: Any
    B: Any


def registers(denoiser: Denoiser, tableau: Tableau, x: PyTree) -> tuple[PyTree, ...]:
    """All registers after the last row, the sample first: what `invert` starts from. x as in `jdiff.sample`."""
    x = _checked(denoiser, tableau, x, None)
    dtype = jax.tree.leaves(x)[0].dtype
    h0, c0 = (jnp.asarray(a).astype(dtype) for a in (tableau.h0, tableau.c0))
    return _registers(denoiser, rows(tableau, dtype), h0, c0, x, tableau.record.prediction)


@functools.partial(jax.jit, static_argnums=5)
def _registers(denoiser, all_rows, h0, c0, x, kind):
    return run(stepper(denoiser, h0, c0, prediction=kind), all_rows, x)[0].registers


def invert(denoiser: Denoiser, tableau: Tableau, registers: Any) -> PyTree:
    """The noise from which `tableau` arrives at `registers` (`jdiff.registers`, or your own pair of states).

    One `lax.scan` over the rows backwards, one network evaluation each. For an image of your own there is no partner:
    `partner` makes one for BDIA as its paper does, and EDICT takes (image, image). What comes out is then exact for
    that pair. Raises ValueError for a table that cannot be read backwards, with the first row that forbids it.
    """
    inverse = reverse(tableau)
    if isinstance(registers, tuple) and registers and not any(tableau.record.names[-1][len(registers) :]):
        nothing = jax.tree.map(jnp.zeros_like, registers[0])  # registers that hold nothing at the end
        registers = (*registers, *[nothing] * (tableau.registers - len(registers)))
    if not isinstance(registers, tuple) or len(registers) != tableau.registers:
        got = f"{len(registers)}" if isinstance(registers, tuple) else type(registers).__name__
        raise ValueError(
            f"invert: {tableau.record.name} keeps {tableau.registers} registers, got {got}; pass the tuple that "
            "jdiff.registers returns, or (image, partner)"
        )
    for r in registers:
        _checked(denoiser, tableau, r, None)
    registers = tuple(jax.tree.map(jnp.asarray, r) for r in registers)
    dtype = jax.tree.leaves(registers)[0].dtype
    inverse = Inverse(*(jnp.asarray(a, wide(dtype)) for a in inverse))
    first = _invert(denoiser, inverse, registers, tableau.record.prediction)
    return back_to_start(tableau.h0, first)


def partner(denoiser: Denoiser, times: Any, image: PyTree) -> tuple[PyTree, PyTree]:
    """(image, its state at times[-2]) by one DDIM inversion step: how BDIA's paper starts from an image alone.

    times as for sampling. Where they end at 0, the network looks at the image at t_min.
    """
    from jdiff.execute import sample
    from jdiff.solvers.reversible import ddim_inversion

    table = ddim_inversion(denoiser.process, denoiser.process.check_times(times)[-2:])
    return image, sample(denoiser, table, image)


def back_to_start(h0: Any, registers: tuple[PyTree, ...]) -> PyTree:
    """x from the registers h0 x."""
    h0 = np.asarray(h0, np.float64)
    return combine(h0 / np.sum(h0**2), registers)


def combine(weights: Any, values: tuple[PyTree, ...]) -> PyTree:
    """sum_r weights[r] values[r], leaf by leaf, in the values' dtype."""
    scaled = [jax.tree.map(lambda a, w=weights[r]: jnp.asarray(w, a.dtype) * a, v) for r, v in enumerate(values)]
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), scaled)


def one_row(
    denoiser: Denoiser, row: Inverse, after: tuple[PyTree, ...], kind: str
) -> tuple[tuple[PyTree, ...], PyTree]:
    """One row of the way back: the values after it, and the output that it used."""
    x = combine(row.w, after)
    t = model_time(row.t, x)
    out = cast_like(denoiser.apply(x, t, denoiser.init(x))[0], x)
    f = convert(denoiser.process, x, t, out, denoiser.prediction, kind)
    weights = jnp.concatenate([row.A, row.B[:, None]], 1)
    return tuple(combine(weights[q], (*after, f)) for q in range(len(after))), f


@functools.partial(jax.jit, static_argnums=3)
def _invert(denoiser, inverse, registers, kind):
    more = inverse.w.shape[1] - len(registers)
    values = (*registers, *[jax.tree.map(jnp.zeros_like, registers[0])] * more)
    step = lambda after, row: (one_row(denoiser, row, after, kind)[0], None)
    return jax.lax.scan(step, values, inverse)[0][: len(registers)]


def reverse(tableau: Tableau, tolerance: float = 1e-9) -> Inverse:
    """The way back, float64. ValueError names the first row that cannot be undone."""
    name = tableau.record.name
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tableau)):
        raise ValueError(
            f"{name} is an argument of jit, grad or vmap here; it is read backwards on the host: close over it"
        )
    if np.ndim(tableau.A) > 3 or tableau.E is not None:
        raise ValueError(f"{name} cannot be read backwards: it has coefficients an element, or constants")
    if tableau.stochastic or tableau.record.outputs > 1 or np.ndim(tableau.t) > 1:
        raise ValueError(f"{name} cannot be read backwards: it draws noise, has several outputs, or a time an element")
    V = _basis(np.asarray(tableau.h0)[:, None])  # what the registers can reach
    ways: dict[int, list[Any]] = {0: []}  # the rows before this one in groups that can be undone
    row, why = 0, ""
    for k in range(tableau.nfe):
        for m in range(1, min(LONGEST, tableau.nfe - k) + 1) if k in ways else ():
            group = _undo(tableau, k, m, V, tolerance)
            if not isinstance(group, str):
                ways.setdefault(k + m, [*ways[k], group])
            elif m == 1:
                row, why = k, group
        V = _basis(np.concatenate([np.asarray(tableau.A[k]) @ V, np.asarray(tableau.B[k])], 1))
    if tableau.nfe not in ways:
        raise ValueError(
            f"{name} cannot be read backwards: row {row} (t = {tableau.t[row]:.4g}) loses its start, {why}; bdia and "
            "edict can (with gamma > 0, and edict from a start with alpha > 0), ddim_inversion is approximate"
        )
    blocks = ways[tableau.nfe]
    Q = max(len(row[1]) for rows in blocks for row in rows)
    pad = lambda a: np.pad(a, [(0, Q - n) for n in a.shape])
    back = [(t, pad(w), pad(A), pad(B)) for rows in blocks[::-1] for t, w, A, B in rows]
    return Inverse(*(np.stack(a) for a in zip(*back, strict=True)))


def _undo(tableau: Tableau, k: int, m: int, V: np.ndarray, tolerance: float) -> Any:
    """Rows of the way back over rows k .. k + m - 1, whose registers start in the span of V (R, r); or why not.

    S holds the registers' coefficients of (V's coordinates, the m outputs).
    """
    R, r = V.shape
    S, points = np.concatenate([V, np.zeros((R, m))], 1), []
    for j in range(m):
        points.append(S[0])
        S = np.asarray(tableau.A[k + j]) @ S
        S[:, r + j] += np.asarray(tableau.B[k + j])[:, 0]
    rows, Q, values = [], R + m - 1, np.linalg.svd(S[:, :r], compute_uv=False)
    M = V @ np.linalg.pinv(S[:, :r])
    for j, point in enumerate(points):
        known = slice(r, r + j)  # outputs evaluated before, on the way back
        rest = np.delete(np.arange(r + m), known)
        w = np.linalg.lstsq(S[:, rest].T, point[rest], rcond=1e-12)[0]
        if np.abs(S[:, rest].T @ w - point[rest]).max() > tolerance * max(np.abs(w).max(), 1.0):
            return "its point moves by the output itself"
        if j == 0 and (len(values) < r or values.min() <= 1e-10 * values.max()):
            return "it forgets a register"
        A, B, last = np.eye(Q), np.zeros(Q), j == m - 1
        if last:
            A = np.concatenate([np.concatenate([M, -M @ S[:, r : r + j]], 1), np.zeros((j, Q))])
            B[:R] = -M @ S[:, r + j]
        else:
            B[R + j] = 1.0
        weights = np.concatenate([w, point[known] - S[:, known].T @ w, np.zeros(m - 1 - j)])
        rows.append((np.asarray(tableau.t[k + j]), weights, A, B))
    return rows


def _basis(columns: np.ndarray) -> np.ndarray:
    U, values, _ = np.linalg.svd(columns, full_matrices=False)
    return U[:, values > 1e-12 * values.max()]
