"""Features of 8 x 8 digits: the penultimate layer of a small classifier, whose weights are in the package."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

NAME = "digits-cnn-v1"
WEIGHTS = Path(__file__).parent / "digits_features.safetensors"
DIM = 32

Params = dict[str, Array]


def init(key: PRNGKeyArray) -> Params:
    """Weights of scale sqrt(2 / fan-in), float32, and zero biases."""
    shapes = {
        "conv1": (3, 3, 1, 24),
        "conv2": (3, 3, 24, 48),
        "conv3": (3, 3, 48, 48),
        "dense": (4 * 4 * 48, DIM),
        "head": (DIM, 10),
    }
    params = {}
    for k, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True):
        scale = (2 / np.prod(shape[:-1])) ** 0.5
        params[name] = jax.random.normal(k, shape, jnp.float32) * jnp.float32(scale)
        params[f"{name}_bias"] = jnp.zeros(shape[-1], jnp.float32)
    return params


def embed_digits(params: Params, images: Float[Array, "b 8 8 1"]) -> Float[Array, "b 32"]:
    """The 32 numbers that the last layer sees, before their activation, of images in [-1, 1]."""

    def conv(x, name, stride):
        dims = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, params[name], (stride, stride), "SAME", dimension_numbers=dims)
        return jax.nn.silu(y + params[f"{name}_bias"])

    x = conv(conv(conv(images.astype(jnp.float32), "conv1", 1), "conv2", 2), "conv3", 1)
    return x.reshape(len(x), -1) @ params["dense"] + params["dense_bias"]


def classify_digits(params: Params, images: Float[Array, "b 8 8 1"]) -> Float[Array, "b 10"]:
    """Logits of the ten digits."""
    return jax.nn.silu(embed_digits(params, images)) @ params["head"] + params["head_bias"]


def load_weights(path: Path = WEIGHTS) -> tuple[Params, dict[str, str]]:
    """(weights, the metadata that stands beside them: name, accuracy, seed, command)."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        return {name: jnp.asarray(file.get_tensor(name)) for name in names}, file.metadata()


@lru_cache(maxsize=1)
def digit_features() -> Callable[[Float[Array, "b 8 8 1"]], Float[Array, "b 32"]]:
    """The features "digits-cnn-v1": images (b, 8, 8, 1) in [-1, 1] -> (b, 32), float32, jitted.

    Those of a classifier that never saw the split "test" (`python -m jdiff.metrics.train_digits` made it),
    of mean 0 and standard deviation 1 over the split "train"; 32 of them, so that the 898 images of one half
    determine a covariance. That the classifier knows the train half does not show: its Fréchet distance to the
    test half is 0.17, and 0.17 ± 0.03 between other halves of equal classes. Classes at random cost as much
    again (0.30 between halves cut without regard to class): give samples the class counts of the reference.
    """
    params, _ = load_weights()

    def features(images):
        return (embed_digits(params, images) - params["mean"]) / params["std"]

    features.__name__ = NAME
    return jax.jit(features)
