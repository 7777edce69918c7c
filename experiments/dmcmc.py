"""Denoising MCMC against its own solvers from the prior, at equal cost, on an exact mixture.

    jdiff reproduce dmcmc

The question of Kim and Ye 2023: a Langevin-Gibbs chain over (x, noise level) visits low noise levels; is it cheaper to
denoise from there than from sigma_max? 16 dimensions, 8 modes of standard deviation 0.3, exact score and p(level | x).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import exact, metrics, process, reproduce, solvers, times
from jdiff.reproduce import Published, Table
from jdiff.solvers import markov

NFE = (10, 20)
SOLVERS = {"Euler": "euler", "Heun": "heun", "DPM-Solver++(2M)": "dpm_solver_pp"}
N_SKIP, MODES, DIM = 5, 8, 16
SIGMA = (10.0, 0.01)


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/dmcmc"  # folder of the finished cells and the report
    chains: int = 5000  # run in parallel
    draws: int = 1  # samples of each chain
    eta: float = 0.05  # Langevin step; the modes have variance 0.09
    levels: int = 100  # noise levels, geometric from 10 to 0.01 (1000 in the paper)
    seed: int = 0


class Context(NamedTuple):
    settings: Settings
    model: exact.Mixture
    levels: np.ndarray
    start: tuple[jax.Array, jax.Array]
    reference: np.ndarray
    floor: float


def _distance(x: Any, y: Any) -> float:
    return float(metrics.sliced_wasserstein(jax.random.key(9), np.asarray(x), np.asarray(y)).value)


def _chain(model: exact.Mixture, levels: np.ndarray, eta: float, argmax: bool) -> jdiff.Stepper:
    den = model.denoiser(process.edm())
    return markov.langevin_gibbs(den, levels, markov.level_posterior(model, levels), eta, argmax=argmax)


def prepare(settings: Settings) -> Context:
    """The mixture, and warm chains: samples of a 20-step Heun, noise 0.5 added, and 20 moves, as in their code."""
    rng, keys = np.random.default_rng(3), jax.random.split(jax.random.key(settings.seed), 6)
    model = exact.mixture(np.full(MODES, 1 / MODES), rng.normal(size=(MODES, DIM)), np.full(MODES, 0.09))
    levels, p = np.geomspace(*SIGMA, settings.levels), process.edm()
    x = SIGMA[0] * jax.random.normal(keys[0], (settings.chains, DIM))
    T = solvers.heun()(p, times.karras(p, 20, start=SIGMA[0]))
    y = jdiff.sample(model.denoiser(p), T, x) + 0.5 * jax.random.normal(keys[1], x.shape)
    moves = lambda y, key: jdiff.run(_chain(model, levels, settings.eta, False), jnp.arange(20), (y, None), key)[0]
    state = jax.jit(moves)(y, keys[2])
    n = settings.chains * settings.draws
    draws = [np.asarray(model.sample(key, n)) for key in keys[3:5]]
    return Context(settings, model, levels, (state.x, state.level), draws[0], _distance(*draws))


def cell(context: Context, row: str, nfe: int) -> dict[str, Any]:
    """n samples by one solver: from sigma = 10, or from the chain's lowest level after N_SKIP moves."""
    s, model, (name, _, kind) = context.settings, context.model, row.partition(" + ")
    solver, den = solvers.parse(SOLVERS[name]), model.denoiser(process.edm())
    n = solver.steps(nfe - (N_SKIP if kind else 0))
    key = jax.random.key(s.seed + 1)
    evaluations = solver.cost(n) + (N_SKIP if kind else 0)
    if not kind:
        p = den.process
        x = SIGMA[0] * jax.random.normal(key, context.reference.shape)
        samples = jdiff.sample(den, solver(p, times.karras(p, n, start=SIGMA[0])), x, key)
        return {"sliced Wasserstein": _distance(samples, context.reference), "evaluations": evaluations,
                "floor": context.floor, "mean start level": SIGMA[0]}  # fmt: skip
    denoise = markov.denoise_from_levels(den, context.levels, solver, n, tweedie=None)
    chain = _chain(model, context.levels, s.eta, "argmax" in kind)
    seen: list[float] = []
    draw, state, found = jax.jit(markov.dmcmc(chain, denoise, N_SKIP)), context.start, []
    for k in range(s.draws):
        samples, state = draw(jax.random.fold_in(key, k), state)
        found.append(np.asarray(samples))
        seen.append(float(context.levels[np.asarray(state[1])].mean()))
    return {"sliced Wasserstein": _distance(np.concatenate(found), context.reference), "evaluations": evaluations,
            "floor": context.floor, "mean start level": float(np.mean(seen))}  # fmt: skip


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    d = lambda row, nfe: cells[row, nfe]["sliced Wasserstein"]
    lines = ["## Claims", "", f"Floor (exact draws, n = {len(context.reference)}): {context.floor:.3g}.", ""]
    for name, bound in (("Heun", 0.6), ("Euler", 0.8), ("DPM-Solver++(2M)", 1.0)):
        ratio = d(f"{name} + chain", 10) / d(name, 10)
        holds = "holds" if ratio <= bound else "DOES NOT HOLD"
        lines.append(f"- NFE 10, {name}: with the chain over without {ratio:.3g}, expected at most {bound:g}: {holds}.")
    worst = max(d(f"{name} + chain", 20) for name in SOLVERS) / context.floor
    holds = "holds" if worst <= 1.2 else "DOES NOT HOLD"
    lines.append(f"- NFE 20: worst distance with the chain over the floor {worst:.3g}, expected at most 1.2: {holds}.")
    lines += [
        "",
        "One draw a chain by default: samples of one chain are correlated. A chain's warm-up (39 evaluations and 20 "
        "moves, once) is not in the NFE. The paper's last denoising (Tweedie) is left out, as the grid ends at 0.",
    ]
    return lines


TABLE = Table(
    name="dmcmc",
    summary="Sliced Wasserstein distance on an exact mixture in 16 dimensions: a solver, and the same after a chain.",
    needs="nothing: an exact model",
    rows=(*(f"{name}{kind}" for name in SOLVERS for kind in ("", " + chain")), "Heun + chain (argmax)"),
    columns=NFE,
    row_title="method",
    column_title="NFE",
    metric="sliced Wasserstein",
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
    published=(Published.load("dmcmc_readme.toml"),),
)
