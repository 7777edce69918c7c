"""FK steering of a small model of digits against a larger one, unsteered, by an independent judge.

    jdiff reproduce fk-digits

The question of Singhal et al. 2025: does a small model with k particles follow its prompt better than a larger model
alone, and than the best of k? The prompt is a class; the reward is the log-probability of that class by a small
convolutional classifier, called as a black box; the judge is another: the 5 nearest training digits in pixel space.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import data, metrics, reproduce, solvers, steering, times, train
from jdiff.experiments import _digits
from jdiff.experiments.fast_sampling import score
from jdiff.metrics import digits as classifier
from jdiff.reproduce import Table

SEEDS, LAM = (0, 1, 2), 2.0
STEPS = (25, 50)
SIZES = {"small": {"width": 32, "depth": 2}, "large": {}}


class Row(NamedTuple):
    model: str
    k: int
    potential: str | None = None


ROWS = {
    "small": Row("small", 1),
    "small, best of 4": Row("small", 4, "last"),
    "small, FK difference, k = 4": Row("small", 4, "difference"),
    "small, FK max, k = 4": Row("small", 4, "max"),
    "small, FK sum, k = 4": Row("small", 4, "sum"),
    "small, FK difference, k = 8": Row("small", 8, "difference"),
    "large": Row("large", 1),
    "large, best of 4": Row("large", 4, "last"),
    "large, FK difference, k = 4": Row("large", 4, "difference"),
}


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/fk-digits"  # folder of the finished cells and the report
    prompts: int = 200  # samples a model and cell, classes in equal numbers
    steps: int = 4000  # of training, of each of the six models


class Context(NamedTuple):
    settings: Settings
    runs: Mapping[tuple[str, int], Path]
    images: np.ndarray  # of the judge, flat
    labels: np.ndarray
    reference: np.ndarray


def prepare(settings: Settings) -> Context:
    """Three models of each size (trained where runs/models lacks them), the judge's digits, held-out features."""
    runs = {(m, s): _digits.trained("vp_linear", s, settings.steps, **kw) for m, kw in SIZES.items() for s in SEEDS}
    known = data.load("digits", split="train")
    images = known.take(np.arange(len(known)))["image"].reshape(len(known), -1)
    reference = metrics.embed(metrics.digit_features(), data.load("digits", split="test"))
    return Context(settings, runs, images, known.labels, reference)


def judge(context: Context, x: np.ndarray) -> np.ndarray:
    """The class most frequent among the 5 nearest training digits (n,)."""
    flat = x.reshape(len(x), -1)
    square = (flat**2).sum(1)[:, None] - 2 * flat @ context.images.T + (context.images**2).sum(1)
    near = context.labels[np.argsort(square, 1)[:, :5]]
    return np.array([np.bincount(row, minlength=10).argmax() for row in near])


def cell(context: Context, name: str, steps: int) -> dict[str, Any]:
    """Share of samples that the judge reads as their prompt, over three models; reward, distance, time a sample."""
    row, weights = ROWS[name], classifier.load_weights()[0]
    prompts = np.arange(context.settings.prompts) % 10
    wanted = jnp.asarray(np.repeat(prompts, row.k), jnp.int32)
    at = tuple(int(round(f * steps)) for f in (0.2, 0.4, 0.6, 0.8))
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        denoiser = train.denoiser_from(context.runs[row.model, seed], labels=wanted)
        tableau = solvers.ddpm()(denoiser.process, times.logsnr(denoiser.process, steps))
        x = denoiser.process.prior(jax.random.key(seed), (len(wanted), 8, 8, 1))

        def reward(x: jax.Array) -> jax.Array:
            log_p = jax.nn.log_softmax(classifier.classify_digits(weights, jnp.clip(x, -1, 1)))
            return jnp.maximum(jnp.take_along_axis(log_p, wanted[:, None], 1)[:, 0], -20.0)

        def draw(denoiser=denoiser, tableau=tableau, x=x, reward=reward, seed=seed) -> jax.Array:
            key = jax.random.key(seed + 10)
            if row.potential is None:
                return jdiff.sample(denoiser, tableau, x, key)
            potential = steering.fk(reward, LAM, row.potential)
            options = {"groups": len(prompts), "at": at, "final": False}
            out = steering.sample(denoiser, tableau, x, key, potential, **options)
            return steering.best(reward, out.x, len(prompts))

        samples = np.clip(np.asarray(jax.block_until_ready(draw())), -1, 1)
        start = time.perf_counter()
        jax.block_until_ready(draw())
        seconds = (time.perf_counter() - start) / len(prompts)
        log_p = jax.nn.log_softmax(classifier.classify_digits(weights, jnp.asarray(samples)))
        embedded = metrics.embed(metrics.digit_features(), samples, batch_size=len(samples))
        numbers = {
            "accuracy": float((judge(context, samples) == prompts).mean()),
            "reward": float(np.asarray(log_p)[np.arange(len(prompts)), prompts].mean()),
            "Fréchet distance": score(embedded, context.reference)["Fréchet distance"],
            "milliseconds a sample": 1e3 * seconds,
        }
        for what, value in numbers.items():
            found.setdefault(what, []).append(value)
        folder = Path(context.settings.out) / "samples"
        data.save_grid(samples[:40], folder / f"{''.join(c if c.isalnum() else '_' for c in name)}-{steps}-{seed}.png",
                       columns=10)  # fmt: skip
    error = lambda v: float(np.std(v, ddof=1) / np.sqrt(len(v)))
    return {k: float(np.mean(v)) for k, v in found.items()} | {f"{k} se": error(v) for k, v in found.items()}


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    lines = [
        f"{context.settings.prompts} prompts a model, three models of each size (seeds 0, 1, 2); small: 2 blocks of "
        f"width 32, large: 4 of width 64; {context.settings.steps} steps of training; DDPM; lambda {LAM:g}; resampling "
        "at 20, 40, 60 and 80 % of the steps; the best particle of each prompt is kept.", "",
        "| method | steps | accuracy (5-NN) | reward | Fréchet distance | ms a sample |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    say = lambda c, what, digits: f"{c[what]:.{digits}f} ± {c[f'{what} se']:.{digits}f}"
    for (row, steps), c in cells.items():
        lines.append(
            f"| {row} | {steps} | {say(c, 'accuracy', 3)} | {say(c, 'reward', 2)} | {say(c, 'Fréchet distance', 3)} | "
            f"{say(c, 'milliseconds a sample', 2)} |"
        )
    get = lambda row, what="accuracy": cells[row, STEPS[-1]][what]
    cost = lambda row: get(row, "milliseconds a sample")
    wins = lambda a, b, what="accuracy": "holds" if get(a, what) > get(b, what) else "DOES NOT HOLD"
    steered, alone = "small, FK difference, k = 4", "small, best of 4"
    lines += [
        "", f"## Claims, at {STEPS[-1]} steps", "",
        f"- small and steered (k = 4) follows its prompt better than the large model alone: {get(steered):.3f} against "
        f"{get('large'):.3f}: {wins(steered, 'large')}.",
        f"- at {cost(steered):.2f} ms a sample against {cost('large'):.2f}.",
        f"- steered has a higher reward than the best of 4: {get(steered, 'reward'):.3f} against "
        f"{get(alone, 'reward'):.3f}: {wins(steered, alone, 'reward')}; and than the base: "
        f"{wins(steered, 'small', 'reward')}.",
    ]  # fmt: skip
    return lines


TABLE = Table(
    name="fk-digits",
    summary="A small model of digits, steered, against a larger one: how often a judge reads the class asked for.",
    needs="nothing: six small models of digits, which it trains where runs/models lacks them",
    rows=tuple(ROWS),
    columns=STEPS,
    row_title="method",
    column_title="steps",
    metric="accuracy",
    highest=True,
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
)
