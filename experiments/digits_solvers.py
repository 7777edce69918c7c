"""Every solver on real digits: Fréchet distance against network evaluations, with standard errors over three models.

    jdiff reproduce digits-solvers

Three small DiTs (seeds 0, 1, 2 of training and of sampling; the model of fast-sampling) are trained if runs/models does
not hold them yet, and each solver of `jdiff.solvers.ALL` samples each of them from the same noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import data, metrics, reproduce, solvers, times, train
from jdiff.experiments import _digits
from jdiff.experiments.fast_sampling import score
from jdiff.reproduce import Published, Table

NFE = (5, 6, 8, 10, 20, 50)
SEEDS = (0, 1, 2)
EXTRA = {
    "deis in log-SNR": "deis(variable='lam')",
    "dpm_solver_pp 3M": "dpm_solver_pp(order=3)",
    "dpm_solver_pp 2M SDE": "dpm_solver_pp(order=2, eta=1.0)",
    "heun in t": "heun(variable='t')",
    "unipc 2": "unipc(order=2)",
}
SOLVERS = {**{name: name for name in solvers.ALL}, **EXTRA}


@dataclass(frozen=True)
class Settings:
    """Options of the experiment; training, if it is needed, takes some three minutes a model on two cores."""

    out: str = "runs/digits-solvers"  # folder of the finished cells and the report
    grid: str = "uniform"  # time grid of all solvers: uniform, logsnr, karras, quadratic
    n: int = 500  # samples a seed; at most 898
    steps: int = 4000  # training steps of each model


class Context(NamedTuple):
    settings: Settings
    models: list[tuple[jdiff.Denoiser, jax.Array]]
    reference: np.ndarray
    floor: float


def prepare(settings: Settings) -> Context:
    """Find or train the three models; embed the held-out digits; measure the floor."""
    if not 2 <= settings.n <= 898:
        raise ValueError(f"n is {settings.n}; expected 2 to 898, the number of held-out digits that give the floor")
    if settings.grid not in times.ALL:
        raise ValueError(solvers.unknown("time grid", settings.grid, times.ALL))
    held = data.load("digits", split="train")
    rank = [int((held.labels[:i] == label).sum()) for i, label in enumerate(held.labels)]  # its place in its class
    chosen = np.argsort(rank, kind="stable")[: settings.n]
    labels = jnp.asarray(held.labels[chosen])
    models = []
    for seed in SEEDS:
        denoiser = train.denoiser_from(_digits.trained("flow", seed, settings.steps), ema=0.10, labels=labels)
        models.append((denoiser, denoiser.process.prior(jax.random.key(seed), (settings.n, 8, 8, 1))))
    reference = metrics.embed(metrics.digit_features(), data.load("digits", split="test"))
    held_out = metrics.embed(metrics.digit_features(), held)[chosen]
    return Context(settings, models, reference, score(held_out, reference)["Fréchet distance"])


def cell(context: Context, row: str, nfe: int) -> dict[str, Any]:
    """One solver at one number of evaluations on the three models: mean and standard error."""
    solver, settings = solvers.parse(SOLVERS[row]), context.settings
    empty = {"Fréchet distance": None, "Fréchet distance se": None, "evaluations": None}
    process = context.models[0][0].process
    try:
        tableau = solver(process, times.ALL[settings.grid](process, solver.steps(nfe)))
    except ValueError:  # fewer evaluations than the solver's least
        return {**empty, "n": settings.n, "seeds": len(SEEDS), "floor": context.floor}
    found = []
    for seed, (denoiser, x) in zip(SEEDS, context.models, strict=True):
        padded = tableau.pad(max(8, tableau.registers), max(2, tableau.noises))  # few programs for many solvers
        samples = np.clip(np.asarray(jdiff.sample(denoiser, padded, x, jax.random.key(seed + 1))), -1, 1)
        embedded = metrics.embed(metrics.digit_features(), samples, batch_size=settings.n)
        moments = [metrics.Moments.init(f.shape[1]).update(jnp.asarray(f)) for f in (embedded, context.reference)]
        found.append(float(metrics.frechet_distance(*moments).value))
    return {
        "Fréchet distance": float(np.mean(found)),
        "Fréchet distance se": float(np.std(found, ddof=1) / np.sqrt(len(found))),
        "evaluations": tableau.nfe,
        "n": settings.n,
        "seeds": len(SEEDS),
        "floor": context.floor,
    }


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    """What the table says, computed from it."""
    value = lambda row, nfe: cells[row, nfe]["Fréchet distance"]
    lines = [
        f"n = {context.settings.n} samples of each of {len(SEEDS)} models against {len(context.reference)} held-out "
        "digits, features of the classifier in jdiff/metrics (32 dimensions); mean ± standard error over the models. "
        f"Floor: {context.floor:.3g}, as many training digits. A dash: the solver needs more evaluations.",
        "",
    ]
    for nfe in (5, 10, 20, 50):
        known = sorted((row for row in SOLVERS if value(row, nfe) is not None), key=lambda row: value(row, nfe))
        best = [f"{row} {value(row, nfe):.3g} ± {cells[row, nfe]['Fréchet distance se']:.1g}" for row in known[:3]]
        lines.append(f"- NFE {nfe}: {'; '.join(best)}; ddim {value('ddim', nfe):.3g}.")
    return lines


TABLE = Table(
    name="digits-solvers",
    summary="Fréchet distance of digits for all solvers against NFE, with standard errors over three trained models.",
    needs="nothing: the digits and their features come with the package",
    rows=tuple(SOLVERS),
    columns=NFE,
    row_title="solver",
    column_title="NFE",
    metric="Fréchet distance",
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
    published=(Published.load("dpm_solver_v3_table1.toml"),),
)
