"""Solver schedules: what a step does is decided step by step. Notation as in classic.py and exponential.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jdiff.predict import convert
from jdiff.trace import Grid, Model, Noise, Solver, Value

from .exponential import exact, half, integrate

KINDS, STARTS, DERIVATIVES = ("x0", "eps"), ("multistep", "singlestep"), ("full", "low", "halved")


@dataclass(frozen=True)
class Decision:
    """What one step does.

    order       of the Taylor expansion, 1 to 3
    kind        what is expanded: "x0" or "eps"
    start       where the further outputs are: "multistep", at the past points; "singlestep", at order - 1 points
                between this step's ends (r = 1/2, or 1/3 and 2/3 of it in lam), each an evaluation more
    derivative  "full": every derivative, from all outputs; "low": the first derivative alone, from the farthest
                output of a single step, or the nearest past one (a term fewer: order 3 is then 2); "halved": so too,
                weighted by half of int 1 instead of its integral (DPM-Solver-2, DPM-Solver++(2M), UniP-2)
    corrector   order of the correction by the output at the step's end, which costs nothing; 0: none
    """

    order: int = 1
    kind: str = "x0"
    start: str = "multistep"
    derivative: str = "full"
    corrector: int = 0

    def __post_init__(self) -> None:
        for value, known in ((self.kind, KINDS), (self.start, STARTS), (self.derivative, DERIVATIVES)):
            if value not in known:
                raise ValueError(f"Decision: {value!r} is not one of {', '.join(known)}")
        if self.order not in (1, 2, 3) or self.corrector not in (0, 1, 2, 3):
            raise ValueError(f"Decision: order is {self.order}, corrector {self.corrector}; expected 1 to 3 and 0 to 3")

    @property
    def cost(self) -> int:
        """Evaluations of this step, one that does not end at sigma = 0."""
        return self.order if self.start == "singlestep" else 1


def nfe(decisions: Sequence[Decision]) -> int:
    """Evaluations of a schedule on a grid that ends at sigma = 0: its last step is the last prediction."""
    return sum(d.cost for d in decisions[:-1]) + 1


def _step(g: Grid, i: int, to: float, x: Value, first: Value, others: list[tuple[Any, Value]], kind: str, how: str):
    """From point i by h to lam[i] + to h: `first` is the output there, others (r, output) at lam[i] + r h."""
    p, h = g.process, g.h(i) * to
    end = (g.a[i + 1], g.s[i + 1])
    if to < 1.0:
        t = p.t_of_lam(g.lam[i] + h)
        end = (p.alpha(t), p.sigma(t))
    if others and how != "full":
        others = [others[-1] if others[-1][0] > 0 else others[0]]
    points = [(0.0, first), *((r / to, out) for r, out in others)]
    return integrate((g.a[i], g.s[i]), end, h, x, points, kind, rule=half if how == "halved" else exact)


def schedule(decisions: Sequence[Decision]) -> Solver:
    """A solver schedule of the unified sampling framework (Liu et al. 2023, arXiv 2312.07243): one Decision a step.

    With m_k the integrals of the exponential integrator (e^-u for x0, e^u for eps) and r_k where the outputs are,

        x1 = (s1/s0) x + a1 [m0 D0 + sum_k w_k (D_k - D0) / r_k]      (or a1/a0, -s1 and eps)

    The times are the grid's. DDIM, DPM-Solver-2, DPM-Solver++(2M) and (3M) and UniPC are lists of one decision.
    A multistep order takes the past outputs that there are. Into sigma = 0 and out of alpha = 0 a step is of first
    order in x0, whatever was decided. ValueError for another number of decisions than the grid has steps.
    """
    decisions = tuple(decisions)
    if not decisions or not all(isinstance(d, Decision) for d in decisions):
        raise ValueError(f"schedule: expected a list of at least one Decision, got {decisions!r}")

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        if g.n != len(decisions):
            raise ValueError(f"schedule: {len(decisions)} decisions for a grid of {g.n} steps; expected one a step")
        p = g.process
        seen: list[tuple[float, Any, Value, Value]] = []  # lam, time, point, x0 there; newest first

        def output(entry: tuple[float, Any, Value, Value], kind: str) -> Value:
            return convert(p, entry[2], entry[1], entry[3], "x0", kind)

        point, D = x, model(x, g.t[0])
        for i, d in enumerate(decisions):
            here = (g.lam[i], g.t[i], point, D)
            free = g.s[i + 1] > 0 and g.a[i] > 0
            kind = d.kind if free else "x0"
            first = output(here, kind)
            past = [((e[0] - g.lam[i]) / g.h(i), output(e, kind)) for e in seen if np.isfinite(e[0])] if free else []
            inner: list[tuple[Any, Value]] = []
            if free and d.start == "singlestep":
                for r in {1: (), 2: (0.5,), 3: (1 / 3, 2 / 3)}[d.order]:
                    between = _step(g, i, r, x, first, inner, kind, "full")
                    t = p.t_of_lam(g.lam[i] + r * g.h(i))
                    inner.append((r, model(between, t, kind=kind)))
            others = inner if d.start == "singlestep" else past[: d.order - 1]
            begin, end = x, _step(g, i, 1.0, x, first, others, kind, d.derivative)
            if i == g.n - 1:
                return end
            new = model(end, g.t[i + 1], label=f"after order {len(others) + 1}, {kind}")
            x = end
            if d.corrector and free:
                out = convert(p, end, g.t[i + 1], new, "x0", kind)
                others = [*past[: d.corrector - 1], (1.0, out)]
                x = _step(g, i, 1.0, begin, first, others, kind, "full" if d.corrector > 1 else "halved")
            seen = [here, *seen]
            point, D = end, new
        return x

    orders = [d.order for d in decisions]
    reference = "Liu et al. 2023 (USF, S3), arXiv 2312.07243: a schedule of solver decisions"
    return Solver("schedule", sampler, min(orders), (reference,), lambda n: nfe(decisions), len(decisions))
