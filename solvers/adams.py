"""Classical Runge-Kutta and Adams methods on noise predictions: DEIS, iPNDM, PNDM. Notation as in classic.py.

x/alpha moves with slope eps in rho = sigma/alpha, so that any classical method in rho is a sampler; and the weights of
a classical method in t, put on the eps of one DDIM move, are one too (PNDM, iPNDM: "pseudo numerical").
"""

from typing import Any

import numpy as np

from jdiff.trace import Grid, Model, Noise, Solver, Value

from .exponential import _check_choice, _check_order, _final_cap, step
from .weights import lagrange, quadrature

AB = {  # Adams-Bashforth for equal steps, newest first
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
RK: dict[int, tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]] = {  # rows below the diagonal, and the weights
    1: ((), (1.0,)),
    2: (((1.0,),), (1 / 2, 1 / 2)),
    3: (((1 / 2,), (-1.0, 2.0)), (1 / 6, 4 / 6, 1 / 6)),
    4: (((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 2 / 6, 2 / 6, 1 / 6)),
}


def mix(weights: Any, outputs: list[Value]) -> Value:
    """sum_j weights[j] outputs[j] over the non-zero ones."""
    kept = [(w, F) for w, F in zip(weights, outputs, strict=False) if w != 0]
    return sum((w * F for w, F in kept[1:]), kept[0][0] * kept[0][1])


def move(x: Value, F: Value, kind: str, a0: Any, s0: Any, a1: Any, s1: Any) -> Value:
    """DDIM's move of x from (a0, s0) to (a1, s1) with F held: PNDM's transfer part phi."""
    if kind == "x0":
        return (s1 / s0) * x + (a1 - a0 * s1 / s0) * F
    return (a1 / a0) * x + (s1 - a1 * s0 / a0) * F


def deis(
    order: int = 3, variable: str = "t", lower_order_final: bool = False, method: str = "ab", as_published: bool = False
) -> Solver:
    """DEIS (Zhang and Chen 2022, eq. 14 and 15), orders 1 to 4 (the paper's r = order - 1); order 1 is DDIM.

        x1 = (a1/a0) x + a1 sum_j C_j eps_j,     C_j = int_rho0^rho1 l_j drho,     l_j Lagrange on past points

    method    "ab": that formula. "rk": rhoRK, a Runge-Kutta method of that order in rho (Heun, Kutta, the classical
              one of order 4), `order` evaluations a step; Euler into sigma = 0, and in alpha/sigma out of alpha = 0.
              "ipndm": Adams-Bashforth weights for equal steps on eps of a DDIM move, whatever the steps are: of
              second order at most. Its variable-step form, iPNDM_v, is "ab" in "rho"
    variable  of "ab", what eps is a polynomial in. "t": tAB-DEIS, the paper's best, made for VP processes; "rho":
              rhoAB, for sigma/alpha; "lam": log-SNR, what diffusers calls DEIS (there the integrals are closed forms
              that cancel in float32; here they are float64 and good to rounding). On `edm` "t" and "rho" are one, and
              "lam" is far better

    as_published  of order 3 in "rho": the weights of iPNDM_v in diff-sampler, which lack a pair of brackets; of second
              order, and on Karras grids often the better (docs/differences.md)

    The official code sums 10,000 rectangles; here the weights are exact.
    """
    _check_order("deis", order, 4)
    _check_choice("deis", "variable", variable, ("t", "rho", "lam"))
    _check_choice("deis", "method", method, ("ab", "rk", "ipndm"))
    if as_published and (order, variable, method) != (3, "rho", "ab"):
        raise ValueError("deis: as_published is iPNDM_v's form of order=3, variable='rho', method='ab'")
    if method == "rk" and lower_order_final:
        raise ValueError("deis: lower_order_final is for methods with past points, got method='rk'")

    def weights(g: Grid, i: int, points: list[int]) -> np.ndarray:
        rho0, rho1 = g.rho(i), g.rho(i + 1)
        if method == "ipndm":
            return (rho1 - rho0) * np.array(AB[len(points)])
        if variable == "rho":
            nodes = np.array([g.rho(j) for j in points])
            C = quadrature(lambda rho: lagrange(nodes, rho), rho0, rho1, panels=1)
            if as_published and len(points) == 3:
                h, h1, h2 = rho0 - rho1, *np.diff(nodes)
                right, found = h * (2 * h + 3 * h1) / (6 * h1 * (h1 + h2)), (1 - h**2 / (3 * h1 * (h1 + h2))) / 2
                C = C - h * (found - right) * np.array([1.0, -1.0 - h1 / h2, h1 / h2])
            return C
        with np.errstate(divide="ignore"):
            time = lambda rho: g.process.t_of_lam(-np.log(rho))
        return quadrature(lambda rho: lagrange(g.t[points], time(rho)), rho0, rho1)

    def multistep(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        past: list[tuple[int, Value]] = []
        for i in range(g.n):
            if g.a[i] == 0:  # rho is infinite: DDIM, the same step in its other form
                D = model(x, g.t[i], label="order 1")
                past = [(i, x / g.s[i])] if variable == "t" and method == "ab" else []
                x = move(x, D, "x0", g.a[i], g.s[i], g.a[i + 1], g.s[i + 1])
                continue
            in_lam = variable == "lam" and method == "ab"
            cap = _final_cap(g, i, lower_order_final) if in_lam else g.n - i if lower_order_final else order
            p = min(order, cap, len(past) + 1)
            eps = model(x, g.t[i], kind="eps", label=f"order {p}")
            past = [(i, eps), *past[: order - 1]]
            if in_lam:
                x = step(g, i, i + 1, x, past[:p], "eps")
            else:
                C = weights(g, i, [j for j, _ in past[:p]])
                x = (g.a[i + 1] / g.a[i]) * x
                for c, (_, e) in zip(C, past, strict=False):
                    x = x + (g.a[i + 1] * c) * e
        return x

    def runge_kutta(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        for i in range(g.n):
            a0, s0, a1, s1 = g.a[i], g.s[i], g.a[i + 1], g.s[i + 1]
            kind = "x0" if a0 == 0 else "eps"
            rows, b = RK[order if s1 > 0 else 1]
            F = [model(x, g.t[i], kind=kind)]
            for row in rows:
                c = sum(row)
                with np.errstate(divide="ignore"):  # a point of the variable in which the method is classical
                    lam = np.log(c * a1 / s1) if a0 == 0 else -np.log(s0 / a0 + c * (s1 / a1 - s0 / a0))
                t = g.t[i + 1] if c == 1 else g.process.t_of_lam(lam)
                at = (a0, s0, g.process.alpha(t), g.process.sigma(t))
                F.append(model(move(x, mix([w / c for w in row], F), kind, *at), t, kind=kind, label="inner point"))
            x = move(x, mix(b, F), kind, a0, s0, a1, s1)
        return x

    return Solver(
        "deis",
        runge_kutta if method == "rk" else multistep,
        min(order, 2) if method == "ipndm" else order,
        ("Zhang and Chen 2022 (DEIS), arXiv 2204.13902, eq. 14 and 15",),
        cost=(lambda n: order * (n - 1) + 1) if method == "rk" else lambda n: n,
        prediction="eps",
        when="10 to 50 evaluations on VP models with quadratic times; on edm take variable='lam'",
    )


def pndm(order: int = 4, warmup: str | None = None) -> Solver:
    """PNDM (Liu et al. 2022): classical methods in t, whose steps are DDIM's moves phi on averaged eps.

        x1 = phi(x, sum_j b_j eps_j),     b Adams-Bashforth ("PLMS"), e.g. (55, -59, 37, -9)/24

    order   4: F-PNDM; 2: S-PNDM; 1: DDIM; 3 between them
    warmup  "rk" (default of order 4): the first order - 1 steps are pseudo Runge-Kutta of order 4, at 4 evaluations
            each (n + 9 in all); "ramp" (default of the others): pseudo improved Euler, and then orders 2, 3, ..
            (n + 1 in all; for order 4 it is diffusers' skip_prk_steps)

    The weights are those of equal steps in t, as published: use `times.uniform`. Orders 2 to 4 all converge with order
    2, as the paper proves: phi holds eps over a step of rho, while the average is one in t.
    Half steps are taken at the middle of t (the official code rounds them to whole timesteps). A step into sigma = 0
    makes one evaluation, and out of alpha = 0 D takes the place of eps.
    """
    _check_order("pndm", order, 4)
    warmup = ("rk" if order == 4 else "ramp") if warmup is None else warmup
    _check_choice("pndm", "warmup", warmup, ("rk", "ramp"))
    started = (order - 1 if warmup == "rk" else 1) if order > 1 else 0  # steps that need no past
    rows, b = RK[4] if warmup == "rk" else RK[2]

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        past: list[Value] = []
        for i in range(g.n):
            a0, s0, a1, s1 = g.a[i], g.s[i], g.a[i + 1], g.s[i + 1]
            kind = "x0" if a0 == 0 else "eps"
            F = [model(x, g.t[i], kind=kind)]
            past = [F[0] if kind == "eps" else x / s0, *past[: order - 1]]
            if i < started and s1 > 0:
                for row in rows:
                    c = sum(row)
                    t = (1 - c) * g.t[i] + c * g.t[i + 1]
                    at = (a0, s0, g.process.alpha(t), g.process.sigma(t))
                    F.append(model(move(x, mix([w / c for w in row], F), kind, *at), t, kind=kind, label="warm-up"))
                averaged = mix(b, F)
            else:
                averaged = F[0] if kind == "x0" else mix(AB[len(past)], past)
            x = move(x, averaged, kind, a0, s0, a1, s1)
        return x

    return Solver(
        "pndm",
        sampler,
        min(order, 2),
        ("Liu et al. 2022 (PNDM), arXiv 2202.09778, algorithms 1 and 2",),
        cost=lambda n: n + (len(b) - 1) * min(started, n - 1),
        prediction="eps",
        when="uniform times and 30 evaluations or more, to match published results; else deis",
    )
