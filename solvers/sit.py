"""SiT's stochastic sampler: the velocity and the score of one network, noise of a form of one's own, a last step.

Notation as in classic.py. SiT (Ma et al. 2024, arXiv 2401.08740) counts time from noise to data; here t = 1 is noise.
Its paths are the processes `flow` (Linear), `trigonometric` (GVP) and `vp_linear` (VP).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jdiff.predict import convert
from jdiff.process import Process
from jdiff.trace import Grid, Model, Noise, Solver, Value

from .classic import ddpm
from .sde import _one

FORMS: dict[str, Callable[[Process, Any, float], Any]] = {
    "constant": lambda p, t, norm: norm,
    "sbdm": lambda p, t, norm: 0.5 * norm * p.diffusion(t) ** 2,
    "sigma": lambda p, t, norm: norm * p.sigma(t),
    "linear": lambda p, t, norm: norm * t / p.t_max,
    "decreasing": lambda p, t, norm: 0.25 * (1.0 - norm * np.cos(np.pi * t / p.t_max)) ** 2,
    "increasing_decreasing": lambda p, t, norm: norm * np.sin(np.pi * t / p.t_max) ** 2,
}
LAST = ("mean", "tweedie", "euler", "none")


def sit(form: str = "sbdm", norm: float = 1.0, last: str = "mean", method: str = "euler") -> Solver:
    """dx = [velocity - w(t) score] dt + sqrt(2 w) dW, from noise to data; any w >= 0 has the same marginals.

    form    of w, with `norm` as a factor: "constant"; "sbdm", g^2 / 2, of score-based diffusion (then it is
            Euler-Maruyama on the reverse SDE); "sigma"; "linear" in t; "decreasing" (1 - norm cos(pi t))^2 / 4;
            "increasing_decreasing" sin^2(pi t). All but sbdm are made for t_max = 1
    last    the step into t = 0: "mean", a step without its noise; "tweedie", the x0 prediction; "euler", a step of the
            ODE; "none", a step like all others. A grid that ends before has no such step
    method  "euler" (Euler-Maruyama), or "heun", the noise first, then a Heun step of the drift (2 evaluations), as
            published with the noise of w at the step's start; of weak order 1 too

    Official defaults: sbdm and mean in the library, sigma and mean in the script, 250 evaluations, times as in
    `sit_times`. Out of alpha = 0 g is infinite: sbdm's first step is ancestral there (the official code, which starts
    linear and GVP paths of a velocity network at alpha = 0 exactly, divides by zero). ValueError for an unknown form,
    last step or method, and for norm < 0.
    """
    for value, known, what in ((form, FORMS, "form"), (last, LAST, "last"), (method, ("euler", "heun"), "method")):
        if value not in known:
            raise ValueError(f"sit: {what} is {value!r}; expected one of {', '.join(known)}")
    if not norm >= 0:
        raise ValueError(f"sit: norm is {norm}; the noise must not be negative")

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        p = g.process

        def slope(x: Value, i: int) -> Value:
            D = model(x, g.t[i])
            v = _of(g, i, x, D, "velocity")
            return v - FORMS[form](p, g.t[i], norm) * _of(g, i, x, D, "score")

        for i in range(g.n):
            dt, final = g.t[i] - g.t[i + 1], g.s[i + 1] == 0
            if g.a[i] == 0 and form == "sbdm":
                x = ddpm().sampler(_one(g, i), x, model, noise)
            elif final and last in ("tweedie", "euler"):
                D = model(x, g.t[i])
                x = g.a[i + 1] * D if last == "tweedie" else x - dt * _of(g, i, x, D, "velocity")
            else:
                kick = 0.0 if final and last == "mean" else np.sqrt(2.0 * FORMS[form](p, g.t[i], norm) * dt)
                x = x + (kick * noise() if kick > 0 else 0.0) if method == "heun" else x
                first = slope(x, i)
                if method == "euler":
                    x = x - dt * first + (kick * noise() if kick > 0 else 0.0)
                elif final:
                    x = x - dt * first
                else:
                    x = x - (0.5 * dt) * first - (0.5 * dt) * slope(x - dt * first, i + 1)
        return x

    return Solver(
        "sit",
        sampler,
        1,
        ("Ma et al. 2024 (SiT), arXiv 2401.08740, section 3.5 and appendix",),
        cost=(lambda n: n) if method == "euler" else (lambda n: 2 * n - 1),
        stochastic=True,
        prediction="velocity",
        when="flow models at 100 evaluations and more, where noise of a chosen size mends errors of the ODE",
    )


def _of(g: Grid, i: int, x: Value, D: Value, kind: str) -> Value:
    return convert(g.process, x, g.t[i], D, "x0", kind)


def sit_times(
    process: Process, n: int = 250, *, last: float = 0.04, start: float | None = None, end: float = 0.0
) -> np.ndarray:
    """The official grid, of n evaluations: linspace(start, last, n), which is n - 1 steps, and a step of size `last`.

    With 250 points the steps are (1 - 0.04) / 249, and the last one is ten times as long. end > 0: no last step, as
    with the official last step None: linspace(start, end, n + 1).
    """
    start = process.t_max if start is None else start
    if end > 0:
        return np.linspace(start, end, n + 1)
    if not 0 < last < start or n < 2:
        raise ValueError(f"sit_times: expected 0 < last < {start:g} and at least 2 evaluations, got {last=}, {n=}")
    return np.append(np.linspace(start, last, n), 0.0)
