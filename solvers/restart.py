"""Restart sampling: a deterministic solver that, deep in the grid, goes back up by fresh noise and comes down again."""

from collections.abc import Mapping

import numpy as np

from jdiff.process import Process
from jdiff.trace import Grid, Model, Noise, Solver, Value, grid

CIFAR10 = {(0.06, 0.30): (3, 2)}


def restart(
    intervals: Mapping[tuple[float, float], tuple[int, int]] = CIFAR10,
    solver: Solver | str = "heun",
    inner: Solver | str | None = None,
    s_noise: float = 1.0,
    rho: float = 7.0,
) -> Solver:
    """Restart (Xu et al. 2023, algorithm 1): K times over [t_min, t_max], noise up at once and solve down again.

    intervals  {(t_min, t_max): (N_restart, K)} in noise levels sigma/alpha. t_min moves to the nearest point of the
               grid below t_max; each of the K passes has N_restart points (so N_restart - 1 steps) on a Karras grid
               from t_max to there. The default is the paper's least for CIFAR-10 (18 main steps, 43 NFE); with
               K = 5, 10, 20 it is 55, 75, 115 NFE. ImageNet-64, 36 main steps, 203 NFE: {(19.35, 40.79): (4, 1),
               (1.09, 1.92): (4, 1), (0.59, 1.09): (4, 5), (0.30, 0.59): (4, 5), (0.06, 0.30): (6, 6)}.
               A pass has its own error, which a finer main grid does not remove
    solver     the backbone, a solver or its text ("ddim", "unipc(order=2)"); a multistep one starts afresh after
               each restart, as its past belongs to another path
    inner      the solver of the passes, if another
    s_noise    factor of the noise that lifts x. The paper's runs have s_noise=1.003 and, in the passes, churn of 0.05
               in [0.01, 1]: inner="heun(churn=0.1, s_min=0.01, s_max=1.0, s_noise=1.003)" for N_restart = 3
               (churn is divided by the N_restart - 1 steps)

    With an exact denoiser the noise and the descent cancel in law, and errors made above t_max are contracted.
    An interval whose t_max lies below the grid's last level is never reached and changes nothing.
    """
    main = _solver(solver)
    descent = main if inner is None else _solver(inner)
    for (low, high), (points, times) in intervals.items():
        if not 0 <= low < high or points < 2 or times < 0:
            raise ValueError(
                "restart: expected intervals {(t_min, t_max): (N_restart, K)} with 0 <= t_min < t_max, N_restart >= 2 "
                f"and K >= 0; got {{({low}, {high}): ({points}, {times})}}"
            )

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        p, r = g.process, np.array([g.rho(i) for i in range(g.n + 1)])
        passes: dict[int, list[tuple[float, int, int]]] = {}
        for (low, high), (points, times) in intervals.items():
            below = np.flatnonzero(r[1:] < high) + 1
            if len(below) and high < r[0]:
                passes.setdefault(int(below[np.argmin(abs(r[below] - low))]), []).append((high, points, times))
        start = 0
        for i in sorted({*passes, g.n}):
            if i > start:
                x = main.sampler(grid(p, g.t[start : i + 1]), x, model, noise)
            for high, points, times in passes.get(i, []):
                down = _levels(p, high, g.t[i], points, rho)
                top = p.sigma(down[0]) / p.alpha(down[0])
                for _ in range(times):
                    x = (p.alpha(down[0]) / g.a[i]) * x
                    x = x + (p.alpha(down[0]) * np.sqrt(top**2 - r[i] ** 2) * s_noise) * noise()
                    x = descent.sampler(grid(p, down), x, model, noise)
            start = i
        return x

    extra = sum(K * (descent.cost(N) - descent.cost(1)) for N, K in intervals.values())  # no pass ends at sigma = 0
    return Solver(
        "restart",
        sampler,
        main.order,
        ("Xu et al. 2023 (Restart), arXiv 2306.14878, algorithm 1", *main.references),
        cost=lambda n: main.cost(n) + extra,
        stochastic=True,
        prediction=main.prediction,
        when="the network's errors, not the solver's, limit quality; 40 evaluations and more",
    )


def _solver(solver: Solver | str) -> Solver:
    from . import parse

    return parse(solver) if isinstance(solver, str) else solver


def _levels(p: Process, high: float, end: float, points: int, rho: float) -> np.ndarray:
    """`points` times from noise level `high` down to time `end`, evenly spaced in (sigma/alpha)^(1/rho)."""
    with np.errstate(divide="ignore"):
        low = np.exp(-p.lam(end))
        t = p.t_of_lam(-rho * np.log(np.linspace(high ** (1 / rho), low ** (1 / rho), points)))
    t[-1] = end
    return t
