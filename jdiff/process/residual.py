"""Processes given by a table, and what is left of ResShift and RDDM when the anchor is taken off (`jdiff.anchored`)."""

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from .base import Process, Time, float_, interp, xp_of


@dataclass(frozen=True)
class Residual(Process):
    """alpha and sigma at t = i / n from two tables of n + 1 values, straight between them.

    The published chains add to a state and never scale it, x_t = x_s + (eta_t - eta_s) (y - x0) + noise: so `spread`
    is sigma^2, and the posterior is theirs.
    """

    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        a, s = np.asarray(self.alphas), np.asarray(self.sigmas)
        return np.arange(len(a)) / (len(a) - 1), a, s

    def _at(self, table: int, t: Time, slope: bool = False) -> Any:
        t = float_(t)
        xp, tables = xp_of(t), self._tables
        if slope:
            slopes = np.diff(tables[table]) / np.diff(tables[0])
            i = xp.clip(xp.ceil(t * len(slopes)).astype(int) - 1, 0, len(slopes) - 1)
            return slopes[i] if xp is np else jnp.asarray(slopes, t.dtype)[i]
        return interp(t, tables[0], tables[table])

    def alpha(self, t: Time) -> Any:
        return self._at(1, t)

    def sigma(self, t: Time) -> Any:
        return self._at(2, t)

    def dalpha(self, t: Time) -> Any:
        return self._at(1, t, slope=True)

    def dsigma(self, t: Time) -> Any:
        return self._at(2, t, slope=True)

    def spread(self, t: Time) -> Any:
        return self.sigma(t) ** 2

    def t_of_lam(self, lam: Any) -> Any:
        lam = float_(lam)
        xp, (_, a, s) = xp_of(lam), self._tables
        n = len(a) - 1
        with np.errstate(divide="ignore"):
            inner = (np.log(s) - np.log(a))[1:-1]  # -lam at the inner levels: rises
        i = xp.searchsorted(xp.asarray(inner, lam.dtype), -lam)
        # alpha e^(-lam) = sigma is linear in t between two levels; both sides scaled so that neither overflows
        ca, cs = (xp.exp(-xp.logaddexp(xp.zeros_like(lam), sign * lam)) for sign in (1.0, -1.0))
        gap = lambda j: ca * xp.asarray(a, lam.dtype)[j] - cs * xp.asarray(s, lam.dtype)[j]
        left, right = gap(i), gap(i + 1)
        return xp.clip((i.astype(lam.dtype) + left / (left - right)) / n, 0.0, 1.0)


def tabulated(alphas: Any, sigmas: Any, who: str = "tabulated") -> Process:
    """alpha and sigma of the levels t = 1/n, 2/n, .., 1 of a published schedule (n,); t = 0 is (1, 0).

    ValueError unless sigma / alpha rises from level to level, alpha >= 0 and sigma > 0.
    """
    a, s = (np.asarray(v, np.float64) for v in (alphas, sigmas))
    if a.ndim != 1 or a.shape != s.shape or len(a) < 1:
        raise ValueError(f"{who}: expected two vectors of one length, got shapes {a.shape} and {s.shape}")
    a, s = np.append(1.0, a), np.append(0.0, s)
    if not (np.isfinite(a).all() and np.isfinite(s).all() and (a >= 0).all() and (s[1:] > 0).all()):
        raise ValueError(f"{who}: expected finite alpha >= 0 and sigma > 0 at every level, got {a[1:]} and {s[1:]}")
    bad = np.flatnonzero(s[1:] * a[:-1] <= s[:-1] * a[1:])
    if len(bad):
        i = int(bad[0])
        raise ValueError(f"{who}: sigma / alpha must rise from level to level, but does not from level {i} to {i + 1}")
    return Residual(1.0 / (len(a) - 1), 1.0, tuple(a.tolist()), tuple(s.tolist()))


def resshift(
    steps: int = 15, kappa: float = 2.0, power: float = 0.3, min_noise: float = 0.04, end: float = 0.99
) -> Process:
    """ResShift (Yue et al. 2023, arXiv 2307.12348): x_t = x0 + eta (y - x0) + kappa sqrt(eta) eps, less eta y.

    alpha = 1 - eta, sigma = kappa sqrt(eta). As coded, sqrt(eta_i) = e (end / e)^(u^power), u = (i - 1) / (steps - 1)
    and e = min(min_noise / kappa, min_noise). The conference model is the default; the journal's (arXiv 2403.07319)
    has steps=4, min_noise=0.2. One step is eta = end^2. The network's index is n t - 1, and its input is scaled by
    1 / sqrt(kappa^2 eta + 1) in the official code. UPSR (arXiv 2503.18512): steps=5, kappa=2.5, power=0.2 and a noise
    map, the `scale` of `Anchored`.
    """
    if int(steps) != steps or steps < 1:
        raise ValueError(f"resshift: steps is {steps}; expected a whole number, at least 1")
    first = min(min_noise / kappa, min_noise) if kappa > 0 else 0.0
    if not (kappa > 0 and power > 0 and 0 < first < end <= 1):
        raise ValueError(
            "resshift: expected kappa > 0, power > 0 and 0 < min(min_noise / kappa, min_noise) < end <= 1, "
            f"got {kappa=}, {power=}, {min_noise=}, {end=}"
        )
    u = np.linspace(0.0, 1.0, int(steps)) ** power if steps > 1 else np.ones(1)
    root = first * (end / first) ** u
    return tabulated(1.0 - root**2, kappa * root, "resshift")


def _weights(kind: str, n: int) -> np.ndarray:
    kinds = {"increased": np.arange(1.0, n + 1), "decreased": np.arange(float(n), 0, -1), "average": np.ones(n)}
    if kind not in kinds:
        raise ValueError(f"rddm: a schedule is {kind!r}; expected one of {', '.join(kinds)}, or {n} values >= 0")
    return kinds[kind] / kinds[kind].sum()


def rddm(
    steps: int = 1000, alphas: str | Any = "decreased", betas2: str | Any = "increased", sum_scale: float = 0.01
) -> Process:
    """RDDM (Liu et al. 2024, arXiv 2308.13712): I_t = I_0 + abar I_res + bbar eps, I_res = I_in - I_0, less abar I_in.

    alpha = 1 - abar, sigma = bbar: two schedules, apart. alphas (sum 1: abar = their running sum) and betas2 (bbar^2
    is `sum_scale` times theirs) are "increased" (1, 2, ..), "decreased", "average", or a vector of increments.
    sum_scale: 0.01 is the official restoration default, so the noise ends at 0.1; 1 for generation.
    """
    if int(steps) != steps or steps < 1 or not sum_scale > 0:
        raise ValueError(f"rddm: expected whole steps >= 1 and sum_scale > 0, got {steps=}, {sum_scale=}")
    a, b = (_weights(v, int(steps)) if isinstance(v, str) else np.asarray(v, np.float64) for v in (alphas, betas2))
    if a.shape != (steps,) or b.shape != (steps,) or (a < 0).any() or (b < 0).any() or abs(a.sum() - 1) > 1e-9:
        raise ValueError(
            f"rddm: alphas and betas2 must be {steps} increments >= 0, and alphas sum to 1; got shapes {a.shape} and "
            f"{b.shape}, sum {a.sum():.6g}"
        )
    rest = np.append(np.cumsum(a[::-1])[::-1][1:], 0.0)  # 1 - abar, without cancellation at the end
    return tabulated(rest, np.sqrt(sum_scale * np.cumsum(b)), "rddm")
