"""Exposure bias: a network meets its own samples, not the noised data it was trained on. Three remedies, no training.

All ask the network something else than the sampler would and leave the sampler as it is: a Denoiser becomes a
Denoiser, for every solver.

    time_shift        at the time whose noise explains the sample's variance    (Li et al. 2023, arXiv 2305.15583)
    epsilon_scaling   its noise a little smaller                                (Ning et al. 2023, arXiv 2308.15321)
    conditioning_map  at calibrated times: NoiseShift, whose table `calibrate_noise_shift` finds on data
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from jdiff.denoiser import Denoiser, cast_like
from jdiff.predict import check_kind, convert, model_time, wide


@dataclass(frozen=True)
class _Ask:
    """Evaluate at (x, asked) and take what was said, as the prediction `keep`, to be said at (x, t)."""

    keep: str

    def __call__(self, denoiser: Denoiser, x: PyTree, t: Any, asked: Any, carry: PyTree) -> tuple[PyTree, PyTree]:
        out, carry = denoiser.apply(x, asked, carry)
        p, own, out = denoiser.process, denoiser.prediction, cast_like(out, x)
        if self.keep != own:
            out = convert(p, x, t, convert(p, x, asked, out, own, self.keep), self.keep, own)
        return out, carry


# --- time shift
def time_shift(
    denoiser: Denoiser, window: float, cutoff: float, *, levels: int = 61, data_variance: Any = 0.0, keep: str = "eps"
) -> Denoiser:
    """The Time-Shift sampler (Li et al. 2023, algorithm 2): each sample's variance tells the time to ask at.

    While t > cutoff the network is asked at the t_s in [t - window, t + window] whose noise variance sigma(t_s)^2 is
    nearest to the variance of the sample's elements; the solver keeps t. The first evaluation is not shifted.

    window, cutoff   in the process's time: 30 and 300 of the paper's 1000 steps are 0.03 and 0.3. The window is half
                     as wide as the range (the official code halves its `window_size` for PNDM and DPM-Solver alone)
    levels           candidates, evenly spaced over the window; odd, so that t is one of them
    data_variance    mean variance of the elements of a clean sample. Published is 0; but a noised sample's variance is
                     sigma^2 + alpha^2 data_variance, so that with 0 the noise is overestimated
    keep             the prediction that is kept from t_s to t; the paper's is the noise

    x is an array, batch axis first; its times become (batch, 1, ..). ValueError for a window that is not positive, an
    even number of levels, a cutoff outside [0, t_max]; TypeError, when sampling, for a sample that is a pytree.
    """
    if not window > 0 or levels < 3 or levels % 2 == 0:
        raise ValueError(
            f"time_shift: expected window > 0 and an odd number of levels from 3, got {window=}, {levels=}"
        )
    if not 0 <= cutoff <= denoiser.process.t_max:
        raise ValueError(f"time_shift: cutoff is {cutoff}; expected a time in [0, {denoiser.process.t_max:g}]")
    shift = _Shift(levels, _Ask(check_kind(keep)))
    settings = tuple(jnp.asarray(v, jnp.float32) for v in (window, cutoff, data_variance))
    return Denoiser(
        Partial(_first, denoiser.init), Partial(shift, denoiser, settings), denoiser.process, denoiser.prediction
    )


def _first(init: Partial, x: PyTree) -> PyTree:
    if not isinstance(x, jax.Array):
        raise TypeError(f"time_shift takes the variance of one array a sample; the sample is a {type(x).__name__}")
    return jnp.ones((x.shape[0],) + (1,) * (x.ndim - 1), bool), init(x)  # nothing was evaluated yet, a sample


@dataclass(frozen=True)
class _Shift:
    levels: int
    ask: _Ask

    def __call__(self, denoiser: Denoiser, settings: Any, x: Array, t: Any, carry: Any) -> tuple[Array, Any]:
        (first, inner), p = carry, denoiser.process
        window, cutoff, data_variance = (v.astype(wide(x.dtype)) for v in settings)
        variance = jnp.var(x, axis=tuple(range(1, x.ndim)), keepdims=True, ddof=1)
        steps = jnp.linspace(-1.0, 1.0, self.levels, dtype=window.dtype)
        near = jnp.clip(t + window * steps.reshape(-1, *[1] * x.ndim), p.t_min, p.t_max)
        off = jnp.abs(p.sigma(near) ** 2 + p.alpha(near) ** 2 * data_variance - variance)  # (levels, batch, 1, ..)
        best = jnp.take_along_axis(jnp.broadcast_to(near, off.shape), jnp.argmin(off, 0, keepdims=True), 0)[0]
        asked = jnp.where(first | (t <= cutoff), t, best)
        out, inner = self.ask(denoiser, x, t, asked, inner)
        return out, (jnp.zeros_like(first), inner)


# --- epsilon scaling
def epsilon_scaling(denoiser: Denoiser, b: Any, k: Any = 0.0) -> Denoiser:
    """Epsilon scaling (Ning et al. 2023): the predicted noise over lambda(t) = k t + b, at every t.

    The paper's uniform schedule is k = 0, its choice in nearly all tables; b depends on the model and the number of
    steps: the official commands for 100 steps have 1.017 (CIFAR-10), 1.006 (LSUN tower, ImageNet 64), 1.005 (FFHQ 128)
    and 1.004 (ImageNet 128). t is the process's time, so that k is the paper's times its number of steps. b = 1, k = 0
    is the identity. b and k are numbers or arrays, arguments of the compiled program. ValueError for b <= 0.
    """
    if isinstance(b, (int, float)) and not b > 0:
        raise ValueError(f"epsilon_scaling: b is {b}; expected a divisor near 1, such as 1.005")
    b, k = (jnp.asarray(v, jnp.float32) if isinstance(v, (int, float)) else v for v in (b, k))
    return Denoiser(denoiser.init, Partial(_scaled, denoiser, b, k), denoiser.process, denoiser.prediction)


def _scaled(denoiser: Denoiser, b: Any, k: Any, x: PyTree, t: Any, carry: PyTree) -> tuple[PyTree, PyTree]:
    out, carry = denoiser.apply(x, t, carry)
    p, kind = denoiser.process, denoiser.prediction
    eps = convert(p, x, t, cast_like(out, x), kind, "eps")
    eps = jax.tree.map(lambda e: e / (jnp.asarray(k, wide(e.dtype)) * t + jnp.asarray(b, wide(e.dtype))), eps)
    return convert(p, x, t, eps, "eps", kind), carry


# --- NoiseShift
def conditioning_map(denoiser: Denoiser, times: Any, asked: Any, keep: str | None = None) -> Denoiser:
    """NoiseShift's sampler: the network is conditioned on another time, and the schedule stays what it is.

    times, asked   (n,), as `calibrate_noise_shift` returns them, in any order: at times[i] the network is asked at
                   asked[i]; linear between them, constant outside
    keep           the prediction that is kept from the one time to the other; the network's own if None, as published
                   (there the velocity)

    ValueError for tables that are not two vectors of one length, or that leave [0, t_max].
    """
    times, asked = np.asarray(times, np.float64), np.asarray(asked, np.float64)
    if times.ndim != 1 or not len(times) or times.shape != asked.shape:
        raise ValueError(f"conditioning_map: expected two vectors of one length, got {times.shape} and {asked.shape}")
    both = np.stack([times, asked])
    if not ((both >= 0) & (both <= denoiser.process.t_max)).all():
        raise ValueError(
            f"conditioning_map: times in [{both.min():g}, {both.max():g}]; expected [0, {denoiser.process.t_max:g}]"
        )
    table = jnp.asarray(both[:, np.argsort(times)])
    ask = Partial(_Ask(check_kind(denoiser.prediction if keep is None else keep)))
    return Denoiser(denoiser.init, Partial(_mapped, ask, denoiser, table), denoiser.process, denoiser.prediction)


def _mapped(ask: Any, denoiser: Denoiser, table: Array, x: PyTree, t: Any, carry: PyTree) -> tuple[PyTree, PyTree]:
    times, asked = table.astype(t.dtype)
    return ask(denoiser, x, t, jnp.interp(t, times, asked), carry)


def calibrate_noise_shift(
    denoiser: Denoiser,
    x0: Float[Array, "batch *d"],
    times: Any,
    key: Array,
    *,
    span: float = 1.5,
    grid: int = 13,
    rounds: int = 3,
    keep: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """NoiseShift's calibration: for each time, the conditioning at which one reverse step errs least on data.

    For noised data x_t (the same noise at every time) it minimises E|x'(asked) - x_{t-1}|^2 over `asked`, x' one step
    of the sampler. With one noise in x_t and x_{t-1} that error is a number times that of the x0 prediction, whatever
    the step, so it is the latter that is measured. Coarse to fine, from the cleanest time to the noisiest, never below
    the one before: `grid` candidates over half log-SNRs within `span` of the time's own, then as many over the two
    intervals around the best, `rounds` times.

    x0      data at the resolution to sample at, a few dozen samples
    times   (n,) evaluation times; 0 and t_max are allowed (t = 0 is left as it is)
    keep    as in `conditioning_map`

    Returns (times, asked), (n,) each, float64, rising. ValueError for a search that is none.
    """
    if span <= 0 or grid < 3 or rounds < 1:
        got = f"{span=}, {grid=}, {rounds=}"
        raise ValueError(f"calibrate_noise_shift: expected span > 0, grid >= 3 and rounds >= 1, got {got}")
    p = denoiser.process
    times = np.unique(np.asarray(times, np.float64))
    x0 = jnp.asarray(x0)
    eps = p.kernel(key, x0)
    ask = Partial(_Ask(check_kind(denoiser.prediction if keep is None else keep)))
    losses = jax.jit(_losses)
    highest = float(p.lam(np.array(p.t_min)))
    lowest = float(p.lam(np.array(p.t_max if p.alpha(p.t_max) > 0 else (1.0 - 1e-3) * p.t_max)))
    bound, asked = highest, []
    for t in times:
        if t == 0:
            asked.append(0.0)
            continue
        centre, width = float(np.clip(p.lam(t), lowest, highest)), span
        for _ in range(rounds):
            lam = np.clip(centre + width * np.linspace(-1.0, 1.0, grid), lowest, bound)
            found = losses(ask, denoiser, x0, eps, model_time(t, x0), model_time(p.t_of_lam(lam), x0))
            centre, width = float(lam[int(np.argmin(found))]), 2.0 * width / (grid - 1)
        bound = min(bound, centre)
        asked.append(float(p.t_of_lam(centre)))
    return times, np.array(asked)


def _losses(ask: Any, denoiser: Denoiser, x0: Array, eps: Array, t: Array, asked: Array) -> Array:
    """Mean square error of the x0 prediction at (x_t, asked), for every one of asked (m,)."""
    p, x = denoiser.process, denoiser.process.mix(x0, eps, t)

    def loss(s: Array) -> Array:
        out, _ = ask(denoiser, x, t, s, denoiser.init(x))
        return jnp.mean((convert(p, x, t, out, denoiser.prediction, "x0") - x0) ** 2)

    return jax.lax.map(loss, asked)
