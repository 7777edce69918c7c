"""Bridges and SGMSE's processes, of what is left when the anchor is taken off (`jdiff.anchored`)."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .base import Process, Time, check_t_min, float_, xp_of


@dataclass(frozen=True)
class Bridge(Process):
    """alpha = 1 - m, sigma^2 = v m (1 - m) with the clock m(t) = (k^(2t) - 1) / (k^2 - 1), or t itself for k = 1."""

    v: float
    k: float

    def _clock(self, t: Time) -> tuple[Any, Any, Any]:
        """m, 1 - m and dm/dt."""
        t = float_(t)
        xp, rate = xp_of(t), 2.0 * math.log(self.k)
        if rate == 0:
            return t, 1.0 - t, xp.ones_like(t)
        whole = math.expm1(rate)
        up = xp.exp(rate * t)
        return xp.expm1(rate * t) / whole, up * xp.expm1(rate * (1.0 - t)) / whole, rate * up / whole

    def alpha(self, t: Time) -> Any:
        return self._clock(t)[1]

    def sigma(self, t: Time) -> Any:
        m, rest, _ = self._clock(t)
        return xp_of(m).sqrt(self.v * m * rest)

    def dalpha(self, t: Time) -> Any:
        return -self._clock(t)[2]

    def dsigma(self, t: Time) -> Any:
        m, rest, dm = self._clock(t)
        return 0.5 * self.v * dm * (rest - m) / xp_of(m).maximum(self.sigma(t), 1e-15)

    def lam(self, t: Time) -> Any:
        m, rest, _ = self._clock(t)
        with np.errstate(divide="ignore"):
            return 0.5 * (xp_of(m).log(rest) - xp_of(m).log(self.v * m))

    def spread(self, t: Time) -> Any:
        return self.v * self._clock(t)[0]

    def t_of_lam(self, lam: Any) -> Any:
        lam = float_(lam)
        xp, rate = xp_of(lam), 2.0 * math.log(self.k)
        m = xp.exp(-xp.logaddexp(xp.zeros_like(lam), 2.0 * lam + math.log(self.v)))
        return m if rate == 0 else xp.log1p(m * math.expm1(rate)) / rate


def brownian_bridge(max_var: float = 1.0, k: float = 1.0, t_max: float = 0.999, t_min: float = 1e-3) -> Process:
    """A Brownian bridge from x0 to y, less its share of y: x_t = (1 - m) x0 + m y + sqrt(2 max_var m (1 - m)) eps.

    BBDM (Li et al. 2023, arXiv 2205.07680), eq. 4 to 6, with its m from 0.001 to 0.999; consecutive bridges for frame
    interpolation (Lyu et al. 2024, arXiv 2405.05953) share x0: one a frame, see `anchored.signed_time`. k != 1 runs a
    faster clock m = (k^(2t) - 1) / (k^2 - 1): SGMSE's Schroedinger bridge (Jukic et al. 2024, arXiv 2407.16074) with
    k = 2.6 and 2 max_var = c (k^2 - 1) / (2 log k), c = 0.4.

    At m = 1 the bridge IS y, without noise: t_max = 1 starts there (prior_std = 0), as the papers do, and the first
    step must draw noise: `solvers.ddpm` does. Any other solver starts before it, at t_max < 1, where the published
    start y + sigma(t_max) eps is off by (1 - m) (y - x0) in the mean: see `Process.mismatch`.
    """
    if not (max_var > 0 and k >= 1 and 0 < t_max <= 1):
        raise ValueError(
            f"brownian_bridge: expected max_var > 0, k >= 1, 0 < t_max <= 1, got {max_var=}, {k=}, {t_max=}"
        )
    return Bridge(check_t_min(t_min, t_max), float(t_max), 2.0 * float(max_var), float(k))


def sb_ve(k: float = 2.6, c: float = 0.4, t_max: float = 0.999) -> Process:
    """SGMSE's Schroedinger bridge with exploding variance: a Brownian bridge in the clock sigma_t^2 / sigma_1^2."""
    if not (k > 1 and c > 0):
        raise ValueError(f"sb_ve: expected k > 1 and c > 0, got {k=}, {c=}")
    return brownian_bridge(c * (k * k - 1.0) / (4.0 * math.log(k)), k, t_max)


@dataclass(frozen=True)
class OUVE(Process):
    theta: float
    sigma_min: float
    sigma_max: float

    @property
    def _rates(self) -> tuple[float, float]:
        """theta + log r, and sigma_min^2 log r / (theta + log r); r = sigma_max / sigma_min."""
        log_r = math.log(self.sigma_max / self.sigma_min)
        return self.theta + log_r, self.sigma_min**2 * log_r / (self.theta + log_r)

    def alpha(self, t: Time) -> Any:
        t = float_(t)
        return xp_of(t).exp(-self.theta * t)

    def sigma(self, t: Time) -> Any:
        t, (rate, scale) = float_(t), self._rates
        return self.alpha(t) * xp_of(t).sqrt(scale * xp_of(t).expm1(2.0 * rate * t))

    def dalpha(self, t: Time) -> Any:
        return -self.theta * self.alpha(t)

    def dsigma(self, t: Time) -> Any:
        t, (rate, scale) = float_(t), self._rates
        a, s = self.alpha(t), self.sigma(t)
        g2 = 2.0 * rate * scale * a * a * xp_of(t).exp(2.0 * rate * t)
        return 0.5 * g2 / xp_of(t).maximum(s, 1e-15) - self.theta * s

    def t_of_lam(self, lam: Any) -> Any:
        lam, (rate, scale) = float_(lam), self._rates
        return xp_of(lam).log1p(xp_of(lam).exp(-2.0 * lam) / scale) / (2.0 * rate)


def ouve(theta: float = 1.5, sigma_min: float = 0.05, sigma_max: float = 0.5, t_min: float = 0.03) -> Process:
    """SGMSE+ (Richter et al. 2023, arXiv 2208.05830): dx = theta (y - x) dt + g dW, of x less (1 - alpha) y.

    g = sigma_min r^t sqrt(2 log r), r = sigma_max / sigma_min; alpha = e^(-theta t),
    sigma^2 = sigma_min^2 (r^(2t) - e^(-2 theta t)) log r / (theta + log r). The official code starts from
    y + sigma(1) eps, although e^(-theta) = 22 % of x0 - y is left there (`Process.mismatch`), and stops at t_min.
    """
    if not (theta > 0 and 0 < sigma_min < sigma_max):
        raise ValueError(
            f"ouve: expected theta > 0, 0 < sigma_min < sigma_max, got {theta=}, {sigma_min=}, {sigma_max=}"
        )
    return OUVE(check_t_min(t_min, 1.0), 1.0, float(theta), float(sigma_min), float(sigma_max))


@dataclass(frozen=True)
class BBED(Process):
    theta: float
    k: float

    def _square(self, t: Any) -> Any:
        """(sigma / alpha)^2 = theta int_0^t k^(2u) / (1 - u)^2 du: the series of k^(-2w), w = 1 - u, term by term."""
        xp, c = xp_of(t), 2.0 * math.log(self.k)
        log_rest = xp.log1p(-t)  # of 1 - t
        total = t / (1.0 - t) + c * log_rest
        factor = -c
        for n in range(2, 40):
            factor = -factor * c / n
            total = total - factor * xp.expm1((n - 1.0) * log_rest) / (n - 1.0)
        return self.theta * self.k**2 * total

    def alpha(self, t: Time) -> Any:
        return 1.0 - float_(t)

    def sigma(self, t: Time) -> Any:
        t = float_(t)
        return (1.0 - t) * xp_of(t).sqrt(xp_of(t).maximum(self._square(t), 0.0))

    def dalpha(self, t: Time) -> Any:
        t = float_(t)
        return -xp_of(t).ones_like(t)

    def dsigma(self, t: Time) -> Any:
        t, s = float_(t), self.sigma(t)
        g2 = self.theta * xp_of(t).exp(2.0 * math.log(self.k) * t)
        return 0.5 * g2 / xp_of(t).maximum(s, 1e-15) - s / (1.0 - t)

    def t_of_lam(self, lam: Any) -> Any:
        lam = float_(lam)
        xp = xp_of(lam)
        goal = xp.exp(-2.0 * lam)

        def halve(_: Any, ends: tuple[Any, Any]) -> tuple[Any, Any]:
            low, high = ends
            middle = 0.5 * (low + high)
            below = self._square(middle) < goal
            return xp.where(below, middle, low), xp.where(below, high, middle)

        ends = xp.zeros_like(lam), xp.full_like(lam, self.t_max)
        if xp is jnp:
            return jax.lax.fori_loop(0, 50, halve, ends)[1]
        for i in range(56):
            ends = halve(i, ends)
        return np.where(np.isposinf(lam), 0.0, ends[1])


def bbed(theta: float = 0.52, k: float = 2.6, t_max: float = 0.999, t_min: float = 0.03) -> Process:
    """Brownian bridge with exponential diffusion (Lay et al. 2023, arXiv 2302.14748), less t y.

    dx = (y - x) / (1 - t) dt + sqrt(theta) k^t dW, so alpha = 1 - t and
    sigma^2 = theta (1 - t)^2 int_0^t k^(2u) / (1 - u)^2 du (the paper writes it with exponential integrals). Sampling
    starts from y + sigma(t_max) eps, off by (1 - t_max) (y - x0): 0.1 % where OUVE's start is off by 22 %.
    """
    if not (theta > 0 and k > 1 and 0 < t_max < 1):
        raise ValueError(f"bbed: expected theta > 0, k > 1, 0 < t_max < 1, got {theta=}, {k=}, {t_max=}")
    return BBED(check_t_min(t_min, t_max), float(t_max), float(theta), float(k))
