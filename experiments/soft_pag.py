"""SoftPAG and HeadHunter: which attention heads to perturb, on digits models without their labels.

    jdiff reproduce soft-pag

HeadHunter chooses three of sixteen heads, one a round, by an objective on 32 fixed noises; what is reported is on
others. Claims of Ahn et al. 2025: chosen heads beat random ones and whole layers; u is a monotone knob; an objective of
style is met by other heads.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jdiff import guidance
from jdiff.experiments import _guided
from jdiff.experiments._claims import Claim
from jdiff.experiments._guided import Model, Row, Settings, sampled, table
from jdiff.reproduce import number

SHAPE, SCALE, HUNTED, RANDOM = (4, 4), 2.0, 32, 3  # layers and heads, w, noises of a hunt, random sets
HEADS = [(layer, head) for layer in range(4) for head in range(4)]


def guided(m: Model, heads: Sequence[guidance.Head], u: float, x: Any = None) -> np.ndarray:
    net = m.null if x is None else m.null.with_cond(m.null.apply.args[1][: len(x)])  # type: ignore
    return sampled(m, guidance.soft_pag(net, guidance.head_mask(heads, SHAPE, u), SCALE), x=x)


def sure(images: np.ndarray) -> float:
    """Mean log of the packaged classifier's largest probability."""
    return float(np.mean(_guided.log_probabilities(images).max(1)))


def ink(images: np.ndarray) -> float:
    return float(np.mean(np.clip(images, -1, 1)))


@functools.cache
def _hunt(seed: int, objective: Callable[[np.ndarray], float], settings: tuple[int, int]) -> guidance.Hunt:
    m = _guided.models("vp_linear", *settings)[seed]
    x = m.null.process.prior(jax.random.key(1000 + seed), (HUNTED, 8, 8, 1))
    return guidance.head_hunter(lambda heads: objective(guided(m, heads, 1.0, x)), HEADS, k=1, rounds=3)


def hunt(m: Model, objective: Callable[[np.ndarray], float]) -> tuple[guidance.Head, ...]:
    return _hunt(m.seed, objective, (len(m.labels), len(m.times) - 1)).heads


def random_set(i: int) -> list[guidance.Head]:
    return [HEADS[j] for j in np.random.default_rng(i).choice(16, 3, replace=False)]


def row(heads: Callable[[Model], Sequence[guidance.Head]]) -> Row:
    return lambda m, u: (guided(m, heads(m), u), 2.0)


ROWS: dict[str, Row] = {
    "no guidance": lambda m, u: (sampled(m, m.null), 1.0),
    "HeadHunter, sure": row(lambda m: hunt(m, sure)),
    "HeadHunter, ink": row(lambda m: hunt(m, ink)),
    **{f"PAG, layer {i}": row(lambda m, i=i: [(i, h) for h in range(4)]) for i in range(4)},
    **{f"random heads {i}": row(lambda m, i=i: random_set(i)) for i in range(RANDOM)},
}


def random_mean(e: Any, metric: str) -> list[float]:
    return [e(f"random heads {i}", 1.0, metric) for i in range(RANDOM)]


def gain(e: Any, name: str) -> float:
    return e("no guidance", 1.0) - e(name, 1.0)


def sigmas(e: Any, name: str, metric: str) -> float:
    """Of `name` over the random sets: the difference of means over the standard error, model by model."""
    off = np.array([
        e(name, 1.0, f"{metric} {s}") - np.mean(random_mean(e, f"{metric} {s}")) for s in _guided.SEEDS
    ])  # fmt: skip
    return float(off.mean() / (off.std(ddof=1) / np.sqrt(len(off))))


BASE = table(
    "soft-pag",
    "Perturbed attention: HeadHunter's three heads against random ones and whole layers, by u.",
    rows=ROWS,
    columns=(0.5, 1.0),
    column_title="u",
    metric="doubt",
    shown=("ink", "Fréchet distance", "precision", "recall"),
    defaults=Settings("", n=150),
    claims=(
        Claim("gain of HeadHunter's heads less 1.2 times the mean gain of random ones, u = 1",
              lambda e: gain(e, "HeadHunter, sure")
              - 1.2 * (e("no guidance", 1.0) - float(np.mean(random_mean(e, "doubt")))),
              at_least=0.0),
        Claim("doubt of HeadHunter's heads less random heads', over its standard error",
              lambda e: sigmas(e, "HeadHunter, sure", "doubt"), at_most=-2.0),
        Claim("gain of HeadHunter's heads over the best layer's",
              lambda e: gain(e, "HeadHunter, sure") / max(gain(e, f"PAG, layer {i}") for i in range(4)), at_least=1.0),
        Claim("ink of the heads chosen for it less random heads', over its standard error",
              lambda e: sigmas(e, "HeadHunter, ink", "ink"), at_least=2.0),
        Claim("ink of the heads chosen for it over that without guidance",
              lambda e: e("HeadHunter, ink", 1.0, "ink") / e("no guidance", 1.0, "ink"), at_least=1.05),
    ),
    notes=(
        "Doubt is 1 less the mean of the packaged classifier's largest probability: lower is better, and the first "
        "hunt is for its logarithm. Guidance weight 2, DDIM on a uniform grid; the models with their null label. "
        "Published: win rates on SD3 and FLUX.1, not compared.",
    ),
)  # fmt: skip


def finish(settings: Any, cells: Any, out: Any) -> list[str]:
    lines, us = list(BASE.finish(settings, cells, out)), (0.0, 0.25, 0.5, 0.75, 1.0)
    found, ranks = [], []
    for m in _guided.models("vp_linear", settings.n, settings.steps):
        x = m.x[:HUNTED]
        images = [guided(m, hunt(m, sure), u, x) for u in us]
        found.append([float(np.sqrt(np.mean((y - images[0]) ** 2))) for y in images])
        ranks.append(float(np.corrcoef(np.argsort(np.argsort(found[-1])), np.arange(5))[0, 1]))
    knob = ", ".join(f"u = {u:g}: {number(float(d))}" for u, d in zip(us, np.mean(found, 0), strict=True))
    holds = "holds" if min(ranks) >= 0.9 else "DOES NOT HOLD"
    heads = [[hunt(m, f) for f in (sure, ink)] for m in _guided.models("vp_linear", settings.n, settings.steps)]
    return [
        *lines,
        f"- distance to the unguided sample against u, least rank correlation of the models: {min(ranks):.3g}, "
        f"expected at least 0.9: {holds}.",
        "",
        f"Root mean square distance to the unguided samples: {knob}.",
        "",
        *(f"Seed {s}: heads (layer, head) for certainty {a}, for ink {b}." for s, (a, b) in enumerate(heads)),
    ]


TABLE = dataclasses.replace(BASE, finish=finish)
