"""Integration in any of the variables, on Diffrax, which is imported here and only when it is needed."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from jdiff.denoiser import Denoiser
from jdiff.predict import array_of
from jdiff.process import Process

from .variables import VARIABLES, flow_slope, position, scale, time_of

GRADIENTS = {"checkpoint": "RecursiveCheckpointAdjoint", "adjoint": "BacksolveAdjoint"}


class Info(NamedTuple):
    """Counts a sample, (batch,): network evaluations, step attempts, those rejected; and whether it arrived."""

    nfe: Array
    steps: Array
    rejected: Array
    success: Array


def stop_of(p: Process, end: float, last: float | None) -> tuple[float, bool]:
    """Where the integration stops, and whether an x0 prediction is to follow."""
    if not 0 <= end < p.t_max:
        raise ValueError(f"end is {end}; expected 0 <= end < {p.t_max:g}")
    if end > 0:
        return float(end), False
    last = p.t_min if last is None else float(last)
    if not 0 <= last < p.t_max:
        raise ValueError(f"last is {last}; expected 0 <= last < {p.t_max:g}, the time of the last x0 prediction")
    return last, last > 0


def _field(denoiser: Denoiser, variable: str, probes: Array | None, trace: bool) -> Callable[[Array, Any], Any]:
    """The slope of the state: z, or with `trace` (z, minus the running integral of its divergence a probe)."""

    def field(u: Array, y: Any) -> Any:
        z = y[0] if trace else y
        u = u.reshape(u.shape + (1,) * (z.ndim - 1)) if u.ndim else u
        f = lambda z: flow_slope(denoiser, variable, u, z)
        if not trace:
            return f(z)
        slope, push = jax.linearize(f, z)
        if probes is None:  # samples do not interact, so one product gives an entry of every sample's Jacobian
            d = z[0].size
            unit = lambda i: jnp.broadcast_to(jnp.zeros(d, z.dtype).at[i].set(1.0).reshape(z.shape[1:]), z.shape)
            entry = lambda i: push(unit(i)).reshape(len(z), d)[:, i]
            return slope, jax.lax.map(entry, jnp.arange(d), batch_size=min(d, 32)).sum(0)[:, None]
        along = jax.vmap(push, 1, 1)(probes)
        return slope, jnp.sum((probes * along).reshape(*probes.shape[:2], -1), -1)

    return field


def integrate(
    denoiser: Denoiser, x: Any, start: float | None, stop: float, variable: str, solver: Any, rtol: float, atol: float,
    per_sample: bool, max_steps: int, *, inner: tuple[float, ...] = (), probes: Array | None = None,
    forward: bool = False, gradient: str | None = None,
) -> tuple[Any, Info]:  # fmt: skip
    """From start down to stop; with `forward`, from stop up to start, and the integral of the divergence too."""
    import diffrax

    p, x = denoiser.process, array_of(x, "ode")
    if variable not in VARIABLES:
        raise ValueError(f"variable is {variable!r}; expected one of {', '.join(VARIABLES)}")
    if gradient not in (None, *GRADIENTS):
        raise ValueError(f"gradient is {gradient!r}; expected one of {', '.join(map(repr, GRADIENTS))}, or None")
    if gradient and per_sample:
        raise ValueError("gradient needs per_sample=False: one step size for the batch, of its joint error")
    if gradient == "adjoint" and p.sigma(stop) == 0:
        raise ValueError(
            "gradient='adjoint' starts where the flow stops, and at sigma = 0 the slope has no derivative: "
            "let it stop earlier (last > 0), or use gradient='checkpoint'"
        )
    start = p.t_max if start is None else float(start)
    if not 0 <= stop < start <= p.t_max * (1 + 1e-12):
        raise ValueError(f"expected 0 <= end < start <= {p.t_max:g}, got {start=:g}, end={stop:g} for {p}")
    u0, u1, *inner_u = (position(p, variable, t) for t in (start, stop, *inner))
    if not np.isfinite([u0, u1]).all():
        raise ValueError(f"{variable!r} is infinite at time {start if np.isinf(u0) else stop:g}; use variable='angle'")
    if isinstance(solver, str) and not hasattr(diffrax, solver):
        raise ValueError(f"diffrax has no solver {solver!r}; try 'Tsit5', 'Dopri5', 'Dopri8' or 'Bosh3'")
    solver = getattr(diffrax, solver)() if isinstance(solver, str) else solver
    ends = (stop, start) if forward else (start, stop)
    points = (u1, u0) if forward else (u0, *inner_u, u1)
    options = (variable, solver, per_sample, max_steps, forward, ends, gradient)
    with jax.numpy_dtype_promotion("standard"):  # Diffrax mixes dtypes
        ys, info = _diffeqsolve(denoiser, x, points, probes, (rtol, atol), *options)
    return ys, arrived(info, max_steps)


def arrived(info: Info, max_steps: int) -> Info:
    if not isinstance(info.success, Tracer) and not (ok := np.asarray(info.success)).all():
        raise RuntimeError(
            f"{(~ok).sum()} of {ok.size} samples did not arrive within max_steps = {max_steps}: their states are not "
            "finite, or the tolerance is below what the dtype can give; loosen rtol and atol or raise max_steps"
        )
    return info


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8, 9, 10, 11))
def _diffeqsolve(
    denoiser, x, points, probes, tolerance, variable, solver, per_sample, max_steps, trace, ends, gradient
):
    import diffrax

    def field(args: Any, u: Array, y: Any) -> Any:
        return _field(args[0], variable, args[1], trace)(u, y)

    @jax.custom_batching.custom_vmap
    def single(args, u, y):  # gives shapes alone: under vmap the rule below runs instead
        return jax.tree.map(jnp.zeros_like, y)

    @single.def_vmap
    def _(n, batched, args, u, y):
        spread = lambda a, b: a if b else jnp.broadcast_to(a, (n, *jnp.shape(a)))
        dy = field(args, spread(u, batched[1]), jax.tree.map(spread, y, batched[2]))
        return dy, jax.tree.map(lambda _: True, dy)

    points = jnp.stack([jnp.asarray(u, x.dtype) for u in points])
    rtol, atol = (jnp.asarray(v, x.dtype) for v in tolerance)
    controller = diffrax.PIDController(rtol=rtol, atol=atol)
    if len(points) > 2:
        controller = diffrax.ClipStepSizeController(controller, step_ts=points[1:-1])
    saveat = diffrax.SaveAt(ts=points[1:]) if len(points) > 2 else diffrax.SaveAt(t1=True)

    def solve(y: Any, term: Any) -> Any:
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(term), solver, points[0], points[-1], 0.01 * (points[-1] - points[0]), y,
            args=(denoiser, probes), saveat=saveat, stepsize_controller=controller, max_steps=max_steps, throw=False,
            adjoint=getattr(diffrax, GRADIENTS.get(gradient, "ForwardMode"))(),
        )  # fmt: skip
        stats = (found.stats["num_steps"], found.stats["num_rejected_steps"])
        return found.ys, (*stats, found.result == diffrax.RESULTS.successful)

    first, final = (jnp.asarray(scale(denoiser.process, variable, t), x.dtype) for t in ends)
    y0 = x / first
    if trace:
        width = 1 if probes is None else probes.shape[1]
        y0 = (y0, jnp.zeros((len(x), width), x.dtype))
    if per_sample:
        ys, counts = jax.vmap(lambda y: solve(y, lambda u, y, args: single(args, u, y)), out_axes=(1, 0))(y0)
    else:
        ys, counts = solve(y0, lambda u, y, args: field(args, u, y))
        counts = tuple(jnp.broadcast_to(c, (len(x),)) for c in counts)
    steps, rejected, success = counts
    stages = solver.tableau.num_stages - solver.tableau.fsal
    info = Info(stages * steps + int(solver.tableau.fsal), steps, rejected, success)
    if trace:
        return (ys[0][0] * final, ys[1][0]), info
    if len(points) == 2:
        return ys[0] * final, info
    scales = scale(denoiser.process, variable, time_of(denoiser.process, variable, points[1:]))
    return ys * jnp.asarray(scales, x.dtype).reshape(-1, *(1,) * x.ndim), info
