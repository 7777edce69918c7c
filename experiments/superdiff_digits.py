"""SuperDiff on digits: two networks that saw the digits 0-4 and 5-9 alone, superposed, against one that saw all.

    jdiff reproduce superdiff-digits

What the paper's table 1 does with CIFAR-10, with three seeds of small MLPs: Fréchet distance to all held-out digits,
and diversity: the effective number of classes among samples, by the classifier, of ten.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jdiff
from jdiff import process, reproduce, steering, times
from jdiff.experiments import _mlp
from jdiff.experiments._claims import Claim
from jdiff.reproduce import Published, Table

P, SEEDS = process.edm(), (0, 1, 2)
ROWS: dict[str, tuple[str, str, float]] = {  # models, mode, temperature
    "half A": ("A", "average", 1.0),
    "half B": ("B", "average", 1.0),
    "one model of the whole": ("W", "average", 1.0),
    "A or B, drawn at random": ("A|B", "average", 1.0),
    "averaged scores": ("AB", "average", 1.0),
    "SuperDiff or, T = 1": ("AB", "or", 1.0),
    "SuperDiff or, T = 100": ("AB", "or", 100.0),
}
DISTANCE = "Fréchet distance"


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/superdiff-digits"  # folder of the finished cells and the report
    n: int = 900  # samples a seed
    steps: int = 2000  # of training each network, batches of 128
    width: int = 128


@dataclass(frozen=True, eq=False)
class Context:
    settings: Settings
    models: dict[tuple[str, int], jdiff.Denoiser]
    reference: np.ndarray


def prepare(settings: Settings) -> Context:
    x, labels = _mlp.digits()
    parts, models = {"A": labels < 5, "B": labels >= 5, "W": labels >= 0}, {}
    for seed in SEEDS:
        for name, part in parts.items():
            key = jax.random.fold_in(jax.random.key(seed), ord(name))
            start = _mlp.init(jax.random.fold_in(key, 1), settings.width)
            models[name, seed] = _mlp.denoiser(P, _mlp.trained(P, x[part], start, settings.steps, key))
    return Context(settings, models, _mlp.reference())


def cell(context: Context, row: str, steps: int) -> dict[str, Any]:
    from jdiff.experiments.fast_sampling import score

    which, mode, temperature = ROWS[row]
    distances, classes = [], []
    for seed in SEEDS:
        keys = jax.random.split(jax.random.key(100 + seed))
        noise = P.prior(keys[0], (context.settings.n, 64))
        draw = lambda names, noise, seed=seed, key=keys[1]: np.asarray(
            steering.superpose(
                [context.models[name, seed] for name in names], times.karras(P, steps), noise, key, mode,
                temperature=temperature,
            ).x
        )  # fmt: skip
        found = draw(which, noise) if "|" not in which else None
        if found is None:
            half = context.settings.n // 2
            found = np.concatenate([draw("A", noise[:half]), draw("B", noise[half:])])
        features = _mlp.features(found)
        distances.append(score(features, context.reference)[DISTANCE])
        shares = np.bincount(_mlp.classes(found), minlength=10) / len(found)
        classes.append(float(np.exp(-sum(s * np.log(s) for s in shares if s > 0))))
    error = lambda v: float(np.std(v, ddof=1) / np.sqrt(len(SEEDS)))
    return {
        DISTANCE: float(np.mean(distances)), f"{DISTANCE} se": error(distances),
        "classes": float(np.mean(classes)), "classes se": error(classes),
    }  # fmt: skip


def _ratio(a: str, b: str) -> Any:
    return lambda e: e(a, 200) / e(b, 200)


OURS = "SuperDiff or, T = 1"
CLAIMS = (
    Claim("200 steps: or at T = 1 over half A", _ratio(OURS, "half A"), at_most=0.5),
    Claim("200 steps: or at T = 1 over half B", _ratio(OURS, "half B"), at_most=0.5),
    Claim("200 steps: or at T = 1 over averaged scores", _ratio(OURS, "averaged scores"), at_most=0.9),
    Claim("200 steps: or at T = 1 over A or B at random", _ratio(OURS, "A or B, drawn at random"), at_most=1.1),
    Claim(
        "200 steps: or at T = 100 over A or B at random",
        _ratio("SuperDiff or, T = 100", "A or B, drawn at random"), at_most=1.1,
    ),
    Claim("200 steps: effective classes of or at T = 1", lambda e: e(OURS, 200, "classes"), at_least=9.0),
)  # fmt: skip


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    e: Any = lambda row, column, what=DISTANCE: cells[row, column].get(what)
    shown = lambda row, n: f"{e(row, n, 'classes'):.2f} ± {e(row, n, 'classes se'):.2f}"
    rows = [[row, *(shown(row, n) for n in TABLE.columns)] for row in ROWS]
    return [
        f"{context.settings.n} samples of each of three seeds (of training and noise), mean ± standard error; MLPs of "
        f"width {context.settings.width}, {context.settings.steps:,} steps; reverse SDE on Karras times. Features: the "
        "32-dimensional digits classifier, against the held-out digits. Effective number of classes:", "",
        *reproduce.grid(["sampler", *map(str, TABLE.columns)], rows), "", "## Claims", "",
        *(claim.line(e) for claim in CLAIMS),
    ]  # fmt: skip


TABLE = Table(
    name="superdiff-digits",
    summary="Two networks that saw half of the digits' classes each, superposed: distance to all digits, three seeds.",
    needs="nothing: trains nine small MLPs on the embedded digits",
    rows=tuple(ROWS),
    columns=(50, 200),
    row_title="sampler",
    column_title="steps",
    metric=DISTANCE,
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
    published=(Published.load("superdiff_table1.toml"),),
)
