"""Reading a table backwards: from the registers at the end to the noise at the start, exactly.

Row k maps registers S to S' = A S + B f, with f the output at the point S[0]. The row can be undone where

    1. the point follows from S' without f:    w . S' = S[0],        w . B = 0
    2. S follows from S' and f:                S = M (S' - B f),     M A = 1

on the registers that a sampler can reach (a dead register need not come back). Then f is evaluated once more, at the
same point as on the way there, and nothing is lost but rounding. w and M are found from the table, on the host. BDIA
and EDICT qualify, and so does any table of your own with a second register that keeps the point; DDIM, Heun and
multistep methods move the point by f itself, so that it would have to be solved for: they are refused.
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


class Inverse(NamedTuple):
    """Rows of the way back, last row first: t, B as in the tableau; w (K, R) and M (K, R, R) as above."""

    t: Any
    B: Any
    w: Any
    M: Any


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


def point_and_registers(
    denoiser: Denoiser, row: Inverse, after: tuple[PyTree, ...], kind: str
) -> tuple[tuple[PyTree, ...], PyTree]:
    """One row backwards: the registers before it, and the output at their point."""
    x = combine(row.w, after)
    t = model_time(row.t, x)
    out = cast_like(denoiser.apply(x, t, denoiser.init(x))[0], x)
    f = convert(denoiser.process, x, t, out, denoiser.prediction, kind)
    rest = tuple(
        jax.tree.map(lambda a, o, b=row.B[r, 0]: a - jnp.asarray(b, a.dtype) * o, v, f) for r, v in enumerate(after)
    )
    before = [combine(row.M[r], rest) for r in range(len(after))]
    return (x, *before[1:]), f


@functools.partial(jax.jit, static_argnums=3)
def _invert(denoiser, inverse, registers, kind):
    step = lambda after, row: (point_and_registers(denoiser, row, after, kind)[0], None)
    return jax.lax.scan(step, registers, inverse)[0]


def reverse(tableau: Tableau, tolerance: float = 1e-9) -> Inverse:
    """w and M of every row, float64, last row first. ValueError names the first row that cannot be undone."""
    name = tableau.record.name
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tableau)):
        raise ValueError(
            f"{name} is an argument of jit, grad or vmap here; it is read backwards on the host: close over it"
        )
    if np.ndim(tableau.A) > 3 or tableau.E is not None:
        raise ValueError(f"{name} cannot be read backwards: it has coefficients an element, or constants")
    if tableau.stochastic or tableau.record.outputs > 1 or np.ndim(tableau.t) > 1:
        raise ValueError(f"{name} cannot be read backwards: it draws noise, has several outputs, or a time an element")
    found = []
    V = _basis(np.asarray(tableau.h0)[:, None])  # what the registers can reach
    for k in range(tableau.nfe):
        A, B = np.asarray(tableau.A[k]), np.asarray(tableau.B[k])
        image = np.concatenate([A @ V, B], 1)
        target = np.concatenate([V[0], np.zeros(B.shape[1])])
        w = np.linalg.lstsq(image.T, target, rcond=1e-12)[0]
        values = np.linalg.svd(A @ V, compute_uv=False)
        point = np.abs(image.T @ w - target).max() <= tolerance * max(np.abs(w).max(), 1.0)
        if not point or values.min() <= 1e-10 * values.max():
            why = "its point moves by the output itself" if not point else "it forgets a register"
            raise ValueError(
                f"{name} cannot be read backwards: row {k} (t = {tableau.t[k]:.4g}) loses its start, {why}; bdia and "
                "edict can (with gamma > 0, and edict from a start with alpha > 0), ddim_inversion is approximate"
            )
        found.append((tableau.t[k], B, w, V @ np.linalg.pinv(A @ V)))
        V = _basis(image)
    return Inverse(*(np.stack(a) for a in zip(*found[::-1], strict=True)))


def _basis(columns: np.ndarray) -> np.ndarray:
    U, values, _ = np.linalg.svd(columns, full_matrices=False)
    return U[:, values > 1e-12 * values.max()]
