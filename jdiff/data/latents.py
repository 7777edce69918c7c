"""The TFDS set "image_latents" that `jdiff encode` writes as ArrayRecord, without TensorFlow."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets

tfds: Any = tensorflow_datasets  # its annotations are incomplete
BASE: Any = tfds.core.GeneratorBasedBuilder


class Builder(BASE, skip_registration=True):  # pyright: ignore  # registered, it would stand in for the files it wrote
    """Features "latent", float32 (h, w, c), and "label". examples() yields pairs of them, once, in order."""

    name = "image_latents"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, *, shape: Sequence[int], class_names: Sequence[str], split: str, about: str,
        examples: Callable[[], Iterable[tuple[np.ndarray, int]]], data_dir: str,
    ):  # fmt: skip
        self._latents = tuple(shape), list(class_names), split, about, examples
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> Any:
        shape, class_names, _, about, _ = self._latents
        features = {
            "latent": tfds.features.Tensor(shape=shape, dtype=np.float32),
            "label": tfds.features.ClassLabel(names=class_names),
        }
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, description=about, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {self._latents[2]: self._generate_examples()}

    def _generate_examples(self) -> Iterable[tuple[int, dict[str, Any]]]:
        for i, (latent, label) in enumerate(self._latents[4]()):
            yield i, {"latent": latent, "label": int(label)}
