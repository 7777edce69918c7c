"""Gauge freedom (Horvat and Pfister 2024, arXiv 2402.03845): an invisible part of the score, dimensions misread.

    jdiff reproduce gauge

Exact scores s of data on a surface, and s + A s with A antisymmetric, |A| the columns: div(p A s) = 0, so that the
flow's samples and densities are those of s. What becomes of the dimension that is read off the field? A sphere S^2 in
five dimensions, turned, and a Swiss roll of 3,000 points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import analysis, exact, process, reproduce
from jdiff.experiments._claims import Claim
from jdiff.reproduce import Table

EDM = process.edm(sigma_max=20.0)
NORMS = (0.0, 1.0, 3.0, 10.0)
ROWS = tuple(f"{name}, {method}" for name in ("sphere", "Swiss roll") for method in ("score_svd", "flow_svd"))


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/gauge"  # folder of the finished cells and the report
    n: int = 100  # points where the dimension is read
    seed: int = 0


def turn(d: int, seed: int = 1) -> np.ndarray:
    """A rotation of d dimensions."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def antisymmetric(d: int, norm: float, seed: int = 2) -> np.ndarray:
    """A with A^T = -A, of spectral norm `norm`."""
    a = np.random.default_rng(seed).normal(size=(d, d))
    return norm * (a - a.T) / np.linalg.norm(a - a.T, 2)


def sphere_denoiser(p: process.Process) -> jdiff.Denoiser:
    """Exact for the uniform law on a turned unit S^2 in five dimensions: x0 given x is von Mises-Fisher's,
    with mean (coth k - 1/k) times the direction of x in the sphere's space, k = alpha |x there| / sigma^2."""
    frame = turn(5)[:, :3]

    def fn(x: Any, t: Any) -> Any:
        inside = x @ jnp.asarray(frame, x.dtype)
        length = jnp.sqrt(jnp.sum(inside**2, 1, keepdims=True) + 1e-20)
        k = p.alpha(t) * length / p.sigma(t) ** 2
        safe = jnp.maximum(k, 1e-2)
        mean = jnp.where(k < 1e-2, k / 3.0, 1.0 / jnp.tanh(safe) - 1.0 / safe)
        return (mean * inside / length) @ jnp.asarray(frame.T, x.dtype)

    return jdiff.denoiser(fn, p, "x0")


def sphere(n: int, seed: int) -> np.ndarray:
    z = np.random.default_rng(seed).normal(size=(n, 3))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)) @ turn(5)[:, :3].T


def roll(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The Swiss roll, by arc length u and height v in [0, 1]; two turns, about 2 across."""
    angle = np.linspace(1.5 * np.pi, 4.5 * np.pi, 4000)
    length = np.concatenate([[0.0], np.cumsum(np.hypot(1.0, angle[1:]) * np.diff(angle))])
    a = np.interp(u * length[-1], length, angle)
    return np.stack([a * np.cos(a) / 12, 2.0 * v - 1.0, a * np.sin(a) / 12], -1)


def gauged(denoiser: jdiff.Denoiser, norm: float, d: int) -> jdiff.Denoiser:
    """The same with (I + A) times the score."""
    matrix = np.eye(d) + antisymmetric(d, norm)

    def fn(x: Any, t: Any) -> Any:
        return denoiser(x, t, "score") @ jnp.asarray(matrix.T, x.dtype)

    return jdiff.denoiser(fn, denoiser.process, "score")


def models() -> dict[str, tuple[jdiff.Denoiser, Any, float, int]]:
    """Denoiser, points (n, seed) on the surface away from its edges, the time at which to look, dimensions."""
    grid = np.meshgrid((np.arange(100) + 0.5) / 100, (np.arange(30) + 0.5) / 30, indexing="ij")
    points = exact.points(roll(*(g.ravel() for g in grid)))
    on_roll = lambda n, seed: roll(*np.random.default_rng(seed).uniform(0.15, 0.85, (2, n)))
    return {"sphere": (sphere_denoiser(EDM), sphere, 0.02, 5), "Swiss roll": (points.denoiser(EDM), on_roll, 0.08, 3)}


def cell(settings: Settings, row: str, norm: float) -> dict[str, Any]:
    name, method = row.split(", ")
    denoiser, points, t, d = models()[name]
    with jax.enable_x64(True):
        x = jnp.asarray(points(settings.n, settings.seed))
        model, key = gauged(denoiser, norm, d), jax.random.key(settings.seed)
        found = np.asarray(analysis.intrinsic_dim(model, x, t, method=method, key=key))
        values = np.log(np.asarray(analysis.singular_values(model, x, t, method=method, key=key)))
        gap = 2 if method == "flow_svd" else d - 2
        noisy = denoiser.process.diffuse(key, x, t)
        return {
            "right": float(np.mean(found == 2)),
            "mean dimension": float(found.mean()),
            "log gap": float(np.median(values[:, gap - 1] - values[:, gap])),
            "asymmetry": float(jnp.median(analysis.asymmetry(lambda x: model(x, t, "score"), noisy))),
        }


def finish(settings: Settings, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    e: Any = lambda row, column, what="right": cells[row, column].get(what)
    claims = [
        *(Claim(f"{row}: right without A", lambda e, row=row: e(row, 0.0), at_least=0.95) for row in ROWS),
        *(Claim(f"{row}: right at |A| = 1", lambda e, row=row: e(row, 1.0), at_most=0.85) for row in ROWS),
    ]
    note = (
        "I + A is invertible, so (I + A) s spans as many directions as s; but it stretches them unequally, which "
        "misleads the score's rule from |A| = 3 on. Densities and samples stay: tested in tests/test_analysis.py."
    )
    lines = [note, "", "Median of the log of the ratio of singular values where the gap belongs:", ""]
    lines += ["| | " + " | ".join(f"{a:g}" for a in NORMS) + " |", "|---" * (len(NORMS) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(f"{e(row, a, 'log gap'):.2f}" for a in NORMS) + " |" for row in ROWS]
    return [*lines, "", "## Claims", "", *(claim.line(e) for claim in claims)]


TABLE = Table(
    name="gauge",
    summary="Share of points where the dimension 2 is read off an exact score with an invisible part A s.",
    needs="nothing: exact models",
    rows=ROWS,
    columns=NORMS,
    row_title="surface, method",
    column_title="norm of A",
    metric="right",
    highest=True,
    settings=Settings,
    prepare=lambda settings: settings,
    cell=cell,
    finish=finish,
)
