"""MRS: exponential integrators for mean-reverting diffusion, on the shifted state of `jdiff.anchored`."""

import numpy as np

from jdiff.trace import Grid, Model, Noise, Solver, Value

from .exponential import _check_order
from .weights import moments


def mrs(
    order: int = 2,
    kind: str = "ode",
    prediction: str = "x0",
    lower_order_final: bool = False,
    as_published: bool = False,
) -> Solver:
    """MR Sampler (Li et al. 2025, arXiv 2502.07856), orders 1 to 3, data or noise prediction, ODE or reverse SDE.

    The paper's steps carry the mean mu as a constant; on x - (1 - a) mu, the state of `jdiff.anchored`, it drops out.
    With differences D1 ~ h q', D2 ~ h^2 q'' of the outputs q, eta = 0 for the ODE and 1 for the SDE, H = (1 + eta) h,

        x0    x1 = (s1/s0) e^(-eta h) x + a1 [m0(H) q + m1(H) D1 + m2(H) D2] + s1 sqrt(1 - e^(-2 eta h)) z
        eps   x1 = (a1/a0) x - (1 + eta) s1 [p1(h) q + p2(h) D1 + p3(h) D2] + s1 sqrt(e^(2 eta h) - 1) z

    with p1 = e^h - 1, p2 = p1/h - 1, p3 = p2/h - 1/2. These are multistep DPM-Solver++ (its exact weights, "heun"),
    DPM-Solver, and their SDE forms. A velocity network is converted by the denoiser (`Anchored.denoiser`, "angular").
    The official code stops at order 2 for the SDE; order 3 is the same expansion, one term further: its error was
    measured five times smaller, its weak order still 2 (the noise bends what the differences measure).

    lower_order_final  the last steps take order 2, 1
    as_published       D2 without its factor 2, which makes order 3 one of second order; and below 10 steps the official
                       order of each step: the last but one takes order 1 (at order 3 the one before it 2), and the
                       last the full order, though not into sigma = 0
    """
    _check_order("mrs", order, 3)
    if kind not in ("ode", "sde"):
        raise ValueError(f"mrs: kind is {kind!r}; expected 'ode' or 'sde'")
    if prediction not in ("x0", "eps"):
        raise ValueError(
            f"mrs: prediction is {prediction!r}; expected 'x0' or 'eps', what the formulas hold (a network of any kind "
            "is converted to it)"
        )
    eta = 1.0 if kind == "sde" else 0.0

    def order_of(g: Grid, i: int) -> int:
        highest = order
        if as_published and g.n < 10 and order - 1 <= i < g.n - 1:
            highest = min(order, g.n - 1 - i)
        elif lower_order_final and not as_published:
            highest = min(order, g.n - i)
        return min(highest, i + 1)

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        past: list[Value] = []
        for i in range(g.n):
            a0, s0, a1, s1, h = g.a[i], g.s[i], g.a[i + 1], g.s[i + 1], g.h(i)
            if s1 == 0:
                return a1 * model(x, g.t[i], label="order 1")
            p = order_of(g, i)
            held = "x0" if a0 == 0 else prediction  # eps out of alpha = 0 would have an infinite weight
            q = model(x, g.t[i], kind=held, label=f"order {p}")
            past = [q, *past[: order - 1]]
            terms = [q]
            if p == 2:
                terms = [q, (past[0] - past[1]) / (g.h(i - 1) / h)]
            if p == 3:
                r0, r1 = g.h(i - 1) / h, g.h(i - 2) / h
                near, far = (past[0] - past[1]) / r0, (past[1] - past[2]) / r1
                bend = (near - far) / (r0 + r1)
                terms = [q, near + r0 * bend, (1.0 if as_published else 2.0) * bend]
            if held == "x0":
                kept, weights = (s1 / s0) * (np.exp(-h) if eta else 1.0), a1 * moments((1.0 + eta) * h, 3)
                spread = s1 * np.sqrt(-np.expm1(-2.0 * h))
            else:
                kept, weights = a1 / a0, (1.0 + eta) * s1 * moments(-h, 3)  # p_k(h) = -m_(k-1)(-h)
                spread = s1 * np.sqrt(np.expm1(2.0 * h))
            x = kept * x
            for w, term in zip(weights, terms, strict=False):
                x = x + w * term
            if eta:
                x = x + spread * noise()
        return x

    return Solver(
        "mrs",
        sampler,
        order if kind == "ode" else min(order, 2),
        (f"Li et al. 2025 (MRS), arXiv 2502.07856, {kind.upper()}",),
        stochastic=kind == "sde",
        prediction=prediction,
        when="Restoration with a mean-reverting (IR-SDE) model at 5 to 20 evaluations.",
    )
