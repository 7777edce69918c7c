"""Patches of images, video and volumes, their positions and their times. One code for any number of axes.

A sample is (b, *size, c): (b, height, width, c), (b, frames, height, width, c), (b, length, c). Its tokens are patches
of `patch` pixels an axis, in row-major order, so n = the product of the grid size / patch.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Size = int | Sequence[int]


def per_axis(value: Size, axes: int) -> tuple[int, ...]:
    """One number for each axis."""
    return (value,) * axes if isinstance(value, int) else tuple(value)


def patchify(x: Float[Array, "b *size c"], patch: Size) -> Float[Array, "b n ppc"]:
    """Samples to tokens, row by row; a token is (*patch, c) flattened."""
    b, *size, c = x.shape
    patch = per_axis(patch, len(size))
    split = [m for n, p in zip(size, patch, strict=True) for m in (n // p, p)]
    grid, inside = range(1, 2 * len(size), 2), range(2, 2 * len(size) + 1, 2)
    x = x.reshape(b, *split, c).transpose(0, *grid, *inside, 2 * len(size) + 1)
    return x.reshape(b, -1, math.prod(patch) * c)


def unpatchify(x: Float[Array, "b n ppc"], patch: Size, grid: Sequence[int]) -> Float[Array, "b *size c"]:
    """The inverse of patchify for a grid of so many patches an axis."""
    axes, patch = len(grid), per_axis(patch, len(grid))
    x = x.reshape(len(x), *grid, *patch, -1)
    order = [axis for i in range(1, axes + 1) for axis in (i, i + axes)]
    x = x.transpose(0, *order, 2 * axes + 1)
    return x.reshape(len(x), *(n * p for n, p in zip(grid, patch, strict=True)), -1)


def positions(grid: Sequence[int], width: int) -> Float[np.ndarray, "n d"]:
    """Fixed sine and cosine positions (in 2-D those of MAE, 2111.06377) in float64; 2 x axes divides width.

    An equal part of the width tells the place along each axis, the last axis first (in 2-D the column, then the row);
    sines before cosines, as DiT's weights want.
    """
    each = width // len(grid)
    frequencies = 10_000.0 ** -(np.arange(each // 2) / (each // 2))
    angles = [index.reshape(-1, 1) * frequencies for index in np.indices(grid)[::-1]]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=-1)


def pool_time(t: Any, shape: Sequence[int], patch: Size) -> Float[Array, "b *grid"]:
    """A time a patch: the mean of t over the patches of samples of this shape (b, *size, c). float32.

    t is a scalar, (b,), or anything that broadcasts against shape. A time that does not vary within a sample stays
    (b or 1, 1, ..), so that conditioning costs one row a sample.
    """
    t, axes = jnp.asarray(t), len(shape) - 2
    if not jnp.issubdtype(t.dtype, jnp.floating):
        raise ValueError(f"the time is {t.dtype}; a net takes a float time of order 1 (its time_scale multiplies it)")
    t = t.astype(jnp.float32)
    full = t.reshape(-1, *(1,) * (axes + 1)) if t.ndim == 1 else t.reshape((1,) * (len(shape) - t.ndim) + t.shape)
    if full.ndim != len(shape) or any(n not in (1, m) for n, m in zip(full.shape, shape, strict=True)):
        raise ValueError(
            f"a time of shape {t.shape} fits no sample of shape {tuple(shape)}: give (), ({shape[0]},), or a shape "
            f"that broadcasts against the sample, such as {(shape[0], *(1,) * (axes + 1))} or {(*shape[:-1], 1)}"
        )
    if full.shape[1:-1] == (1,) * axes:
        return full.mean(axis=-1)
    full = jnp.broadcast_to(full.mean(axis=-1, keepdims=True), (full.shape[0], *shape[1:-1], 1))
    grid = [n // p for n, p in zip(shape[1:-1], per_axis(patch, axes), strict=True)]
    return patchify(full, patch).mean(axis=-1).reshape(-1, *grid)
