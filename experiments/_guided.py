"""Guidance on the trained digits models of three seeds: a row samples, and every cell has the same numbers.

    def row(model, scale): return sampled(model, guidance.cfg(model.cond, model.null, scale)), 2.0
    TABLE = table("cfg", "..", rows={"CFG": row}, columns=(1.5, 2, 3), column_title="scale", claims=(..))

A row is a function (model, column) -> (images, network evaluations a sample and step). Labels are the ten classes in
turn. "accuracy" is how many samples the packaged classifier of metrics.digits takes for their label; it never sees
the models, and no row is guided by it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jdiff
from jdiff import data, metrics, reproduce, solvers, times, train
from jdiff.experiments import _digits
from jdiff.experiments._claims import Claim
from jdiff.metrics.digits import classify_digits, load_weights
from jdiff.reproduce import Published, Table

NULL = 10  # the null label of the digits models
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: Annotated[str, tyro.conf.arg(help="folder of the finished cells and the report")]
    n: Annotated[int, tyro.conf.arg(help="samples a model; there are three")] = 250
    steps: Annotated[int, tyro.conf.arg(help="steps of the solver, DDIM on a uniform grid")] = 10


class Model(NamedTuple):
    """One seed's model under its labels, without label, and trained for 500 steps alone; labels (n,), noise."""

    cond: jdiff.Denoiser
    null: jdiff.Denoiser
    weak: Callable[[], jdiff.Denoiser]
    labels: jax.Array
    x: jax.Array
    times: np.ndarray
    seed: int


Row = Callable[[Model, Any], tuple[Any, float]]


@functools.cache
def models(kind: str, n: int, steps: int) -> list[Model]:
    """The trained models ("vp_linear", "flow") of three seeds, each with its noise (n, 8, 8, 1)."""
    labels, null, found = jnp.arange(n, dtype=jnp.int32) % 10, jnp.full(n, NULL, jnp.int32), []
    for seed in SEEDS:
        cond = train.denoiser_from(_digits.trained(kind, seed), ema=0.10, labels=labels)
        weak = lambda seed=seed: train.denoiser_from(_digits.trained(kind, seed, 500), ema=0.10, labels=labels)
        x = cond.process.prior(jax.random.key(seed), (n, 8, 8, 1))
        grid = times.uniform(cond.process, steps)
        found.append(Model(cond, cond.with_cond(null), functools.cache(weak), labels, x, grid, seed))
    return found


def sampled(model: Model, denoiser: jdiff.Denoiser, solver: str = "ddim", x: Any = None) -> np.ndarray:
    """Images (n, 8, 8, 1) by the solver on the model's grid."""
    table = solvers.parse(solver)(denoiser.process, model.times)
    start = model.x if x is None else x
    return np.asarray(jdiff.sample(denoiser, table, start, jax.random.key(model.seed + 1)))


def log_probabilities(images: Any) -> np.ndarray:
    """(n, 10), of the packaged classifier."""
    logits = classify_digits(load_weights()[0], jnp.asarray(np.clip(images, -1, 1), jnp.float32))
    return np.asarray(jax.nn.log_softmax(logits))


@functools.cache
def _reference() -> np.ndarray:
    return metrics.embed(metrics.digit_features(), data.load("digits", split="test"))


def score(images: np.ndarray, labels: Any) -> dict[str, float]:
    """The numbers of one model's samples."""
    from jdiff.experiments.fast_sampling import score as distances

    features = metrics.embed(metrics.digit_features(), np.clip(images, -1, 1), batch_size=len(images))
    logs, y = log_probabilities(images), np.asarray(labels)
    return {
        **distances(features, _reference()),
        "accuracy": float(np.mean(logs.argmax(1) == y)),
        "log p(label)": float(np.mean(logs[np.arange(len(y)), y])),
        "doubt": float(1.0 - np.mean(np.exp(logs.max(1)))),
        "ink": float(np.mean(0.5 + 0.5 * np.clip(images, -1, 1))),
        "out of range": float(np.mean(np.abs(images) > 1.05)),
    }


def summary(each: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean over models, " se" the standard error, and " 0", " 1", .. each model."""
    cell: dict[str, Any] = {}
    for key in each[0]:
        values = np.array([m[key] for m in each])
        cell[key] = float(values.mean())
        cell[f"{key} se"] = float(values.std(ddof=1) / np.sqrt(len(values)))
    return cell | {f"{key} {i}": float(m[key]) for key in each[0] for i, m in enumerate(each)}


def paired(e: Callable[..., Any], a: tuple[str, Any], b: tuple[str, Any], metric: str) -> float:
    """Difference of two cells, a - b, over its standard error, model by model."""
    off = np.array([e(*a, f"{metric} {i}") - e(*b, f"{metric} {i}") for i in range(len(SEEDS))])
    return float(off.mean() / (off.std(ddof=1) / np.sqrt(len(off))))


def table(
    name: str,
    summary_line: str,
    *,
    rows: Mapping[str, Row],
    columns: Sequence[Any],
    column_title: str,
    claims: Sequence[Claim],
    kinds: Mapping[str, str] | None = None,
    metric: str = "Fréchet distance",
    shown: Sequence[str] = ("Fréchet distance", "accuracy", "precision", "recall"),
    notes: Sequence[str] = (),
    published: tuple[Published, ...] = (),
    defaults: Settings | None = None,
) -> Table:
    """The experiment. kinds: rows whose models are not "vp_linear"; shown: metrics that get a table of their own."""
    kinds = kinds or {}

    def cell(settings: Settings, row: str, column: Any) -> dict[str, Any]:
        each, cost = [], 0.0
        for model in models(kinds.get(row, "vp_linear"), settings.n, settings.steps):
            images, cost = rows[row](model, column)
            each.append(score(images, model.labels))
        return {metric: None, **summary(each), "evaluations a step": cost}

    def finish(settings: Settings, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
        e: Callable[..., Any] = lambda row, column, what=metric: cells[row, column].get(what)
        number = reproduce.number
        lines = [*notes]
        for what in shown:
            if what != metric:
                body = [[r, *(f"{number(e(r, c, what))} ± {e(r, c, f'{what} se'):.1g}" for c in columns)] for r in rows]
                lines += ["", f"{what}:", "", *reproduce.grid(["method", *map(str, columns)], body)]
        costs = [[r, *(number(e(r, c, "evaluations a step")) for c in columns)] for r in rows]
        lines += ["", "Network evaluations a step:", "", *reproduce.grid(["method", *map(str, columns)], costs)]
        return [*lines, "", "## Claims", "", *(claim.line(e) for claim in claims)]

    start = defaults or Settings("")
    fields = [
        ("out", Settings.__annotations__["out"], dataclasses.field(default=f"runs/{name}")),
        *((f.name, Settings.__annotations__[f.name], dataclasses.field(default=getattr(start, f.name)))
          for f in dataclasses.fields(Settings) if f.name != "out"),
    ]  # fmt: skip
    return Table(
        name=name,
        summary=summary_line,
        needs="nothing: digits models that it trains where runs/models lacks them",
        rows=tuple(rows),
        columns=tuple(columns),
        row_title="method",
        column_title=column_title,
        metric=metric,
        settings=dataclasses.make_dataclass("Settings", fields, bases=(Settings,), frozen=True),
        prepare=lambda settings: settings,
        cell=cell,
        finish=finish,
        published=published,
    )
