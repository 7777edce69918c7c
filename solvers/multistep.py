"""Adams predictor-corrector methods in half log-SNR: UniPC and SA-Solver, on the forms of exponential.py."""

from collections.abc import Callable

import numpy as np

from jdiff.trace import Grid, Model, Noise, Solver, Value

from .exponential import (
    Outputs,
    Rule,
    _check_choice,
    _check_order,
    _final_cap,
    adams,
    exact,
    groups,
    half,
    half_step,
    singlestep,
    step,
)  # fmt: skip
from .weights import moments


def unipc(
    order: int = 3,
    variant: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
    prediction: str = "x0",
    method: str = "multistep",
    as_published: bool = False,
) -> Solver:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2), orders 1 to 6, with the corrector UniC for free.

    With r_k the other points' (lam_k - lam0)/h and q_k = D_k - D0,

        x1 = (s1/s0) x + a1 [m0 D0 + sum_k w_k q_k / r_k],     sum_k w_k r_k^(j-1) = j! m_j   (j = 1, 2, ..)

    The predictor uses past points; the corrector repeats the step with the new point (r = 1) too, at no evaluation:
    the output at the predicted point is used again for the next step. The corrector adds one to the order. The
    function B(h) of the paper, "bh1" B = h and "bh2" B = 1 - e^(-h), cancels out of that system and matters only
    where the paper sets w = B/2 instead of solving: the order-2 predictor and the order-1 corrector. "vary_coeff"
    solves there too. Out of alpha = 0 (h = inf) bh1 has no value and bh2's is taken (peers return NaN there, and into
    sigma = 0). No corrector after the last step.

    lower_order_final  the published default, lowers the last steps to order 2, 1: better at few steps
                       (docs/differences.md); with False the order of convergence is kept to the end
    prediction         "x0" (default, as published), or "eps": a polynomial through noise predictions
    method             "multistep", or "singlestep": inner points for past ones, `order` steps of the grid a step
    as_published       with "vary_coeff": the official corrector, which adds one term of the new point instead of all
                       of them (a loop variable left over); it is of first order
    """
    _check_order("unipc", order, 6)
    _check_choice("unipc", "variant", variant, ("bh1", "bh2", "vary_coeff"))
    _check_choice("unipc", "prediction", prediction, ("x0", "eps"))
    _check_choice("unipc", "method", method, ("multistep", "singlestep"))
    if as_published and (variant != "vary_coeff" or method != "multistep"):
        raise ValueError("unipc: as_published is the official corrector of variant='vary_coeff' in multistep form")
    rule = {"bh1": half_step, "bh2": half, "vary_coeff": exact}[variant]

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        if method == "singlestep":
            sizes = groups(g, order, False)
            return singlestep(g, x, model, noise, sizes, prediction, 0.0, rule, corrector=corrector)
        cap = lambda i: _final_cap(g, i, lower_order_final)
        use = _left_over if as_published else step
        more = order + 1 if corrector else 0
        return adams(g, x, model, noise, order, more, prediction, rule=rule, cap=cap, correct=use)

    return Solver(
        "unipc",
        sampler,
        order,
        ("Zhao et al. 2023 (UniPC), arXiv 2302.04867, algorithms 1 and 2",),
        prediction=prediction,
        when="5 to 10 evaluations, guided or not; order=4, prediction='eps' from 20 on",
    )


def _left_over(g: Grid, i: int, j: int, x: Value, points: Outputs, kind: str, eta: float, rule: Rule) -> Value:
    """The corrector of the official vary_coeff: the last difference with one moment, and the wrong row."""
    h = g.lam[j] - g.lam[i]
    (_, new), (_, D), *past = points
    m, n = moments(h if kind == "x0" else -h, len(points) + 1), len(points) - 1
    r = np.array([(g.lam[k] - g.lam[i]) / h for k, _ in past] + [1.0])
    k = np.arange(n)
    A = np.linalg.inv(r[:, None] ** k / np.cumprod(k + 1.0))
    w = [m[1:n] @ A[: n - 1, c] for c in range(n - 1)] + [m[n] * A[max(n - 2, 0), -1]]
    y = step(g, i, j, x, [(i, D)], kind)
    for weight, ratio, F in zip(w, r, [F for _, F in past] + [new], strict=True):
        y = y + ((g.a[j] if kind == "x0" else g.s[j]) * weight / ratio) * (F - D)
    return y


def sa_solver(
    predictor: int = 3,
    corrector: int = 4,
    tau: float | Callable[[float], float] = 1.0,
    interval: tuple[float, float] | None = (0.72, 25.8),
    few_steps: bool = False,
    lower_order_final: bool = True,
    prediction: str = "x0",
    mode: str = "PEC",
) -> Solver:
    """SA-Solver (Xue et al. 2023): a stochastic Adams predictor-corrector, one evaluation a step.

    The SDE family whose noise is tau times that of the reverse SDE: the step of `dpm_solver_pp` with eta = tau(t)^2
    of the step's end, a polynomial through `predictor` past points, then through `corrector` points with the new one
    among them (0: none), and one noise for both. Exact weights for any steps.

    predictor  1 to 3;  corrector  0 to 4  (official defaults 3 and 4; diffusers' 2 and 2)
    tau        a number, or a function of the model's time
    interval   where a number tau acts, in sigma/alpha; elsewhere it is 0. The default is tau = 1 on timesteps 200 to
               800 of 1000 of the DDPM schedule (diffusers; the paper: noise in the middle, none at the ends).
               None: everywhere
    few_steps  H/2 for the exact weight where two points are used, the official form for few steps
    lower_order_final  the last steps take lower orders, as published; they end a step before sigma = 0
    prediction "x0", or "eps" (few_steps has no form for it); the paper advises against it with noise, whose variance
               then grows like e^(2h) - 1 in a step
    mode       "PEC", or "PECE": one more evaluation, at the corrected point, for the steps after it; 2 n - 1 in all

    The last step is without noise, as in the official few-steps form. tau = 0 is a deterministic Adams method of
    order min(predictor + 1, corrector), or `predictor` without corrector; with noise the weak order is 2 at most.
    The official form for many steps evaluates once more at the corrected last point before sigma = 0; here the output
    at the predicted one is taken, as in every other step.
    """
    _check_order("sa_solver", predictor, 3)
    _check_choice("sa_solver", "corrector", corrector, (0, 1, 2, 3, 4))
    if not callable(tau) and not tau >= 0:
        raise ValueError(f"sa_solver: expected tau >= 0, or a function of the model's time, got {tau}")
    _check_choice("sa_solver", "prediction", prediction, ("x0", "eps"))
    _check_choice("sa_solver", "mode", mode, ("PEC", "PECE"))
    if few_steps and prediction == "eps":
        raise ValueError("sa_solver: few_steps is a form of prediction='x0', got prediction='eps'")
    if mode == "PECE" and corrector == 0:
        raise ValueError("sa_solver: mode='PECE' evaluates corrected points, and corrector=0 makes none")
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"sa_solver: interval is {interval}; expected (low, high) in sigma/alpha, 0 <= low < high")

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        def eta(i: int) -> float:
            if i == g.n - 1:
                return 0.0
            if callable(tau):
                return float(tau(float(g.t[i + 1]))) ** 2
            return float(tau) ** 2 if interval is None or interval[0] <= g.rho(i + 1) <= interval[1] else 0.0

        steps = g.n - int(g.s[-1] == 0)
        cap = lambda i: max(steps - i, 1) if lower_order_final else g.n
        rule = half_step if few_steps else exact
        return adams(g, x, model, noise, predictor, corrector, prediction, eta, rule, cap, again=mode == "PECE")

    noisy = callable(tau) or tau > 0
    order = min(predictor + 1, corrector) if corrector else predictor
    return Solver(
        "sa_solver",
        sampler,
        min(order, 2) if noisy else order,
        ("Xue et al. 2023 (SA-Solver), arXiv 2309.05019, algorithm 1",),
        cost=lambda n: 2 * n - 1 if mode == "PECE" else n,
        prediction=prediction,
        stochastic=noisy,
        when="stochastic, 20 evaluations or more; noise in the middle of sampling alone",
    )
