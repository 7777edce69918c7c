"""First solvers of the field: Euler, Heun with EDM's churn, DDIM, DDPM.

Notation, here and in the other files: step i goes from (a0, s0) = (alpha, sigma)(t_i) to (a1, s1) at t_{i+1};
rho = sigma / alpha; D is the x0 prediction; h is the step in half log-SNR.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from jdiff.predict import convert
from jdiff.process import Process
from jdiff.trace import Grid, Model, Noise, Solver, Value


def _slope(g: Grid, variable: str, x: Any, t: Any, D: Any) -> Any:
    """eps (the slope of x / alpha in rho) or velocity (the slope of x in t)."""
    return convert(g.process, x, t, D, "x0", "eps" if variable == "sigma" else "velocity")


def _check_variable(name: str, variable: str) -> None:
    if variable not in ("sigma", "t"):
        raise ValueError(f"{name}: variable is {variable!r}; expected 'sigma' (x/alpha over sigma/alpha) or 't'")


def euler(variable: str = "sigma") -> Solver:
    """Euler's method on the probability-flow ODE, in sigma/alpha (then it is DDIM) or in the process's own time.

    variable: "sigma" integrates x/alpha over rho = sigma/alpha (k-diffusion's sample_euler); "t" integrates
    dx/dt = velocity. On `edm` and `flow` the two agree; on VP processes "t" is the plain Euler of Song et al. 2021.
    """
    _check_variable("euler", variable)

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        for i in range(g.n):
            D = model(x, g.t[i])
            if variable == "sigma":
                x = (g.s[i + 1] / g.s[i]) * x + (g.a[i + 1] - g.a[i] * g.s[i + 1] / g.s[i]) * D
            else:
                x = x + (g.t[i + 1] - g.t[i]) * _slope(g, "t", x, g.t[i], D)
        return x

    return Solver(
        "euler",
        sampler,
        1,
        ("Karras et al. 2022 (EDM), eq. 4; Song et al. 2021, eq. 13",),
        prediction="eps" if variable == "sigma" else "velocity",
        when="the baseline; one-step and distilled models",
    )


def _move(p: Process, variable: str, t0: Any, t: Any) -> tuple[Any, Any]:
    """(what is kept of x, the factor of the slope) in an Euler step from t0 to t."""
    a0, s0, a, s = p.alpha(t0), p.sigma(t0), p.alpha(t), p.sigma(t)
    if variable == "t":
        return 1.0, t - t0
    return (s / s0, a) if a0 == 0 else (a / a0, s - a * s0 / a0)


def _between(p: Process, variable: str, fraction: float, t0: Any, t1: Any) -> Any:
    """The time at a fraction of the step, in the variable that is integrated: t, rho, or 1/rho out of alpha = 0."""
    if fraction == 1:
        return t1
    if variable == "t":
        return t0 + fraction * (t1 - t0)
    if p.alpha(t0) == 0:
        return p.t_of_lam(np.log(fraction) + p.lam(t1))
    r0, r1 = np.exp(-p.lam(t0)), np.exp(-p.lam(t1))
    return p.t_of_lam(-np.log(r0 + fraction * (r1 - r0)))


def heun(
    churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = float("inf"),
    s_noise: float = 1.0,
    variable: str = "sigma",
    alpha: float = 1.0,
) -> Solver:
    """EDM's second-order family with churn (Karras et al. 2022, algorithm 2): 2 evaluations a step, 1 into sigma = 0.

    churn (S_churn), s_min, s_max, s_noise: the noise level rho = sigma/alpha is raised by the factor
    1 + min(churn/n, sqrt(2) - 1) before a step where s_min <= rho <= s_max. churn = 0 is deterministic.
    alpha: where in the step the second slope is taken, with weight 1 / (2 alpha) (their appendix, eq. 9): 1 Heun,
    1/2 midpoint, 2/3 Ralston. From far out (rho = 80) Heun overshoots at few steps, and midpoint does not.
    variable: as in `euler`. On `edm` both are the paper's algorithm; diffusers' FlowMatchHeun is "t" on `flow`.
    Out of alpha = 0, where rho is infinite, the first step integrates x/sigma over alpha/sigma instead.
    """
    _check_variable("heun", variable)
    if churn < 0 or s_noise < 0:
        raise ValueError(f"heun: churn and s_noise must not be negative, got {churn=}, {s_noise=}")
    if not 0 < alpha <= 1:
        raise ValueError(f"heun: expected 0 < alpha <= 1 (1 Heun, 1/2 midpoint, 2/3 Ralston), got {alpha}")

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        p = g.process
        for i in range(g.n):
            t0, a0, t1 = g.t[i], g.a[i], g.t[i + 1]
            gamma = min(churn / g.n, np.sqrt(2.0) - 1.0) if s_min <= g.rho(i) <= s_max else 0.0
            if gamma > 0 and a0 > 0:
                t0 = p.t_of_lam(-np.log((1.0 + gamma) * g.rho(i)))
                a_old, a0 = a0, p.alpha(t0)
                lifted = p.sigma(t0) / a0  # less than asked for where a discrete schedule ends
                x = (a0 / a_old) * x + a0 * np.sqrt(max(lifted**2 - g.rho(i) ** 2, 0.0)) * s_noise * noise()
            outset = a0 == 0 and variable == "sigma"
            slope = (lambda x, t, D: D) if outset else (lambda x, t, D: _slope(g, variable, x, t, D))
            d = slope(x, t0, model(x, t0))
            keep, step = _move(p, variable, t0, t1)
            if g.s[i + 1] == 0:
                x = keep * x + step * d
                continue
            t = _between(p, variable, alpha, t0, t1)
            keep_there, step_there = _move(p, variable, t0, t)
            y = keep_there * x + step_there * d
            rest = keep * x + ((1.0 - 0.5 / alpha) * step) * d  # one value, so one register, crosses the evaluation
            x = rest + (0.5 / alpha * step) * slope(y, t, model(y, t, label="second slope"))
        return x

    return Solver(
        "heun",
        sampler,
        2,
        ("Karras et al. 2022 (EDM), algorithm 2",),
        cost=lambda n: 2 * n - 1,
        stochastic=churn > 0,
        prediction="eps" if variable == "sigma" else "velocity",
        when="plenty of evaluations (35 up) and no history wanted; alpha=0.5 on wide noise ranges",
    )


def edm_stochastic() -> Solver:
    """EDM's stochastic sampler at its ImageNet-64 settings: 256 steps (511 NFE), `times.karras`, on `edm`."""
    when = "trained networks at hundreds of evaluations, where noise mends the network's own errors"
    return replace(heun(churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003), name="edm_stochastic", when=when)


def ddim(eta: float = 0.0) -> Solver:
    """DDIM (Song et al. 2021, eq. 12): x1 = a1 D + sqrt(s1^2 - c^2) eps + c z, c = eta s1 sqrt(1 - e^(-2h)).

    eta = 0 is deterministic and equals Euler in sigma/alpha; eta = 1 is `ddpm`. No noise is added into sigma = 0.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: expected 0 <= eta <= 1, got {eta}")

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        for i in range(g.n):
            a0, s0, a1, s1 = g.a[i], g.s[i], g.a[i + 1], g.s[i + 1]
            D = model(x, g.t[i])
            c = eta * s1 * np.sqrt(-np.expm1(-2.0 * g.h(i)))
            direction = np.sqrt(s1**2 - c**2) / s0
            x = direction * x + (a1 - a0 * direction) * D
            if c > 0:
                x = x + c * noise()
        return x

    return Solver(
        "ddim",
        sampler,
        1,
        ("Song, Meng and Ermon 2021 (DDIM), eq. 12 and 16",),
        stochastic=eta > 0,
        prediction="eps",
        when="the baseline, and the calm choice under very strong guidance at few steps",
    )


def ddpm(variance: str = "posterior") -> Solver:
    """Ancestral sampling (Ho et al. 2020, eq. 6 and 7), for any two times of any process.

    The mean is that of q(x1 | x0 = D, x) of the process's own chain (`Process.posterior`): ResShift's, RDDM's and
    Resfusion's samplers are this on their processes, and a bridge may start at its end, without noise. variance:
    "posterior" is the paper's beta-tilde ("fixed small"; then it is ddim(eta=1) where the chain is x = alpha x0 + ..),
    "beta" its beta ("fixed large"). No noise is added into sigma = 0.
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"ddpm: variance is {variance!r}; expected 'posterior' (beta-tilde) or 'beta'")

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        for i in range(g.n):
            q = g.process.posterior(g.t[i + 1], g.t[i])
            D = model(x, g.t[i])
            x = q.x * x + q.x0 * D
            if g.s[i + 1] > 0:
                x = x + np.sqrt(q.var if variance == "posterior" else -np.expm1(-2.0 * g.h(i)) * g.s[i] ** 2) * noise()
        return x

    return Solver(
        "ddpm",
        sampler,
        1,
        ("Ho, Jain and Abbeel 2020 (DDPM), eq. 6 and 7",),
        stochastic=True,
        when="hundreds of evaluations, and steering, which needs its transition densities",
        from_point=variance == "posterior",
    )
