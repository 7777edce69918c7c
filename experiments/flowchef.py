"""FlowChef (Patel et al. 2024, arXiv 2412.00100): inverse problems on digits by a gradient that skips the network.

    jdiff reproduce flowchef

A flow MLP of the 8 x 8 digits is steered to held-out ones of which it sees part: all but a 4 x 4 box, or the means of
2 x 2 pixels, with noise 0.05. FlowChef's gradient of the loss with respect to the x0 prediction, against that through
the network (DPS). Each method's rate is the best of a ladder on 100 digits of the train half and other noise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import jdiff
from jdiff import data, guidance, process, reproduce, solvers, times
from jdiff.experiments import _mlp
from jdiff.experiments._claims import Claim
from jdiff.reproduce import Table

P, SEEDS, NOISE = process.flow(), (0, 1, 2), 0.05
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
METHODS = {"FlowChef": 1, "FlowChef, 5 inner": 5, "DPS": None, "unguided": None}


def _box(x: Any) -> Any:
    """All pixels but the 4 x 4 in the middle, (n, 48)."""
    hole = np.zeros((8, 8), bool)
    hole[2:6, 2:6] = True
    return x[:, np.flatnonzero(~hole.ravel())]


def _half(x: Any) -> Any:
    """Means of 2 x 2 pixels, (n, 16)."""
    return x.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)


TASKS: dict[str, Callable[[Any], Any]] = {"box": _box, "half size": _half}
ROWS = tuple(f"{task}: {method}" for task in TASKS for method in METHODS)


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/flowchef"  # folder of the finished cells and the report
    n: int = 300  # held-out digits a seed
    steps: int = 2000  # of training, batches of 128
    width: int = 128


@dataclass(frozen=True, eq=False)
class Context:
    settings: Settings
    models: list[jdiff.Denoiser]
    train: np.ndarray
    test: np.ndarray


def prepare(settings: Settings) -> Context:
    x, models = _mlp.digits()[0], []
    for seed in SEEDS:
        key = jax.random.key(seed)
        start = _mlp.init(jax.random.fold_in(key, 1), settings.width)
        models.append(_mlp.denoiser(P, _mlp.trained(P, x, start, settings.steps, key)))
    test = data.from_uint8(data.load("digits", split="test").images, 16).reshape(-1, 64)
    return Context(settings, models, np.asarray(x), test)


def misfit(task: str, y: Any, x0: Any) -> Any:
    """|A x0 - y|^2 / 2 of each sample: its gradient on what is seen is A x0 - y."""
    return 0.5 * jnp.sum((TASKS[task](x0) - y) ** 2, 1)


def distance(task: str, y: Any, x0: Any) -> Any:
    """DPS's |A x0 - y|."""
    return jnp.sqrt(2.0 * misfit(task, y, x0) + 1e-12)


def guided(den: jdiff.Denoiser, row: str, x0: np.ndarray, grid: Any, rate: float, key: jax.Array) -> jdiff.Denoiser:
    """The model steered to what is seen of x0, with noise."""
    task, method = row.split(": ")
    y = TASKS[task](jnp.asarray(x0))
    y = y + NOISE * jax.random.normal(key, y.shape)
    if method == "unguided":
        return den
    if method == "DPS":
        return guidance.dps(den, Partial(_Loss(distance, task), y), rate, grid)
    return guidance.flowchef(den, Partial(_Loss(misfit, task), y), rate, grid, inner=METHODS[method])


def restore(
    den: jdiff.Denoiser, row: str, x0: np.ndarray, nfe: int, rate: float, seed: int
) -> tuple[np.ndarray, float]:
    """Restored images (n, 64), and XLA's count of operations an evaluation and sample, in millions."""
    keys, grid = jax.random.split(jax.random.key(1000 + seed)), times.uniform(P, nfe)
    den, noise = guided(den, row, x0, grid, rate, keys[0]), P.prior(keys[1], (len(x0), 64))
    found = np.asarray(jdiff.sample(den, solvers.euler()(P, grid), noise))
    cost: Any = jax.jit(lambda den, x: den(x, 0.5)).lower(den, noise).compile().cost_analysis()
    return found, 1e-6 * cost["flops"] / len(x0)


@dataclass(frozen=True)
class _Loss:
    loss: Callable[..., Any]
    task: str

    def __call__(self, y: Any, x0: Any) -> Any:
        return self.loss(self.task, y, x0)


def psnr(found: np.ndarray, x0: np.ndarray) -> float:
    """Mean over images, dB; pixels in [-1, 1]."""
    error = ((np.clip(found, -1, 1) - x0) ** 2).mean(1)
    return float(np.mean(10 * np.log10(4.0 / np.maximum(error, 1e-10))))


def cell(context: Context, row: str, nfe: int) -> dict[str, Any]:
    from jdiff.experiments.fast_sampling import score

    n, found, rate = context.settings.n, {}, 0.0
    if "unguided" not in row:
        tried = {r: psnr(restore(context.models[0], row, context.train[:100], nfe, r, 99)[0], context.train[:100])
                 for r in RATES}  # fmt: skip
        rate = max(tried, key=lambda r: tried[r] if np.isfinite(tried[r]) else -np.inf)
    for seed, den in zip(SEEDS, context.models, strict=True):
        x0 = np.roll(context.test, -seed * n, axis=0)[:n]
        images, spent = restore(den, row, x0, nfe, rate, seed)
        numbers = {
            "PSNR": psnr(images, x0),
            "Fréchet distance": score(_mlp.features(images), _mlp.reference())["Fréchet distance"],
            "same class": float((_mlp.classes(images) == _mlp.classes(x0)).mean()),
            "MFLOP": spent,
        }
        for what, value in numbers.items():
            found.setdefault(what, []).append(value)
    error = lambda v: float(np.std(v, ddof=1) / np.sqrt(len(v)))
    means = {k: float(np.mean(v)) for k, v in found.items()} | {f"{k} se": error(v) for k, v in found.items()}
    return means | {"rate": rate}


def _less(a: str, b: str, n: int) -> Callable[[Any], float]:
    return lambda e: e(a, n) - e(b, n)


CLAIMS = (
    *(
        Claim(f"{task}, {n} steps: dB of FlowChef over {other}", _less(f"{task}: FlowChef", f"{task}: {other}", n),
              at_least=bound)
        for task in TASKS for n in (10, 50) for other, bound in (("unguided", 3.0), ("DPS", -0.5))
    ),
    *(
        Claim(
            f"{task}, 50 steps: operations of FlowChef over those of DPS",
            lambda e, task=task: e(f"{task}: FlowChef", 50, "MFLOP") / e(f"{task}: DPS", 50, "MFLOP"),
            at_most=0.5,
        )
        for task in TASKS
    ),
)  # fmt: skip


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    e: Any = lambda row, column, what="PSNR": cells[row, column].get(what)
    shown = lambda c, what, digits: f"{c[what]:.{digits}f} ± {c[f'{what} se']:.{digits}f}"
    title = ["task and method", "NFE", "rate", "PSNR", "same class", "Fréchet distance", "MFLOP"]
    rows = [
        [row, str(n), f"{c['rate']:g}", shown(c, "PSNR", 2), shown(c, "same class", 3), shown(c, "Fréchet distance", 2),
         f"{c['MFLOP']:.3f}"]
        for (row, n), c in cells.items()
    ]  # fmt: skip
    return [
        f"{context.settings.n} held-out digits a seed, three seeds of training, noise and images, mean ± standard "
        f"error; an MLP of width {context.settings.width}, {context.settings.steps:,} steps; flow Euler. MFLOP: "
        "an evaluation and sample, as XLA counts. Same class: as the classifier reads the original. Rates tried: "
        + ", ".join(f"{r:g}" for r in RATES) + ".", "",
        *reproduce.grid(title, rows),
        "", "## Claims", "", *(claim.line(e) for claim in CLAIMS),
    ]  # fmt: skip


TABLE = Table(
    name="flowchef",
    summary="PSNR of digits restored by a steered flow: FlowChef's gradient against the one through the network.",
    needs="nothing: trains three small MLPs on the embedded digits",
    rows=ROWS,
    columns=(10, 50),
    row_title="task and method",
    column_title="NFE",
    metric="PSNR",
    highest=True,
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
)
