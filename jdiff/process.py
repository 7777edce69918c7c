"""A process is two functions of time: x_t = alpha(t) x0 + sigma(t) eps, with eps standard normal.

Everything else follows from alpha and sigma: the half log-SNR lam = log(alpha / sigma), the forward SDE
dx = f(t) x dt + g(t) dW, the probability-flow ODE, and the conversions in `jdiff.predict`.

Time: t = 0 is data (alpha = 1, sigma = 0, exactly), t = t_max is noise. `t_min` is the last time a grid
visits before the exact data end where the grid's own formula cannot reach sigma = 0 (log-SNR, Karras).
Time is a scalar or an array that broadcasts against the sample: one time a sample, a frame, a token, a pixel.

Host and device run the same source: NumPy numbers and arrays are computed in float64 by NumPy, JAX arrays
(traced or not) by JAX in their own dtype. Formulas are written so that neither end cancels in float32.

Own processes: subclass `Process`, give `alpha`, `sigma`, `dalpha`, `dsigma` and `t_of_lam`.
"""

import functools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jdiff import noise

Time = Any  # float, NumPy array or JAX array; any shape that broadcasts against the sample


def _xp(t: Time) -> ModuleType:
    return jnp if isinstance(t, jax.Array) else np


def _float(t: Time) -> Any:
    return t if isinstance(t, jax.Array) else np.asarray(t, np.float64)


def _reciprocal(x: Any) -> Any:
    """1 / x, and 0 where x is 0."""
    xp = _xp(x)
    return xp.where(x == 0, 0.0, 1.0 / xp.where(x == 0, 1.0, x))


@dataclass(frozen=True)
class Process:
    """Base of all processes; frozen and hashable, so that it may be a static argument of compiled functions."""

    t_min: float
    t_max: float

    def alpha(self, t: Time) -> Any:
        """Signal scale at time t, shaped like t."""
        raise NotImplementedError

    def sigma(self, t: Time) -> Any:
        """Noise standard deviation at time t, shaped like t."""
        raise NotImplementedError

    def dalpha(self, t: Time) -> Any:
        """d alpha / dt."""
        raise NotImplementedError

    def dsigma(self, t: Time) -> Any:
        """d sigma / dt; huge but finite where sigma has an infinite slope (VP processes at t = 0)."""
        raise NotImplementedError

    def t_of_lam(self, lam: Any) -> Any:
        """The time at which the half log-SNR is lam; +inf gives 0."""
        raise NotImplementedError

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior from which sampling starts."""
        return float(self.sigma(self.t_max))

    def lam(self, t: Time) -> Any:
        """Half log-SNR log(alpha / sigma): rises from noise to data; +inf at t = 0, -inf where alpha = 0."""
        t = _float(t)
        with np.errstate(divide="ignore"):
            return _xp(t).log(self.alpha(t)) - _xp(t).log(self.sigma(t))

    def drift(self, t: Time) -> Any:
        """f(t) of the forward SDE dx = f x dt + g dW: d log alpha / dt."""
        return self.dalpha(t) / self.alpha(t)

    def diffusion(self, t: Time) -> Any:
        """g(t) of the forward SDE: g^2 = d sigma^2/dt - 2 f sigma^2 (Kingma et al. 2021, eq. 2)."""
        s = self.sigma(t)
        g2 = 2.0 * s * self.dsigma(t) - 2.0 * self.drift(t) * s * s
        return _xp(g2).sqrt(_xp(g2).maximum(g2, 0.0))

    def mix(self, x0: PyTree, eps: PyTree, t: Time) -> PyTree:
        """alpha(t) x0 + sigma(t) eps, leaf by leaf."""
        a, s = self.alpha(t), self.sigma(t)
        return jax.tree.map(lambda x, e: a * x + s * e, x0, eps)

    def diffuse(self, key: Array, x0: PyTree, t: Time, index: Array | None = None) -> PyTree:
        """A draw of x_t given x0; sample i's noise depends on key and index[i] (default i) alone."""
        x0 = jax.tree.map(jnp.asarray, x0)
        t = jnp.asarray(t, jax.tree.leaves(x0)[0].dtype)
        return self.mix(x0, noise.normal(key, x0, index), t)

    def prior(self, key: Array, shape: tuple[int, ...], index: Array | None = None, dtype: Any = None) -> Array:
        """Noise at t_max, shape (batch, ...): what sampling starts from; keyed by sample as in `diffuse`."""
        like = jax.ShapeDtypeStruct(shape, jnp.float32 if dtype is None else dtype)
        return self.prior_std * noise.normal(key, like, index)

    def check_times(self, t: Any, name: str = "times") -> np.ndarray:
        """Host check of a time grid: finite, inside [0, t_max], strictly falling, at least two. Float64 copy."""
        t = np.asarray(t, np.float64)
        if t.ndim < 1 or t.shape[0] < 2:
            raise ValueError(f"{name} has shape {t.shape}; expected (n + 1,) with n >= 1 steps, from noise to data")
        if not np.isfinite(t).all():
            i = int(np.argwhere(~np.isfinite(t))[0][0])
            raise ValueError(f"{name}[{i}] is {t[i]}; every time must be finite")
        if t.min() < 0 or t.max() > self.t_max * (1 + 1e-12):
            bad = t.flat[int(np.argmax((t < 0) | (t > self.t_max * (1 + 1e-12))))]
            raise ValueError(
                f"{name} holds {bad:.6g}, outside [0, {self.t_max:g}] of {self}; 0 is data, {self.t_max:g} noise"
            )
        bad = np.argwhere(np.diff(t, axis=0) >= 0)
        if len(bad):
            i = int(bad[0][0])
            what = "is repeated" if np.any(t[i] == t[i + 1]) else "rises"
            raise ValueError(
                f"{name} must fall strictly from noise to data, but {what}: {name}[{i}] = {t[i]}, {name}[{i + 1}] = "
                f"{t[i + 1]}; drop repeated times, or reverse a grid that runs from data to noise"
            )
        return t


class _VariancePreserving(Process):
    """alpha^2 + sigma^2 = 1, from log alpha and its derivative, or from alpha, sigma and dalpha themselves."""

    def log_alpha(self, t: Time) -> Any:
        raise NotImplementedError

    def dlog_alpha(self, t: Time) -> Any:
        raise NotImplementedError

    @property
    def prior_std(self) -> float:
        return 1.0

    def alpha(self, t: Time) -> Any:
        t = _float(t)
        return _xp(t).exp(self.log_alpha(t))

    def sigma(self, t: Time) -> Any:
        t = _float(t)
        return _xp(t).sqrt(-_xp(t).expm1(2.0 * self.log_alpha(t)))

    def dalpha(self, t: Time) -> Any:
        t = _float(t)
        return self.alpha(t) * self.dlog_alpha(t)

    def dsigma(self, t: Time) -> Any:
        t = _float(t)
        # sigma^2 = 1 - alpha^2, so sigma sigma' = -alpha alpha'
        return -self.alpha(t) * self.dalpha(t) / _xp(t).maximum(self.sigma(t), 1e-15)


@dataclass(frozen=True)
class VPLinear(_VariancePreserving):
    beta_min: float
    beta_max: float

    def log_alpha(self, t: Time) -> Any:
        return -0.25 * (self.beta_max - self.beta_min) * t * t - 0.5 * self.beta_min * t

    def dlog_alpha(self, t: Time) -> Any:
        return -0.5 * (self.beta_max - self.beta_min) * t - 0.5 * self.beta_min

    def t_of_lam(self, lam: Any) -> Any:
        lam = _float(lam)
        xp = _xp(lam)
        minus_log_alpha = 0.5 * xp.logaddexp(xp.zeros_like(lam), -2.0 * lam)
        half = 0.5 * self.beta_min
        root = xp.sqrt(half * half + (self.beta_max - self.beta_min) * minus_log_alpha)
        return 2.0 * minus_log_alpha / (half + root)


@dataclass(frozen=True)
class VPCosine(_VariancePreserving):
    s: float

    @property
    def _u0(self) -> float:
        return 0.5 * math.pi * self.s / (1.0 + self.s)

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1.0 + self.s)

    def alpha(self, t: Time) -> Any:
        t = _float(t)  # cos(u) as a sine of the distance to t = 1: no cancellation there
        return _xp(t).sin(self._rate * (1.0 - t)) / math.cos(self._u0)

    def sigma(self, t: Time) -> Any:
        t = _float(t)  # cos^2 u0 - cos^2 u = sin(u - u0) sin(u + u0): no cancellation at t = 0
        d = self._rate * t
        return _xp(t).sqrt(_xp(t).sin(d) * _xp(t).sin(d + 2.0 * self._u0)) / math.cos(self._u0)

    def dalpha(self, t: Time) -> Any:
        t = _float(t)
        return -self._rate * _xp(t).cos(self._rate * (1.0 - t)) / math.cos(self._u0)

    def t_of_lam(self, lam: Any) -> Any:
        lam = _float(lam)
        xp = _xp(lam)
        a2 = xp.exp(-xp.logaddexp(xp.zeros_like(lam), -2.0 * lam))
        s2 = xp.exp(-xp.logaddexp(xp.zeros_like(lam), 2.0 * lam))
        c0, s0 = math.cos(self._u0), math.sin(self._u0)
        u = xp.arctan2(xp.sqrt(s0 * s0 + c0 * c0 * s2), c0 * xp.sqrt(a2))
        return xp.maximum((u - self._u0) / self._rate, 0.0)


@dataclass(frozen=True)
class VPDiscrete(_VariancePreserving):
    betas: tuple[float, ...]

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.betas)
        log_alpha = 0.5 * np.cumsum(np.log1p(-np.asarray(self.betas)))
        return np.arange(n + 1) / n, np.concatenate([[0.0], log_alpha])

    def log_alpha(self, t: Time) -> Any:
        xp, (times, table) = _xp(t), self._table
        if xp is np:
            return np.interp(t, times, table)
        return jnp.interp(t, jnp.asarray(times, t.dtype), jnp.asarray(table, t.dtype))

    def dlog_alpha(self, t: Time) -> Any:
        xp, (times, table) = _xp(t), self._table
        slopes = np.diff(table) / np.diff(times)
        segment = xp.clip(xp.ceil(t * len(self.betas)).astype(int) - 1, 0, len(self.betas) - 1)
        return slopes[segment] if xp is np else jnp.asarray(slopes, t.dtype)[segment]

    def t_of_lam(self, lam: Any) -> Any:
        lam = _float(lam)
        xp, (times, table) = _xp(lam), self._table
        minus_log_alpha = 0.5 * xp.logaddexp(xp.zeros_like(lam), -2.0 * lam)
        if xp is np:
            return np.interp(minus_log_alpha, -table, times)
        return jnp.interp(minus_log_alpha, jnp.asarray(-table, lam.dtype), jnp.asarray(times, lam.dtype))


@dataclass(frozen=True)
class ZeroTerminal(_VariancePreserving):
    """alpha of `base`, moved and scaled beyond time t_first so that it ends at 0; before it, unchanged."""

    base: _VariancePreserving
    t_first: float

    @property
    def _ends(self) -> tuple[float, float, float]:
        """alpha at the first and the last level, and the scale that keeps the first."""
        first, last = float(self.base.alpha(self.t_first)), float(self.base.alpha(self.t_max))
        return first, last, first / (first - last)

    def alpha(self, t: Time) -> Any:
        t = _float(t)
        _, last, scale = self._ends
        return _xp(t).where(t <= self.t_first, self.base.alpha(t), scale * (self.base.alpha(t) - last))

    def sigma(self, t: Time) -> Any:
        t = _float(t)
        xp, (first, last, scale) = _xp(t), self._ends
        one_minus = -scale * (xp.expm1(self.base.log_alpha(t)) + last * (1.0 - first) / first)  # 1 - alpha
        beyond = xp.sqrt(xp.maximum(one_minus, 0.0) * (1.0 + self.alpha(t)))
        return xp.where(t <= self.t_first, self.base.sigma(t), beyond)

    def dalpha(self, t: Time) -> Any:
        t = _float(t)
        return _xp(t).where(t <= self.t_first, 1.0, self._ends[2]) * self.base.dalpha(t)

    def t_of_lam(self, lam: Any) -> Any:
        lam = _float(lam)
        xp, (first, last, scale) = _xp(lam), self._ends
        s2 = xp.exp(-xp.logaddexp(xp.zeros_like(lam), 2.0 * lam))
        a = xp.exp(-0.5 * xp.logaddexp(xp.zeros_like(lam), -2.0 * lam))
        inner = a / scale + last  # the base's alpha, and 1 - alpha without cancellation
        one_minus = last * (1.0 - first) / first + s2 / (1.0 + a) / scale
        beyond = xp.log(inner) - 0.5 * xp.log(xp.maximum(one_minus, 1e-37) * (1.0 + inner))
        return self.base.t_of_lam(xp.where(lam >= self.base.lam(self.t_first), lam, beyond))


@dataclass(frozen=True)
class MeanReverting(Process):
    """alpha of `base`, and sigma_inf times its sigma."""

    base: Process
    sigma_inf: float

    @property
    def prior_std(self) -> float:
        return self.sigma_inf * self.base.prior_std

    def alpha(self, t: Time) -> Any:
        return self.base.alpha(t)

    def sigma(self, t: Time) -> Any:
        return self.sigma_inf * self.base.sigma(t)

    def dalpha(self, t: Time) -> Any:
        return self.base.dalpha(t)

    def dsigma(self, t: Time) -> Any:
        return self.sigma_inf * self.base.dsigma(t)

    def t_of_lam(self, lam: Any) -> Any:
        return self.base.t_of_lam(_float(lam) + math.log(self.sigma_inf))


@dataclass(frozen=True)
class EDM(Process):
    def alpha(self, t: Time) -> Any:
        t = _float(t)
        return _xp(t).ones_like(t)

    def sigma(self, t: Time) -> Any:
        return _float(t)

    def dalpha(self, t: Time) -> Any:
        t = _float(t)
        return _xp(t).zeros_like(t)

    def dsigma(self, t: Time) -> Any:
        t = _float(t)
        return _xp(t).ones_like(t)

    def t_of_lam(self, lam: Any) -> Any:
        lam = _float(lam)
        return _xp(lam).exp(-lam)


@dataclass(frozen=True)
class Flow(Process):
    def alpha(self, t: Time) -> Any:
        return 1.0 - _float(t)

    def sigma(self, t: Time) -> Any:
        return _float(t)

    def dalpha(self, t: Time) -> Any:
        t = _float(t)
        return -_xp(t).ones_like(t)

    def dsigma(self, t: Time) -> Any:
        t = _float(t)
        return _xp(t).ones_like(t)

    def t_of_lam(self, lam: Any) -> Any:
        lam = _float(lam)
        return _xp(lam).exp(-_xp(lam).logaddexp(_xp(lam).zeros_like(lam), lam))


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> Process:
    """Variance preserving with beta(t) linear in t in [0, 1] (Song et al. 2021, eq. 33): the DDPM schedule."""
    if not 0 < beta_min < beta_max:
        raise ValueError(f"vp_linear: expected 0 < beta_min < beta_max, got {beta_min=}, {beta_max=}")
    return VPLinear(_check_t_min(t_min, 1.0), 1.0, float(beta_min), float(beta_max))


def vp_cosine(s: float = 0.008, t_min: float = 1e-3) -> Process:
    """Variance preserving, alpha = cos(pi/2 (t + s)/(1 + s)) / cos(pi/2 s/(1 + s)), t in [0, 1].

    Nichol and Dhariwal 2021, eq. 17, without their clipping of beta at 0.999: alpha(1) is exactly 0 here.
    """
    if not s > 0:
        raise ValueError(f"vp_cosine: expected s > 0, got {s=}")
    return VPCosine(_check_t_min(t_min, 1.0), 1.0, float(s))


def vp_discrete(betas: Any) -> Process:
    """Variance preserving from N discrete betas: alpha(i / N)^2 = prod_{j <= i} (1 - beta_j), alpha(0) = 1.

    Between the levels log alpha is linear in t (as in DPM-Solver's NoiseScheduleVP). t is in [0, 1]; a network
    that was trained on indices 0..N-1 wants index = N t - 1, which may be fractional.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(
            f"vp_discrete: expected a vector of at least two betas inside (0, 1), got shape {betas.shape} with values "
            f"in [{betas.min() if betas.size else math.nan:g}, {betas.max() if betas.size else math.nan:g}]"
        )
    return VPDiscrete(1.0 / len(betas), 1.0, tuple(betas.tolist()))


def zero_terminal_snr(process: Any) -> Process:
    """A variance-preserving process whose alpha at t_max is 0, so that pure noise IS its law there.

    process: betas as in `vp_discrete`, or a VP process. Lin et al. 2023 (arXiv 2305.08891), algorithm 1: beyond the
    first level alpha becomes alpha_1 (alpha - alpha_T) / (alpha_1 - alpha_T); a process in continuous time has its
    first level at t = 0. (As betas the last one would be 1, which `vp_discrete` cannot hold.) At alpha = 0 an eps
    network says nothing about x0: train with prediction="v" and sample from t_max, as `times.uniform` does: with
    index = N t - 1 those are the paper's "trailing" steps.
    """
    base = process if isinstance(process, Process) else vp_discrete(process)
    if not isinstance(base, _VariancePreserving):
        raise ValueError(f"zero_terminal_snr: {base} is not variance preserving; expected betas or a VP process")
    if not base.alpha(base.t_max) > 1e-12:
        raise ValueError(f"zero_terminal_snr: {base} already ends at alpha = 0; use it as it is")
    first = base.t_min if isinstance(base, VPDiscrete) else 0.0
    return ZeroTerminal(base.t_min, base.t_max, base, first)


def mean_reverting(
    theta: str | Any = "cosine", sigma_inf: float = 50 / 255, n: int = 100, end: float = 0.005
) -> Process:
    """IR-SDE (Luo et al. 2023, arXiv 2301.11699): dx = theta (mu - x) dt + g dW with g^2 = 2 theta sigma_inf^2.

    x_t = a x0 + (1 - a) mu + sigma_inf sqrt(1 - a^2) eps with a = exp(-integral of theta). This is the process of
    x - (1 - a) mu: alpha = a, sigma = sigma_inf sqrt(1 - a^2); `jdiff.anchored` holds mu. As in the official code,
    theta is a table of n + 1 values, "constant", "linear" or "cosine" (or your own), scaled so that a ends at `end`;
    t is in [0, 1], log a linear between the levels, and the network's index is (n + 1) t - 1. `end` (0.01 in
    IR-SDE, 0.005 in DA-CLIP) is what is left of x0 in the prior.
    """
    if isinstance(theta, str):
        cosine = lambda i: np.cos((i / (n + 2) + 0.008) / 1.008 * 0.5 * np.pi) ** 2
        schedules = {
            "constant": np.ones(n + 1),
            "linear": np.linspace(1e-4, 2e-2, n + 1),
            "cosine": 1.0 - cosine(np.arange(1, n + 2)) / cosine(0),
        }
        if theta not in schedules:
            raise ValueError(f"mean_reverting: theta is {theta!r}; expected one of {', '.join(schedules)}, or values")
        theta = schedules[theta]
    theta = np.asarray(theta, np.float64)
    if theta.ndim != 1 or len(theta) < 2 or not (theta > 0).all():
        raise ValueError(f"mean_reverting: theta has shape {theta.shape}; expected a vector of at least two values > 0")
    if not (0 < end < 1 and sigma_inf > 0):
        raise ValueError(f"mean_reverting: expected 0 < end < 1 and sigma_inf > 0, got {end=}, {sigma_inf=}")
    base = vp_discrete(-np.expm1(2.0 * np.log(end) * theta / theta.sum()))
    return MeanReverting(base.t_min, base.t_max, base, float(sigma_inf))


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Process:
    """alpha = 1, sigma = t: the variance-exploding form of Karras et al. 2022; time IS the noise level."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"edm: expected 0 < sigma_min < sigma_max, got {sigma_min=}, {sigma_max=}")
    return EDM(float(sigma_min), float(sigma_max))


def flow(t_min: float = 1e-3) -> Process:
    """alpha = 1 - t, sigma = t: rectified flow / linear interpolant; t = 1 is noise (Liu et al. 2022)."""
    return Flow(_check_t_min(t_min, 1.0), 1.0)


def _check_t_min(t_min: float, t_max: float) -> float:
    if not 0 < t_min < t_max:
        raise ValueError(
            f"expected 0 < t_min < {t_max:g}, got {t_min=}; the exact data end t = 0 is always in the range"
        )
    return float(t_min)


ALL = {
    "vp_linear": vp_linear,
    "vp_cosine": vp_cosine,
    "vp_discrete": vp_discrete,
    "edm": edm,
    "flow": flow,
    "mean_reverting": mean_reverting,
}
