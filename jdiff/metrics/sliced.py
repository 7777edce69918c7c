"""Sliced Wasserstein distance: exact one-dimensional transport along random directions."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Num, PRNGKeyArray

from .result import Result, any_mesh, checked


def sliced_wasserstein(
    key: PRNGKeyArray,
    samples: Num[Array | np.ndarray, "n d"],
    reference: Num[Array | np.ndarray, "m d"],
    projections: int = 256,
    *,
    features: str = "unnamed",
    reference_name: str = "unnamed",
) -> Result:
    """SW2 = (E_u W2^2(u.x, u.y))^(1/2) over uniform unit vectors u (Rabin et al. 2011; Bonneel et al. 2015).

    In one dimension W2^2 is the integral of the squared difference of the two quantile functions: a step
    function with at most n + m - 1 steps, so it is exact for n and m that differ, too. The only error beside
    that of the samples is of order 1/sqrt(projections). Two shifted copies of one law, in d dimensions, are
    |shift|/sqrt(d) apart. samples and reference may be sharded.

    Raises ValueError for no projection, no sample, or features that are not finite.
    """
    if projections < 1:
        raise ValueError(f"projections must be at least 1, got {projections}")
    samples, reference = checked(samples, reference, 1)
    n, m = len(samples), len(reference)
    # Steps end at i/n and j/m: in units of 1/(n m) these are integers, and so are the ranks, exactly.
    ends = np.union1d(np.arange(n + 1, dtype=np.int64) * m, np.arange(m + 1, dtype=np.int64) * n)
    rank_x, rank_y = ends[:-1] // m, ends[:-1] // n
    weight = (np.diff(ends) / (n * m)).astype(samples.dtype)
    value = _mean_square(key, samples, reference, rank_x, rank_y, weight, projections)
    return Result("SW2", float(value) ** 0.5, n, m, features, reference_name)


@jax.jit(static_argnames="projections")
def _mean_square(key, samples, reference, rank_x, rank_y, weight, projections):
    @any_mesh
    def run(key, samples, reference, rank_x, rank_y, weight):
        u = jax.random.normal(key, (samples.shape[1], projections), samples.dtype)
        u /= jnp.linalg.norm(u, axis=0)
        x, y = (jnp.sort(jnp.matmul(z, u, precision=lax.Precision.HIGHEST), 0) for z in (samples, reference))
        return (weight[:, None] * (x[rank_x] - y[rank_y]) ** 2).sum(0).mean()

    return run(key, samples, reference, rank_x, rank_y, weight)
