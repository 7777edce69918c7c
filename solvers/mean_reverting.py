"""MRS: exponential integrators for mean-reverting diffusion, on the shifted state of `jdiff.anchored`."""

from jdiff.trace import Grid, Model, Noise, Solver, Value

from .exponential import _check_order, _final_cap, adams


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
    rule = lambda m, H: m * [1.0, 1.0, 0.5] if as_published and len(m) == 3 else m

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        def cap(i: int) -> int:
            if as_published and g.n < 10 and order - 1 <= i < g.n - 1:
                return g.n - 1 - i
            return _final_cap(g, i, lower_order_final and not as_published)

        return adams(g, x, model, noise, order, 0, prediction, lambda i: eta, rule, cap)

    return Solver(
        "mrs",
        sampler,
        order if kind == "ode" else min(order, 2),
        (f"Li et al. 2025 (MRS), arXiv 2502.07856, {kind.upper()}",),
        stochastic=kind == "sde",
        prediction=prediction,
        when="Restoration with a mean-reverting (IR-SDE) model at 5 to 20 evaluations.",
    )
