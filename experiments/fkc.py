"""Feynman-Kac correctors (Skreta et al. 2025, arXiv 2503.02819) where the target is known: powers, guidance, products.

    jdiff reproduce fkc

Two mixtures on a line. Their powers, geometric means and products are integrated on a grid, so that errors of mode
weight, mean and log Z are exact: of scaled scores without weights, of the published forms, of the velocity whose
weights vary least, and of the official image code, which clips its weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import exact, process, reproduce, steering, times
from jdiff.reproduce import Table

P = process.vp_linear()
ONE = exact.mixture([0.7, 0.3], [[-1.0], [1.2]], [0.2, 0.1])
TWO = exact.mixture([0.4, 0.6], [[-0.9], [1.0]], [0.3, 0.25])
GROUPS = 10


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/fkc"  # folder of the finished cells and the report
    particles: int = 100_000  # a cell, in ten independent groups
    seed: int = 0


def annealed(beta: float) -> dict[str, Any]:
    name = f"p^{beta:g}"
    den = ONE.denoiser(P)
    return {
        f"{name}: scaled score, no weights": (steering.anneal(den, beta, order=2), (beta,), False),
        f"{name}: FKC, target score": (steering.anneal(den, beta, order=2), (beta,), True),
        f"{name}: FKC, tempered noise": (steering.anneal(den, beta, "tempered", order=2), (beta,), True),
        f"{name}: FKC, velocity of p": (steering.anneal(den, beta, "flow", order=2), (beta,), True),
    }


def rows() -> dict[str, Any]:
    """Name -> (corrector, powers, corrected?)."""
    one, two = ONE.denoiser(P), TWO.denoiser(P)
    found = {**annealed(0.5), **annealed(2.0), **annealed(3.0)}
    for w in (2.0, 4.0):
        guided = steering.corrected_cfg(one, two, w, order=2)
        published = steering.corrected_cfg(one, two, w, as_published=True)
        found[f"guidance {w:g}: plain CFG"] = (guided, (1 - w, w), False)
        found[f"guidance {w:g}: FKC"] = (guided, (1 - w, w), True)
        found[f"guidance {w:g}: official image code"] = (published, (1 - w, w), True)
    product = steering.product([two, one], velocity=[0.5, 0.5], order=2)
    found["product: summed scores, no weights"] = (steering.product([two, one], order=2), (1.0, 1.0), False)
    found["product: FKC, mean velocity"] = (product, (1.0, 1.0), True)
    return found


def target(powers: Sequence[float]) -> tuple[float, float, float, float]:
    """Weight of x > 0, mean, standard deviation and log Z of the product with these powers."""
    models = [ONE] if len(powers) == 1 else [TWO, ONE]
    x = np.linspace(-9.0, 9.0, 18_001)[:, None]
    log = sum(b * np.asarray(m.log_density(P, jnp.asarray(x), 0.0)) for m, b in zip(models, powers, strict=True))
    w = np.exp(log) * 1e-3
    mean = float(w @ x[:, 0] / w.sum())
    sd = float(np.sqrt(w @ (x[:, 0] - mean) ** 2 / w.sum()))
    return float(w[x[:, 0] > 0].sum() / w.sum()), mean, sd, float(np.log(w.sum()))


def cell(settings: Settings, name: str, steps: int) -> dict[str, Any]:
    """Errors over ten groups, weighted, with standard errors between groups."""
    corrector, powers, corrected = rows()[name]
    keys = jax.random.split(jax.random.key(settings.seed), 2)
    x = P.prior(keys[0], (settings.particles, 1))
    grid = times.logsnr(P, steps)
    threshold, at = (1.0 if corrector.as_published else 0.5), (None if corrected else ())
    out = steering.correct(
        corrector, grid, x, keys[1], groups=GROUPS, threshold=threshold, at=at, final=corrector.as_published
    )
    log_w = out.log_w if corrected else 0.0 * out.log_w
    w = np.asarray(jax.nn.softmax(log_w, -1), np.float64)
    x = np.asarray(out.x, np.float64).reshape(GROUPS, -1)
    mass, mean, sd, log_z = target(powers)
    masses, means = (w * (x > 0)).sum(1), (w * x).sum(1)
    sds = np.sqrt((w * (x - means[:, None]) ** 2).sum(1))
    z = np.exp(np.asarray(out.log_z, np.float64) - log_z)
    error = lambda v: float(v.std(ddof=1) / np.sqrt(GROUPS))
    return {
        "error of the mode weight": abs(float(masses.mean()) - mass), "mode weight": float(masses.mean()),
        "mode weight se": error(masses), "exact": mass, "error of the mean": float(means.mean()) - mean,
        "mean se": error(means), "sd over the exact": float(sds.mean() / sd), "sd se": error(sds / sd),
        "Z over the exact": float(z.mean()) if corrected and not corrector.as_published else float("nan"),
        "Z se": error(z), "resampled": float(np.asarray(out.info.resampled).sum(0).mean()),
    }  # fmt: skip


def finish(context: Settings, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    last = TABLE.columns[-1]
    lines = [f"At {last} steps, {context.particles:,} particles (standard errors between {GROUPS} groups):", ""]
    for name in TABLE.rows:
        c = cells[name, last]
        lines.append(
            f"- {name}: mode weight {c['mode weight']:.4f} ± {c['mode weight se']:.4f} (exact {c['exact']:.4f}), mean "
            f"off by {c['error of the mean']:+.4f} ± {c['mean se']:.4f}, sd {c['sd over the exact']:.3f} of the exact"
            + (f", Z {c['Z over the exact']:.3f} ± {c['Z se']:.3f} of the exact" if c["Z over the exact"] > 0 else "")
        )
    lines += ["", "## Claims", ""]
    for name in TABLE.rows:
        if not name.endswith(("FKC, velocity of p", ": FKC", "mean velocity")):
            continue
        c = cells[name, last]
        far = max(
            c["error of the mode weight"] / c["mode weight se"],
            abs(c["error of the mean"]) / c["mean se"],
            abs(c["sd over the exact"] - 1) / c["sd se"],
        )
        off = abs(c["Z over the exact"] - 1)
        lines.append(
            f"- {name}: mode weight, mean and sd within 3 standard errors ({far:.1f}): "
            f"{'holds' if far <= 3 else 'DOES NOT HOLD'}; Z within 1 % ({100 * off:.2f} % ± {100 * c['Z se']:.2f} %): "
            f"{'holds' if off <= 0.01 else 'DOES NOT HOLD'}."
        )
        plain = next(r for r in TABLE.rows if r.split(":")[0] == name.split(":")[0])
        less, more = c["error of the mode weight"], cells[plain, last]["error of the mode weight"]
        lines.append(
            f"- ... and its error of the mode weight is at most half of that without weights: {less:.4f} against "
            f"{more:.4f}: {'holds' if less <= 0.5 * more else 'DOES NOT HOLD'}."
        )
    return lines


TABLE = Table(
    name="fkc",
    summary="Error of a mode's weight under powers, guidance and products of exact mixtures, with and without weights.",
    needs="nothing: exact models",
    rows=tuple(rows()),
    columns=(100, 200),
    row_title="target and method",
    column_title="steps",
    metric="error of the mode weight",
    settings=Settings,
    prepare=lambda settings: settings,
    cell=cell,
    finish=finish,
)
