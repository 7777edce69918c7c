"""Precision and recall of samples by nearest neighbours."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Num

from .kernel import squared_distances
from .result import Result, any_mesh, checked


def precision_recall(
    samples: Num[Array | np.ndarray, "n d"],
    reference: Num[Array | np.ndarray, "m d"],
    k: int = 3,
    *,
    block: int = 1024,
    features: str = "unnamed",
    reference_name: str = "unnamed",
) -> tuple[Result, Result]:
    """(precision, recall) of Kynkäänniemi et al. (arXiv 1904.06991, eq. 2): the part of the samples within
    the manifold of the reference (fidelity), and of the reference within that of the samples (diversity).

    The manifold of a set is the union of closed balls about its points, each up to its k-th nearest
    neighbour in the set. Distances are computed `block` rows at a time: memory is block x max(n, m) numbers.
    Both depend on n and k, so compare at equal n and k only. samples and reference may be sharded.

    Raises ValueError for k < 1, sets of k points or less, or features that are not finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    samples, reference = checked(samples, reference, k + 1)
    precision, recall = _inside(samples, reference, k, block)
    about = (len(samples), len(reference), features, reference_name)
    return (
        Result(f"precision[k={k}]", float(precision), *about),
        Result(f"recall[k={k}]", float(recall), *about),
    )


@partial(jax.jit, static_argnames=("k", "block"))
def _inside(samples, reference, k, block):
    @any_mesh
    def run(samples, reference):
        centre = reference.mean(0)  # distances do not change, but lose less to rounding about the origin
        x, y = samples - centre, reference - centre
        radius_x, radius_y = _radii(x, k, block), _radii(y, k, block)
        return _coverage(x, y, radius_y, block), _coverage(y, x, radius_x, block)

    return run(samples, reference)


def _radii(x, k, block):
    """Squared distance of each point to its k-th nearest neighbour, itself not counted."""

    def of(row):
        i, point = row
        distances = squared_distances(point[None], x)[0].at[i].set(jnp.inf)
        return -lax.top_k(-distances, k)[0][-1]

    return lax.map(of, (jnp.arange(len(x)), x), batch_size=block)


def _coverage(points, centres, radii, block):
    """Part of the points that lie within any of the balls."""

    def of(point):
        return (squared_distances(point[None], centres)[0] <= radii).any()

    return lax.map(of, points, batch_size=block).mean(dtype=points.dtype)
