"""Exponential integrators: DPM-Solver++, DEIS, UniPC. Notation as in classic.py.

All three integrate the linear part of the probability-flow ODE exactly and a polynomial through past outputs:

    x1 = (s1/s0) x + a1 int_0^h e^(u-h) D(lam0 + u) du          (data prediction: DPM-Solver++, UniPC)
    x1 = (a1/a0) x + a1 int_rho0^rho1 eps drho                  (noise prediction: DEIS)

Into sigma = 0 (h = inf) a polynomial in lam cannot be extrapolated: that step is D itself, of first order. (The
integral of eps would be finite in DEIS; but taken in full order it was measured to spoil the sample, 6 times the error
at 50 steps on the digits.) DEIS in t or rho has its nodes at finite places and keeps its order.
Multistep methods start at order 1 and climb; `jdiff.times.graded` gives a start that keeps the order.
"""

from typing import Any

import numpy as np

from jdiff.trace import Grid, Model, Noise, Solver, Value

from .weights import lagrange, moments, quadrature


def _check_order(name: str, order: int, highest: int) -> None:
    if order not in range(1, highest + 1):
        raise ValueError(f"{name}: order is {order!r}; expected 1 to {highest}")


def _final_cap(g: Grid, i: int, lower_order_final: bool) -> int:
    """Highest order that step i may have."""
    if g.s[i + 1] == 0:
        return 1
    return g.n - i if lower_order_final else g.n


def dpm_solver_pp(
    order: int = 2,
    eta: float = 0.0,
    form: str = "midpoint",
    lower_order_final: bool = False,
    as_published: bool = False,
    interval: tuple[float, float] = (0.0, float("inf")),
) -> Solver:
    """Multistep DPM-Solver++ (Lu et al. 2022, algorithm 2), orders 1 to 3: "2M", "3M"; with eta > 0 the SDE versions.

    With differences D1 ~ h D', D2 ~ h^2 D'' at the step's start and H = (1 + eta) h,

        x1 = (s1/s0) e^(-eta h) x + a1 [m0(H) D0 + m1(H) D1 + m2(H) D2] + s1 sqrt(1 - e^(-2 eta h)) z.

    eta                0 the ODE, 1 the reverse SDE ("SDE-DPM-Solver++(2M)"), between them k-diffusion's eta
    form               order 2's weight of D1: "midpoint" m0/2 as in the paper, "heun" the exact m1 (official "taylor")
    lower_order_final  the last steps take order 2, 1: helps some models at few steps and costs the order (the
                       official code does so below 10 steps; its documentation, and diffusers, say 15)
    as_published       D2 without its factor 2, as in the official code, diffusers and k-diffusion: order 3 is then
                       of second order everywhere
    interval           noise levels sigma/alpha (low, high) of the steps that eta acts in; the others are the ODE's.
                       Noise at high levels alone costs next to nothing, as with (5, inf)
    """
    _check_order("dpm_solver_pp", order, 3)
    if form not in ("midpoint", "heun"):
        raise ValueError(f"dpm_solver_pp: form is {form!r}; expected 'midpoint' or 'heun'")
    if not 0 <= eta <= 1:
        raise ValueError(f"dpm_solver_pp: expected 0 <= eta <= 1, got {eta}")
    if not 0 <= interval[0] < interval[1]:
        raise ValueError(f"dpm_solver_pp: interval is {interval}; expected (low, high), 0 <= low < high, sigma/alpha")

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        past: list[Value] = []
        for i in range(g.n):
            a1, s0, s1, h = g.a[i + 1], g.s[i], g.s[i + 1], g.h(i)
            e = eta if interval[0] <= g.rho(i) <= interval[1] else 0.0
            p = min(order, i + 1, _final_cap(g, i, lower_order_final))
            D = model(x, g.t[i], label=f"order {p}")
            past = [D, *past[: order - 1]]
            m0, m1, m2 = moments((1.0 + e) * h, 3)
            bracket = m0 * D
            if p == 2:
                slope = (past[0] - past[1]) / (g.h(i - 1) / h)
                bracket = bracket + (m0 / 2 if form == "midpoint" else m1) * slope
            if p == 3:
                r0, r1 = g.h(i - 1) / h, g.h(i - 2) / h
                near, far = (past[0] - past[1]) / r0, (past[1] - past[2]) / r1
                D1 = near + (r0 / (r0 + r1)) * (near - far)
                D2 = ((1.0 if as_published else 2.0) / (r0 + r1)) * (near - far)
                bracket = bracket + m1 * D1 + m2 * D2
            decay = np.exp(-e * h) if e > 0 else 1.0  # h may be infinite
            x = (s1 / s0) * decay * x + a1 * bracket if s1 > 0 else a1 * D
            if e > 0 and s1 > 0:
                x = x + s1 * np.sqrt(-np.expm1(-2.0 * e * h)) * noise()
        return x

    kind = "SDE-DPM-Solver++" if eta > 0 else "DPM-Solver++"
    return Solver(
        "dpm_solver_pp",
        sampler,
        order,
        (f"Lu et al. 2022, {kind}, arXiv 2211.01095, algorithm 2",),
        stochastic=eta > 0,
    )


def deis(order: int = 3, variable: str = "t", lower_order_final: bool = False) -> Solver:
    """DEIS (Zhang and Chen 2022, eq. 14 and 15), orders 1 to 4 (the paper's r = order - 1); order 1 is DDIM.

        x1 = (a1/a0) x + a1 sum_j C_j eps_j,     C_j = int_rho0^rho1 l_j drho,     l_j Lagrange on past points

    variable: what eps is a polynomial in. "t": tAB-DEIS, the paper's best, made for VP processes; "rho": rhoAB, for
    sigma/alpha; "lam": log-SNR, what diffusers calls DEIS (there the integrals are closed forms that cancel in
    float32; here they are float64 and good to rounding). On `edm` "t" and "rho" are one, and "lam" is far better.
    The official code sums 10,000 rectangles; here the weights are exact.
    """
    _check_order("deis", order, 4)
    if variable not in ("t", "rho", "lam"):
        raise ValueError(f"deis: variable is {variable!r}; expected 't', 'rho' or 'lam'")

    def weights(g: Grid, i: int, points: list[int]) -> np.ndarray:
        rho0, rho1, h = g.rho(i), g.rho(i + 1), g.h(i)
        if variable == "lam":  # drho = -rho dlam
            basis = lambda u: lagrange(g.lam[points] - g.lam[i], u)
            if np.isinf(h):
                return np.array([-rho0])
            return -rho0 * quadrature(lambda u: basis(u) * np.exp(-u), 0.0, h)
        if variable == "rho":
            nodes = np.array([g.rho(j) for j in points])
            return quadrature(lambda rho: lagrange(nodes, rho), rho0, rho1, panels=1)
        with np.errstate(divide="ignore"):
            time = lambda rho: g.process.t_of_lam(-np.log(rho))
        return quadrature(lambda rho: lagrange(g.t[points], time(rho)), rho0, rho1)

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        past: list[tuple[int, Value]] = []
        for i in range(g.n):
            a0, s0, a1, s1 = g.a[i], g.s[i], g.a[i + 1], g.s[i + 1]
            cap = _final_cap(g, i, lower_order_final) if variable == "lam" else g.n - i if lower_order_final else order
            if a0 == 0:  # rho is infinite: DDIM, the same step in its other form
                D = model(x, g.t[i], label="order 1")
                past = [(i, x / s0)] if variable == "t" else []
                x = (s1 / s0) * x + a1 * D
                continue
            p = min(order, cap, len(past) + 1)
            eps = model(x, g.t[i], kind="eps", label=f"order {p}")
            past = [(i, eps), *past[: order - 1]]
            C = weights(g, i, [j for j, _ in past[:p]])
            x = (a1 / a0) * x
            for c, (_, e) in zip(C, past, strict=False):
                x = x + (a1 * c) * e
        return x

    return Solver("deis", sampler, order, ("Zhang and Chen 2022 (DEIS), arXiv 2204.13902, eq. 14 and 15",))


def unipc(order: int = 3, variant: str = "bh2", corrector: bool = True, lower_order_final: bool = True) -> Solver:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2), data prediction, orders 1 to 3, with the corrector UniC for free.

    With r_k the past points' (lam_k - lam0)/h and q_k = D_k - D0,

        x1 = (s1/s0) x + a1 [m0 D0 + sum_k w_k q_k / r_k],     sum_k w_k r_k^(j-1) = j! m_j   (j = 1, 2, ..)

    The predictor uses past points; the corrector repeats the step with the new point (r = 1) too, at no evaluation:
    the output at the predicted point is used again for the next step. The corrector adds one to the order. The
    function B(h) of the paper, "bh1" B = h and "bh2" B = 1 - e^(-h), cancels out of that system and matters only
    where the paper sets w = B/2 instead of solving: the order-2 predictor and the order-1 corrector. Out of
    alpha = 0 (h = inf) bh1 has no value and bh2's is taken (peers return NaN there, and into sigma = 0).
    No corrector after the last step. lower_order_final, the published default, lowers the last steps to order 2, 1:
    better at few steps (docs/differences.md); with False the order of convergence is kept to the end.
    """
    _check_order("unipc", order, 3)
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"unipc: variant is {variant!r}; expected 'bh1' or 'bh2'")

    def weights(h: float, r: list[float], halved: bool) -> np.ndarray:
        m = moments(h, len(r) + 1)
        if halved and len(r) == 1:
            B = h if variant == "bh1" and np.isfinite(h) else m[0]
            return np.array([B / 2])
        j = np.arange(1, len(r) + 1)
        factorial = np.cumprod(j)
        return np.linalg.solve(np.array(r)[None, :] ** (j - 1)[:, None], factorial * m[1:])

    def step(g: Grid, i: int, x: Value, D: Value, others: list[tuple[Any, Value]], halved: bool) -> Value:
        """Step i from x with the output D there and further outputs (r, D_r)."""
        a1, h = g.a[i + 1], g.h(i)
        y = (g.s[i + 1] / g.s[i]) * x + (a1 * moments(h, 1)[0]) * D
        for w, (r, Dr) in zip(weights(h, [r for r, _ in others], halved), others, strict=True):
            y = y + (a1 * w / r) * (Dr - D)
        return y

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        D = model(x, g.t[0])
        past: list[tuple[int, Value]] = []  # newest first, without point i itself
        for i in range(g.n):
            if g.s[i + 1] == 0:
                return g.a[i + 1] * D
            usable = [((g.lam[j] - g.lam[i]) / g.h(i), Dj) for j, Dj in past if np.isfinite(g.lam[j])]
            p = min(order, len(usable) + 1, _final_cap(g, i, lower_order_final))
            others = usable[: p - 1]
            predicted = step(g, i, x, D, others, halved=p == 2)
            if i == g.n - 1:
                return predicted
            new = model(predicted, g.t[i + 1], label=f"after order {p}")
            x = step(g, i, x, D, [*others, (1.0, new)], halved=p == 1) if corrector else predicted
            past = [(i, D), *past[: order - 2]] if order > 1 else []
            D = new
        return x

    return Solver("unipc", sampler, order, ("Zhao et al. 2023 (UniPC), arXiv 2302.04867, algorithms 1 and 2",))
