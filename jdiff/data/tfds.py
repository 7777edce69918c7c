"""TFDS data sets that lie prepared as ArrayRecord: read without TensorFlow."""

import difflib
import os
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import Dataset
from .images import fit


def load_tfds(name: str, split: str, size: int | None, data_dir: str | os.PathLike | None) -> Dataset:
    """The features "image" (uint8, H x W x C) and, where there is one, "label" of a prepared TFDS data set.

    A set without "image" but with "latent" (float, H x W x C) is one of an autoencoder's latents, taken as they are:
    they should have been scaled to a standard deviation of about 1.

    Reading needs no TensorFlow; preparing a set that has `features.Image` does (elsewhere, once:
    `tfds.builder(name, file_format="array_record").download_and_prepare()`).

    Raises FileNotFoundError if the set is not prepared there as ArrayRecord, ValueError for an unknown split,
    or features that are not labelled uint8 images of one size (give `size` for several).
    """
    import tensorflow_datasets

    tfds: Any = tensorflow_datasets  # its annotations are incomplete

    data_dir = None if data_dir is None else os.fspath(data_dir)
    where = data_dir or tfds.core.constants.DATA_DIR
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        splits = builder.info.splits
    except (tfds.core.DatasetNotFoundError, ValueError, NotImplementedError) as error:
        raise _not_prepared(name, where) from error
    if not splits:
        raise _not_prepared(name, where)
    if split.split("[")[0] not in splits:
        raise ValueError(f"tfds:{name} has the splits {sorted(splits)}, got {split!r}")
    source = builder.as_data_source(split=split)
    features = dict(builder.info.features.items())
    key = "image" if "image" in features else "latent"
    image, kind = features.get(key), np.uint8 if key == "image" else np.floating
    if key == "latent" and size is not None:
        raise ValueError(f"tfds:{name} holds latents, which cannot be resized: leave `size` out")
    if image is None or not np.issubdtype(image.np_dtype, kind) or len(image.shape) != 3:
        raise ValueError(
            f'tfds:{name} must have a feature "image" of uint8 (H, W, C), or "latent" of floats; '
            f"its features are {features}"
        )
    if None in image.shape[:2] and size is None:
        raise ValueError(f"tfds:{name} has images of different sizes {image.shape}: give `size`")
    label = features.get("label")
    class_names = tuple(label.names) if label is not None else ("all",)

    def read(indices):
        examples = source.__getitems__([int(i) for i in indices])
        images = np.stack([_resize(example[key], size) for example in examples])
        images = images if key == "image" else images.astype(np.float32)
        return images, np.array([example.get("label", 0) for example in examples], np.int32)

    height, width, channels = image.shape
    shape = (size or height, size or width, channels)
    return Dataset(f"tfds:{name}/{split}", len(source), shape, class_names, read)


def _not_prepared(name: str, where: str) -> FileNotFoundError:
    there = sorted(p.name for p in Path(where).expanduser().glob("*") if p.is_dir()) if where else []
    near = difflib.get_close_matches(name, there, 1, 0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return FileNotFoundError(
        f"no TFDS data set {name!r} prepared as ArrayRecord in {where!r}{hint}: give its `data_dir`, or "
        "prepare it, where TensorFlow is installed, with "
        f'tfds.builder("{name}", file_format="array_record").download_and_prepare()'
    )


def _resize(image: np.ndarray, size: int | None) -> np.ndarray:
    if size is None or image.shape[:2] == (size, size):
        return image
    from PIL import Image

    grey = image.shape[-1] == 1
    out = np.asarray(fit(Image.fromarray(image[..., 0] if grey else image), size))
    return out[..., None] if grey else out
