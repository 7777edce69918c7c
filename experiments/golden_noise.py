"""Golden noise: starts moved by one guided step there and back, and a small network that learns the move.

    jdiff reproduce golden-noise

Class-conditional digits at a low guidance scale in 10 steps of DDIM; the reward is the packaged classifier's log
probability of the label. Claim of Zhou et al. 2024: golden noises sample better, and a network trained on pairs gives
most of the gain at the cost of one small forward pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import jdiff
from jdiff import guidance, nets, reproduce, solvers
from jdiff.experiments import _guided
from jdiff.experiments._claims import Claim
from jdiff.experiments._guided import Model

HIGH = (2.0, 5.5)


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: Annotated[str, tyro.conf.arg(help="folder of the finished cells and the report")] = "runs/golden-noise"
    n: Annotated[int, tyro.conf.arg(help="noises a model to report on, and as many to train on; three models")] = 250
    scale: Annotated[float, tyro.conf.arg(help="guidance scale of sampling, and of the step back")] = 1.0


def images(m: Model, settings: Settings, x: Any) -> np.ndarray:
    denoiser = guidance.cfg(m.cond, m.null, settings.scale)
    return np.asarray(jdiff.sample(denoiser, solvers.ddim()(denoiser.process, m.times), x))


def reward(m: Model, settings: Settings, x: Any) -> Any:
    y = np.asarray(m.labels)
    return jnp.asarray(_guided.log_probabilities(images(m, settings, x))[np.arange(len(y)), y])


def learned(m: Model, settings: Settings, high: float) -> Any:
    """The starts as the network moves them; it saw other noises under the same labels."""
    other = m.cond.process.prior(jax.random.key(100 + m.seed), m.x.shape)
    pairs = guidance.golden_pairs(
        m.cond, m.null, other, m.times, lambda x: reward(m, settings, x), high, settings.scale
    )
    net = nets.NoisePromptNet(8, 1, num_classes=10, rngs=nnx.Rngs(m.seed))
    net = guidance.fit_noise_prompt(net, pairs, m.labels[pairs.kept], jax.random.key(m.seed), steps=300)
    return net(m.x, m.labels)


ROWS = {
    "random": lambda m, s, high: m.x,
    "golden": lambda m, s, high: guidance.golden_noise(m.cond, m.null, m.x, m.times, high, s.scale),
    "learned": learned,
}


def cell(settings: Settings, row: str, high: float) -> dict[str, Any]:
    each = []
    for m in _guided.models("vp_linear", settings.n, 10):
        x = ROWS[row](m, settings, high)
        y, plain, found = np.asarray(m.labels), images(m, settings, m.x), images(m, settings, x)
        logs = [_guided.log_probabilities(v)[np.arange(len(y)), y] for v in (found, plain)]
        better = np.mean(logs[0] > logs[1])
        moved = float(jnp.sqrt(jnp.mean((x - m.x) ** 2)))
        each.append(_guided.score(found, y) | {"better": float(better), "moved": moved})
    summary = _guided.summary(each)
    negative = {k.replace("log p(label)", "-log p(label)"): v for k, v in summary.items() if "log p(label)" in k}
    return {"-log p(label)": -negative["-log p(label)"], "-log p(label) se": negative["-log p(label) se"], **summary}


def learnt(e: Any, high: float) -> float:
    gain = lambda row: e("random", high) - e(row, high)
    return gain("learned") / gain("golden")


CLAIMS = (
    *(Claim(f"golden noise at w = {w:g}: share of starts with a higher reward",
            lambda e, w=w: e("golden", w, "better"), at_least=0.6) for w in HIGH),
    Claim("the network's share of the gain, w = 5.5", lambda e: learnt(e, 5.5), at_least=0.6),
    Claim("golden noise's Fréchet distance over random's, w = 5.5",
          lambda e: e("golden", 5.5, "Fréchet distance") / e("random", 5.5, "Fréchet distance"), at_most=0.95),
)  # fmt: skip


def finish(settings: Settings, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    e: Any = lambda row, column, what="-log p(label)": cells[row, column].get(what)
    lines = [
        "One DDIM step of ten at scale w and its inversion at the scale of sampling: 4 evaluations a start, none but a "
        "small forward pass for the network. Published: HPSv2 of SDXL on DrawBench, not compared.",
    ]
    for what in ("better", "moved", "Fréchet distance", "accuracy", "recall"):
        body = [[r, *(f"{reproduce.number(e(r, c, what))} ± {e(r, c, f'{what} se'):.1g}" for c in HIGH)] for r in ROWS]
        title = {"better": "share of starts with a higher reward than random", "moved": "root mean square move"}
        lines += ["", f"{title.get(what, what)}:", "", *reproduce.grid(["start", *map(str, HIGH)], body)]
    return [*lines, "", "## Claims", "", *(claim.line(e) for claim in CLAIMS)]


TABLE = reproduce.Table(
    name="golden-noise",
    summary="Golden noise and a network that learns it, by the guidance scale of the step ahead.",
    needs="nothing: digits models that it trains where runs/models lacks them",
    rows=tuple(ROWS),
    columns=HIGH,
    row_title="start",
    column_title="scale of the step ahead",
    metric="-log p(label)",
    settings=Settings,
    prepare=lambda settings: settings,
    cell=cell,
    finish=finish,
)
