"""Videos with known answers: shapes that move and bounce, and a Gaussian AR(1) sequence.

clips = moving_shapes(512, frames=8, size=8, seed=0)      # clips.frames (512, 8, 8, 8, 1) float32 in [-1, 1]
law = ar1(frames=16, rho=0.9)                             # jdiff.exact.Gaussian: denoiser at a time a frame, samples
"""

from typing import NamedTuple

import numpy as np

from jdiff import exact


class Clips(NamedTuple):
    """frames (n, frames, size, size, 1) float32 in [-1, 1]; centre (n, frames, 2), pixels (row, column); shape (n,)."""

    frames: np.ndarray
    centre: np.ndarray
    shape: np.ndarray


def moving_shapes(n: int, frames: int = 8, size: int = 8, seed: int = 0, radius: float = 1.5) -> Clips:
    """n clips of one shape each (0: disc, 1: square) on black, of constant speed, bouncing off the borders.

    Centres start uniform, velocities are uniform in a disc of radius size / 8 pixels a frame; edges are one pixel soft,
    so a frame changes smoothly with the centre. Clip i depends on the seed and i alone. ValueError for sizes below 1.
    """
    if min(n, frames, size) < 1 or not 0 < radius < size / 2:
        raise ValueError(f"moving_shapes: expected counts of 1 and more, radius < size / 2; {n=}, {frames=}, {size=}")
    draws = np.stack([np.random.default_rng([seed, i]).uniform(size=5) for i in range(n)])
    lowest, span = radius - 0.5, size - 2 * radius
    angle, speed = 2 * np.pi * draws[:, 2], size / 8 * np.sqrt(draws[:, 3])
    velocity = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    path = span * draws[:, None, :2] + np.arange(frames)[None, :, None] * velocity[:, None]
    centre = lowest + span - np.abs(path % (2 * span) - span)  # reflected at both borders
    shape = (draws[:, 4] < 0.5).astype(np.int32)
    rows, columns = (np.abs(np.arange(size) - centre[..., k, None]) for k in (0, 1))
    rows, columns = rows[..., :, None], columns[..., None, :]
    disc, square = np.hypot(rows, columns), np.maximum(rows, columns)
    distance = np.where(shape[:, None, None, None] == 0, disc, square)
    picture = 2.0 * np.clip(radius + 0.5 - distance, 0.0, 1.0) - 1.0
    return Clips(picture[..., None].astype(np.float32), centre, shape)


def found_centre(frames: np.ndarray) -> np.ndarray:
    """Centre of brightness of each frame in pixels, (..., 2), from frames (..., size, size, 1): what a net drew."""
    weight = np.clip(np.asarray(frames, np.float64)[..., 0] + 1.0, 0.0, None) + 1e-9
    rows, columns = (np.arange(n) for n in weight.shape[-2:])
    total = weight.sum((-2, -1))
    return np.stack([(weight.sum(-1) @ rows) / total, (weight.sum(-2) @ columns) / total], -1)


def ar1(frames: int, rho: float) -> exact.Gaussian:
    """x_f = rho x_{f-1} + sqrt(1 - rho^2) e_f, of unit variance: a number a frame. ValueError for |rho| >= 1."""
    if not abs(rho) < 1 or frames < 1:
        raise ValueError(f"ar1: expected |rho| < 1 and at least one frame, got {rho=}, {frames=}")
    lag = np.abs(np.subtract.outer(np.arange(frames), np.arange(frames)))
    return exact.gaussian(np.zeros(frames), np.power(float(rho), lag))


def sheet(frames: np.ndarray, rows: int = 6) -> np.ndarray:
    """The first `rows` clips, a clip a row, as one picture (rows size, frames size) in [0, 1] for `imshow`."""
    part = np.clip(0.5 * np.asarray(frames)[:rows, ..., 0] + 0.5, 0.0, 1.0)
    return part.transpose(0, 2, 1, 3).reshape(part.shape[0] * part.shape[2], -1)
