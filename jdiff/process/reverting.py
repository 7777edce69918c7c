"""Mean-reverting processes, of what is left when the mean they revert to is taken off (see `jdiff.anchored`)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Process, Time, float_
from .vp import vp_discrete


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
        return self.base.t_of_lam(float_(lam) + math.log(self.sigma_inf))


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
