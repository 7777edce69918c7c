"""Mean and covariance of features, streaming, and the Fréchet distance between two of them."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from .result import Result, any_mesh


class Moments(NamedTuple):
    """Count, mean and centred second moment of feature vectors: a pytree, updated by pure functions.

    n: (), int32. mean: (d,), float32. m2: (d, d), float32: the sum of (x - mean)(x - mean)^T.

    Batches are centred on their own mean before they are squared, and merged by the formula of Chan, Golub &
    LeVeque (1979), so features with a mean far from 0 lose nothing to cancellation, as they would in
    E[x x^T] - mean mean^T. Inputs may lie on a mesh, their first axis sharded.
    """

    n: Int[Array, ""]
    mean: Float[Array, "d"]
    m2: Float[Array, "d d"]

    @classmethod
    def init(cls, dim: int) -> "Moments":
        """Of no sample yet."""
        return cls(jnp.int32(0), jnp.zeros(dim, jnp.float32), jnp.zeros((dim, dim), jnp.float32))

    def update(self, features: Num[Array | np.ndarray, "b d"], mask: Bool[Array, "b"] | None = None) -> "Moments":
        """With a batch (b, d) more; rows where `mask` is False (padding) do not count."""
        mask = jnp.ones(features.shape[0], bool) if mask is None else mask
        return self.merge(_batch_moments(jnp.asarray(features, jnp.float32), mask))

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets of samples together."""
        n = self.n + other.n
        total, n1, n2 = (k.astype(jnp.float32) for k in (jnp.maximum(n, 1), self.n, other.n))
        delta = other.mean - self.mean
        m2 = self.m2 + other.m2 + (n1 * (n2 / total)) * (delta[:, None] * delta[None, :])
        return Moments(n, self.mean + delta * (n2 / total), m2)

    def finalise(self) -> tuple[int, Float[np.ndarray, "d"], Float[np.ndarray, "d d"]]:
        """(n, mean, unbiased covariance), float64, on the host. ValueError for n < 2 or not finite."""
        n, mean, m2 = int(self.n), np.asarray(self.mean, np.float64), np.asarray(self.m2, np.float64)
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {n}")
        if not (np.isfinite(mean).all() and np.isfinite(m2).all()):
            raise ValueError("features are not finite: look for NaN in the images or in the network")
        return n, mean, (m2 + m2.T) / (2 * (n - 1))


@any_mesh
def _batch_moments(x: Float[Array, "b d"], mask: Bool[Array, "b"]) -> Moments:
    n = mask.sum(dtype=jnp.int32)
    mean = jnp.where(mask[:, None], x, 0).sum(0) / jnp.maximum(n, 1).astype(x.dtype)
    centred = jnp.where(mask[:, None], x - mean, 0)
    return Moments(n, mean, jnp.matmul(centred.T, centred, precision=lax.Precision.HIGHEST))


def frechet_distance(
    samples: Moments,
    reference: Moments,
    *,
    features: str = "unnamed",
    reference_name: str = "unnamed",
) -> Result:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): the squared 2-Wasserstein distance of two Gaussians
    (Dowson & Landau 1982; as a score of images, Heusel et al., arXiv 1706.08500, eq. 6).

    On the host in float64. tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of the symmetric
    matrix S1^(1/2) S2 S1^(1/2): real and finite even if a covariance is singular, which a matrix square root
    of the product S1 S2 need not be.

    It is biased: it falls with n even between samples of one law, so compare at equal n only.
    Raises ValueError if the dimensions differ, or if n is not above d + 1 on either side, where the estimated
    covariance is singular whatever the law.
    """
    n1, mean1, cov1 = samples.finalise()
    n2, mean2, cov2 = reference.finalise()
    dim = len(mean1)
    if dim != len(mean2):
        raise ValueError(f"features of dimension {dim} and {len(mean2)} cannot be compared")
    if min(n1, n2) <= dim + 1:
        raise ValueError(
            f"a Fréchet distance of {dim}-dimensional features needs more than {dim + 1} samples on either "
            f"side, got {n1} and {n2}: draw more, or use features of a lower dimension, or kernel_distance"
        )
    value, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(value, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov2 @ root), 0)).sum()
    distance = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross
    return Result("FD", max(float(distance), 0.0), n1, n2, features, reference_name)
