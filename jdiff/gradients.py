"""Gradients through sampling: with respect to the noise, the parameters, the conditions and guidance scales.

    "direct"      jax.grad of `jdiff.sample`: exact, keeps what the backward pass needs of all K evaluations
    "checkpoint"  exact, any table: keeps about 2 sqrt(K) states and one evaluation; 3 evaluations forward a row in all
    "reversible"  exact up to rounding, tables that `jdiff.invert` can read: keeps the last registers alone, rebuilds
                  the others on the way back; 2 evaluations forward a row
    adjoint       AdjointDPM: keeps the sample alone, solves the adjoint ODE, and has that solver's error

The first three are one function, `sample`; they differ in memory and time, not in what they return. The adjoint is a
function of its own, since its gradient is of the ODE and not of the table.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jdiff import execute, inversion
from jdiff.denoiser import Denoiser
from jdiff.ode.variables import flow_slope, position, scale
from jdiff.predict import wide
from jdiff.tableau import Tableau


def sample(
    denoiser: Denoiser, tableau: Tableau, x: PyTree, key: Array | None = None, *, gradient: str = "checkpoint",
    index: Array | None = None,
) -> PyTree:  # fmt: skip
    """`jdiff.sample`, with the way to its gradient chosen: "direct", "checkpoint" or "reversible" (see above).

    The sample itself is the same for all. "reversible" needs a table that `jdiff.invert` can read, without noise, with
    concrete coefficients (it has no gradient with respect to the table), and a denoiser without memory.
    """
    if gradient == "direct":
        return execute.sample(denoiser, tableau, x, key, index=index)
    if gradient not in ("checkpoint", "reversible"):
        raise ValueError(f"gradient is {gradient!r}; expected 'direct', 'checkpoint' or 'reversible'")
    x = execute._checked(denoiser, tableau, x, key)
    dtype = jax.tree.leaves(x)[0].dtype
    start = [jnp.asarray(a).astype(dtype) for a in (tableau.h0, tableau.c0)]
    rows, kind = execute.rows(tableau, dtype), tableau.record.prediction
    if gradient == "checkpoint":
        return _checkpointed(denoiser, rows, *start, x, key, index, kind)
    if jax.tree.leaves(denoiser.init(x)):
        raise ValueError("gradient='reversible': this denoiser has memory (a carry), which cannot be rebuilt backwards")
    inverse = inversion.Inverse(*(jnp.asarray(a, wide(dtype)) for a in inversion.reverse(tableau)))
    if inverse.w.shape[1] > tableau.registers:
        raise ValueError(
            f"gradient='reversible': {tableau.record.name} has rows that are undone together; use gradient='checkpoint'"
        )
    return _reversible(kind, denoiser, rows, inverse, start[0], x)


@functools.partial(jax.jit, static_argnums=7)
def _checkpointed(denoiser, rows, h0, c0, x, key, index, kind):
    """A scan of scans: one over ~sqrt(K) segments whose start is kept, one in each, recomputed step by step."""
    init, step = execute.stepper(denoiser, h0, c0, prediction=kind, index=index)
    fold = lambda k: None if key is None else jax.random.fold_in(key, k)
    body = lambda state, k_row: (step(fold(k_row[0]), state, k_row[1])[0], None)
    body = jax.checkpoint(body, prevent_cse=False)
    segment = jax.checkpoint(lambda state, steps: (jax.lax.scan(body, state, steps)[0], None), prevent_cse=False)
    K = rows.A.shape[0]
    steps = (jnp.arange(1, K + 1, dtype=jnp.int32), rows)
    length = math.isqrt(K)
    whole = K - K % length
    cut = jax.tree.map(lambda a: a[:whole].reshape(K // length, length, *a.shape[1:]), steps)
    state, _ = jax.lax.scan(segment, init(fold(0), x), cut)
    state, _ = segment(state, jax.tree.map(lambda a: a[whole:], steps)) if whole < K else (state, None)
    return state.x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reversible(kind, denoiser, rows, inverse, h0, x):
    return inversion._registers(denoiser, rows, h0, jnp.zeros((h0.shape[0], 0), h0.dtype), x, kind)[0]


def _reversible_forward(kind, denoiser, rows, inverse, h0, x):
    last = inversion._registers(denoiser, rows, h0, jnp.zeros((h0.shape[0], 0), h0.dtype), x, kind)
    return last[0], (denoiser, rows, inverse, h0, last)


def _reversible_backward(kind, kept, slope):
    denoiser, rows, inverse, h0, last = kept
    floats, join = _split(denoiser)

    def row_of(floats, before, row):
        _, step = execute.stepper(join(floats), h0, jnp.zeros((h0.shape[0], 0), h0.dtype), prediction=kind)
        return step(None, execute.State(before, ()), row)[0].registers

    def back(carry, both):
        after, slopes, total = carry
        undo, row = both
        before, _ = inversion.one_row(denoiser, undo, after, kind)
        _, pull = jax.vjp(lambda floats, before: row_of(floats, before, row), floats, before)
        to_floats, slopes = pull(slopes)
        return (before, slopes, jax.tree.map(jnp.add, total, to_floats)), None

    slopes = (slope, *(jax.tree.map(jnp.zeros_like, r) for r in last[1:]))
    backwards = jax.tree.map(lambda a: a[::-1], rows)
    total = jax.tree.map(jnp.zeros_like, floats)
    (_, slopes, total), _ = jax.lax.scan(back, (last, slopes, total), (inverse, backwards))
    to_x = inversion.combine(h0, slopes)
    nothing = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    return _cotangent(denoiser, total), nothing(rows), nothing(inverse), nothing(h0), to_x


_reversible.defvjp(_reversible_forward, _reversible_backward)


def adjoint(
    denoiser: Denoiser, tableau: Tableau, x: Array, times: Any, *, order: int = 2, variable: str = "sigma"
) -> Array:  # fmt: skip
    """`jdiff.sample` whose gradient is that of the probability flow: AdjointDPM (Pan et al. 2023, arXiv 2307.10711).

    In y = x / alpha over rho = sigma / alpha the flow is dy/drho = eps, without its stiff linear part, and with a the
    gradient of a loss with respect to y

        da/drho = -a . d eps/dy,        dL/dparameters = -int a . d eps/d(parameters) drho

    are solved together with y itself from the sample back to the noise, on `times` (as for sampling; any number of
    them), by Euler (order 1), Heun (2) or Runge-Kutta (4). Nothing of the way there is kept. A last time of 0 is the x0
    prediction at the time before, and is differentiated as such. variable="angle" (see `jdiff.ode`) for processes
    that start at alpha = 0. Gradients with respect to x and all float arrays of the denoiser.
    """
    p = denoiser.process
    t = p.check_times(times)
    if order not in _RUNGE_KUTTA:
        raise ValueError(f"adjoint: order is {order!r}; expected 1 (Euler), 2 (Heun) or 4 (Runge-Kutta)")
    if variable not in ("sigma", "angle"):
        raise ValueError(f"adjoint: variable is {variable!r}; expected 'sigma' or 'angle'")
    if variable == "sigma" and p.alpha(t[0]) == 0:
        raise ValueError(f"adjoint: sigma/alpha is infinite at time {t[0]:g}; use variable='angle' or start later")
    x = execute._checked(denoiser, tableau, x, None)
    if not isinstance(x, jax.Array):
        raise TypeError(f"adjoint: expected one array, got {type(x).__name__}")
    to_data = t[-1] == 0
    if to_data:
        last = np.asarray(tableau.A[-1])[0].any() or not np.allclose(np.asarray(tableau.B[-1])[0], 1.0)
        if last or not np.isclose(np.asarray(tableau.t[-1]), t[-2]):
            raise ValueError(
                f"adjoint: {tableau.record.name} does not end by the x0 prediction at times[-2] = {t[-2]:g}; build it "
                "on the same times, or end them before 0"
            )
        t, rows = t[:-1], ("t", "A", "B", "C")
        tableau = tableau.replace(**{name: getattr(tableau, name)[:-1] for name in rows})
    if len(t) > 1:
        u = jnp.asarray([position(p, variable, s) for s in t], x.dtype)
        ends = (float(scale(p, variable, t[0])), float(scale(p, variable, t[-1])))
        x = _adjoint((order, variable, *ends), denoiser, tableau, u, x)
    return denoiser(x, t[-1]) if to_data else x


# (coefficients of each stage, weights) of the adjoint's Runge-Kutta methods; a stage's point is their sum
_RUNGE_KUTTA: dict[int, tuple[list[list[float]], list[float]]] = {
    1: ([[]], [1.0]),
    2: ([[], [1.0]], [0.5, 0.5]),
    4: ([[], [0.5], [0.0, 0.5], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adjoint(static, denoiser, tableau, u, x):
    return execute.sample(denoiser, tableau, x)


def _adjoint_forward(static, denoiser, tableau, u, x):
    out = execute.sample(denoiser, tableau, x)
    return out, (denoiser, tableau, u, out)


def _adjoint_backward(static, kept, slope):
    order, variable, first_scale, last_scale = static
    denoiser, tableau, u, out = kept
    floats, join = _split(denoiser)
    stages, weights = _RUNGE_KUTTA[order]

    def field(u, state):
        z, a, _ = state
        dz, pull = jax.vjp(lambda floats, z: flow_slope(join(floats), variable, u, z), floats, z)
        to_floats, to_z = pull(-a)
        return dz, to_z, to_floats

    def step(state, ends):
        h = ends[1] - ends[0]
        move = lambda coefficients, slopes: jax.tree.map(
            lambda s, *ks: s + h.astype(s.dtype) * sum(c * k for c, k in zip(coefficients, ks, strict=True)),
            state,
            *slopes,
        )
        slopes: list[Any] = []
        for row in stages:
            slopes.append(field(ends[0] + sum(row) * h, move(row, slopes) if row else state))
        return move(weights, slopes), None

    state = (out / last_scale, slope * last_scale, jax.tree.map(jnp.zeros_like, floats))
    (_, a, total), _ = jax.lax.scan(step, state, (u[::-1][:-1], u[::-1][1:]))
    nothing = lambda tree: jax.tree.map(lambda v: jnp.zeros_like(v), tree)
    return _cotangent(denoiser, total), nothing(tableau), nothing(u), a / first_scale


_adjoint.defvjp(_adjoint_forward, _adjoint_backward)


def _split(denoiser: Denoiser) -> tuple[list[Array], Any]:
    """The denoiser's float arrays, and the function that puts others in their place."""
    leaves, structure = jax.tree.flatten(denoiser)
    moving = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]

    def join(floats: list[Array]) -> Denoiser:
        new = iter(floats)
        return structure.unflatten([next(new) if m else leaf for m, leaf in zip(moving, leaves, strict=True)])

    return [jnp.asarray(leaf) for m, leaf in zip(moving, leaves, strict=True) if m], join


def _cotangent(denoiser: Denoiser, floats: list[Array]) -> Denoiser:
    """A cotangent of the whole denoiser: integers (labels) have none."""
    leaves, structure = jax.tree.flatten(denoiser)
    new = iter(floats)
    is_float = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return structure.unflatten([next(new) if is_float(v) else np.zeros(np.shape(v), jax.dtypes.float0) for v in leaves])
