"""Variance-preserving processes, alpha^2 + sigma^2 = 1: linear and cosine in continuous time, and discrete betas."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from .base import Process, Time, check_t_min, float_, xp_of


class VariancePreserving(Process):
    """alpha^2 + sigma^2 = 1, from log alpha and its derivative, or from alpha, sigma and dalpha themselves."""

    def log_alpha(self, t: Time) -> Any:
        raise NotImplementedError

    def dlog_alpha(self, t: Time) -> Any:
        raise NotImplementedError

    @property
    def prior_std(self) -> float:
        return 1.0

    def alpha(self, t: Time) -> Any:
        t = float_(t)
        return xp_of(t).exp(self.log_alpha(t))

    def sigma(self, t: Time) -> Any:
        t = float_(t)
        return xp_of(t).sqrt(-xp_of(t).expm1(2.0 * self.log_alpha(t)))

    def dalpha(self, t: Time) -> Any:
        t = float_(t)
        return self.alpha(t) * self.dlog_alpha(t)

    def dsigma(self, t: Time) -> Any:
        t = float_(t)
        # sigma^2 = 1 - alpha^2, so sigma sigma' = -alpha alpha'
        return -self.alpha(t) * self.dalpha(t) / xp_of(t).maximum(self.sigma(t), 1e-15)


@dataclass(frozen=True)
class VPLinear(VariancePreserving):
    beta_min: float
    beta_max: float

    def log_alpha(self, t: Time) -> Any:
        return -0.25 * (self.beta_max - self.beta_min) * t * t - 0.5 * self.beta_min * t

    def dlog_alpha(self, t: Time) -> Any:
        return -0.5 * (self.beta_max - self.beta_min) * t - 0.5 * self.beta_min

    def t_of_lam(self, lam: Any) -> Any:
        lam = float_(lam)
        xp = xp_of(lam)
        minus_log_alpha = 0.5 * xp.logaddexp(xp.zeros_like(lam), -2.0 * lam)
        half = 0.5 * self.beta_min
        root = xp.sqrt(half * half + (self.beta_max - self.beta_min) * minus_log_alpha)
        return 2.0 * minus_log_alpha / (half + root)


@dataclass(frozen=True)
class VPCosine(VariancePreserving):
    s: float

    @property
    def _u0(self) -> float:
        return 0.5 * math.pi * self.s / (1.0 + self.s)

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1.0 + self.s)

    def alpha(self, t: Time) -> Any:
        t = float_(t)  # cos(u) as a sine of the distance to t = 1: no cancellation there
        return xp_of(t).sin(self._rate * (1.0 - t)) / math.cos(self._u0)

    def sigma(self, t: Time) -> Any:
        t = float_(t)  # cos^2 u0 - cos^2 u = sin(u - u0) sin(u + u0): no cancellation at t = 0
        d = self._rate * t
        return xp_of(t).sqrt(xp_of(t).sin(d) * xp_of(t).sin(d + 2.0 * self._u0)) / math.cos(self._u0)

    def dalpha(self, t: Time) -> Any:
        t = float_(t)
        return -self._rate * xp_of(t).cos(self._rate * (1.0 - t)) / math.cos(self._u0)

    def t_of_lam(self, lam: Any) -> Any:
        lam = float_(lam)
        xp = xp_of(lam)
        a2 = xp.exp(-xp.logaddexp(xp.zeros_like(lam), -2.0 * lam))
        s2 = xp.exp(-xp.logaddexp(xp.zeros_like(lam), 2.0 * lam))
        c0, s0 = math.cos(self._u0), math.sin(self._u0)
        u = xp.arctan2(xp.sqrt(s0 * s0 + c0 * c0 * s2), c0 * xp.sqrt(a2))
        return xp.maximum((u - self._u0) / self._rate, 0.0)


@dataclass(frozen=True)
class VPDiscrete(VariancePreserving):
    betas: tuple[float, ...]

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.betas)
        log_alpha = 0.5 * np.cumsum(np.log1p(-np.asarray(self.betas)))
        return np.arange(n + 1) / n, np.concatenate([[0.0], log_alpha])

    def log_alpha(self, t: Time) -> Any:
        xp, (times, table) = xp_of(t), self._table
        if xp is np:
            return np.interp(t, times, table)
        return jnp.interp(t, jnp.asarray(times, t.dtype), jnp.asarray(table, t.dtype))

    def dlog_alpha(self, t: Time) -> Any:
        xp, (times, table) = xp_of(t), self._table
        slopes = np.diff(table) / np.diff(times)
        segment = xp.clip(xp.ceil(t * len(self.betas)).astype(int) - 1, 0, len(self.betas) - 1)
        return slopes[segment] if xp is np else jnp.asarray(slopes, t.dtype)[segment]

    def t_of_lam(self, lam: Any) -> Any:
        lam = float_(lam)
        xp, (times, table) = xp_of(lam), self._table
        minus_log_alpha = 0.5 * xp.logaddexp(xp.zeros_like(lam), -2.0 * lam)
        if xp is np:
            return np.interp(minus_log_alpha, -table, times)
        return jnp.interp(minus_log_alpha, jnp.asarray(-table, lam.dtype), jnp.asarray(times, lam.dtype))


@dataclass(frozen=True)
class Trigonometric(VariancePreserving):
    def alpha(self, t: Time) -> Any:
        t = float_(t)  # cos as a sine of the distance to t = 1: no cancellation there
        return xp_of(t).sin(0.5 * math.pi * (1.0 - t))

    def sigma(self, t: Time) -> Any:
        t = float_(t)
        return xp_of(t).sin(0.5 * math.pi * t)

    def dalpha(self, t: Time) -> Any:
        return -0.5 * math.pi * self.sigma(t)

    def dsigma(self, t: Time) -> Any:
        return 0.5 * math.pi * self.alpha(t)

    def t_of_lam(self, lam: Any) -> Any:
        lam = float_(lam)
        return xp_of(lam).arctan(xp_of(lam).exp(-lam)) / (0.5 * math.pi)


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> Process:
    """Variance preserving with beta(t) linear in t in [0, 1] (Song et al. 2021, eq. 33): the DDPM schedule."""
    if not 0 < beta_min < beta_max:
        raise ValueError(f"vp_linear: expected 0 < beta_min < beta_max, got {beta_min=}, {beta_max=}")
    return VPLinear(check_t_min(t_min, 1.0), 1.0, float(beta_min), float(beta_max))


def vp_cosine(s: float = 0.008, t_min: float = 1e-3) -> Process:
    """Variance preserving, alpha = cos(pi/2 (t + s)/(1 + s)) / cos(pi/2 s/(1 + s)), t in [0, 1].

    Nichol and Dhariwal 2021, eq. 17, without their clipping of beta at 0.999: alpha(1) is exactly 0 here.
    """
    if not s > 0:
        raise ValueError(f"vp_cosine: expected s > 0, got {s=}")
    return VPCosine(check_t_min(t_min, 1.0), 1.0, float(s))


def trigonometric(t_min: float = 1e-3) -> Process:
    """Variance preserving, alpha = cos(pi t / 2), sigma = sin(pi t / 2): the one-sided trigonometric interpolant.

    Albergo et al. 2023 (arXiv 2303.08797); SiT's GVP path (Ma et al. 2024). It is `vp_cosine` at s = 0, with a finite
    d sigma / dt at t = 0. SiT's other paths are `flow` (Linear) and `vp_linear` (VP).
    """
    return Trigonometric(check_t_min(t_min, 1.0), 1.0)


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


def vp_exponential(k: float = 8.0, n: int = 1000, end: float = 1e-3) -> Process:
    """Variance preserving, alpha^2 = end + (1 - end) (1 - exp(-k (1 - t))) / (1 - exp(-k)) at n levels: HIR-Diff's.

    Pang et al. 2024 (arXiv 2402.15865); k = 8 and end = 1e-3 as in the official code. alpha stays near 1 for most
    of the time and falls at the end, so that few uniform steps are spent at high noise. Between levels as
    `vp_discrete`.
    """
    if not (k > 0 and n >= 2 and 0 < end < 1):
        raise ValueError(f"vp_exponential: expected k > 0, n >= 2 and 0 < end < 1, got {k=}, {n=}, {end=}")
    t = np.arange(n + 1) / n
    bars = end + (1.0 - end) * np.expm1(-k * (1.0 - t)) / math.expm1(-k)
    return vp_discrete(1.0 - bars[1:] / bars[:-1])
