"""Momentum for multistep solvers (Wizadwongsa et al. 2023, arXiv 2307.11118): heavy ball, Nesterov, GHVB.

All integrate y = x/alpha over rho = sigma/alpha, dy = eps drho, by Adams-Bashforth of equal steps (PLMS): as published,
the weights know nothing of the steps' true lengths. beta = 1 is no momentum; smaller beta damps more, and so widens the
stability region (`jdiff.stability`). Methods start at order 1 and climb, with the velocity v_0 = eps_0.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jdiff.trace import Grid, Model, Noise, Solver, Value

from .exponential import _check_choice, _final_cap, adams, half, step

GAMMA = np.array([1.0, 1 / 2, 5 / 12, 3 / 8, 251 / 720])  # Adams-Bashforth over backward differences
REFERENCE = "Wizadwongsa et al. 2023, arXiv 2307.11118"


def mix(order: int, beta: float = 1.0) -> np.ndarray:
    """Weights (order,) of the newest and the older velocities, for v_n = (1 - beta) v_{n-1} + beta eps_n.

    eps = (1 + (1 - beta)/beta d) v, where d is the backward difference; so AB's sum_j GAMMA_j d^j eps becomes
    sum_j g_j d^j v, g_j = GAMMA_j + (1 - beta)/beta GAMMA_{j-1}, cut after `order` terms. beta = 1: AB itself.
    """
    g = GAMMA[:order] + (1.0 - beta) / beta * np.concatenate([[0.0], GAMMA[: order - 1]])
    weights, difference = np.zeros(order), np.array([1.0])
    for gj in g:
        weights[: len(difference)] += gj * difference
        difference = np.convolve(difference, [1.0, -1.0])
    return weights


def _check(name: str, order: int, beta: float) -> None:
    if order not in range(1, 6):
        raise ValueError(f"{name}: order is {order!r}; expected 1 to 5")
    if not 0 < beta <= 1:
        raise ValueError(f"{name}: expected 0 < beta <= 1 (1 is no momentum), got {beta}")


def _combine(weights: np.ndarray, values: list[Value]) -> Value:
    return sum(w * v for w, v in zip(weights, values, strict=True))


def _advance(g: Grid, i: int, x: Value, slope: Value) -> Value:
    """Step i with one slope; out of alpha = 0, where rho is infinite, DDIM's step with eps = x / sigma."""
    a0, s0, a1, s1 = g.a[i], g.s[i], g.a[i + 1], g.s[i + 1]
    return (a1 / a0) * x + (s1 - a1 * s0 / a0) * slope


def _multistep(g: Grid, x: Value, model: Model, update) -> Value:
    for i in range(g.n):
        if g.a[i] == 0:
            D = model(x, g.t[i])
            update(x / g.s[i])
            x = (g.s[i + 1] / g.s[i]) * x + g.a[i + 1] * D
        else:
            x = _advance(g, i, x, update(model(x, g.t[i], kind="eps")))
    return x


def ghvb(order: int = 4, beta: float = 0.8) -> Solver:
    """Generalised heavy ball (GHVB), orders 1 to 5: momentum that keeps the order.

        v_n = (1 - beta) v_{n-1} + beta eps_n,      y_{n+1} = y_n + drho sum_j mix(order, beta)_j v_{n-j}

    The authors write GHVB 3.8 for order 4, beta 0.8. beta = 1 is PLMS (Adams-Bashforth of equal steps).
    """
    _check("ghvb", order, beta)

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        past: list[Value] = []

        def update(eps: Value) -> Value:
            past[:] = [(1.0 - beta) * past[0] + beta * eps if past else eps, *past[: order - 1]]
            return _combine(mix(len(past), beta), past)

        return _multistep(g, x, model, update)

    when = "8 to 15 evaluations at order 3; strong guidance where others diverge (lower beta damps more)"
    return Solver("ghvb", sampler, order, (f"{REFERENCE} (GHVB)",), prediction="eps", when=when)


def heavy_ball(
    order: int = 4, beta: float = 0.8, base: str = "plms", nesterov: bool = False, as_published: bool = False
) -> Solver:
    """Polyak's heavy ball on a multistep solver: of first order for beta < 1.

        v_{n+1} = (1 - beta) v_n + beta u_n,      the step is taken with v_{n+1} in place of u_n

    base      "plms": u is AB of `order` over eps; "dpm_solver_pp": u = D0 + D1/2, what DPM-Solver++(2M) holds
              constant (order 2 only; as published the velocity begins with the first second-order step)
              "unipc": u is what UniPC of `order` (bh2) holds constant, by its predictor and by its corrector, each with
              a velocity of its own
    nesterov  the step is taken with (1 - beta) v_{n+1} + beta u_n; for "plms"
    as_published  of "unipc", the official code: no velocity in the predictor (it is written over), and in the
              corrector one of u / s1, which moves a point mass by 2 to 5 % (8 to 100 steps)
    """
    _check("heavy_ball", order, beta)
    _check_choice("heavy_ball", "base", base, ("plms", "dpm_solver_pp", "unipc"))
    if (base != "plms" and nesterov) or (base != "unipc" and as_published):
        raise ValueError(f"heavy_ball: nesterov belongs to 'plms' and as_published to 'unipc', got base={base!r}")
    if base == "dpm_solver_pp" and order != 2:
        raise ValueError(f"heavy_ball: base 'dpm_solver_pp' has order 2, got {order=}")

    def plms(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        past: list[Value] = []
        velocity: list[Value] = []

        def update(eps: Value) -> Value:
            past[:] = [eps, *past[: order - 1]]
            u = _combine(mix(len(past)), past)
            velocity[:] = [(1.0 - beta) * (velocity[0] if velocity else eps) + beta * u]
            return (1.0 - beta) * velocity[0] + beta * u if nesterov else velocity[0]

        return _multistep(g, x, model, update)

    def dpm_solver_pp(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        v = before = None
        for i in range(g.n):
            D, s1 = model(x, g.t[i]), g.s[i + 1]
            u = D
            if before is not None and s1 > 0:
                u = D + (0.5 * g.h(i) / g.h(i - 1)) * (D - before)
                u = v = u if v is None else (1.0 - beta) * v + beta * u
            x = (s1 / g.s[i]) * x - (g.a[i + 1] * np.expm1(-g.h(i))) * u
            before = D
        return x

    def unipc(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        def damped() -> Callable[..., Value]:
            v = None

            def damp(g: Grid, i: int, j: int, x: Value, *rest: Any) -> Value:
                nonlocal v
                y, keep = step(g, i, j, x, *rest), g.s[j] / g.s[i]
                if g.s[j] == 0:
                    return y
                hold = (g.a[j] - g.a[i] * keep) * (g.s[j] if as_published else 1.0)
                u = (1.0 / hold) * (y - keep * x)
                v = u if v is None else (1.0 - beta) * v + beta * u
                return keep * x + hold * v

            return damp

        cap = lambda i: _final_cap(g, i, True)
        predict = step if as_published else damped()
        return adams(g, x, model, noise, order, order + 1, rule=half, cap=cap, correct=damped(), predict=predict)

    return Solver(
        "heavy_ball",
        {"plms": plms, "dpm_solver_pp": dpm_solver_pp, "unipc": unipc}[base],
        order if beta == 1 else 1,
        (f"{REFERENCE} (HB)",),
        prediction="eps" if base == "plms" else "x0",
        when="as ghvb, where a first-order error matters less than artefacts",
    )
