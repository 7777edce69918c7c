"""Point sets on known manifolds, seeded: for estimates of dimension, of normals, and for small generative models.

    s = points.sphere(1000, seed=0, dimension=2)
    s.x (n, d) float64, s.normals (n, d) unit vectors or None, s.dimension

Points are uniform on the manifold (by area or length); `noise` adds N(0, noise^2) to every coordinate afterwards.
"""

from typing import NamedTuple

import numpy as np


class Points(NamedTuple):
    """x (n, d); unit normals (n, d) where the manifold has codimension 1, before noise; the manifold's dimension."""

    x: np.ndarray
    normals: np.ndarray | None
    dimension: int


def _finish(
    rng: np.random.Generator, x: np.ndarray, normals: np.ndarray | None, dimension: int, noise: float
) -> Points:
    if noise < 0:
        raise ValueError(f"points: noise is {noise}; expected a standard deviation >= 0")
    return Points(x + noise * rng.normal(size=x.shape), normals, dimension)


def sphere(n: int, seed: int = 0, *, dimension: int = 2, radius: float = 1.0, noise: float = 0.0) -> Points:
    """The sphere S^dimension of this radius in dimension + 1 coordinates; normals point outwards."""
    if dimension < 1 or not radius > 0:
        raise ValueError(f"sphere: expected dimension >= 1 and radius > 0, got {dimension=}, {radius=}")
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, dimension + 1))
    normals = z / np.linalg.norm(z, axis=1, keepdims=True)
    return _finish(rng, radius * normals, normals, dimension, noise)


def torus(n: int, seed: int = 0, *, radius: float = 2.0, tube: float = 0.7, noise: float = 0.0) -> Points:
    """The torus around the third axis, tube < radius; its area element is proportional to radius + tube cos(phi)."""
    if not 0 < tube < radius:
        raise ValueError(f"torus: expected 0 < tube < radius, got {tube=}, {radius=}")
    rng = np.random.default_rng(seed)
    phi = np.empty(0)
    while len(phi) < n:  # rejection, at least half are kept
        trial = rng.uniform(0, 2 * np.pi, 2 * n + 8)
        phi = np.append(phi, trial[rng.random(len(trial)) * (radius + tube) < radius + tube * np.cos(trial)])
    phi, theta = phi[:n], rng.uniform(0, 2 * np.pi, n)
    normals = np.stack([np.cos(phi) * np.cos(theta), np.cos(phi) * np.sin(theta), np.sin(phi)], 1)
    ring = np.stack([np.cos(theta), np.sin(theta), 0 * theta], 1)
    return _finish(rng, radius * ring + tube * normals, normals, 2, noise)


def two_moons(n: int, seed: int = 0, *, noise: float = 0.0) -> Points:
    """Two half circles of radius 1 in the plane: around (0, 0), y >= 0, and around (1, 0.5), y <= 0.5; half the points
    on each. Normals point away from the centres."""
    rng = np.random.default_rng(seed)
    angle = np.pi * rng.random(n)
    upper = np.arange(n) % 2 == 0
    normals = np.stack([np.cos(angle), np.where(upper, 1, -1) * np.sin(angle)], 1)
    return _finish(rng, normals + np.where(upper[:, None], [0.0, 0.0], [1.0, 0.5]), normals, 1, noise)


def swiss_roll(n: int, seed: int = 0, *, turns: float = 1.5, width: float = 10.0, noise: float = 0.0) -> Points:
    """A sheet rolled up: (r cos r, y, r sin r), r from 1.5 pi over so many turns, y uniform in [0, width].

    Uniform by area: r has density sqrt(1 + r^2), inverted on a fine table.
    """
    if not (turns > 0 and width > 0):
        raise ValueError(f"swiss_roll: expected turns > 0 and width > 0, got {turns=}, {width=}")
    rng = np.random.default_rng(seed)
    table = 1.5 * np.pi + np.linspace(0, 2 * np.pi * turns, 4097)
    length = 0.5 * (table * np.sqrt(1 + table**2) + np.arcsinh(table))
    r = np.interp(rng.uniform(length[0], length[-1], n), length, table)
    x = np.stack([r * np.cos(r), width * rng.random(n), r * np.sin(r)], 1)
    along = np.stack([np.cos(r) - r * np.sin(r), 0 * r, np.sin(r) + r * np.cos(r)], 1)
    normals = np.stack([along[:, 2], 0 * r, -along[:, 0]], 1)
    return _finish(rng, x, normals / np.linalg.norm(normals, axis=1, keepdims=True), 2, noise)


ALL = {"sphere": sphere, "torus": torus, "two_moons": two_moons, "swiss_roll": swiss_roll}
