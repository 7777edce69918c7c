"""Restoration pairs from real images: patches, and what a camera of half the resolution would have seen of them."""

import numpy as np
from jaxtyping import Float, Shaped


def patches(
    images: Shaped[np.ndarray, "n h w c"], size: int, count: int, seed: int = 0, *, colour: bool = False
) -> Float[np.ndarray, "count size size *c"]:
    """`count` patches in [-1, 1] at random places of random images (uint8, or floats in [-1, 1]); seeded.

    Grey, (count, size, size), or with all channels, (count, size, size, c).
    """
    n, h, w, _ = images.shape
    if not 1 <= size <= min(h, w):
        raise ValueError(f"patches: size is {size}; expected 1 to {min(h, w)}, the images' shorter side")
    rng = np.random.default_rng(seed)
    i, y, x = (rng.integers(0, top, count) for top in (n, h - size + 1, w - size + 1))
    cut = np.stack([images[a, b : b + size, c : c + size] for a, b, c in zip(i, y, x, strict=True)])
    cut = cut if colour else cut.mean(-1)
    return cut / 127.5 - 1.0 if images.dtype == np.uint8 else cut.astype(np.float64)


def degraded(
    x0: Float[np.ndarray, "n h w *c"], factor: int = 2, noise: float = 0.1, seed: int = 0
) -> Float[np.ndarray, "n h w *c"]:
    """The anchor y: `factor` x `factor` blocks averaged, noise added to each, and blown up again by repetition."""
    n, h, w, *c = x0.shape
    if factor < 1 or h % factor or w % factor:
        raise ValueError(f"degraded: {factor=} must divide the sides {h} and {w}")
    low = x0.reshape(n, h // factor, factor, w // factor, factor, *c).mean((2, 4))
    low = low + noise * np.random.default_rng(seed).normal(size=low.shape)
    return low.repeat(factor, 1).repeat(factor, 2)
