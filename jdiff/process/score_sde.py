"""The other two processes of score SDE (Song et al. 2021, arXiv 2011.13456, appendix B) on t in [0, 1]: VE, sub-VP."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Process, Time, check_t_min, float_, xp_of
from .vp import VPLinear


@dataclass(frozen=True)
class VE(Process):
    sigma_min: float
    sigma_max: float

    @property
    def _rate(self) -> float:
        return 2.0 * float(np.log(self.sigma_max / self.sigma_min))

    def alpha(self, t: Time) -> Any:
        t = float_(t)
        return xp_of(t).ones_like(t)

    def sigma(self, t: Time) -> Any:
        t = float_(t)
        return self.sigma_min * xp_of(t).sqrt(xp_of(t).expm1(self._rate * t))

    def dalpha(self, t: Time) -> Any:
        t = float_(t)
        return xp_of(t).zeros_like(t)

    def dsigma(self, t: Time) -> Any:
        t = float_(t)
        slope = 0.5 * self.sigma_min**2 * self._rate * xp_of(t).exp(self._rate * t)
        return slope / xp_of(t).maximum(self.sigma(t), 1e-15)

    def t_of_lam(self, lam: Any) -> Any:
        lam = float_(lam)
        xp = xp_of(lam)
        return xp.logaddexp(xp.zeros_like(lam), -2.0 * (lam + float(np.log(self.sigma_min)))) / self._rate


@dataclass(frozen=True)
class SubVP(Process):
    """alpha of `base`, and the square of its sigma."""

    base: VPLinear

    def alpha(self, t: Time) -> Any:
        return self.base.alpha(t)

    def sigma(self, t: Time) -> Any:
        t = float_(t)
        return -xp_of(t).expm1(2.0 * self.base.log_alpha(t))

    def dalpha(self, t: Time) -> Any:
        return self.base.dalpha(t)

    def dsigma(self, t: Time) -> Any:
        return -2.0 * self.alpha(t) * self.dalpha(t)

    def t_of_lam(self, lam: Any) -> Any:
        lam = float_(lam)  # sigma = 1 - alpha^2 = rho alpha, so base's log-SNR is log(alpha) - log(rho), halved
        xp = xp_of(lam)
        rho = xp.exp(-lam)
        return self.base.t_of_lam(0.5 * (xp.log(2.0 / (rho + xp.hypot(rho, xp.full_like(rho, 2.0)))) + lam))


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0, t_min: float = 1e-3) -> Process:
    """Variance exploding: dx = g dW with g^2 = d/dt (sigma_min (sigma_max / sigma_min)^t)^2 (eq. 30).

    sigma(t)^2 = sigma_min^2 ((sigma_max / sigma_min)^(2 t) - 1), the SDE's own variance, 0 at t = 0. The official codes
    leave the -1 away: their data carries noise sigma_min.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"ve: expected 0 < sigma_min < sigma_max, got {sigma_min=}, {sigma_max=}")
    return VE(check_t_min(t_min, 1.0), 1.0, float(sigma_min), float(sigma_max))


def subvp(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-2) -> Process:
    """Sub-VP: alpha of `vp_linear`, sigma = 1 - alpha^2 (eq. 29).

    sigma falls like t, not like its root: 1e-4 at the official code's last time 1e-3, where tables get coefficients
    past what `validate` allows. Hence the larger t_min.
    """
    if not 0 < beta_min < beta_max:
        raise ValueError(f"subvp: expected 0 < beta_min < beta_max, got {beta_min=}, {beta_max=}")
    t_min = check_t_min(t_min, 1.0)
    return SubVP(t_min, 1.0, VPLinear(t_min, 1.0, float(beta_min), float(beta_max)))
