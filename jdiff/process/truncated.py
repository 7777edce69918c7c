"""Variance-preserving processes that an anchor cuts short: at t_max nothing of x0 is left beside it.

alpha is the base's A less something of the base's S, and sigma is S. Both are DDPM chains in x (or in x less the
residual), so `spread` is the base's and the reverse step is DDPM's, unchanged.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Process, Time, float_, xp_of
from .vp import VariancePreserving, VPDiscrete, vp_discrete


@dataclass(frozen=True)
class _Truncated(Process):
    base: VariancePreserving

    def sigma(self, t: Time) -> Any:
        return self.base.sigma(t)

    def dsigma(self, t: Time) -> Any:
        return self.base.dsigma(t)

    def spread(self, t: Time) -> Any:
        return self.base.spread(t)

    def _ended(self, t: Time, alpha: Any) -> Any:
        """alpha, and exactly 0 at t_max."""
        return xp_of(t).where(t >= self.t_max, 0.0, alpha)


@dataclass(frozen=True)
class Resfusion(_Truncated):
    """alpha = 2 A - 1: x_t = A x0 + (1 - A) R + S eps with R = y - x0, less (1 - A) y."""

    def alpha(self, t: Time) -> Any:
        t = float_(t)
        return self._ended(t, 2.0 * self.base.alpha(t) - 1.0)

    def dalpha(self, t: Time) -> Any:
        return 2.0 * self.base.dalpha(t)

    def t_of_lam(self, lam: Any) -> Any:
        lam = float_(
            lam
        )  # with (A, S) = (cos f, sin f): 2 cos f - q sin f = 1, so f = acos(1 / sqrt(4 + q^2)) - atan(q / 2)
        xp = xp_of(lam)
        q = xp.exp(xp.minimum(lam, 40.0))
        root = xp.sqrt(3.0 + q * q)
        inner = self.base.t_of_lam(xp.log1p(0.5 * q * root) - xp.log(root - 0.5 * q))
        return xp.where(lam > 40.0, self.base.t_of_lam(lam), xp.minimum(inner, self.t_max))


@dataclass(frozen=True)
class Relay(_Truncated):
    """alpha = A - rate S, with rate = A / S at t_max: x_t = A x0 + S (eps + rate (z_c - x0)), less rate S z_c."""

    @property
    def rate(self) -> float:
        return float(np.exp(self.base.lam(self.t_max)))

    def alpha(self, t: Time) -> Any:
        t = float_(t)
        return self._ended(t, self.base.alpha(t) - self.rate * self.base.sigma(t))

    def dalpha(self, t: Time) -> Any:
        return self.base.dalpha(t) - self.rate * self.base.dsigma(t)

    def t_of_lam(self, lam: Any) -> Any:
        lam = float_(lam)
        return self.base.t_of_lam(xp_of(lam).logaddexp(lam, np.log(self.rate).astype(lam.dtype)))


def resfusion(steps: int = 12, schedule: str = "linear") -> Process:
    """Resfusion (Shi et al. 2024, arXiv 2311.14900) up to its acceleration point, where sqrt(alpha_bar) = 1/2.

    There x = y / 2 + sqrt(3/4) eps needs no x0: sampling starts there, 5 levels of the default 12. Beyond it alpha
    would be negative. schedule: DDPM's "linear" betas times 1000 / steps, or Nichol and Dhariwal's "cosine". t = i / n
    over the n levels that are left, and the network's index is n t - 1. The last level is moved to sqrt(alpha_bar) =
    1/2 exactly, the paper's truncated schedule; the official code leaves it where it is within 0.01 of that, and then
    starts off by (2 A - 1) (x0 - y).
    """
    if int(steps) != steps or steps < 2:
        raise ValueError(f"resfusion: steps is {steps}; expected a whole number, at least 2")
    if schedule not in ("linear", "cosine"):
        raise ValueError(f"resfusion: schedule is {schedule!r}; expected 'linear' or 'cosine'")
    square = lambda i: np.cos((i / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    if schedule == "cosine":
        bars = square(np.arange(1, steps + 1)) / square(0)
    else:
        bars = np.cumprod(1.0 - 1000.0 / steps * np.linspace(1e-4, 0.02, int(steps)))
    n = int(np.argmax(bars <= 0.25))  # what is beyond is not used: of 12 linear betas the last are above 1
    bars = np.concatenate([[1.0], bars[:n], [0.25]])
    betas = 1.0 - bars[1:] / bars[:-1]
    return Resfusion(1.0 / len(betas), 1.0, VPDiscrete(1.0 / len(betas), 1.0, tuple(betas.tolist())))


def relay(base: Process | None = None, t_max: float = 0.3) -> Process:
    """RDEIC's relay (Li et al. 2024, arXiv 2410.02640): a VP process entered at t_max from the codec's latent z_c.

    z_t = A (z0 + eta (z_c - z0)) + S eps with eta A / S constant, so that z_t = A z0 + S eps', eps' = eps + rate
    (z_c - z0): a pretrained network of the base process that predicts eps' goes on unchanged, from A z_c + S eps.
    base: Stable Diffusion's scaled-linear betas; t_max = 0.3 is step 300 of 1000.
    """
    base = vp_discrete(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2) if base is None else base
    if not isinstance(base, VariancePreserving):
        raise ValueError(f"relay: base is {base}; expected a variance-preserving process")
    if not base.t_min < t_max < base.t_max:
        raise ValueError(f"relay: expected {base.t_min:g} < t_max < {base.t_max:g}, got {t_max}")
    return Relay(base.t_min, float(t_max), base)
