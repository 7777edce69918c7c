"""Patches of images, video and volumes, their positions and their times. One code for any number of axes.

A sample is (b, *size, c): (b, height, width, c), (b, frames, height, width, c), (b, length, c). Its tokens are patches
of `patch` pixels an axis, in row-major order, so n = the product of the grid size / patch. Points become a volume by
`voxelise` and a volume's features the points' by `devoxelise`, so that patches serve them too.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
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


def positions(
    grid: Sequence[int], width: int, *, offsets: Sequence[float] | None = None, scale: float | Sequence[float] = 1.0
) -> Float[np.ndarray, "n d"]:
    """Fixed sine and cosine positions (in 2-D those of MAE, 2111.06377) in float64; 2 x axes divides width.

    An equal part of the width tells the place along each axis, the last axis first (in 2-D the column, then the row);
    sines before cosines, as DiT's weights want. offsets, scale: as for `rope.rotations`, the place of a token is
    (index + offset) / scale: places between those of training, where the axes are `scale` times longer.
    """
    axes = len(grid)
    each = width // axes
    start = (0.0,) * axes if offsets is None else offsets
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * axes
    frequencies = 10_000.0 ** -(np.arange(each // 2) / (each // 2))
    places = [(i + o) / s for i, o, s in zip(np.indices(grid), start, scales, strict=True)]
    angles = [place.reshape(-1, 1) * frequencies for place in places[::-1]]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=-1)


def resize_positions(table: Float[np.ndarray, "n d"], grid: Sequence[int], extras: int = 0) -> Float[np.ndarray, "m d"]:
    """A learned table of positions for another grid, by bicubic interpolation with antialiasing (as timm does it).

    table: `extras` rows of tokens beside the patches, which stay, then the rows of a square of patches. ValueError
    where they are no square.
    """
    side = math.isqrt(max(len(table) - extras, 0))
    if side * side != len(table) - extras or not side or len(grid) != 2:
        raise ValueError(f"{len(table)} positions are not {extras} and those of a square of patches")
    square = jnp.asarray(table[extras:], jnp.float32).reshape(side, side, -1)
    # the borders' weights are divided by their sum, so that a constant stays one
    wide = jax.image.resize(square, (*grid, square.shape[-1]), "cubic")
    return np.concatenate([table[:extras], np.asarray(wide, table.dtype).reshape(math.prod(grid), -1)])


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


# --- points as volumes and back (PVCNN, 1907.03739)
def voxel_places(points: Float[Array, "b n 3"], side: int) -> Float[Array, "b n 3"]:
    """Where points lie in a cube of side^3 voxels, in voxels: the cloud's mean in the middle, the point that is
    farthest from it half a side away. Voxel i is around place i; places are clipped to 0 .. side - 1."""
    centred = points - points.mean(axis=1, keepdims=True)
    radius = jnp.sqrt(jnp.square(centred).sum(-1).max(axis=1))[:, None, None]
    places = (centred / jnp.maximum(2 * radius, 1e-12) + 0.5) * side
    return jnp.clip(places, 0, side - 1)


def voxelise(places: Float[Array, "b n 3"], features: Float[Array, "b n c"], side: int) -> Float[Array, "b s s s c"]:
    """The mean of the features of the points that lie in each voxel; zeros in a voxel without points."""
    index = jnp.round(places).astype(jnp.int32)
    flat = (index[..., 0] * side + index[..., 1]) * side + index[..., 2]
    add = jax.vmap(lambda i, v: jnp.zeros((side**3, v.shape[-1]), v.dtype).at[i].add(v))
    total, count = add(flat, features), add(flat, jnp.ones_like(features[..., :1]))
    return (total / jnp.maximum(count, jnp.ones((), count.dtype))).reshape(len(places), side, side, side, -1)


def devoxelise(grid: Float[Array, "b s s s c"], places: Float[Array, "b n 3"]) -> Float[Array, "b n c"]:
    """A volume's features at places, trilinear between the eight voxels around each."""
    side = grid.shape[1]
    low = jnp.clip(jnp.floor(places).astype(jnp.int32), 0, max(side - 2, 0))
    far = (places - low.astype(places.dtype)).astype(grid.dtype)
    take = jax.vmap(lambda g, i: g[i[:, 0], i[:, 1], i[:, 2]])
    found = jnp.zeros((*places.shape[:2], grid.shape[-1]), grid.dtype)
    for corner in np.ndindex(2, 2, 2):
        up = np.asarray(corner, np.int32)
        weight = jnp.where(up == 1, far, 1 - far).prod(axis=-1, keepdims=True)
        found = found + weight * take(grid, jnp.minimum(low + up, side - 1))
    return found
