"""SuperDiff (Skreta, Atanackovic et al. 2025, arXiv 2412.17762): the union of two half-data models, exactly.

    jdiff reproduce superdiff

25 sharp modes in the plane, split at random into halves A and B, each with its exact model. What the paper asks of two
CIFAR-10 models: does "or" sample the union, as good as one model of the whole? No trained network is involved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdiff import exact, metrics, process, reproduce, steering, times
from jdiff.experiments import _models
from jdiff.reproduce import Published, Table

P = process.vp_linear()
WHOLE = _models.survey("gmm2")


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/superdiff"  # folder of the finished cells and the report
    samples: int = 4000
    seed: int = 0


def half(seed: int, which: int) -> exact.Mixture:
    """Every second mode in a random order, with the weights that they have."""
    k = np.random.default_rng(seed).permutation(len(WHOLE.weights))[which::2]
    w = WHOLE.weights[k]
    return exact.Mixture(w / w.sum(), WHOLE.means[k], WHOLE.eigenvalues[k], WHOLE.eigenvectors[k])


def shares(seed: int) -> np.ndarray:
    """The data's share of each half."""
    k = np.random.default_rng(seed).permutation(len(WHOLE.weights))
    return np.array([WHOLE.weights[k[i::2]].sum() for i in (0, 1)])


ROWS: dict[str, tuple[str, str, float, float]] = {  # models, mode, temperature, noise
    "half A": ("A", "average", 1.0, 1.0),
    "half B": ("B", "average", 1.0, 1.0),
    "one model of the whole": ("whole", "average", 1.0, 1.0),
    "A or B, drawn at random": ("random", "average", 1.0, 1.0),
    "averaged scores": ("AB", "average", 1.0, 1.0),
    "SuperDiff or, T = 1": ("AB", "or", 1.0, 1.0),
    "SuperDiff or, T = 100": ("AB", "or", 100.0, 1.0),
    "SuperDiff or, T = 1, ODE": ("AB", "or", 1.0, 0.0),
    "SuperDiff and": ("AB", "and", 1.0, 1.0),
}


def cell(settings: Settings, name: str, steps: int) -> dict[str, Any]:
    which, mode, temperature, noise = ROWS[name]
    keys = jax.random.split(jax.random.key(settings.seed), 4)
    one, two = (half(settings.seed, i) for i in (0, 1))
    models = {"A": [one], "B": [two], "whole": [WHOLE], "random": [one], "AB": [one, two]}[which]
    x, grid, bias = P.prior(keys[0], (settings.samples, 2)), times.logsnr(P, steps), np.log(shares(settings.seed))
    draw = lambda models: steering.superpose(
        [m.denoiser(P) for m in models], grid, x, keys[1], mode, temperature=temperature, noise=noise,
        bias=bias if mode == "or" else 0.0,
    )  # fmt: skip
    found = np.asarray(draw(models).x)
    if which == "random":
        first = np.random.default_rng(settings.seed).random(settings.samples) < shares(settings.seed)[0]
        found = np.where(first[:, None], found, np.asarray(draw([two]).x))
    real = [np.asarray(WHOLE.sample(k, settings.samples)) for k in keys[2:]]
    distance = lambda a: float(metrics.sliced_wasserstein(keys[3], a, real[0]).value)
    near = np.linalg.norm(found[:, None] - WHOLE.means, axis=-1)
    on = near.min(1) < 4 * np.sqrt(WHOLE.eigenvalues.max())
    counts = np.bincount(near.argmin(1)[on], minlength=len(WHOLE.weights)) / settings.samples
    entropy = -np.sum(counts[counts > 0] * np.log(counts[counts > 0]))
    return {
        "sliced Wasserstein": distance(found), "floor": distance(real[1]), "share on a mode": float(on.mean()),
        "modes reached": int((counts > 0.2 * WHOLE.weights).sum()), "diversity": float(np.exp(entropy)),
    }  # fmt: skip


def finish(context: Settings, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    last = TABLE.columns[-1]
    lines = [
        f"{context.samples:,} samples, one seed. At {last} steps: modes reached of {len(WHOLE.weights)}, the effective "
        "number of modes (exp of the entropy of their shares), and the share of samples within 4 deviations of one:",
        "",
    ]  # fmt: skip
    for name in ROWS:
        c = cells[name, last]
        lines.append(
            f"- {name}: {c['modes reached']}, {c['diversity']:.1f}, {c['share on a mode']:.3f}; distance "
            f"{c['sliced Wasserstein']:.4f} (real data {c['floor']:.4f})"
        )
    value = lambda name, what="sliced Wasserstein": cells[name, last][what]
    ours, halves = value("SuperDiff or, T = 1"), min(value("half A"), value("half B"))
    claims = {
        "T = 1 is nearer to the data than either half": (ours, halves),
        "T = 1 is nearer than averaged scores": (ours, value("averaged scores")),
        "T = 1 is within 1.5 times one model of the whole": (ours, 1.5 * value("one model of the whole")),
        "T = 1 is within 1.5 times drawing A or B at random": (ours, 1.5 * value("A or B, drawn at random")),
    }
    lines += ["", "## Claims", ""]
    for text, (a, b) in claims.items():
        lines.append(f"- {text}: {a:.4f} against {b:.4f}: {'holds' if a <= b else 'DOES NOT HOLD'}.")
    return lines


TABLE = Table(
    name="superdiff",
    summary="Two half-data models superposed, exact mixtures: distance to the whole data.",
    needs="nothing: exact models",
    rows=tuple(ROWS),
    columns=(100, 400),
    row_title="sampler",
    column_title="steps",
    metric="sliced Wasserstein",
    settings=Settings,
    prepare=lambda settings: settings,
    cell=cell,
    finish=finish,
    published=(Published.load("superdiff_table1.toml"),),
)
