"""Rotary positions (RoFormer, 2104.09864) for tokens on a line, a plane or a volume, with offsets and extrapolation.

Pairs of neighbouring channels of a head turn by position x frequency; each axis of the grid has its own part of the
pairs (as in Next-DiT, 2406.18583). Logits depend on differences of positions alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float


class Rotations(NamedTuple):
    """Cosines and sines of the angles of n tokens, each (n, head width / 2), float32."""

    cos: Float[Array, "n half"]
    sin: Float[Array, "n half"]


def frequencies(width: int, base: float = 10_000.0, scale: ArrayLike = 1.0, target: ArrayLike | None = None) -> Any:
    """Radians a position of the width / 2 pairs: base^(-d / width) for d = 0, 2, 4 .., slowed for longer sequences.

    scale: how many times longer than in training the axis is; 1 leaves all as it is. Pair d is slowed by
    max(1 / scale, scale^(-d / target)): target None interpolates positions (all by 1 / scale); target = width - 2 is
    NTK-aware scaling (the fastest as they were, the slowest by 1 / scale); the d whose wavelength is the trained
    length is Lumina-Next's frequency-aware scaling (2406.18583, section 2.3), and (width - 1) s + 1 with s from 0 at
    noise to 1 at data its time-aware one. scale and target may be traced.
    """
    d = np.arange(0, width, 2)
    plain = base ** -(d / width)
    if isinstance(scale, int | float) and scale == 1:
        return plain
    slowest = 1 / jnp.asarray(scale, jnp.float32)
    if target is None:
        return plain.astype(np.float32) * slowest
    exponent = d.astype(np.float32) / jnp.asarray(target, jnp.float32)
    return plain.astype(np.float32) * jnp.maximum(slowest, slowest**exponent)


def rotations(
    grid: Sequence[int],
    width: int,
    *,
    base: float = 10_000.0,
    offsets: Sequence[float] | None = None,
    scale: ArrayLike | Sequence[float] = 1.0,
    target: ArrayLike | None = None,
) -> Rotations:
    """The rotations of tokens on a grid, row-major, for heads of `width` channels (an even number).

    offsets: position of the first token along each axis, 0 if not given. scale: one, or one an axis; with target, see
    `frequencies`, whose width is an axis' part. Where the axes do not divide the pairs, the last axes have one more.
    """
    axes = len(grid)
    if width % 2 or width < 2 * axes:
        raise ValueError(f"rotary positions turn pairs of channels: {width} channels a head serve no {axes} axes")
    parts = [width // 2 // axes + (i >= axes - width // 2 % axes) for i in range(axes)]
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * axes
    start = np.zeros(axes) if offsets is None else np.asarray(offsets, np.float64)
    angles = []
    for index, part, s, first in zip(np.indices(grid), parts, scales, start, strict=True):
        place, f = index.reshape(-1, 1) + first, frequencies(2 * part, base, s, target)
        angles.append(place * f if isinstance(f, np.ndarray) else place.astype(np.float32) * f)
    if all(isinstance(a, np.ndarray) for a in angles):  # on the host, in float64
        turned = np.concatenate(angles, axis=-1)
        return Rotations(jnp.asarray(np.cos(turned), jnp.float32), jnp.asarray(np.sin(turned), jnp.float32))
    turned = jnp.concatenate([jnp.asarray(a, jnp.float32) for a in angles], axis=-1)
    return Rotations(jnp.cos(turned), jnp.sin(turned))


def rotate(x: Float[Array, "b n heads d"], by: Rotations) -> Float[Array, "b n heads d"]:
    """Queries or keys turned by their tokens' rotations, computed in float32 or better."""
    kind = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = (a[:, None, :].astype(kind) for a in by)
    a, b = x[..., 0::2].astype(kind), x[..., 1::2].astype(kind)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)
