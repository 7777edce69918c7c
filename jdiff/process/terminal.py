"""Variance-preserving processes that end at alpha = 0: pure noise IS their law there."""

from dataclasses import dataclass
from typing import Any

from .base import Process, Time, float_, xp_of
from .vp import VariancePreserving, VPDiscrete, vp_discrete


@dataclass(frozen=True)
class ZeroTerminal(VariancePreserving):
    """alpha of `base`, moved and scaled beyond time t_first so that it ends at 0; before it, unchanged."""

    base: VariancePreserving
    t_first: float

    @property
    def _ends(self) -> tuple[float, float, float]:
        """alpha at the first and the last level, and the scale that keeps the first."""
        first, last = float(self.base.alpha(self.t_first)), float(self.base.alpha(self.t_max))
        return first, last, first / (first - last)

    def alpha(self, t: Time) -> Any:
        t = float_(t)
        _, last, scale = self._ends
        return xp_of(t).where(t <= self.t_first, self.base.alpha(t), scale * (self.base.alpha(t) - last))

    def sigma(self, t: Time) -> Any:
        t = float_(t)
        xp, (first, last, scale) = xp_of(t), self._ends
        one_minus = -scale * (xp.expm1(self.base.log_alpha(t)) + last * (1.0 - first) / first)  # 1 - alpha
        beyond = xp.sqrt(xp.maximum(one_minus, 0.0) * (1.0 + self.alpha(t)))
        return xp.where(t <= self.t_first, self.base.sigma(t), beyond)

    def dalpha(self, t: Time) -> Any:
        t = float_(t)
        return xp_of(t).where(t <= self.t_first, 1.0, self._ends[2]) * self.base.dalpha(t)

    def t_of_lam(self, lam: Any) -> Any:
        lam = float_(lam)
        xp, (first, last, scale) = xp_of(lam), self._ends
        s2 = xp.exp(-xp.logaddexp(xp.zeros_like(lam), 2.0 * lam))
        a = xp.exp(-0.5 * xp.logaddexp(xp.zeros_like(lam), -2.0 * lam))
        inner = a / scale + last  # the base's alpha, and 1 - alpha without cancellation
        one_minus = last * (1.0 - first) / first + s2 / (1.0 + a) / scale
        beyond = xp.log(inner) - 0.5 * xp.log(xp.maximum(one_minus, 1e-37) * (1.0 + inner))
        return self.base.t_of_lam(xp.where(lam >= self.base.lam(self.t_first), lam, beyond))


def zero_terminal_snr(process: Any) -> Process:
    """A variance-preserving process whose alpha at t_max is 0, so that pure noise IS its law there.

    process: betas as in `vp_discrete`, or a VP process. Lin et al. 2023 (arXiv 2305.08891), algorithm 1: beyond the
    first level alpha becomes alpha_1 (alpha - alpha_T) / (alpha_1 - alpha_T); a process in continuous time has its
    first level at t = 0. (As betas the last one would be 1, which `vp_discrete` cannot hold.) At alpha = 0 an eps
    network says nothing about x0: train with prediction="v" and sample from t_max, as `times.uniform` does: with
    index = N t - 1 those are the paper's "trailing" steps.
    """
    base = process if isinstance(process, Process) else vp_discrete(process)
    if not isinstance(base, VariancePreserving):
        raise ValueError(f"zero_terminal_snr: {base} is not variance preserving; expected betas or a VP process")
    if not base.alpha(base.t_max) > 1e-12:
        raise ValueError(f"zero_terminal_snr: {base} already ends at alpha = 0; use it as it is")
    first = base.t_min if isinstance(base, VPDiscrete) else 0.0
    return ZeroTerminal(base.t_min, base.t_max, base, first)
