"""Fast sampling on real digits: train a small DiT, sample it with every solver at few evaluations, measure.

    jdiff reproduce fast-sampling

The question of DPM-Solver (table 2), DEIS, UniPC and DPM-Solver-v3 (table 1): how good are samples at 5 to 50 network
evaluations? Here on 8 x 8 digits that come with the package, with a model trained in the same run.
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
from jdiff.reproduce import Published, Table

NFE = (5, 6, 8, 10, 15, 20, 50)
SOLVERS = {
    "DDIM (Euler)": "ddim",
    "DDPM (DDIM eta=1)": "ddpm",
    "Heun": "heun",
    "Heun, churn": "heun(churn=4.0)",
    "DPM-Solver++(2M)": "dpm_solver_pp(order=2)",
    "DPM-Solver++(3M)": "dpm_solver_pp(order=3)",
    "SDE-DPM-Solver++(2M)": "dpm_solver_pp(order=2, eta=1.0)",
    "DEIS-2 (t)": "deis(order=2)",
    "DEIS-3 (t)": "deis(order=3)",
    "DEIS-3 (log-SNR)": "deis(order=3, variable='lam')",
    "UniPC-2": "unipc(order=2)",
    "UniPC-3": "unipc(order=3)",
}
HIGH_ORDER = ("DPM-Solver++(2M)", "DPM-Solver++(3M)", "DEIS-3 (t)", "DEIS-3 (log-SNR)", "UniPC-2", "UniPC-3")


@dataclass(frozen=True)
class Settings:
    """Options of the experiment; the defaults end in under five minutes on two CPU cores."""

    out: str = "runs/fast-sampling"  # folder of the model, the finished cells and the report
    steps: int = 4000  # training steps of 64 images
    width: int = 64  # of the DiT
    depth: int = 4  # of the DiT
    grid: str = "uniform"  # time grid of all solvers: uniform, logsnr, karras, quadratic
    n: int = 500  # samples a cell, and real images in the floor; at most 898
    seed: int = 0  # of training and sampling


class Context(NamedTuple):
    settings: Settings
    denoiser: jdiff.Denoiser
    x: jax.Array
    limit: np.ndarray
    reference: np.ndarray
    floor: float


def prepare(settings: Settings) -> Context:
    """Train (or find the trained model), embed the reference, and measure the floor."""
    if not 2 <= settings.n <= 898:
        raise ValueError(f"n is {settings.n}; expected 2 to 898, the number of held-out digits that give the floor")
    if settings.grid not in times.ALL:
        raise ValueError(solvers.unknown("time grid", settings.grid, times.ALL))
    config = train.TrainConfig(
        out=f"{settings.out}/model",
        net="DiT",
        net_options={
            "patch": 2,
            "width": settings.width,
            "depth": settings.depth,
            "heads": 4,
            "unroll": settings.depth,
        },
        process="flow",
        prediction="velocity",
        weighting="flow",
        time="logit_normal",
        batch=64,
        steps=settings.steps,
        learning_rate=1.5e-3,
        seed=settings.seed,
    )
    result = train.train(config)
    held = data.load("digits", split="train")
    rank = [int((held.labels[:i] == label).sum()) for i, label in enumerate(held.labels)]  # its place in its class
    chosen = np.argsort(rank, kind="stable")[: settings.n]  # as many of each class, as in the reference
    labels = jnp.asarray(held.labels[chosen])
    denoiser = train.denoiser_from(result, ema=0.10, labels=labels)
    x = denoiser.process.prior(jax.random.key(settings.seed), (settings.n, 8, 8, 1))
    # Where every deterministic solver should end: the model's own probability flow, by 200 steps of third order.
    fine = solvers.unipc(order=3)(denoiser.process, times.logsnr(denoiser.process, 200))
    limit = np.asarray(jdiff.sample(denoiser, fine, x))
    reference = metrics.embed(metrics.digit_features(), data.load("digits", split="test"))
    held_out = metrics.embed(metrics.digit_features(), held)[chosen]
    return Context(settings, denoiser, x, limit, reference, score(held_out, reference)["Fréchet distance"])


def score(features: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The numbers of a cell, from the features of samples and of the held-out digits."""
    moments = [metrics.Moments.init(f.shape[1]).update(jnp.asarray(f)) for f in (features, reference)]
    precision, recall = metrics.precision_recall(features, reference)
    return {
        "Fréchet distance": metrics.frechet_distance(*moments).value,
        "sliced Wasserstein": metrics.sliced_wasserstein(jax.random.key(0), features, reference).value,
        "precision": precision.value,
        "recall": recall.value,
    }


def cell(context: Context, row: str, nfe: int) -> dict[str, Any]:
    """Sample with one solver at one number of evaluations."""
    solver = solvers.parse(SOLVERS[row])
    process, settings = context.denoiser.process, context.settings
    tableau = solver(process, times.ALL[settings.grid](process, solver.steps(nfe)))
    key = jax.random.key(settings.seed + 1)
    samples = jdiff.sample(context.denoiser, tableau.pad(5, 1), context.x, key)  # one program for all solvers of an NFE
    off = float(np.sqrt(np.mean((np.asarray(samples) - context.limit) ** 2)))
    samples = np.clip(np.asarray(samples), -1, 1)
    folder = Path(settings.out) / "samples"
    name = solver.name + "-" + "".join(c if c.isalnum() else "_" for c in row) + f"-{nfe}.png"
    data.save_grid(samples[:40], folder / name, columns=10)
    embedded = metrics.embed(metrics.digit_features(), samples, batch_size=settings.n)
    return {
        **score(embedded, context.reference),
        "rms to flow": None if solver.stochastic else off,
        "evaluations": tableau.nfe,
        "n": settings.n,
        "n_reference": len(context.reference),
        "seed": settings.seed,
        "floor": context.floor,
        "picture": f"samples/{name}",
    }


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    """The claims, checked on the numbers above; the solvers' own error; a sheet of samples."""
    distance = lambda row, nfe: cells[row, nfe]["Fréchet distance"]
    error = lambda row, nfe: cells[row, nfe]["rms to flow"]
    best = min(SOLVERS, key=lambda row: distance(row, 50))
    ratio = distance(best, 50) / context.floor
    _sheet(cells, out)
    cell = next(iter(cells.values()))
    deterministic = [row for row in SOLVERS if error(row, NFE[0]) is not None]
    rows = [[row, *(reproduce.number(error(row, nfe)) for nfe in NFE)] for row in deterministic]
    return [
        f"n = {cell['n']} samples against {cell['n_reference']} held-out digits; features: the classifier in "
        "jdiff/metrics (32 dimensions). Distances of another n, or other features, are not comparable.",
        "",
        f"Floor: {context.floor:.3g}, as many of the training digits against the same held-out ones.",
        "",
        "![distance against evaluations](plot.png)",
        "",
        "## The solvers' own error",
        "",
        "Root mean square distance per pixel, from the same noise, to the model's probability flow (200 steps of "
        "UniPC-3): how well the ODE is solved, whatever the model is worth. Stochastic solvers have no such limit.",
        "",
        *reproduce.grid(["solver", *map(str, NFE)], rows),
        "",
        "## Claims",
        "",
        f"- At NFE 50 the best distance is {distance(best, 50):.3g} ({best}), {ratio:.2f} times the floor; "
        f"within 3 times: {_verdict(ratio <= 3)}.",
        _ahead("Fréchet distance", distance),
        _ahead("rms to flow", error),
        "",
        "![samples](samples.png)",
    ]


def _verdict(holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"


def _ahead(metric: str, value: Any) -> str:
    """Are the high-order solvers ahead of DDIM at NFE 10?"""
    behind = [row for row in HIGH_ORDER if not value(row, 10) < value("DDIM (Euler)", 10)]
    numbers = ", ".join(f"{row} {value(row, 10):.3g}" for row in HIGH_ORDER)
    but = f"; behind it: {', '.join(behind)}" if behind else ""
    start = (
        f"- High-order solvers ahead of DDIM at NFE 10 by {metric} (DDIM {value('DDIM (Euler)', 10):.3g}; {numbers}): "
    )
    return f"{start}{_verdict(not behind)}{but}."


def _sheet(cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> None:
    """The same ten noises through some solvers (rows) at NFE 5, 10 and 50 (columns)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows, columns = ("DDIM (Euler)", "Heun", "DPM-Solver++(2M)", "DEIS-3 (log-SNR)", "UniPC-3"), (5, 10, 50)
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(11, 2.8), layout="constrained")
    for i, row in enumerate(rows):
        for j, nfe in enumerate(columns):
            image = plt.imread(out / cells[row, nfe]["picture"])
            axes[i, j].imshow(image[: len(image) // 4 + 1], cmap="gray")
            axes[i, j].set(xticks=[], yticks=[])
            axes[0, j].set_title(f"NFE {nfe}")
        axes[i, 0].set_ylabel(row, rotation=0, ha="right", va="center")
    figure.savefig(out / "samples.png", dpi=110)
    plt.close(figure)


TABLE = Table(
    name="fast-sampling",
    summary="Fréchet distance of digits by solver and number of network evaluations (NFE), trained in the same run.",
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
