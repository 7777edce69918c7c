"""The probability-flow ODE with adaptive steps: samples, log-likelihoods, reference trajectories. On Diffrax.

A step size that depends on the state makes a loop of unknown length, so nothing here is a tableau. Every sample has
its own step sizes (per_sample=True): what comes out does not depend on the batch it is in, as everywhere in jdiff;
the network still sees the whole batch at once, with a time a sample.

The independent variable u and the state z = x / c that are integrated:

    "angle"  phi = atan2(sigma, alpha)   c = hypot(alpha, sigma)   dz/dphi = cos(phi) eps - sin(phi) x0
    "lam"    half log-SNR                c = hypot(alpha, sigma)   dz/dlam = -sin(phi) cos(phi) dz/dphi
    "sigma"  rho = sigma/alpha           c = alpha                 dz/drho = eps
    "t"      the process's own time      c = 1                     dx/dt = velocity

The angle is finite at both ends of every process and its slope is smooth there, so it alone may start at alpha = 0
and end at sigma = 0, and z keeps the size of data and noise, which is what atol is measured by.
A denoiser's carry starts afresh at every evaluation: caches make no sense between points that may be rejected.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from jdiff import noise
from jdiff.denoiser import Denoiser, cast_like
from jdiff.predict import convert
from jdiff.process import Process

VARIABLES = ("angle", "lam", "sigma", "t")


class Info(NamedTuple):
    """Counts a sample, (batch,): network evaluations, step attempts, those rejected; and whether it arrived."""

    nfe: Array
    steps: Array
    rejected: Array
    success: Array


def sample(
    denoiser: Denoiser, x: Any, *, start: float | None = None, end: float = 0.0, last: float | None = None,
    rtol: float = 1e-4, atol: float = 1e-4, variable: str = "angle", solver: Any = "Tsit5", per_sample: bool = True,
    max_steps: int = 4096,
) -> tuple[Array, Info]:  # fmt: skip
    """The probability flow from x (batch, ...) at time `start` (default t_max) to `end`, to a tolerance.

    last        where end = 0: the time at which the integration stops and the x0 prediction is the sample, one more
                evaluation. Default t_min, the lowest level that a network has seen; 0 integrates to sigma = 0 itself
                ("angle" or "t" only), which is right for a model that is good at every time
    rtol, atol  of each step: the rms of error / (atol + rtol |z|) is kept below 1
    solver      name of a Diffrax solver, or one: "Bosh3", "Dopri5", "Tsit5", "Dopri8"
    per_sample  True: step sizes a sample. False: one for the batch by its joint rms (then samples interact)

    Returns (sample, Info). Raises ValueError for bad options and times, RuntimeError where max_steps were not enough
    (outside jit; inside, look at info.success).
    """
    stop, final = _stop(denoiser.process, end, last)
    ys, info = _integrate(denoiser, x, start, stop, variable, solver, rtol, atol, per_sample, max_steps)
    return (_x0(denoiser, ys, stop), info._replace(nfe=info.nfe + 1)) if final else (ys, info)


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
    stop, final = _stop(p, times[-1], last)
    if stop > times[-2]:
        raise ValueError(f"reference: last is {last:g}, later than times[-2] = {times[-2]:g}; expected at most that")
    inner = tuple(float(t) for t in times[1:-1]) if stop < times[-2] else tuple(float(t) for t in times[1:-2])
    ys, info = _integrate(denoiser, x, times[0], stop, variable, solver, rtol, atol, per_sample, max_steps, inner=inner)
    path = jnp.concatenate([jnp.asarray(x)[None], ys])
    if final:
        end, info = _x0(denoiser, ys[-1], stop), info._replace(nfe=info.nfe + 1)
        path = jnp.concatenate([path if stop == times[-2] else path[:-1], end[None]])
    return path, info


def log_likelihood(
    denoiser: Denoiser, x0: Any, key: Array | None = None, *, divergence: str = "exact", probes: int = 1,
    probe: str = "rademacher", start: float = 0.0, prior: Callable[[Array], Array] | None = None, rtol: float = 1e-5,
    atol: float = 1e-5, variable: str = "angle", solver: Any = "Tsit5", per_sample: bool = True, max_steps: int = 4096,
    index: Array | None = None,
) -> tuple[Array, Array, Info]:  # fmt: skip
    """log p(x0) in nats, (batch,), of the model's probability flow (Song et al. 2021, eq. 39): exact for any model.

        log p(x0) = log p_T(x_T) + int div(dx/dt) dt,   integrated from x0 at `start` to t_max

    divergence  "exact": the trace by d Jacobian-vector products an evaluation; "hutchinson": unbiased, from `probes`
                random vectors a sample ("rademacher" or "gaussian"), fixed along the path; needs key
    start       the time at which x0 is taken to be a draw. 0 is exact; the official score_sde takes 1e-5 with x0 as
                it is, and so does a network here that is not to be asked below t_min: start=process.t_min
    prior       log-density of x_T, (batch, ...) -> (batch,); default the process's N(0, prior_std^2)
    index       as in `jdiff.sample`: sample i's probes depend on key and index[i] alone

    Returns (log p, its standard error over probes, Info); the error is NaN for one probe and 0 for "exact". info.nfe
    counts slopes: each is one evaluation with d ("exact") or `probes` Jacobian-vector products. As published: one
    Rademacher probe, rtol = atol = 1e-5, the Dormand-Prince pair, but over the batch jointly (per_sample=False).
    """
    p = denoiser.process
    if divergence not in ("exact", "hutchinson"):
        raise ValueError(f"log_likelihood: divergence is {divergence!r}; expected 'exact' or 'hutchinson'")
    if probe not in ("rademacher", "gaussian"):
        raise ValueError(f"log_likelihood: probe is {probe!r}; expected 'rademacher' or 'gaussian'")
    hutchinson = divergence == "hutchinson"
    if hutchinson and (key is None or probes < 1):
        raise ValueError(f"log_likelihood: hutchinson needs key=jax.random.key(seed) and probes >= 1, got {probes=}")
    x0 = _array(x0)
    d, e = x0[0].size, None
    if hutchinson and key is not None:
        draws = [noise.normal(jax.random.fold_in(key, j), x0, index) for j in range(probes)]
        e = jnp.stack(draws, 1)  # (batch, probes, ...)
        e = jnp.where(e < 0, -1.0, 1.0).astype(x0.dtype) if probe == "rademacher" else e
    (x, rise), info = _integrate(
        denoiser, x0, p.t_max, start, variable, solver, rtol, atol, per_sample, max_steps, probes=e, forward=True
    )
    if prior is None:
        flat = x.reshape(len(x), -1) / p.prior_std
        log_p = -0.5 * jnp.sum(flat**2, -1) - d * (0.5 * np.log(2 * np.pi) + np.log(p.prior_std))
    else:
        log_p = prior(x)
    change = d * np.log(_scale(p, variable, p.t_max) / _scale(p, variable, start))
    n = rise.shape[1]
    error = jnp.std(rise, 1, ddof=1) / np.sqrt(n) if n > 1 else jnp.full(len(x), 0.0 if e is None else np.nan, x.dtype)
    return log_p + rise.mean(1) + change, error, info


def bits_per_dim(log_p: Any, d: int, levels: int = 256, span: float = 2.0) -> Any:
    """-log2 p(image) / d of a log-density in nats of data that fill `span` (2 for [-1, 1]) in `levels` steps.

    For x0 dequantised uniformly, x0 = (value + u) span / levels - span / 2 with u in [0, 1), this bounds the bits a
    dimension of the discrete image from above (Theis et al. 2016). The offset log2(levels / span) is 7 for 8-bit
    images in [-1, 1], as in score_sde.
    """
    return -log_p / (d * np.log(2.0)) + np.log2(levels / span)


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
    stop, final = _stop(p, end, last)
    if stop == 0 or not stop < start <= p.t_max:
        raise ValueError(f"dpm_solver_adaptive: expected 0 < last < start <= {p.t_max:g}, got last={stop:g}, {start=}")
    x = _array(x)
    shift = int(p.alpha(start) == 0)
    if shift:
        later = start - min(1e-3 * p.t_max, 0.5 * (start - stop))
        x = float(p.sigma(later) / p.sigma(start)) * x + float(p.alpha(later)) * _x0(denoiser, x, start)
        start = later
    lams = p.lam(np.array([start, stop])).tolist()
    out, info = _dpm(denoiser, x, lams, (rtol, atol, theta, h_init), order, max_steps, as_published)
    info = _arrived(info._replace(nfe=info.nfe + shift), max_steps)
    return (_x0(denoiser, out, stop), info._replace(nfe=info.nfe + 1)) if final else (out, info)


# The parts ---------------------------------------------------------------------------------------------------------


def _stop(p: Process, end: float, last: float | None) -> tuple[float, bool]:
    """Where the integration stops, and whether an x0 prediction is to follow."""
    if not 0 <= end < p.t_max:
        raise ValueError(f"end is {end}; expected 0 <= end < {p.t_max:g}")
    if end > 0:
        return float(end), False
    last = p.t_min if last is None else float(last)
    if not 0 <= last < p.t_max:
        raise ValueError(f"last is {last}; expected 0 <= last < {p.t_max:g}, the time of the last x0 prediction")
    return last, last > 0


def _array(x: Any) -> Array:
    if not hasattr(x, "shape") or x.ndim < 2 or x.dtype not in (jnp.float32, jnp.float64):
        what = f"{type(x).__name__} of shape {x.shape}, {x.dtype}" if hasattr(x, "shape") else type(x).__name__
        raise TypeError(f"expected one float32 or float64 array (batch, ...), got {what}; ode takes no pytrees")
    return jnp.asarray(x)


def _position(p: Process, variable: str, t: float) -> float:
    a, s = float(p.alpha(t)), float(p.sigma(t))
    with np.errstate(divide="ignore"):
        values = {"angle": np.arctan2(s, a), "lam": np.log(a) - np.log(s), "sigma": np.divide(s, a), "t": t}
    return float(values[variable])


def _scale(p: Process, variable: str, t: Any) -> Any:
    if variable == "t":
        return np.float64(1.0)
    a, s = p.alpha(t), p.sigma(t)
    return a if variable == "sigma" else (jnp if isinstance(t, jax.Array) else np).hypot(a, s)


def _time(p: Process, variable: str, u: Array) -> Array:
    if variable == "t":
        return u
    lam = {"lam": lambda: u, "sigma": lambda: -jnp.log(u)}.get(variable, lambda: _log_cot(u))()
    return jnp.clip(p.t_of_lam(lam), 0.0, p.t_max)


def _log_cot(u: Array) -> Array:
    """log(1 / tan u), with the ends -inf at pi/2 (which float32 rounds up) and +inf at 0."""
    return jnp.log(jnp.maximum(jnp.cos(u), 0.0)) - jnp.log(jnp.sin(u))


def _slope(denoiser: Denoiser, variable: str, u: Array, z: Array) -> Array:
    """dz/du; u a scalar, or (batch, 1, ...)."""
    p, t = denoiser.process, _time(denoiser.process, variable, u)
    x = jnp.asarray(_scale(p, variable, t), z.dtype) * z
    out = cast_like(denoiser.apply(x, t, denoiser.init(x))[0], x)
    to = lambda kind: convert(p, x, t, out, denoiser.prediction, kind)
    if variable in ("sigma", "t"):
        return to("eps" if variable == "sigma" else "velocity")
    phi = u if variable == "angle" else jnp.arctan(jnp.exp(-u))
    along = jnp.cos(phi) * to("eps") - jnp.sin(phi) * to("x0")
    return along if variable == "angle" else -jnp.sin(phi) * jnp.cos(phi) * along


def _x0(denoiser: Denoiser, x: Array, t: float) -> Array:
    return denoiser(x, t)


def _field(denoiser: Denoiser, variable: str, probes: Array | None, trace: bool) -> Callable[[Array, Any], Any]:
    """The slope of the state: z, or with `trace` (z, minus the running integral of its divergence a probe)."""

    def field(u: Array, y: Any) -> Any:
        z = y[0] if trace else y
        u = u.reshape(u.shape + (1,) * (z.ndim - 1)) if u.ndim else u
        f = lambda z: _slope(denoiser, variable, u, z)
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


def _integrate(
    denoiser: Denoiser, x: Any, start: float | None, stop: float, variable: str, solver: Any, rtol: float, atol: float,
    per_sample: bool, max_steps: int, *, inner: tuple[float, ...] = (), probes: Array | None = None,
    forward: bool = False,
) -> tuple[Any, Info]:  # fmt: skip
    """From start down to stop; with `forward`, from stop up to start, and the integral of the divergence too."""
    import diffrax

    p, x = denoiser.process, _array(x)
    if variable not in VARIABLES:
        raise ValueError(f"variable is {variable!r}; expected one of {', '.join(VARIABLES)}")
    start = p.t_max if start is None else float(start)
    if not 0 <= stop < start <= p.t_max * (1 + 1e-12):
        raise ValueError(f"expected 0 <= end < start <= {p.t_max:g}, got {start=:g}, end={stop:g} for {p}")
    u0, u1, *inner_u = (_position(p, variable, t) for t in (start, stop, *inner))
    if not np.isfinite([u0, u1]).all():
        raise ValueError(f"{variable!r} is infinite at time {start if np.isinf(u0) else stop:g}; use variable='angle'")
    if isinstance(solver, str) and not hasattr(diffrax, solver):
        raise ValueError(f"diffrax has no solver {solver!r}; try 'Tsit5', 'Dopri5', 'Dopri8' or 'Bosh3'")
    solver = getattr(diffrax, solver)() if isinstance(solver, str) else solver
    ends = (stop, start) if forward else (start, stop)
    points = (u1, u0) if forward else (u0, *inner_u, u1)
    options = (variable, solver, per_sample, max_steps, forward, ends)
    with jax.numpy_dtype_promotion("standard"):  # Diffrax mixes dtypes
        ys, info = _diffeqsolve(denoiser, x, points, probes, (rtol, atol), *options)
    return ys, _arrived(info, max_steps)


def _arrived(info: Info, max_steps: int) -> Info:
    if not isinstance(info.success, Tracer) and not (ok := np.asarray(info.success)).all():
        raise RuntimeError(
            f"{(~ok).sum()} of {ok.size} samples did not arrive within max_steps = {max_steps}: their states are not "
            "finite, or the tolerance is below what the dtype can give; loosen rtol and atol or raise max_steps"
        )
    return info


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8, 9, 10))
def _diffeqsolve(denoiser, x, points, probes, tolerance, variable, solver, per_sample, max_steps, trace, ends):
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
            adjoint=diffrax.ForwardMode(),
        )  # fmt: skip
        stats = (found.stats["num_steps"], found.stats["num_rejected_steps"])
        return found.ys, (*stats, found.result == diffrax.RESULTS.successful)

    first, final = (jnp.asarray(_scale(denoiser.process, variable, t), x.dtype) for t in ends)
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
    scales = _scale(denoiser.process, variable, _time(denoiser.process, variable, points[1:]))
    return ys * jnp.asarray(scales, x.dtype).reshape(-1, *(1,) * x.ndim), info


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
