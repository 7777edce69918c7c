"""Kernel distance: the squared maximum mean discrepancy, unbiased, with a standard error."""

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Num, PRNGKeyArray

from .result import Result, any_mesh, checked

Kernel = Callable[[Float[Array, "n d"], Float[Array, "m d"]], Float[Array, "n m"]]


def _dot(x, y):
    return jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)


def squared_distances(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """|x_i - y_j|^2, not below 0; rounding errors are of the order of eps (|x_i|^2 + |y_j|^2)."""
    return jnp.maximum((x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * _dot(x, y), 0)


def cubic(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """(x.y / d + 1)^3: the kernel of KID (Bińkowski et al., arXiv 1801.01401, sec. 4)."""
    return (_dot(x, y) / x.shape[1] + 1) ** 3


def energy(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """-|x - y|: the distance is then the energy distance (Székely & Rizzo 2013); no scale to choose."""
    return -jnp.sqrt(squared_distances(x, y))


@lru_cache
def rbf(bandwidth: float) -> Kernel:
    """exp(-|x - y|^2 / (2 bandwidth^2)). Cached, so that equal bandwidths compile once."""

    def gaussian(x, y):
        return jnp.exp(-squared_distances(x, y) / (2 * bandwidth**2))

    gaussian.__name__ = f"rbf({bandwidth:g})"
    return gaussian


def kernel_distance(
    key: PRNGKeyArray,
    samples: Num[Array | np.ndarray, "n d"],
    reference: Num[Array | np.ndarray, "m d"],
    *,
    kernel: Kernel = cubic,
    blocks: int = 10,
    features: str = "unnamed",
    reference_name: str = "unnamed",
) -> Result:
    """E k(x, x') + E k(y, y') - 2 E k(x, y): KID, with its cubic kernel (arXiv 1801.01401).

    Both sets are shuffled (key) and cut into `blocks` disjoint blocks; each gives one unbiased estimate (the
    U-statistic of Gretton et al. 2012, eq. 3), so the mean is unbiased at every n, may be negative, and its
    standard error over the independent blocks is honest. Few large blocks resolve smaller differences: memory
    is (n / blocks)^2 numbers. samples and reference may be of different n, and sharded.

    Raises ValueError for less than 2 samples a block, less than 2 blocks, or features that are not finite.
    """
    if blocks < 2:
        raise ValueError(f"a standard error needs at least 2 blocks, got {blocks}")
    samples, reference = checked(samples, reference, 2 * blocks)
    estimates = _block_estimates(key, samples, reference, kernel, blocks)
    error = jnp.std(estimates, ddof=1) / blocks**0.5
    name = "KID" if kernel is cubic else f"MMD2[{getattr(kernel, '__name__', 'kernel')}]"
    n, m = len(samples), len(reference)
    return Result(name, float(estimates.mean()), n, m, features, reference_name, float(error))


@partial(jax.jit, static_argnames=("kernel", "blocks"))
def _block_estimates(key, samples, reference, kernel, blocks):
    @any_mesh
    def run(key, samples, reference):
        def cut(key, x):
            size = len(x) // blocks
            return jax.random.permutation(key, x)[: size * blocks].reshape(blocks, size, -1)

        key_x, key_y = jax.random.split(key)
        return lax.map(lambda xy: unbiased_mmd2(xy[0], xy[1], kernel), (cut(key_x, samples), cut(key_y, reference)))

    return run(key, samples, reference)


def unbiased_mmd2(x: Float[Array, "n d"], y: Float[Array, "m d"], kernel: Kernel = cubic) -> Float[Array, ""]:
    """The U-statistic over all pairs of two sets; a pair never has one sample twice."""

    def within(gram):
        n = len(gram)
        return (gram.sum() - jnp.trace(gram)) / (n * (n - 1))

    return within(kernel(x, x)) + within(kernel(y, y)) - 2 * kernel(x, y).mean()
