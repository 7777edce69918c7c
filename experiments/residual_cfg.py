"""Residual classifier-free guidance: a digit edited into another one, quality against network evaluations.

    jdiff reproduce residual-cfg

Test digits are noised to t = 0.6 and denoised by DDIM in few steps under the label five classes on. Claim of
StreamDiffusion (Kodaira et al. 2023): with a virtual negative branch, at no or one evaluation more, the prompt is met
nearly as well as with full guidance.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jdiff
from jdiff import data, guidance, reproduce, solvers, times
from jdiff.experiments import _guided
from jdiff.experiments._claims import Claim

START, STEPS, SCALE = 0.6, (2, 4, 8), 1.5
DELTAS = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: Annotated[str, tyro.conf.arg(help="folder of the finished cells and the report")] = "runs/residual-cfg"
    n: Annotated[int, tyro.conf.arg(help="test digits a model; there are three models")] = 250
    scale: Annotated[float, tyro.conf.arg(help="guidance scale of all rows")] = SCALE


Wrap = Callable[[jdiff.Denoiser, jdiff.Denoiser, Any, float], jdiff.Denoiser]
ROWS: dict[str, tuple[Wrap, Callable[[int], int]]] = {
    "no guidance": (lambda c, u, x, w: c, lambda n: n),
    "CFG": (lambda c, u, x, w: guidance.cfg(c, u, w), lambda n: 2 * n),
    **{
        f"self-negative, delta {d:g}": (
            lambda c, u, x, w, d=d: guidance.residual_cfg(c, w, source=x, delta=d), lambda n: n
        ) for d in DELTAS
    },
    **{
        f"onetime-negative, delta {d:g}": (
            lambda c, u, x, w, d=d: guidance.residual_cfg(c, w, negative=u, delta=d), lambda n: n + 1
        ) for d in DELTAS
    },
}  # fmt: skip


def cell(settings: Settings, row: str, steps: int) -> dict[str, Any]:
    """P(target class), and how much of the source is kept, three models."""
    test, each = data.load("digits", split="test").take(np.arange(settings.n)), []
    source, target = jnp.asarray(test["image"]), jnp.asarray((test["label"] + 5) % 10, jnp.int32)
    wrap, cost = ROWS[row]
    for m in _guided.models("vp_linear", settings.n, 10):
        p = m.cond.process
        t = times.uniform(p, steps, start=START)
        x = p.diffuse(jax.random.key(m.seed), source, START)
        denoiser = wrap(m.cond.with_cond(target), m.null, source, settings.scale)
        images = np.asarray(jdiff.sample(denoiser, solvers.ddim()(p, t), x))
        found = _guided.score(images, target)
        probability = np.exp(_guided.log_probabilities(images))[np.arange(settings.n), np.asarray(target)]
        found["distance to the source"] = float(np.sqrt(np.mean((images - np.asarray(source)) ** 2)))
        each.append({"P(target)": float(probability.mean()), **found})
    return {"P(target)": None, **_guided.summary(each), "evaluations": cost(steps)}


def best(e: Any, kind: str, n: int, metric: str = "P(target)") -> float:
    """Of the deltas, by P(target): the metric."""
    row = max((r for r in ROWS if r.startswith(kind)), key=lambda r: e(r, n))
    return e(row, n, metric)


CLAIMS = tuple(
    claim
    for n in STEPS
    for kind in ("self-negative", "onetime-negative")
    for claim in (
        Claim(f"{kind}, best delta, {n} steps: P(target) less that without guidance",
              lambda e, n=n, k=kind: best(e, k, n) - e("no guidance", n), at_least=0.1),
        Claim(f"{kind}, best delta, {n} steps: P(target) over CFG's",
              lambda e, n=n, k=kind: best(e, k, n) / e("CFG", n), at_least=0.9),
        Claim(f"{kind}, that delta, {n} steps: Fréchet distance over CFG's",
              lambda e, n=n, k=kind: best(e, k, n, "Fréchet distance") / e("CFG", n, "Fréchet distance"),
              at_most=1.1),
    )
)  # fmt: skip


def finish(settings: Settings, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    e: Any = lambda row, column, what="P(target)": cells[row, column].get(what)
    lines = [
        "Higher is better (bold is the lowest). Published: 2.05 times the speed of full guidance (StreamDiffusion, "
        "abstract); the evaluations, a sample, are counted here in tests/test_guidance.py.",
    ]
    for what in ("evaluations", "Fréchet distance", "distance to the source"):
        body = [[r, *(reproduce.number(e(r, c, what)) for c in STEPS)] for r in ROWS]
        lines += ["", f"{what}:", "", *reproduce.grid(["method", *map(str, STEPS)], body)]
    return [*lines, "", "## Claims", "", *(claim.line(e) for claim in CLAIMS)]


TABLE = reproduce.Table(
    name="residual-cfg",
    summary="Residual guidance against full guidance: digits edited from t = 0.6 into another class.",
    needs="nothing: digits models that it trains where runs/models lacks them",
    rows=tuple(ROWS),
    columns=STEPS,
    row_title="method",
    column_title="steps",
    metric="P(target)",
    highest=True,
    settings=Settings,
    prepare=lambda settings: settings,
    cell=cell,
    finish=finish,
)
