"""Learned mixing of two experts (AFA: Wang et al. 2024; MixerMDM: Ruiz-Ponce et al. 2025) on digits.

    jdiff reproduce afa

Two networks that saw the digits 0-4 and 5-9 alone; a small gate, trained with the denoising loss on all digits while
they stay as they are, weighs their x0 predictions pixel by pixel. AFA weighs features after every block of a U-Net,
here it is the outputs. Error of the x0 prediction of held-out digits at a noise level, against each expert, their mean,
the mean of their parameters, and the expert that each digit belongs to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import jdiff
from jdiff import data, guidance, process, reproduce
from jdiff.experiments import _mlp
from jdiff.experiments._claims import Claim
from jdiff.reproduce import Table

P, SEEDS, SIGMAS = process.edm(), (0, 1, 2), (0.2, 0.5, 1.0, 2.0, 5.0)
LEARNED, RIGHT = "learned, a weight a pixel", "the right expert"
ROWS = ("expert of 0-4", "expert of 5-9", "mean", "mean of parameters", LEARNED, "learned, a weight a digit", RIGHT)
WEIGHT = "weight of the right expert"


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/afa"  # folder of the finished cells and the report
    steps: int = 2000  # of training each expert, batches of 128
    gate_steps: int = 1000  # of training a gate
    width: int = 128


@dataclass(frozen=True, eq=False)
class Context:
    settings: Settings
    digits: tuple[np.ndarray, np.ndarray]  # held out: images (n, 64) and labels
    experts: list[tuple[Any, Any]]  # parameters, a pair a seed
    gates: dict[tuple[str, int], Any]


def gate(shared: bool, params: Any, x: jax.Array, t: jax.Array, outs: Sequence[jax.Array]) -> jax.Array:
    """Logits (2, n, 64 or 1): a layer of 32 that sees both predictions, the input's and the noise level's size."""
    sigma = jnp.broadcast_to(t, (len(x), 1))
    seen = [*outs, x / jnp.sqrt(sigma**2 + _mlp.SIGMA_DATA**2), jnp.log(sigma)]
    h = jax.nn.silu(jnp.concatenate(seen, 1) @ params["in"] + params["bias"]) @ params["out"]
    h = jnp.mean(h, 1, keepdims=True) if shared else h
    return jnp.stack([h, jnp.zeros_like(h)])


def start(key: jax.Array) -> Any:
    """Zero logits: the mean of the experts, as published."""
    draw = jax.random.normal(key, (193, 32), jnp.float32) / np.sqrt(193)
    return {"in": draw, "bias": jnp.zeros(32, jnp.float32), "out": jnp.zeros((32, 64), jnp.float32)}


def mixture(experts: Sequence[Any], shared: bool, params: Any) -> jdiff.Denoiser:
    return guidance.mix([_mlp.denoiser(P, e) for e in experts], Partial(gate, shared, params))


def prepare(settings: Settings) -> Context:
    x, labels = _mlp.digits()
    experts, gates = [], {}
    for seed in SEEDS:
        key = jax.random.key(seed)
        begin = _mlp.init(jax.random.fold_in(key, 1), settings.width)  # one start for both, for the sake of their mean
        pair = [_mlp.trained(P, x[part], begin, settings.steps, jax.random.fold_in(key, i))
                for i, part in enumerate((labels < 5, labels >= 5))]  # fmt: skip
        experts.append(tuple(pair))
        for name, shared in ((LEARNED, False), ("learned, a weight a digit", True)):
            apply = lambda params, x, t, y, pair=pair, shared=shared: mixture(pair, shared, params)(x, t)
            gates[name, seed] = _mlp.fitted(apply, P, x, start(jax.random.fold_in(key, 2)), settings.gate_steps, key)
    test = data.load("digits", split="test")
    images = data.from_uint8(test.images, 16).reshape(-1, 64)
    return Context(settings, (images, np.asarray(test.labels)), experts, gates)


def cell(context: Context, row: str, sigma: float) -> dict[str, Any]:
    (x0, labels), errors, weights = context.digits, [], []
    first = labels < 5
    for seed, pair in zip(SEEDS, context.experts, strict=True):
        x = x0 + np.float32(sigma) * np.asarray(jax.random.normal(jax.random.key(100 + seed), x0.shape, jnp.float32))
        outs = [np.asarray(_mlp.denoiser(P, e)(jnp.asarray(x), jnp.float32(sigma))) for e in pair]
        if row in ROWS[:2]:
            found = outs[ROWS.index(row)]
        elif row == "mean":
            found = 0.5 * (outs[0] + outs[1])
        elif row == RIGHT:
            found = np.where(first[:, None], *outs)
        elif row == "mean of parameters":
            soup = jax.tree.map(lambda a, b: 0.5 * (a + b), *pair)
            found = np.asarray(_mlp.denoiser(P, soup)(jnp.asarray(x), jnp.float32(sigma)))
        else:
            params, shared = context.gates[row, seed], row != LEARNED
            found = np.asarray(mixture(pair, shared, params)(jnp.asarray(x), jnp.float32(sigma)))
            logits = gate(shared, params, jnp.asarray(x), jnp.float32(sigma), [jnp.asarray(o) for o in outs])
            w = np.asarray(jax.nn.softmax(logits, 0)[0]).mean(1)
            weights.append(float(np.where(first, w, 1 - w).mean()))
        errors.append(float(((found - x0) ** 2).mean()))
    error = lambda v: float(np.std(v, ddof=1) / np.sqrt(len(v)))
    return {
        "error of x0": float(np.mean(errors)), "error of x0 se": error(errors),
        WEIGHT: float(np.mean(weights)) if weights else None,
    }  # fmt: skip


def _against(e: Any, others: Sequence[str]) -> float:
    """Geometric mean over noise levels of the learned mixture's error over the least of the others'."""
    return float(np.exp(np.mean([np.log(e(LEARNED, s) / min(e(o, s) for o in others)) for s in SIGMAS])))


CLAIMS = (
    Claim("learned over the best of experts and means, all levels", lambda e: _against(e, ROWS[:4]), at_most=0.95),
    Claim("learned over the right expert, all levels", lambda e: _against(e, [RIGHT]), at_most=1.1),
    *(Claim(f"weight of the right expert at sigma {s:g}", lambda e, s=s: e(LEARNED, s, WEIGHT), at_least=0.65)
      for s in (0.5, 1.0, 2.0)),
)  # fmt: skip


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    e: Any = lambda row, column, what="error of x0": cells[row, column].get(what)
    weights = [[row, *(reproduce.number(e(row, s, WEIGHT)) for s in SIGMAS)] for row in ROWS[4:6]]
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    share = size(context.gates[LEARNED, 0]) / size(context.experts[0])
    return [
        f"Mean squared error over 899 held-out digits, mean ± standard error over three seeds; MLPs of width "
        f"{context.settings.width}, {context.settings.steps:,} steps; gates of {100 * share:.1f} % of their "
        f"parameters, {context.settings.gate_steps:,} steps. Mean weight of the expert that saw the digit's class:", "",
        *reproduce.grid(["mixture", *map(str, SIGMAS)], weights), "", "## Claims", "", *(c.line(e) for c in CLAIMS),
    ]  # fmt: skip


TABLE = Table(
    name="afa",
    summary="Two experts of half of the digits' classes, mixed by a learned gate: error of the x0 prediction.",
    needs="nothing: trains six small MLPs and six gates on the embedded digits",
    rows=ROWS,
    columns=SIGMAS,
    row_title="model",
    column_title="sigma",
    metric="error of x0",
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
)
