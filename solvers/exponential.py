"""Exponential integrators in half log-SNR; DPM-Solver and DPM-Solver++. Notation as in classic.py.

All of them integrate the linear part of an ODE or SDE exactly, and a polynomial in lam through outputs F:

    x1 = (s1/s0) e^(-eta h) x + a1 int_0^H e^(u-H) F du + noise,   H = (1 + eta) h     F = D, data prediction
    x1 = (a1/a0) x - (1 + eta) s1 int_0^h e^(h-u) F du + noise                         F = eps, noise prediction

Solvers differ in where the outputs stand: at past points (multistep, `adams`), at the new point too (the correctors of
multistep.py), or at points inside the step (`singlestep`). Both forms take their points from the grid, so
that a grid of n steps costs n evaluations with any method: in a singlestep method of order p, p steps of the grid make
one step.

Into sigma = 0 (h = inf) a polynomial in lam cannot be extrapolated: that step is D itself, of first order. (The
integral of eps would be finite; but taken in full order it was measured to spoil the sample, 6 times the error at 50
steps on the digits.) Out of alpha = 0 noise prediction has no step; that step is taken in data prediction.
Multistep methods start at order 1 and climb; `jdiff.times.graded` gives a start that keeps the order.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jdiff.trace import Grid, Model, Noise, Solver, Value

from .weights import moments

Rule = Callable[[np.ndarray, float], np.ndarray]  # (moments, H) -> the moments that a published form uses
Outputs = list[tuple[int, Value]]  # (grid point, output there)


def _check_order(name: str, order: int, highest: int) -> None:
    if order not in range(1, highest + 1):
        raise ValueError(f"{name}: order is {order!r}; expected 1 to {highest}")


def _check_choice(name: str, what: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: {what} is {value!r}; expected {', '.join(map(repr, known[:-1]))} or {known[-1]!r}")


def _final_cap(g: Grid, i: int, lower_order_final: bool) -> int:
    """Highest order that step i may have."""
    if g.s[i + 1] == 0:
        return 1
    return g.n - i if lower_order_final else g.n


def exact(m: np.ndarray, H: float) -> np.ndarray:
    """The rule of the exact integral."""
    return m


def half(m: np.ndarray, H: float) -> np.ndarray:
    """Two points: m0/2 for the exact m1, which costs no order. 2M's "midpoint", UniPC's bh2, B(h) = e^h - 1."""
    return np.array([m[0], m[0] / 2]) if len(m) == 2 else m


def half_step(m: np.ndarray, H: float) -> np.ndarray:
    """Two points: H/2 for the exact m1. UniPC's bh1, B(h) = h; SA-Solver's form for few steps."""
    return np.array([m[0], H / 2]) if len(m) == 2 and np.isfinite(H) else half(m, H)


def integrate(
    begin: tuple[Any, Any],
    end: tuple[Any, Any],
    h: Any,
    x: Value,
    points: list[tuple[Any, Value]],
    kind: str = "x0",
    eta: float = 0.0,
    rule: Rule = exact,
) -> Value:
    """The mean of a step of h in lam from x, (alpha, sigma) = begin, to end: the polynomial through outputs (r, F) at
    the fractions r of the step."""
    (a0, s0), (a1, s1) = begin, end
    if s1 == 0 or (len(points) == 1 and np.isinf(h) and eta == 0):  # F held: closed forms without h
        keep, hold = (s1 / s0, a1 - a0 * s1 / s0) if kind == "x0" else (a1 / a0, s1 - s0 * a1 / a0)
        return keep * x + hold * points[0][1]
    H = (1.0 + eta) * h if kind == "x0" else -h
    keep, scale = (s1 / s0) * (np.exp(-eta * h) if eta else 1.0), a1
    if kind == "eps":
        keep, scale = a1 / a0, (1.0 + eta) * s1
    k = np.arange(len(points))
    powers = np.array([r for r, _ in points])[None, :] ** k[:, None]
    w = np.linalg.solve(powers, np.cumprod(np.maximum(k, 1)) * rule(moments(H, len(k)), H))
    y = keep * x
    for weight, (_, F) in zip(w, points, strict=True):
        y = y + (scale * weight) * F
    return y


def step(
    g: Grid, i: int, j: int, x: Value, points: Outputs, kind: str = "x0", eta: float = 0.0, rule: Rule = exact
) -> Value:
    """`integrate` from grid point i to j, x at i, through outputs at the grid points of `points`."""
    h = g.lam[j] - g.lam[i]
    at = lambda k: 0.0 if k == i else 1.0 if k == j else (g.lam[k] - g.lam[i]) / h
    outputs = [(at(k), F) for k, F in points]
    return integrate((g.a[i], g.s[i]), (g.a[j], g.s[j]), h, x, outputs, kind, eta, rule)


def noise_std(g: Grid, i: int, j: int, eta: float, kind: str = "x0") -> float:
    """Standard deviation of the noise that the reverse SDE adds from grid point i to j; none into sigma = 0.

    kind: which part of the drift `step` integrates exactly, and so how much of the noise decays on the way.
    """
    if eta == 0 or g.s[j] == 0:
        return 0.0
    h = g.lam[j] - g.lam[i]
    return g.s[j] * np.sqrt(eta * np.expm1(2.0 * h) if kind == "eps" else -np.expm1(-2.0 * eta * h))


def adams(
    g: Grid,
    x: Value,
    model: Model,
    noise: Noise,
    predictor: int,
    corrector: int = 0,
    kind: str = "x0",
    eta: Callable[[int], float] = lambda i: 0.0,
    rule: Rule = exact,
    cap: Callable[[int], int] | None = None,
    correct: Callable[..., Value] = step,
    predict: Callable[..., Value] = step,
    again: bool = False,
) -> Value:
    """Multistep predictor of order `predictor`; and a corrector through `corrector` points, the new one among them.

    The corrector repeats the step from the same x with the output at the predicted point, and that output is kept for
    the next step (PEC: no evaluation more); with `again`, one at the corrected point takes its place (PECE).
    eta(i): stochasticity of step i; one noise serves both. cap(i): highest order of step i. After the last step
    nothing is evaluated, so nothing is corrected.
    """
    at = lambda i: "x0" if g.a[i] == 0 else kind
    usable = lambda i, past: [(k, F) for k, F in past if k == i or np.isfinite(g.lam[k])]
    known = lambda i: i + 1 - int(g.a[0] == 0 and i > 0)
    order = lambda i: 1 if g.s[i + 1] == 0 else min(predictor, known(i), cap(i) if cap else predictor)

    y, past = x, [(0, model(x, g.t[0], kind=at(0), label=f"order {order(0)}"))]
    for i in range(g.n):
        points, this = usable(i, past), at(i)
        x = y if g.s[i + 1] == 0 else x  # the sample is D, of the point that was evaluated
        y = predict(g, i, i + 1, x, points[: order(i)], this, eta(i), rule)
        std = noise_std(g, i, i + 1, eta(i), this)
        z = std * noise() if std > 0 else 0.0
        y = y + z
        if i == g.n - 1:
            return y
        new = (i + 1, model(y, g.t[i + 1], kind=kind, label=f"order {order(i + 1)}"))
        c = min(corrector, len(points) + 1, (cap(i) if cap else corrector) + 1)
        corrected = c > 0 and this == kind
        x = correct(g, i, i + 1, x, [new, *points[: c - 1]], this, eta(i), rule) + z if corrected else y
        if corrected and again:
            y, new = x, (i + 1, model(x, g.t[i + 1], kind=kind, label="corrected"))
        past = [new, *points][: max(predictor, corrector - 1, 1)]
    return x


def groups(g: Grid, order: int, fast: bool) -> list[int]:
    """How many steps of the grid each singlestep step takes: `order`, and at the end what is left.

    fast: DPM-Solver-fast's splitting, which ends with 2 + 1 where 3 divides the number of evaluations. A step that
    leaves alpha = 0 or reaches sigma = 0 is one step of the grid, of first order.
    """
    sizes = [order] * (g.n // order) + [g.n % order] * (g.n % order > 0)
    if fast and g.n % 3 == 0:
        sizes[-1:] = [2, 1]
    if g.s[-1] == 0 and sizes[-1] > 1:
        sizes[-1:] = [sizes[-1] - 1, 1]
    if g.a[0] == 0 and sizes[0] > 1:
        sizes[:1] = [1, sizes[0] - 1]
    return sizes


def singlestep(
    g: Grid,
    x: Value,
    model: Model,
    noise: Noise,
    sizes: list[int],
    kind: str = "x0",
    eta: float = 0.0,
    rule: Rule = exact,
    two_points: bool = False,
    corrector: bool = False,
) -> Value:
    """Singlestep methods whose inner points are those of the grid; sizes as of `groups`.

    Inner point k is reached with the outputs at the points before it, the end with all of them (two_points: with the
    first and the last alone, by exact weights in a step of order 3). The noise is that of one path: what an inner
    point has seen, the end has seen too. The corrector takes the outputs at the ends of former steps, for those are
    good to the order that it needs and those at inner points are not; it begins when there are enough of them.
    """
    i, y, ends, at = 0, x, list[tuple[int, Value]](), lambda i: "x0" if g.a[i] == 0 else kind
    new = model(x, g.t[0], kind=at(0), label=f"order {sizes[0]}")
    for number, p in enumerate(sizes):
        this, points, path = at(i), [(i, new)], 0.0
        x = y if g.s[i + p] == 0 else x  # the sample is D, of the point that was evaluated
        for j in range(i + 1, i + p + 1):
            last = j == i + p
            used = [points[0], points[-1]] if last and two_points and p > 1 else points
            y = step(g, i, j, x, used, this, eta, exact if two_points and p > 2 else rule)
            if (std := noise_std(g, j - 1, j, eta, kind)) > 0:
                kept = (g.s[j] / g.s[j - 1]) * np.exp(-eta * g.h(j - 1))
                path = std * noise() + (kept * path if j > i + 1 else 0.0)
            y = y + path
            if j == g.n:
                return y
            label = f"order {sizes[number + 1]}" if last else "inner point"
            points.append((j, model(y, g.t[j], kind=kind, label=label)))
        ends = [(k, F) for k, F in [(i, new), *ends] if np.isfinite(g.lam[k])]
        if corrector and len(ends) >= p:
            x = step(g, i, i + p, x, [points[-1], *ends[:p]], this, eta, rule)
        else:
            x = y
        i, new = i + p, points[-1][1]
    return x


def ancestral(g: Grid, x: Value, model: Model, noise: Noise, eta: float) -> Value:
    """DPM-Solver++(2S) down to a level below the step's end, its inner point half-way in lam, and noise back up to it.

    up^2 = eta^2 rho1^2 (1 - rho1^2 / rho0^2) is the noise, in sigma/alpha, and down^2 = rho1^2 - up^2.
    """
    p = g.process
    for i in range(g.n):
        r0, r1, start = g.rho(i), g.rho(i + 1), (g.a[i], g.s[i])
        up = r1 * min(1.0, eta * np.sqrt(1.0 - (r1 / r0) ** 2))
        down = np.sqrt(r1**2 - up**2)
        D = model(x, g.t[i])
        if down > 0 and g.a[i] > 0:
            t = p.t_of_lam(-0.5 * np.log(r0 * down))
            inner = integrate(start, (p.alpha(t), p.sigma(t)), 0.5 * np.log(r0 / down), x, [(0.0, D)])
            D = model(inner, t, label="inner point")
        x = integrate(start, (g.a[i + 1], g.a[i + 1] * down), np.log(r0 / down) if down > 0 else np.inf, x, [(0.0, D)])
        x = x + (g.a[i + 1] * up) * noise() if up > 0 else x
    return x


FORMS = {"midpoint": "midpoint", "dpmsolver": "midpoint", "heun": "heun", "taylor": "heun"}


def _dpm(
    name: str,
    kind: str,
    order: int,
    method: str,
    eta: float,
    form: str,
    lower_order_final: bool,
    as_published: bool,
    interval: tuple[float, float] | None = None,
) -> Callable[[Grid, Value, Model, Noise], Value]:
    """The samplers of DPM-Solver (kind "eps") and DPM-Solver++ ("x0")."""
    _check_order(name, order, 3)
    _check_choice(name, "method", method, ("multistep", "singlestep", "fast"))
    if form not in FORMS:
        raise ValueError(f"{name}: form is {form!r}; expected 'midpoint' or 'heun' (officially 'dpmsolver', 'taylor')")
    if not 0 <= eta <= 1:
        raise ValueError(f"{name}: expected 0 <= eta <= 1, got {eta}")
    if method == "fast" and order != 3:
        raise ValueError(f"{name}: order is {order} with method='fast', which splits the evaluations of order 3")
    if method != "multistep" and (lower_order_final or as_published):
        raise ValueError(f"{name}: lower_order_final and as_published belong to method='multistep', got {method!r}")
    if interval is not None and (method != "multistep" or not 0 <= interval[0] < interval[1]):
        raise ValueError(
            f"{name}: interval is {interval} with method={method!r}; expected (low, high), 0 <= low < high in "
            "sigma/alpha, with method='multistep'"
        )
    midpoint = FORMS[form] == "midpoint"

    def rule(m: np.ndarray, H: float) -> np.ndarray:
        if as_published and len(m) == 3:
            return m * [1.0, 1.0, 0.5]  # h^2 D''/2 with the weight of h^2 D''
        return half(m, H) if midpoint else m

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        if method == "multistep":
            cap = lambda i: _final_cap(g, i, lower_order_final)
            inside = lambda i: interval is None or interval[0] <= g.rho(i) <= interval[1]
            return adams(g, x, model, noise, order, 0, kind, lambda i: eta if inside(i) else 0.0, rule, cap)
        sizes = groups(g, order, method == "fast")
        return singlestep(g, x, model, noise, sizes, kind, eta, rule, two_points=midpoint)

    return sampler


def dpm_solver(
    order: int = 3,
    method: str = "fast",
    form: str = "midpoint",
    lower_order_final: bool = False,
    as_published: bool = False,
) -> Solver:
    """DPM-Solver (Lu et al. 2022), noise prediction, orders 1 to 3; order 1 is DDIM.

    method             "singlestep": DPM-Solver-2 and -3 (algorithms 1 and 2), `order` steps of the grid a step and a
                       last one of what is left; "fast": DPM-Solver-fast, order 3 that ends with 2 + 1 or 2 or 1, as
                       the official "singlestep" and k-diffusion's dpm_fast; "multistep": the official multistep form
    form               "midpoint" (official "dpmsolver", the paper's) or "heun" ("taylor"), as in `dpm_solver_pp`
    lower_order_final, as_published    of "multistep", as in `dpm_solver_pp`

    n steps cost n evaluations with any method. The inner points r1, r2 are the grid's: 1/2, and 1/3 and 2/3, on
    `times.logsnr`. Order 3 needs r2 = 2/3, or nearly, as on any smooth grid. The official code with a log-SNR grid
    makes steps of order 3, 2 and 1 equally long; here a step of order p has p grid steps, so that the evaluations are
    evenly spaced (its other grids are used as here).
    """
    sampler = _dpm("dpm_solver", "eps", order, method, 0.0, form, lower_order_final, as_published)
    return Solver(
        "dpm_solver",
        sampler,
        order,
        ("Lu et al. 2022 (DPM-Solver), arXiv 2206.00927, algorithms 1 and 2, appendix D.1",),
        prediction="eps",
        when="12 or more evaluations of a smooth unguided model; fewer: dpm_solver_pp, unipc or deis",
    )


def dpm_solver_pp(
    order: int = 2,
    eta: float = 0.0,
    form: str = "midpoint",
    lower_order_final: bool = False,
    as_published: bool = False,
    method: str = "multistep",
    interval: tuple[float, float] | None = None,
) -> Solver:
    """DPM-Solver++ (Lu et al. 2022), orders 1 to 3: "2M", "3M", "2S", "3S"; with eta > 0 the SDE versions.

    With differences D1 ~ h D', D2 ~ h^2 D'' at the step's start and H = (1 + eta) h,

        x1 = (s1/s0) e^(-eta h) x + a1 [m0(H) D0 + m1(H) D1 + m2(H) D2] + s1 sqrt(1 - e^(-2 eta h)) z.

    eta                0 the ODE, 1 the reverse SDE ("SDE-DPM-Solver++(2M)"), between them k-diffusion's eta; the weak
                       order is 2 at most, for past outputs have seen other noise
    form               order 2's weight of D1: "midpoint" m0/2 as in the paper (official "dpmsolver"), "heun" the exact
                       m1 (official "taylor"). 3S: "midpoint" uses the first and last point, "heun" all three
    lower_order_final  the last steps take order 2, 1: helps some models at few steps and costs the order (the
                       official code does so below 10 steps; its documentation, and diffusers, say 15)
    as_published       D2 without its factor 2, as in the official code, diffusers and k-diffusion: order 3 is then
                       of second order everywhere
    method             "multistep"; "singlestep" and "fast": inner points in place of past ones, as in `dpm_solver`.
                       With eta = 1 "singlestep" of order 2 is k-diffusion's dpmpp_sde, but the noise at the inner
                       point and at the end are those of one path of the SDE (there: of Brownian motion in sigma)
                       "ancestral": k-diffusion's dpmpp_2s_ancestral: steps of order 2 to below their ends, and noise
                       of its own eta back up to them; 2 n - 1 evaluations, the inner points between the grid's
    interval           noise levels sigma/alpha (low, high) at whose steps eta acts, of "multistep"; the others are the
                       ODE's. Noise at high levels alone, as with (0.5, inf), costs next to nothing
    """
    two = method == "ancestral"
    if two and (order != 2 or form != "midpoint"):
        raise ValueError(f"dpm_solver_pp: method='ancestral' has order=2 and form='midpoint', got {order=}, {form=}")
    options = ("singlestep" if two else method, eta, form, lower_order_final, as_published, interval)
    sampler = _dpm("dpm_solver_pp", "x0", order, *options)  # checks them, too
    if two:
        sampler = functools.partial(ancestral, eta=eta)
    kind = "SDE-DPM-Solver++" if eta > 0 else "DPM-Solver++"
    return Solver(
        "dpm_solver_pp",
        sampler,
        min(order, 1 if two else 2) if eta > 0 else order,
        (f"Lu et al. 2022, {kind}, arXiv 2211.01095, algorithms 1 and 2",),
        cost=lambda n: 2 * n - 1 if two else n,
        stochastic=eta > 0,
        when=(
            "stochastic, 20 to 100 evaluations: the best-known SDE solver"
            if eta > 0
            else "guided models at 10 to 25 evaluations; a safe first choice"
        ),
    )
