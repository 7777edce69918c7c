"""Samples and reference trajectories by adaptive steps."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jdiff.denoiser import Denoiser

from .diffeq import Info, integrate, stop_of


def sample(
    denoiser: Denoiser, x: Any, *, start: float | None = None, end: float = 0.0, last: float | None = None,
    rtol: float = 1e-4, atol: float = 1e-4, variable: str = "angle", solver: Any = "Tsit5", per_sample: bool = True,
    max_steps: int = 4096, gradient: str | None = None,
) -> tuple[Array, Info]:  # fmt: skip
    """The probability flow from x (batch, ...) at time `start` (default t_max) to `end`, to a tolerance.

    last        where end = 0: the time at which the integration stops and the x0 prediction is the sample, one more
                evaluation. Default t_min, the lowest level that a network has seen; 0 integrates to sigma = 0 itself
                ("angle" or "t" only), which is right for a model that is good at every time
    rtol, atol  of each step: the rms of error / (atol + rtol |z|) is kept below 1
    solver      name of a Diffrax solver, or one: "Bosh3", "Dopri5", "Tsit5", "Dopri8"
    per_sample  True: step sizes a sample. False: one for the batch by its joint rms (then samples interact)
    gradient    what jax.grad does, with respect to x and the denoiser's float arrays; needs per_sample=False.
                "checkpoint": that of the steps taken (their sizes held), memory like the logarithm of max_steps.
                "adjoint": solves the adjoint ODE backwards with the same solver and tolerance, constant memory, an
                error of its own; only where the flow stops before sigma = 0 (last > 0, the default).
                None: no reverse mode (jax.jvp works)

    Returns (sample, Info). Raises ValueError for bad options and times, RuntimeError where max_steps were not enough
    (outside jit; inside, look at info.success).
    """
    stop, final = stop_of(denoiser.process, end, last)
    ys, info = integrate(
        denoiser, x, start, stop, variable, solver, rtol, atol, per_sample, max_steps, gradient=gradient
    )
    return (denoiser(ys, stop), info._replace(nfe=info.nfe + 1)) if final else (ys, info)


def reference(
    denoiser: Denoiser, x: Any, times: Any, *, last: float | None = None, rtol: float = 1e-6, atol: float = 1e-6,
    variable: str = "angle", solver: Any = "Dopri8", per_sample: bool = True, max_steps: int = 4096,
) -> tuple[Array, Info]:  # fmt: skip
    """The probability flow from x at times[0], at every one of `times` (n + 1,): states (n + 1, batch, ...), Info.

    Steps end on the requested times, so that the states are as good as the steps. Where times end at 0, the last
    state is the x0 prediction from `last` (see `sample`; default t_min, or times[-2] where that is lower).
    """
    p = denoiser.process
    times = p.check_times(times)
    if times.ndim != 1:
        raise ValueError(f"reference: times have shape {times.shape}; expected (n + 1,), one grid for all elements")
    last = min(p.t_min, times[-2]) if last is None else last
    stop, final = stop_of(p, times[-1], last)
    if stop > times[-2]:
        raise ValueError(f"reference: last is {last:g}, later than times[-2] = {times[-2]:g}; expected at most that")
    inner = tuple(float(t) for t in times[1:-1]) if stop < times[-2] else tuple(float(t) for t in times[1:-2])
    ys, info = integrate(denoiser, x, times[0], stop, variable, solver, rtol, atol, per_sample, max_steps, inner=inner)
    path = jnp.concatenate([jnp.asarray(x)[None], ys])
    if final:
        end, info = denoiser(ys[-1], stop), info._replace(nfe=info.nfe + 1)
        path = jnp.concatenate([path if stop == times[-2] else path[:-1], end[None]])
    return path, info
