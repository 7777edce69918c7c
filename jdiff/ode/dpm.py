"""DPM-Solver-12 and -23 with adaptive steps: a loop of its own, without Diffrax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jdiff.denoiser import Denoiser, cast_like
from jdiff.predict import array_of, convert

from .diffeq import Info, arrived, stop_of


def dpm_solver_adaptive(
    denoiser: Denoiser, x: Any, *, order: int = 2, start: float | None = None, end: float = 0.0,
    last: float | None = None, rtol: float = 0.05, atol: float = 0.0078, theta: float = 0.9, h_init: float = 0.05,
    max_steps: int = 4096, as_published: bool = False,
) -> tuple[Array, Info]:  # fmt: skip
    """DPM-Solver-12 (order 2) and -23 (order 3), adaptive (Lu et al. 2022, arXiv 2206.00927, appendix C): exponential
    integrators in half log-SNR with the next lower order as the error estimate. No tableau: steps depend on x.

    E = rms of (x_high - x_low) / max(atol, rtol max(|x_low|, |x_low of the step before|)); a step with E <= 1 is
    taken, and h becomes theta h E^(-1/order). atol is the paper's for images in [-1, 1] (1/128).
    as_published: one step size for the batch from its largest E, as in the official code (then samples interact).
    Every attempt evaluates the network `order` times. Where alpha(start) = 0, log-SNR begins by one DDIM step, over a
    thousandth of the time. start, end, last, what is returned and raised: as in `sample`.
    """
    p = denoiser.process
    if order not in (2, 3):
        raise ValueError(f"dpm_solver_adaptive: order is {order!r}; expected 2 (DPM-Solver-12) or 3 (DPM-Solver-23)")
    start = p.t_max if start is None else float(start)
    stop, final = stop_of(p, end, last)
    if stop == 0 or not stop < start <= p.t_max:
        raise ValueError(f"dpm_solver_adaptive: expected 0 < last < start <= {p.t_max:g}, got last={stop:g}, {start=}")
    x = array_of(x, "ode")
    shift = int(p.alpha(start) == 0)
    if shift:
        later = start - min(1e-3 * p.t_max, 0.5 * (start - stop))
        x = float(p.sigma(later) / p.sigma(start)) * x + float(p.alpha(later)) * denoiser(x, start)
        start = later
    lams = p.lam(np.array([start, stop])).tolist()
    out, info = _dpm(denoiser, x, lams, (rtol, atol, theta, h_init), order, max_steps, as_published)
    info = arrived(info._replace(nfe=info.nfe + shift), max_steps)
    return (denoiser(out, stop), info._replace(nfe=info.nfe + 1)) if final else (out, info)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _dpm(denoiser, x, lams, options, order, max_steps, joint):
    p, n = denoiser.process, len(x)
    lam_end = jnp.asarray(lams[1], x.dtype)
    rtol, atol, theta, h_init = (jnp.asarray(o, x.dtype) for o in options)
    column = lambda v: v.reshape(n, *(1,) * (x.ndim - 1))

    def level(lam: Array) -> tuple[Array, Array, Array]:
        t = jnp.clip(p.t_of_lam(lam), 0.0, p.t_max)
        return t, p.alpha(t), p.sigma(t)

    def eps(x: Array, t: Array) -> Array:
        return convert(p, x, t, cast_like(denoiser.apply(x, t, denoiser.init(x))[0], x), denoiser.prediction, "eps")

    def attempt(x: Array, lam: Array, h: Array) -> tuple[Array, Array]:
        """Both results over h; the nodes are 1/2 (order 2), or 1/3 and 2/3 (order 3)."""
        lam, h = column(lam), column(h)
        t0, a0, _ = level(lam)
        _, a1, s1 = level(lam + h)
        e0, m1 = eps(x, t0), jnp.expm1(h)
        r = 1 / order
        tr, ar, sr = level(lam + r * h)
        er = eps((ar / a0) * x - sr * jnp.expm1(r * h) * e0, tr)
        first = (a1 / a0) * x - s1 * m1 * e0
        second = first - s1 * m1 / (2 * r) * (er - e0)
        if order == 2:
            return first, second
        q = 2 / 3
        tq, aq, sq = level(lam + q * h)
        mq = jnp.expm1(q * h)
        eq = eps((aq / a0) * x - sq * mq * e0 - sq * (q / r) * (mq / (q * h) - 1.0) * (er - e0), tq)
        return second, first - s1 / q * (m1 / h - 1.0) * (eq - e0)

    def body(state):
        x, before, lam, h, steps, rejected = state
        active = lam < lam_end
        h = jnp.where(active, h, 1.0)  # any number: what has arrived stays
        low, high = attempt(x, lam, h)
        scale = jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(low), jnp.abs(before)))
        E = jnp.sqrt(jnp.mean(((high - low) / scale).reshape(n, -1) ** 2, -1))
        E = jnp.broadcast_to(jnp.max(E), E.shape) if joint else E
        taken = active & (E <= 1.0)
        arrived = h >= lam_end - lam
        lam = jnp.where(taken, jnp.where(arrived, lam_end, lam + h), lam)
        x, before = (jnp.where(column(taken), new, old) for new, old in ((high, x), (low, before)))
        h = jnp.minimum(theta * h * E ** (-1.0 / order), lam_end - lam)
        count = lambda n, one: n + one.astype(n.dtype)
        return x, before, lam, h, count(steps, active), count(rejected, active & ~taken)

    zero = jnp.zeros(n, jnp.int32)
    h = jnp.minimum(h_init, lam_end - jnp.asarray(lams[0], x.dtype))
    start = (x, x, jnp.full(n, lams[0], x.dtype), jnp.full(n, h), zero, zero)
    going = lambda s: jnp.any(s[2] < lam_end) & (jnp.max(s[4]) < max_steps)
    x, _, lam, _, steps, rejected = jax.lax.while_loop(going, body, start)
    return x, Info(order * steps, steps, rejected, (lam >= lam_end) & jnp.isfinite(x).reshape(n, -1).all(-1))
