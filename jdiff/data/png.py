"""Between images in [-1, 1] and 8-bit images: one rule, for files and for scoring alike."""

import math
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8


def to_uint8(images) -> UInt8[np.ndarray, "..."]:
    """8-bit values of images in [-1, 1]: `round(clip(127.5 (x + 1), 0, 255))`, halves to the even number.

    Everything that is written to a file or scored goes through this rule. (127.5 x + 128 truncated, in use
    elsewhere, is the same but for exact halves; 255 (x + 1)/2 truncated darkens images by half a level.)

    images: floating point, any shape, a NumPy or a JAX array. Raises ValueError if a value is not finite.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        images = images.astype(np.float32)  # bfloat16 is no np.floating; integers come here by mistake
    if not np.isfinite(images).all():
        bad = int((~np.isfinite(images)).sum())
        raise ValueError(f"{bad} of {images.size} pixel values are not finite: such images cannot be stored or scored")
    return np.rint(np.clip(127.5 * (images + 1), 0, 255)).astype(np.uint8)


def from_uint8(images: UInt8[np.ndarray, "..."], max_value: int = 255) -> Float32[np.ndarray, "..."]:
    """Images in [-1, 1], float32, of integer images in 0..max_value."""
    out = images.astype(np.float32)
    out *= np.float32(2 / max_value)
    out -= np.float32(1)
    return out


def save_grid(images, path: str | os.PathLike, columns: int | None = None, scale: int | None = None) -> Path:
    """Writes images (n, H, W, C), floating in [-1, 1] or uint8, as one PNG, row by row; returns its path.

    columns: images a row (the default makes the grid nearly square). scale: each pixel becomes scale x scale
    (nearest neighbour; the default brings tiny images up to 32 pixels). C is 1 (grey) or 3 (RGB).
    Raises ValueError for another suffix than .png (a lossy file must never be scored), another shape, or
    values that are not finite.
    """
    from PIL import Image

    path, images = Path(path), to_uint8(images)
    if path.suffix.lower() != ".png":
        raise ValueError(f"save_grid writes PNG, so the path must end in .png, got {str(path)!r}")
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"expected images of shape (n, H, W, 1 or 3) with n > 0, got {images.shape}")
    n, h, w, c = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    scale = max(1, math.ceil(32 / min(h, w))) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got {columns=}, {scale=}")
    columns = min(columns, n)
    rows, gap = math.ceil(n / columns), 1
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (h + gap) + gap, (i % columns) * (w + gap) + gap
        sheet[y : y + h, x : x + w] = image
    sheet = sheet.repeat(scale, 0).repeat(scale, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet[..., 0] if c == 1 else sheet).save(path)
    return path
