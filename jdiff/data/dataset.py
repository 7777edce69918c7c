"""The record that every data set becomes, and `load`, the one way to get it."""

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from .order import permutation
from .png import from_uint8

Reader = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one size.

    name: how results refer to it, e.g. "digits/test".
    length: number of examples, also `len(dataset)`.
    shape: (H, W, C).
    class_names: one a class; labels are indices into it.
    read: int64 indices (b,) -> (uint8 images (b, H, W, C) in 0..max_value, int32 labels (b,)); of a set of latents,
        float32 arrays (b, H, W, C), which are taken as they are.
    max_value: the integer that stands for white: 255, but 16 for the digits.
    in_memory: whether `read` is a mere look-up.
    """

    name: str
    length: int
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    read: Reader
    max_value: int = 255
    in_memory: bool = False

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"Dataset({self.name}: {self.length} images {self.shape}, {self.num_classes} classes)"

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        return self.read(np.arange(self.length))

    @property
    def images(self) -> UInt8[np.ndarray, "n h w c"]:
        """All images as stored, 0..max_value (read from disk at first use)."""
        return self._all[0]

    @property
    def labels(self) -> Int32[np.ndarray, "n"]:
        """All labels (read from disk at first use)."""
        return self._all[1]

    def take(self, indices: Integer[np.ndarray, "b"]) -> dict[str, np.ndarray]:
        """{"image": float32 (b, H, W, C) in [-1, 1], or latents, "label": int32 (b,)} of the examples `indices`."""
        images, labels = self.read(indices)
        latent = images.dtype == np.float32
        return {"image": images if latent else from_uint8(images, self.max_value), "label": labels}


def from_arrays(name: str, images, labels, class_names, max_value: int = 255) -> Dataset:
    """A data set of uint8 images (n, H, W, C) and integer labels (n,) that are in memory."""
    images, labels = np.asarray(images), np.asarray(labels).astype(np.int32)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels) or len(images) == 0:
        raise ValueError(
            f"{name}: expected uint8 images (n, H, W, C) and n labels, "
            f"got {images.dtype} {images.shape} and {labels.shape}"
        )
    images.flags.writeable = labels.flags.writeable = False
    return Dataset(
        name=name,
        length=len(images),
        shape=images.shape[1:],
        class_names=tuple(class_names),
        read=lambda indices: (images[indices], labels[indices]),
        max_value=max_value,
        in_memory=True,
    )


def digits(split: str = "all") -> Dataset:
    """1,797 handwritten digits, 8 x 8 grey, from 13 writers (UCI, CC BY 4.0; see DIGITS_LICENSE.md).

    split: "all" (in the order of the source), or one of two fixed halves, "train" (898) and "test" (899),
    drawn at random within each class, so that their class counts differ by one at most. They are halves so
    that a distance of n samples to one has a floor, that of the other, at the same n.
    """
    if split not in ("all", "train", "test"):
        raise ValueError(f'digits has the splits "all", "train" and "test", got {split!r}')
    with np.load(Path(__file__).parent / "digits.npz") as file:
        images, labels = file["images"][..., None], file["labels"]
    if split != "all":
        order = permutation(len(labels), 0, 0)
        by_class = order[np.argsort(labels[order], kind="stable")]
        rows = np.sort(by_class[1::2] if split == "train" else by_class[::2])
        images, labels = images[rows], labels[rows]
    return from_arrays(f"digits/{split}", images, labels, map(str, range(10)), max_value=16)


def load(
    name_or_path: str | os.PathLike,
    *,
    split: str | None = None,
    size: int | None = None,
    data_dir: str | os.PathLike | None = None,
) -> Dataset:
    """The data set of that name.

    "digits": embedded; split "all" (default), "train" or "test".
    "tfds:NAME" or "tfds:NAME:SPLIT": a TFDS data set that lies prepared as ArrayRecord in `data_dir`.
    a path: a folder, or a .zip, of images in one folder a class; with `split`, the part of it below
        PATH/SPLIT/ or in PATH/SPLIT.zip.

    size: images are cut to their central square and resized to size x size (bicubic, antialiased).
    Raises ValueError or FileNotFoundError that names the path, file or split, before any training starts.
    """
    text = os.fspath(name_or_path)
    if text == "digits":
        if size not in (None, 8):
            raise ValueError(f"digits are 8 x 8: size must be 8 or None, got {size}")
        return digits(split or "all")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if text.startswith("tfds:"):
        from .tfds import load_tfds

        name, *rest = re.split(r":(?![\d.]+(?::|$))", text.removeprefix("tfds:"))  # NAME may end in :1.0.0
        if len(rest) > 1 or (rest and split not in (None, rest[0])):
            raise ValueError(f"{text!r} and {split=} name more than one split")
        return load_tfds(name, split or (rest[0] if rest else "train"), size, data_dir)
    if Path(text).exists():
        from .images import load_images

        return load_images(Path(text), split, size)
    if os.sep in text or Path(text).suffix:
        raise FileNotFoundError(f"there is no folder or .zip of images at {text!r}")
    near = difflib.get_close_matches(text, ["digits", "tfds:"], 1, 0.5)
    raise ValueError(
        f"unknown data set {text!r}{f' (did you mean {near[0]!r}?)' if near else ''}: "
        'expected "digits", "tfds:NAME[:SPLIT]", or the path of a folder or .zip of images'
    )
