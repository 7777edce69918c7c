"""UPSR: noise where a first guess differs from what was seen, against ResShift's even noise, on blurred digits.

    jdiff reproduce upsr

Both are one chain of 5 steps; ResShift is the noise map 1. The guess is the exact E[x0 | y]. The networks are small
MLPs of (x_t, t, y) trained alike, three seeds; a map whose pixels are shuffled shows whether the places matter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import anchored, metrics, reproduce, solvers, times
from jdiff.experiments import _restoration as model
from jdiff.experiments._claims import Claim
from jdiff.experiments.fast_sampling import score
from jdiff.experiments.restoration import batch
from jdiff.reproduce import Table

A = anchored.ALL["upsr"]()
KINDS = ("ResShift's even noise", "UPSR's map", "map, pixels shuffled")
SHUFFLE = np.random.default_rng(0).permutation(64)
NUMBERS = ("PSNR", "PSNR flat", "PSNR edges", "Fréchet distance")


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/upsr"  # folder of the finished cells and the report
    n: int = 500  # held-out digits
    steps: int = 500  # of training, batches of 256
    seed: int = 0  # of the views and the noise


def noise_map(kind: str, arrays: Any, y: jax.Array) -> jax.Array:
    """The noise map of each pixel, (n, 64)."""
    if kind == KINDS[0]:
        return jnp.ones_like(y)
    found = anchored.uncertainty(model.fidelity(arrays, y), y)
    return found if kind == KINDS[1] else found[:, SHUFFLE]


def mapped(kind: str, data: Any, key: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    images, arrays = data
    x0, y = batch(images, key)
    return x0, y, noise_map(kind, arrays, y)


PAIRS = {kind: partial(mapped, kind) for kind in KINDS}


@dataclass(frozen=True, eq=False)
class Context:
    settings: Settings
    train: jax.Array
    arrays: Mapping[str, jax.Array]
    x0: np.ndarray
    y: jax.Array
    networks: dict[str, Any]


def prepare(settings: Settings) -> Context:
    train, labels = model.digits("train")
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in model.posterior(train, labels).items()}
    x0 = model.digits("test")[0][: settings.n]
    y = jnp.asarray(model.view(x0, settings.seed), jnp.float32)
    return Context(settings, jnp.asarray(train, jnp.float32), arrays, x0, y, {})


def psnr(found: np.ndarray, right: np.ndarray, where: Any = True) -> float:
    """In dB, of values within [-1, 1], over the pixels `where`."""
    error = (np.clip(found, -1, 1) - right) ** 2
    return float(20 * np.log10(2 / np.sqrt(np.mean(error, where=np.broadcast_to(where, error.shape)))))


def cell(context: Context, row: str, n: int) -> dict[str, Any]:
    """PSNR over all pixels, over flat ones (where the guess agrees with the view), the others; Fréchet distance."""
    c = context
    if row not in c.networks:
        c.networks[row] = model.trained(A, PAIRS[row], (c.train, dict(c.arrays)), c.settings.steps)
    scale, flat = noise_map(row, c.arrays, c.y), np.asarray(noise_map(KINDS[1], c.arrays, c.y)) < 0.6
    table = solvers.ddpm()(A.process, times.uniform(A.process, n))
    features = lambda v: metrics.embed(
        metrics.digit_features(), np.clip(v, -1, 1).reshape(-1, 8, 8, 1).astype(np.float32), batch_size=len(v)
    )
    found: dict[str, list[float]] = {k: [] for k in NUMBERS}
    for i in range(model.SEEDS):
        params = jax.tree.map(lambda v, i=i: v[i], c.networks[row])
        key = jax.random.key(c.settings.seed + i)
        x = np.asarray(model.restored(A, partial(model.mlp, A.process), params, table, c.y, key, scale), np.float64)
        far = score(features(x), features(c.x0))["Fréchet distance"]
        numbers = (psnr(x, c.x0), psnr(x, c.x0, flat), psnr(x, c.x0, ~flat), far)
        for k, value in zip(NUMBERS, numbers, strict=True):
            found[k].append(value)
    error = float(np.std(found["PSNR"], ddof=1) / np.sqrt(model.SEEDS))
    return {k: float(np.mean(v)) for k, v in found.items()} | {"PSNR se": error, "flat": float(flat.mean())}


def above(text: str, a: str, b: str, what: str, at_least: float) -> Claim:
    return Claim(text, lambda e: e(a, 5, what) - e(b, 5, what), at_least=at_least)


EVEN, MAP, SHUFFLED = KINDS
CLAIMS = (
    above("the map over even noise, PSNR in dB", MAP, EVEN, "PSNR", 0.2),
    above("the map over even noise, PSNR of flat pixels in dB", MAP, EVEN, "PSNR flat", 0.5),
    above("the map over its shuffled self, PSNR in dB", MAP, SHUFFLED, "PSNR", 0.0),
    Claim(
        "the map's Fréchet distance over that of even noise",
        lambda e: e(MAP, 5, "Fréchet distance") / e(EVEN, 5, "Fréchet distance"),
        at_most=1.02,
    ),
)


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    e: Callable[..., Any] = lambda row, n, what="PSNR": cells[row, n].get(what)
    rows = [[row, *(reproduce.number(e(row, 5, k)) for k in NUMBERS)] for row in KINDS]
    c = context
    guess = np.asarray(model.fidelity(dict(c.arrays), c.y), np.float64)
    return [
        f"{c.settings.n} held-out digits, means over {model.SEEDS} seeds; flat: the {100 * e(MAP, 5, 'flat'):.0f} % of "
        f"pixels whose map is below 0.6. The view itself has {psnr(np.asarray(c.y), c.x0):.2f} dB, the guess E[x0 | y] "
        f"{psnr(guess, c.x0):.2f} dB, which no sample of a posterior can have. Published (UPSR, on ImageNet and "
        "RealSR): better than ResShift in perceptual scores with a smaller model; no number on these data.",
        "",
        "## At 5 evaluations",
        "",
        *reproduce.grid(["noise", *NUMBERS], rows),
        "",
        "## Claims",
        "",
        *(claim.line(e) for claim in CLAIMS),
    ]


TABLE = Table(
    name="upsr",
    summary="UPSR's noise map against even noise in ResShift's chain: PSNR in dB (range 2) of restored digits.",
    needs="nothing: digits and three small networks that it trains, three seeds each",
    rows=KINDS,
    columns=(5,),
    row_title="noise",
    column_title="evaluations",
    metric="PSNR",
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
)
