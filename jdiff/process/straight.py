"""Processes whose sigma is the time: variance exploding as in EDM, and the linear interpolant of flow matching."""

from dataclasses import dataclass
from typing import Any

from .base import Process, Time, check_t_min, float_, xp_of


@dataclass(frozen=True)
class EDM(Process):
    def alpha(self, t: Time) -> Any:
        t = float_(t)
        return xp_of(t).ones_like(t)

    def sigma(self, t: Time) -> Any:
        return float_(t)

    def dalpha(self, t: Time) -> Any:
        t = float_(t)
        return xp_of(t).zeros_like(t)

    def dsigma(self, t: Time) -> Any:
        t = float_(t)
        return xp_of(t).ones_like(t)

    def t_of_lam(self, lam: Any) -> Any:
        lam = float_(lam)
        return xp_of(lam).exp(-lam)


@dataclass(frozen=True)
class Flow(Process):
    def alpha(self, t: Time) -> Any:
        return 1.0 - float_(t)

    def sigma(self, t: Time) -> Any:
        return float_(t)

    def dalpha(self, t: Time) -> Any:
        t = float_(t)
        return -xp_of(t).ones_like(t)

    def dsigma(self, t: Time) -> Any:
        t = float_(t)
        return xp_of(t).ones_like(t)

    def t_of_lam(self, lam: Any) -> Any:
        lam = float_(lam)
        return xp_of(lam).exp(-xp_of(lam).logaddexp(xp_of(lam).zeros_like(lam), lam))


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Process:
    """alpha = 1, sigma = t: the variance-exploding form of Karras et al. 2022; time IS the noise level."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"edm: expected 0 < sigma_min < sigma_max, got {sigma_min=}, {sigma_max=}")
    return EDM(float(sigma_min), float(sigma_max))


def flow(t_min: float = 1e-3) -> Process:
    """alpha = 1 - t, sigma = t: rectified flow / linear interpolant; t = 1 is noise (Liu et al. 2022)."""
    return Flow(check_t_min(t_min, 1.0), 1.0)
