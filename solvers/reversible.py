"""Solvers that run backwards exactly, `jdiff.invert`: BDIA and EDICT; and DDIM inversion, which is approximate.

Each keeps two states. The first register at the end is the sample, the second its partner: `jdiff.registers` returns
both, and without the partner the way back is not determined. Notation as in classic.py.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jdiff.process import Process
from jdiff.tableau import Tableau
from jdiff.trace import Grid, Model, Noise, Solver, Value, grid, trace


def _ddim(g: Grid, i: int, j: int, x: Value, D: Value) -> Value:
    """DDIM from time i to time j, earlier or later, with the output D at (x, t_i)."""
    return (g.s[j] / g.s[i]) * x + (g.a[j] - g.a[i] * g.s[j] / g.s[i]) * D


def bdia(gamma: float = 1.0, base: str = "ddim") -> Solver:
    """BDIA (Zhang, Lewis and Kleijn 2023, arXiv 2307.10829): exactly invertible at the cost of its base.

        x_{i+1} = gamma [x_{i-1} - S(t_i -> t_{i-1} | x_i)] + S(t_i -> t_{i+1} | x_i)

    gamma  0 is the base, and not invertible; 1 is a leapfrog, with a spurious root -gamma that nothing damps: at few
           steps, or with strong guidance, 0.5 is often the better. The way back divides by gamma at every step:
           rounding grows by gamma^(-n). (The paper's gamma; the official README calls 1 - gamma so.)
    base   what S is. "ddim" (BDIA-DDIM, as published): the same output serves the step ahead and the step behind, which
           corrects the one that led to x_i; of second order with gamma = 1 where step sizes change slowly, else first.
           "edm": Heun's step (EDM, algorithm 1), 2 evaluations a step and 1 into sigma = 0; of second order at any
           gamma. The step ahead is the parabola in sigma/alpha that leaves x_i with slope d_i and arrives with slope
           d' at Euler's point, and the step behind is read off the same parabola, so that it costs no evaluation. The
           form above is the paper's for any base. We have not seen how it reads the step behind in BDIA-EDM: the
           parabola is ours. Steps that shrink fast (Karras grids of few steps) make it reach far: take 20 or more.

    The first step is the base's; out of alpha = 0 it is DDIM's (1 evaluation). BDIA around DPM-Solver++ is not here.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"bdia: expected 0 <= gamma <= 1, got {gamma}")
    if base not in ("ddim", "edm"):
        raise ValueError(f"bdia: base is {base!r}; expected 'ddim' or 'edm'")

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Any:
        before = x
        for i in range(g.n):
            D = model(x, g.t[i])
            curved = base == "edm" and g.a[i] > 0 and g.s[i + 1] > 0
            move = _parabola(g, i, x, D) if curved else lambda j, i=i, x=x, D=D: (_ddim(g, i, j, x, D), 0.0)
            new, weight = move(i + 1)
            if i > 0 and gamma > 0:
                behind, back = move(i - 1)
                new, weight = new + gamma * (before - behind), weight - gamma * back
            before, x = x, new  # one value and x alone cross the second evaluation
            if curved:
                x = x + weight * model(_ddim(g, i, i + 1, before, D), g.t[i + 1], kind="eps", label="slope at the end")
        return (x, before) if gamma > 0 else x

    return Solver(
        "bdia",
        sampler,
        2 if gamma == 1 or base == "edm" else 1,
        ("Zhang, Lewis and Kleijn 2023 (BDIA), arXiv 2307.10829",),
        cost=(lambda n: n) if base == "ddim" else lambda n: 2 * n - 1,
        prediction="eps",
        when="an image must come back exactly from its noise (editing), at DDIM's cost",
    )


def _parabola(g: Grid, i: int, x: Value, D: Value) -> Callable[[int], tuple[Value, float]]:
    """Heun's step i as the parabola in rho that it is the end of, at time j: (value, weight of eps at the end)."""

    def move(j: int) -> tuple[Value, float]:
        if g.a[j] == 0:  # rho = inf
            return _ddim(g, i, j, x, D), 0.0
        eps = (1.0 / g.s[i]) * x - (g.a[i] / g.s[i]) * D
        weight = 0.5 * (g.s[j] - g.a[j] * g.rho(i)) * (g.rho(j) - g.rho(i)) / (g.rho(i + 1) - g.rho(i))
        return _ddim(g, i, j, x, D) - weight * eps, weight

    return move


def edict(p: float = 0.93, alternate: bool = True) -> Solver:
    """EDICT (Wallace, Gokul and Naik 2022, arXiv 2211.12446): two coupled DDIMs, exactly invertible; 2 NFE a step.

        x' = DDIM(x, eps(y)),  y' = DDIM(y, eps(x')),  then  x = p x' + (1 - p) y',  y = p y' + (1 - p) x

    p         the mixing weight, which keeps the two together; the way back divides by it
    alternate the order of the two updates changes from step to step, as in the official code ("leapfrog_steps")

    The second update takes its eps at the old time from a state that has already moved, so that the method is not exact
    even for a single data point; it is of first order and wants many steps, or a start where alpha is not small.
    Out of alpha = 0 both take the same DDIM step (1 NFE), and the way back ends there: start later to invert.
    """
    if not 0 < p <= 1:
        raise ValueError(f"edict: expected 0 < p <= 1, got {p}")

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Any:
        pair = [x, x]
        for i in range(g.n):
            if g.a[i] == 0:
                pair = [_ddim(g, 0, 1, x, model(x, g.t[0]))] * 2
                continue
            first = i % 2 if alternate else 0
            for j in (first, 1 - first):
                other = pair[1 - j]
                D = model(other, g.t[i])
                # DDIM's step of pair[j] by the eps of the other
                pair[j] = (g.a[i + 1] / g.a[i]) * (pair[j] - other) + _ddim(g, i, i + 1, other, D)
            pair[0] = p * pair[0] + (1 - p) * pair[1]
            pair[1] = p * pair[1] + (1 - p) * pair[0]
        return tuple(pair)

    return Solver(
        "edict",
        sampler,
        1,
        ("Wallace, Gokul and Naik 2022 (EDICT), arXiv 2211.12446",),
        cost=lambda n: 2 * n,
        prediction="eps",
        when="exact inversion without bdia's spurious root; wants 50 steps and more, at 2 NFE each",
    )


def ddim_inversion(process: Process, times: Any) -> Tableau:
    """DDIM run from data to noise (Song et al. 2021, section 4.3; Dhariwal and Nichol 2021): approximately its inverse.

    `times` as for sampling, from noise to data; the tableau runs over them backwards, its x is a data sample, and
    where they end at 0 the sample is taken to be one at t_min (or half of times[-2], if that is lower), since eps has
    no meaning at sigma = 0. The error is of first order: eps is taken at (x, t) and sampling takes it at the other
    end of the step. Not in `ALL`, whose solvers go from noise to data.
    """
    t = process.check_times(times)
    if t[-1] == 0:
        t[-1] = min(process.t_min, 0.5 * t[-2])
    g = grid(process, t)

    def sampler(x: Value, model: Model, noise: Noise) -> Value:
        for i in range(g.n, 0, -1):
            x = _ddim(g, i, i - 1, x, model(x, np.asarray(g.t[i])))
        return x

    reference = ("Song, Meng and Ermon 2021 (DDIM), section 4.3",)
    return trace(sampler, process, name="ddim_inversion", order=1, references=reference).validate()
