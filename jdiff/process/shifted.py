"""Schedules moved towards noise for data of more dimensions: the shift in time of SD3 and of Scale-RAE."""

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, PyTree

from .base import Process, Time, float_
from .straight import Flow


def shift(t: Time, a: float, t_max: float = 1.0) -> Any:
    """t' = a t / (1 + (a - 1) t), of times in units of t_max: logit t' = logit t + log a. Its inverse has 1 / a.

    Esser et al. 2024 (arXiv 2403.03206, eq. 23). shift(shift(t, a), b) = shift(t, a b); both ends stay.
    """
    u = float_(t) / t_max
    return t_max * (a * u / (1.0 + (a - 1.0) * u))


@dataclass(frozen=True)
class Shifted(Process):
    """`base` at the shifted time."""

    base: Process
    a: float

    @property
    def gaussian(self) -> bool:
        return self.base.gaussian

    @property
    def prior_std(self) -> float:
        return self.base.prior_std

    def inner(self, t: Time) -> Any:
        """The base's time at t."""
        return shift(t, self.a, self.t_max)

    def _rate(self, t: Time) -> Any:
        u = float_(t) / self.t_max
        return self.a / (1.0 + (self.a - 1.0) * u) ** 2

    def alpha(self, t: Time) -> Any:
        if isinstance(self.base, Flow):  # 1 - t' without cancellation
            return (1.0 - float_(t)) / (1.0 + (self.a - 1.0) * float_(t))
        return self.base.alpha(self.inner(t))

    def sigma(self, t: Time) -> Any:
        return self.base.sigma(self.inner(t))

    def dalpha(self, t: Time) -> Any:
        return self.base.dalpha(self.inner(t)) * self._rate(t)

    def dsigma(self, t: Time) -> Any:
        return self.base.dsigma(self.inner(t)) * self._rate(t)

    def t_of_lam(self, lam: Any) -> Any:
        return shift(self.base.t_of_lam(lam), 1.0 / self.a, self.t_max)

    def spread(self, t: Time) -> Any:
        return self.base.spread(self.inner(t))

    def kernel(self, key: Array, like: PyTree, index: Array | None = None) -> PyTree:
        return self.base.kernel(key, like, index)

    def log_kernel(self, square: Any, n: int) -> Any:
        return self.base.log_kernel(square, n)


def shifted(process: Process, a: float | None = None, *, dim: int | None = None, base: int = 4096) -> Process:
    """`process` with its time shifted by a = sqrt(dim / base), to more noise where a > 1; in training and in sampling.

    a, or dim: the number of elements of a sample (tokens times channels), whose signal more noise must hide
    (Scale-RAE: base 4096). Given t, it is `process` at `shift(t, a)`; on `flow` sigma / alpha is a times as large. A
    network trained on it is told t. One that was trained on `process` itself keeps that process and takes the grid
    `times.shifted`. Shifts compose: shifted(shifted(p, a), b) is shifted(p, a b). ValueError for both or neither of a
    and dim, or a <= 0.
    """
    if (a is None) == (dim is None):
        raise ValueError(f"shifted: give a, or dim (with base); got {a=}, {dim=}")
    a = math.sqrt(dim / base) if dim is not None and dim > 0 and base > 0 else a
    if a is None or not 0 < a < math.inf:
        raise ValueError(f"shifted: expected a > 0, or dim and base > 0; got {a=}, {dim=}, {base=}")
    if isinstance(process, Shifted):
        process, a = process.base, a * process.a
    t_min = float(shift(process.t_min, 1.0 / a, process.t_max))
    return Shifted(t_min, process.t_max, process, float(a))
