"""DPM-Solver-v3: an exponential integrator whose linear part is measured on the model (see jdiff.statistics).

With y = x / alpha and f = (sigma eps - l x) / alpha the flow is dy/dlam = -l y - f, and df/dlam = s f + b but for a
remainder. Both linear parts are integrated exactly, and what is left, g, is made a polynomial in lam:

    L = int l,  S = int s                       g(u) = e^(S0 - S(u)) f(u) - beta(u),  g' = e^(S0 - S) (f' - s f - b)
    beta(u) = int_lam0^u e^(S0 - S) b           w(u) = e^(L(u) - L0 + S(u) - S0)
    x1 = a1 e^(L0 - L1) [x0 / a0 - int_lam0^lam1 w (g + beta) du]

The paper's I, B, C are these integrals from the table's start on; here each step has its own, so that nothing
overflows. Where the remainder is nothing (a Gaussian with diagonal covariance) one step of any size is exact.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import make_interp_spline

from jdiff.statistics import Statistics, constant
from jdiff.trace import Grid, Model, Noise, Solver, Value
from jdiff.trace import constant as number

from .exponential import _check_order, _final_cap
from .weights import nodes

CORRECTORS = ("pseudo", "full", "same", None)


class _Integrals:
    """l, L, S and the b-integral between table points: splines (cubic; as published: lines, rounded times)."""

    def __init__(self, table: Statistics, as_published: bool):
        self.table, self.rounded = table, as_published
        spline = lambda v: make_interp_spline(table.lam, v, k=1 if as_published else 3)
        self.l, self.L = _once(spline(table.l)), _once(spline(table.l).antiderivative())
        self.S = _once(spline(table.s).antiderivative())
        self.step = functools.lru_cache(4)(self._step)  # the corrector repeats the predictor's step
        b = np.exp(-self.S(table.lam)) * table.b
        self.B = _once(spline(b).antiderivative()) if np.any(table.b) else None

    def beta(self, start: float, u: Any) -> Any:
        return np.exp(self.S(start)) * (self.B(u) - self.B(start)) if self.B else 0.0

    def nodes(self, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
        """Quadrature on a step: Gauss, or as published the trapezoid rule on the table's points."""
        lam = self.table.lam
        if not self.rounded:
            return nodes(start, end, 1 + int(4 * (end - start)) + int(np.sum((lam > start) & (lam < end))) // 8)
        first, last = np.abs(lam - start).argmin(), np.abs(lam - end).argmin()
        u = lam[first : last + 1]
        w = np.diff(u, prepend=u[0]) + np.diff(u, append=u[-1])
        return u, 0.5 * w

    def _step(self, start: float, end: float) -> tuple[np.ndarray, Any]:
        """int w (u - start)^k du, k < 4, and int w beta du, over a step."""
        u, w = self.nodes(start, end)
        weight = (w * np.exp(self.L(u) + self.S(u) - self.L(start) - self.S(start)).T).T
        rest = np.sum(weight * self.beta(start, u), 0) if self.B else 0.0
        return np.tensordot((u - start) ** np.arange(4)[:, None], weight, 1), rest

    def inside(self, g: Grid) -> Grid:
        """The grid with its half log-SNRs inside the table; as published they are rounded to the table's."""
        lam, finite = g.lam.copy(), np.isfinite(g.lam)
        low, high = self.table.lam[[0, -1]]
        slack = 1e-6 * (high - low)
        bad = finite & ((lam < low - slack) | (lam > high + slack))
        if bad.any():
            i = int(np.argmax(bad))
            raise ValueError(
                f"dpm_solver_v3: times[{i}] = {g.t[i]:.6g} has half log-SNR {lam[i]:.6g}, outside the statistics' "
                f"[{low:.6g}, {high:.6g}]; choose times inside, or estimate statistics on a wider range (start, end)"
            )
        lam[finite] = np.clip(lam[finite], low, high)
        if not self.rounded:
            return Grid(g.process, g.t, g.a, g.s, lam)
        n = len(self.table.lam) - 1
        lam[finite] = low + (high - low) * np.round(n * (lam[finite] - low) / (high - low)) / n
        if (np.diff(lam) <= 0).any():
            raise ValueError(f"dpm_solver_v3: {g.n} steps rounded to {n + 1} levels repeat one; use as_published=False")
        t = np.where(finite, np.minimum(g.process.t_of_lam(np.where(finite, lam, 0.0)), g.process.t_max), g.t)
        return Grid(g.process, t, g.process.alpha(t), g.process.sigma(t), lam)


def _once(spline: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """The spline, its values at single points kept: steps ask for the same ends again and again."""
    kept = functools.cache(spline)
    return lambda u: kept(float(u)) if np.ndim(u) == 0 else spline(u)


def _derivatives(u: np.ndarray, pseudo: bool) -> np.ndarray:
    """(r, r): coefficient of (lam - u[0])^k, row k, over values at u (r,): interpolation, or divided differences."""
    if not pseudo:
        return np.linalg.inv(np.vander(u - u[0], increasing=True))
    T = np.zeros((len(u), len(u)))
    for k in range(len(u)):
        for j in range(k + 1):
            T[k, j] = 1.0 / math.prod(u[j] - u[m] for m in range(k + 1) if m != j)
    return T


def dpm_solver_v3(
    statistics: Statistics | str | Path | None = None,
    order: int = 3,
    corrector: str | None = "pseudo",
    pseudo: bool = False,
    lower_order_final: bool = True,
    correct_in: tuple[float, float] = (0.0, 1.0),
    as_published: bool = False,
) -> Solver:
    """DPM-Solver-v3 (Zheng et al. 2023, algorithms 1 and 2), multistep, orders 1 to 3, with a corrector for free.

    statistics  a `jdiff.statistics.Statistics` or the path of its file (`jdiff statistics RUN` makes one). None is
                l = 1, s = b = 0, data prediction: DPM-Solver++ with exact differences. Constant (0, -1, 0) is
                DPM-Solver on eps
    corrector   the step repeated with its end point's output too, which is used again for the next step (eps
                re-expressed at the corrected point, f kept). "pseudo": p + 1 points and divided differences in place
                of derivatives (c_pseudo, the published default; of second order at best); "full": p + 1 points,
                true derivatives, order p + 1; "same": p points; None: predictor only, advised at many steps
    pseudo      divided differences in the predictor too (p_pseudo, published for 5 steps on CIFAR-10)
    lower_order_final  the last steps take order 2, 1 (published default)
    correct_in  part of [0, t_max], as fractions, whose points are corrected. (0, 0.5) is the "half corrector" for large
                guidance as the official documentation says it; the official code does (0.5, 1)
    as_published  integrals by the trapezoid rule on the table and times rounded to it

    The paper advises order 2 for guided sampling. Into sigma = 0 and out of alpha = 0, where no table reaches, a step
    is D's of first order. ValueError for times outside the table.
    """
    _check_order("dpm_solver_v3", order, 3)
    if corrector not in CORRECTORS:
        raise ValueError(
            f"dpm_solver_v3: corrector is {corrector!r}; expected one of {', '.join(map(repr, CORRECTORS))}"
        )
    if len(correct_in) != 2 or not 0 <= correct_in[0] < correct_in[1] <= 1:
        raise ValueError(f"dpm_solver_v3: correct_in is {correct_in}; expected (low, high) with 0 <= low < high <= 1")
    table = constant() if statistics is None else statistics
    if not isinstance(table, Statistics):
        table = Statistics.load(table)
    integrals = _Integrals(table, as_published)

    def step(g: Grid, i: int, x: Value, known: list[tuple[float, Value]], pseudo: bool) -> Value:
        """Step i from x, through (lam, f) of known points, the first of them x's own."""
        start, end = g.lam[i], g.lam[i + 1]
        L, S, points = integrals.L, integrals.S, np.array([lam for lam, _ in known])
        powers, rest = integrals.step(start, end)
        weights = np.tensordot(_derivatives(points, pseudo).T, powers[: len(known)], 1)
        scales = [np.exp(S(start) - S(lam)) for lam, _ in known]
        y = (1.0 / g.a[i]) * x
        for c, scale, (_, f) in zip(weights, scales, known, strict=True):
            y = y - (c * scale) * f
        if integrals.B:
            known_b = sum(c * integrals.beta(start, lam) for c, lam in zip(weights, points, strict=True))
            y = y - number(x, rest - known_b)
        return (g.a[i + 1] * np.exp(L(start) - L(end))) * y

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        g, past, p, before = integrals.inside(g), [], 0, x
        for i in range(g.n):
            a0, lam, t = g.a[i], g.lam[i], g.t[i]
            D = model(x, t, label=f"after order {p}" if p else "")
            if a0 == 0:
                x = (g.s[i + 1] / g.s[i]) * x + g.a[i + 1] * D
                continue
            k = (1.0 - integrals.l(lam)) / a0
            f = k * x - D
            q = p if corrector == "same" else p + 1
            if corrector and p and q > 1 and correct_in[0] <= t / g.process.t_max <= correct_in[1]:
                x = step(g, i - 1, before, [past[0], (lam, f), *past[1:]][:q], corrector == "pseudo")
            if g.s[i + 1] == 0:
                return g.a[i + 1] * (k * x - f)
            past = [(lam, f), *past[:2]]
            p = min(order, len(past), _final_cap(g, i, lower_order_final))
            before, x = x, step(g, i, x, past[:p], pseudo)
        return x

    reached = min(order, 2) if pseudo else order
    reached = {None: reached, "same": reached, "pseudo": 2, "full": order + 1}[corrector]
    return Solver(
        "dpm_solver_v3",
        sampler,
        reached,
        ("Zheng et al. 2023 (DPM-Solver-v3), arXiv 2310.13268, algorithms 1 and 2",),
        prediction="x0" if statistics is None else "sigma eps - l x",
        when="8 to 15 evaluations of a near-Gaussian model; try it: UniPC-2 was better on our digits",
    )
