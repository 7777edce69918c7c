"""All metrics of a set of samples in one call, beside the floor that real images reach."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jdiff.data import Dataset, from_uint8, to_uint8

from .kernel import kernel_distance
from .moments import Moments, frechet_distance
from .neighbours import precision_recall
from .result import Result
from .sliced import sliced_wasserstein

Features = Callable[[Array], Array]  # images (b, H, W, C), float32 in [-1, 1] -> (b, d)


def embed(
    features: Features,
    images,
    batch_size: int = 256,
    sharding: jax.sharding.Sharding | None = None,
) -> Float[np.ndarray, "n d"]:
    """Features (n, d), float32, on the host, of images (n, H, W, C): in [-1, 1], or uint8, or a Dataset.

    Images pass through `data.to_uint8` first, so what is scored is what a PNG file would hold. Batches are
    laid out by `sharding` if given; the last is padded to full size, so `features` is compiled once.
    """
    out = []
    for start in range(0, len(images), batch_size):
        rows = np.arange(start, min(start + batch_size, len(images)))
        batch = images.take(rows)["image"] if isinstance(images, Dataset) else images[rows[0] : rows[-1] + 1]
        batch = from_uint8(to_uint8(batch))
        batch = np.pad(batch, [(0, batch_size - len(rows)), *[(0, 0)] * (batch.ndim - 1)])
        batch = jnp.asarray(batch) if sharding is None else jax.device_put(batch, sharding)
        value = np.asarray(features(batch))
        if value.ndim != 2 or len(value) != batch_size:
            raise ValueError(f"features must map {batch.shape} to ({batch_size}, d), got {value.shape}")
        out.append(value[: len(rows)].astype(np.float32))
    if not out:
        raise ValueError("there is no image to score")
    return np.concatenate(out)


def evaluate(
    samples,
    reference: Dataset,
    features: Features,
    key: PRNGKeyArray,
    *,
    held_out: Dataset | None = None,
    batch_size: int = 256,
    k: int = 3,
    projections: int = 256,
    blocks: int = 10,
    sharding: jax.sharding.Sharding | None = None,
) -> dict[str, Result]:
    """Every metric of the samples against the reference, and the floor that real images reach.

    Keys: "frechet", "kernel", "sliced_wasserstein", "precision", "recall" for the samples, and the same with
    "floor_" in front for `held_out`: real images that are not in the reference.

    Both sides of every comparison have the same n: the smaller of the number of samples and of held-out
    images. The first n samples and n random held-out images (key) are used. Without `held_out`, the reference
    is cut into two random halves (key), one of which is held out.

    samples: (n, H, W, C) in [-1, 1], or uint8. features: any callable, (b, H, W, C) -> (b, d); its
    __name__ stands in the results. Raises ValueError for samples of another shape than the reference's,
    values that are not finite, or too few samples for a Fréchet distance of d dimensions.
    """
    held_shape = reference.shape if held_out is None else held_out.shape
    for name, shape in (("samples", tuple(samples.shape[1:])), ("held-out images", held_shape)):
        if shape != reference.shape:
            raise ValueError(f"{name} have the shape {shape}, but the reference {reference.shape}")
    key_split, key_held, key_kernel, key_sliced = jax.random.split(key, 4)
    real, name = embed(features, reference, batch_size, sharding), reference.name
    if held_out is None:
        order = np.asarray(jax.random.permutation(key_split, len(real)))
        held, real = real[order[: len(real) // 2]], real[order[len(real) // 2 :]]
        name += " (half)"
    else:
        held = embed(features, held_out, batch_size, sharding)
    n = min(len(samples), len(held))
    fake = embed(features, samples[:n], batch_size, sharding)
    held = held[np.asarray(jax.random.permutation(key_held, len(held)))[:n]]
    names = {"features": getattr(features, "__name__", type(features).__name__), "reference_name": name}

    def scores(x, prefix):
        moments = [Moments.init(z.shape[1]).update(jnp.asarray(z)) for z in (x, real)]
        precision, recall = precision_recall(x, real, k, **names)
        return {
            f"{prefix}frechet": frechet_distance(*moments, **names),
            f"{prefix}kernel": kernel_distance(key_kernel, x, real, blocks=blocks, **names),
            f"{prefix}sliced_wasserstein": sliced_wasserstein(key_sliced, x, real, projections, **names),
            f"{prefix}precision": precision,
            f"{prefix}recall": recall,
        }

    return scores(fake, "") | scores(held, "floor_")
