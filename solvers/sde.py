"""The reverse SDE as Song et al. 2021 discretise it: Euler-Maruyama, reverse diffusion, predictor-corrector.

Notation as in classic.py. The reverse SDE is dx = [f x - g^2 score] dt + g dW, run from noise to data. Its third
published predictor, ancestral sampling, is `ddpm`: "beta" on VP processes, "posterior" on VE.

Two steps have no such form and take another: into sigma = 0 the sample is D, as everywhere in this library (an
Euler-Maruyama step there gives 2 D - x on `edm`); out of alpha = 0, where f is infinite, it is ancestral.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jdiff.trace import Grid, Model, Noise, Solver, Value

from .classic import ddpm

REFERENCE = "Song et al. 2021 (score SDE), arXiv 2011.13456"
Step = Callable[[Any, Any, float], tuple[Any, Any, Any]]  # (grid, i, length) -> factors of x, score, z


def _one(g: Grid, i: int) -> Grid:
    """Step i alone."""
    return Grid(g.process, *(v[i : i + 2] for v in (g.t, g.a, g.s, g.lam)))


def _reverse_sde(name: str, step: Step, as_published: bool, reference: str, when: str) -> Solver:
    """x <- k x + v score + w z over a grid; as_published: n + 1 steps of one length, the last at the grid's end."""

    def published(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        if g.s[-1] == 0 or g.a[0] == 0:
            raise ValueError(
                f"{name}: as_published evaluates at every time of the grid, and has no step out of alpha = 0 or at "
                f"sigma = 0; got times from {g.t[0]:g} to {g.t[-1]:g}. Published: uniform times ending at 1e-3"
            )
        length = g.process.t_max / (g.n + 1)
        for i in range(g.n + 1):
            keep, v, w = step(g, i, length)
            score = model(x, g.t[i], kind="score")
            x = keep * x + v * score + (w * noise() if i < g.n else 0.0)
        return x

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        for i in range(g.n):
            if g.s[i + 1] == 0:
                x = g.a[i + 1] * model(x, g.t[i])
            elif g.a[i] == 0:
                x = ddpm().sampler(_one(g, i), x, model, noise)
            else:
                keep, v, w = step(g, i, g.t[i] - g.t[i + 1])
                score = model(x, g.t[i], kind="score")
                x = keep * x + v * score + w * noise()
        return x

    return Solver(
        name,
        published if as_published else sampler,
        1,
        (f"{REFERENCE}, {reference}",),
        cost=(lambda n: n + 1) if as_published else (lambda n: n),
        stochastic=True,
        prediction="score",
        when=when,
    )


def euler_maruyama(as_published: bool = False) -> Solver:
    """Euler-Maruyama on the reverse SDE in the process's own time: x + [f x - g^2 score] dt + g sqrt(-dt) z.

    as_published: the official code evaluates at every time of linspace(t_max, eps, N), eps = 1e-3, and gives each
    of the N steps the length t_max / N: the total is t_max instead of t_max - eps, the last step is taken AT eps, and
    it adds no noise. Here: a uniform grid of N - 1 steps that ends at eps, N evaluations.
    """

    def step(g: Grid, i: int, length: float) -> tuple[Any, Any, Any]:
        f, diffusion = g.process.drift(g.t[i]), g.process.diffusion(g.t[i])
        return 1.0 - f * length, diffusion**2 * length, diffusion * np.sqrt(length)

    return _reverse_sde(
        "euler_maruyama", step, as_published, "eq. 6", "the plain SDE baseline; hundreds of evaluations"
    )


def reverse_diffusion(as_published: bool = False) -> Solver:
    """Reverse-diffusion predictor (appendix E, eq. 46): with the forward step x0 = A x1 + sqrt(V) z of the levels,

        x1 = (2 - A) x + V score + sqrt(V) z,      A = a0/a1,     V = s0^2 - A^2 s1^2.

    On VP A = sqrt(1 - beta) and V = beta, on VE A = 1 and V = s0^2 - s1^2 (theirs: a geometric grid into 0).
    as_published, for VP: at linspace(t_max, eps, N) with beta = g(t)^2 t_max / N, as in `euler_maruyama`.
    """

    def step(g: Grid, i: int, length: float) -> tuple[Any, Any, Any]:
        if as_published:
            V = g.process.diffusion(g.t[i]) ** 2 * length
            if not np.isclose(g.a[i] ** 2 + g.s[i] ** 2, 1.0) or V >= 1:
                raise ValueError(
                    "reverse_diffusion: as_published is for variance-preserving processes at beta = g^2 t_max / N < 1; "
                    f"got alpha^2 + sigma^2 = {g.a[i] ** 2 + g.s[i] ** 2:g} and beta = {V:.3g} at t = {g.t[i]:g}"
                )
            A = np.sqrt(1.0 - V)
        else:
            A = g.a[i] / g.a[i + 1]
            V = g.s[i] ** 2 - (A * g.s[i + 1]) ** 2
        return 2.0 - A, V, np.sqrt(V)

    return _reverse_sde(
        "reverse_diffusion", step, as_published, "eq. 46", "score SDE's predictor, best with a Langevin corrector"
    )


def predictor_corrector(predictor: str = "reverse_diffusion", snr: float = 0.16, steps: int = 1) -> Solver:
    """Score SDE's predictor-corrector (algorithms 4 and 5): before each predictor step, `steps` of Langevin dynamics

        x <- x + e score + sqrt(2 e) z,      e = 2 A^2 (snr sigma)^2,     A = a0/a1

    The paper sizes e by |z| / |score|, a ratio of norms averaged over the batch, for which sigma stands here: it is
    that ratio for pure noise, makes samples independent, and the step linear, so that this is a tableau. The data-
    dependent forms, and correctors on other tables, are in `markov`. predictor: any solver of one step without
    a past, as text. snr 0.16 is the paper's for CIFAR-10; no correction out of alpha = 0.
    """
    from . import parse

    base = parse(predictor)
    if snr < 0 or steps < 0:
        raise ValueError(f"predictor_corrector: snr and steps must not be negative, got {snr=}, {steps=}")

    def sampler(g: Grid, x: Value, model: Model, noise: Noise) -> Value:
        for i in range(g.n):
            e = 2.0 * (snr * g.a[i] / g.a[i + 1] * g.s[i]) ** 2
            for _ in range(steps):
                score = model(x, g.t[i], kind="score", label="corrector")
                x = x + e * score + np.sqrt(2.0 * e) * noise()
            x = base.sampler(_one(g, i), x, model, noise)
        return x

    return Solver(
        "predictor_corrector",
        sampler,
        1,
        (f"{REFERENCE}, algorithms 4 and 5", *base.references),
        cost=lambda n: base.cost(n) + n * steps,
        stochastic=True,
        prediction="score",
        when="a trained score network at hundreds of evaluations, where correction beats smaller steps",
    )
