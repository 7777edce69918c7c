"""DC-Solver: UniPC whose newest output is moved along time before it is used (dynamic compensation)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jdiff.trace import Grid, Model, Noise, Solver, Value

from .exponential import _check_choice, _check_order, _final_cap, half, half_step, step
from .weights import lagrange


def dc_solver(
    ratios: Sequence[float] | None = None,
    order: int = 2,
    dc_order: int = 2,
    variant: str = "bh2",
    lower_order_final: bool = True,
) -> Solver:
    """DC-Solver (Zhao et al. 2024): `unipc` of the same order and variant, with one ratio a step.

    The corrector moves a point without evaluating again, so that an output no longer belongs to it. Before step i the
    newest output is replaced, for good, by the interpolation of the last dc_order + 1 outputs (a polynomial in the
    model's time) at

        t' = ratio_i t_i + (1 - ratio_i) t_{i-1}

    ratios     one a step, of which the first dc_order must be 1: there are not enough outputs yet. All 1 (None) is
               UniPC. `jdiff.fit.compensation.search_ratios` finds them for a model and a guidance scale, and `fit_cpr`
               predicts them for others
    dc_order   1 or 2 (default, as published)

    The official latent-diffusion class keeps `order` outputs only: with order 2 and dc_order 2, its defaults, it never
    compensates and is UniPC-2. Here, as in the official diffusers port, the outputs that are needed are kept.
    """
    _check_order("dc_solver", order, 3)
    _check_choice("dc_solver", "dc_order", dc_order, (1, 2))
    _check_choice("dc_solver", "variant", variant, ("bh1", "bh2"))
    if ratios is not None and not np.isfinite(np.asarray(ratios, np.float64)).all():
        raise ValueError(f"dc_solver: ratios are {tuple(ratios)}; expected finite numbers, one a step")

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        each = (1.0,) * g.n if ratios is None else tuple(map(float, ratios))
        if len(each) != g.n:
            raise ValueError(f"dc_solver: {len(each)} ratios for {g.n} steps; expected one a step")
        if any(r != 1 for r in each[:dc_order]):
            raise ValueError(f"dc_solver: the first {dc_order} ratios must be 1 (too few outputs yet); got {each}")
        return run(g, x, model, each, order, dc_order, variant, lower_order_final)

    return Solver(
        "dc_solver",
        sampler,
        order,
        ("Zhao et al. 2024 (DC-Solver), arXiv 2409.03755, eq. 9 and algorithm 1",),
        when="about 10 evaluations under strong guidance, with ratios searched for that model",
    )


def run(
    g: Grid,
    x: Value,
    model: Model,
    ratios: Sequence[float],
    order: int,
    dc_order: int,
    variant: str,
    lower_order_final: bool,
    stop: int | None = None,
) -> Value:
    """The sampler; `stop`: return after step `stop` and its corrector, that step's output interpolated even at 1."""
    rule = half if variant == "bh2" else half_step
    known: list[tuple[int, Value]] = [(0, model(x, g.t[0]))]  # newest first
    for i in range(g.n):
        if ratios[i] != 1 or i == stop:
            places = g.t[[j for j, _ in known[: dc_order + 1]]]
            w = lagrange(places, np.array([ratios[i] * g.t[i] + (1 - ratios[i]) * g.t[i - 1]]))[:, 0]
            moved: Any = w[0] * known[0][1]
            for c, (_, D) in zip(w[1:], known[1:], strict=False):
                moved = moved + c * D
            known = [(i, moved), *known[1:]]
        if g.s[i + 1] == 0:
            return g.a[i + 1] * known[0][1]
        usable = [(j, D) for j, D in known if j == i or np.isfinite(g.lam[j])]
        p = min(order, len(usable), _final_cap(g, i, lower_order_final))
        predicted = step(g, i, i + 1, x, usable[:p], rule=rule)
        if i == g.n - 1:
            return predicted
        new = (i + 1, model(predicted, g.t[i + 1], label=f"after order {p}"))
        x = step(g, i, i + 1, x, [new, *usable[:p]], rule=rule)
        if i == stop:
            return x
        known = [new, *known][: max(order, dc_order + 1)]
    return x
