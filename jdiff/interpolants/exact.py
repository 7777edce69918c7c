"""Exact interpolants: all fields, densities and draws where the two ends are mixtures of Gaussians.

Given the pair of components, (x0, x1, z) is Gaussian, so x_t is too, and every field is a conditional mean. With
independent ends the law of x_t is the mixture over all pairs; a Gaussian coupling (`schrodinger`) is one pair.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdiff import noise
from jdiff.denoiser import Denoiser
from jdiff.exact import Gaussian, Mixture
from jdiff.predict import model_time
from jdiff.process import Time

from .generate import field
from .paths import FIELDS, Interpolant


class Fields(NamedTuple):
    """At (x, t): b, v, s and eta, each (batch, d), and the log-density of x_t, (batch,)."""

    b: Array
    v: Array
    s: Array
    eta: Array
    log_density: Array


@dataclass(frozen=True)
class Between:
    """An interpolant between exact ends: K pairs of components, float64 on the host.

    weights (K,); means (K, 2, d) and covs (K, 2, d, 2, d) of (x0, x1). Made by `between` and `coupled`.
    """

    interpolant: Interpolant
    weights: np.ndarray
    means: np.ndarray
    covs: np.ndarray

    def __call__(self, x: Float[Array, "batch d"], t: Time) -> Fields:
        """Every field at (x, t); t a scalar, (batch,) or (batch, 1). In x's dtype."""
        return _at(self.interpolant, (self.weights, self.means, self.covs), x, model_time(t, x))

    def field(self, name: str) -> Denoiser:
        """b, v, s or eta, for `drift`."""
        if name not in FIELDS:
            raise ValueError(f"unknown field {name!r}; expected one of {', '.join(FIELDS)}")
        return field(self.interpolant, _Field(name, self.interpolant), params=(self.weights, self.means, self.covs))

    def fields(self, *names: str) -> dict[str, Denoiser]:
        """{"b": .., "s": ..}: drift(interpolant, 0.5, **model.fields("b", "s"))."""
        return {name: self.field(name) for name in names}

    def ends(self, key: Array, n: int, dtype: Any = None) -> tuple[Array, Array]:
        """n pairs (x0, x1), each (n, d); pair i depends on the key and on i alone."""
        dtype = jnp.float32 if dtype is None else dtype
        component, value = jax.random.split(key)
        u = jax.scipy.stats.norm.cdf(noise.normal(component, jax.ShapeDtypeStruct((n,), dtype)))
        k = jnp.searchsorted(jnp.asarray(np.cumsum(self.weights)[:-1], dtype), u)
        d = self.means.shape[-1]
        values, vectors = np.linalg.eigh(self.covs.reshape(-1, 2 * d, 2 * d))
        root = jnp.asarray(vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :], dtype)
        z = noise.normal(value, jax.ShapeDtypeStruct((n, 2 * d), dtype))
        pairs = jnp.asarray(self.means, dtype)[k] + jnp.einsum("nij,nj->ni", root[k], z).reshape(n, 2, d)
        return pairs[:, 0], pairs[:, 1]

    def sample(self, key: Array, n: int, t: float, dtype: Any = None) -> Float[Array, "n d"]:
        """n exact draws of x_t; draw i depends on the key and on i alone."""
        ends_key, noise_key = jax.random.split(key)
        x0, x1 = self.ends(ends_key, n, dtype)
        at = jnp.asarray(t, x0.dtype)
        I, _ = self.interpolant.mean(at, x0, x1 if self.interpolant.two_sided else None)
        return I + self.interpolant.noise(at)[0] * noise.normal(noise_key, x0)


@dataclass(frozen=True)
class _Field:
    name: str
    interpolant: Interpolant

    def __call__(self, arrays: Any, x: Array, t: Array) -> Array:
        return getattr(_at(self.interpolant, arrays, x, t), self.name)


def _at(interpolant: Interpolant, arrays: tuple[Any, Any, Any], x: Array, t: Array) -> Fields:
    """All fields at x (n, d) and t, one time, or one a sample."""
    weights, means, covs = (jnp.asarray(a, x.dtype) for a in arrays)
    at = lambda x, t: _fields(interpolant, weights, means, covs, x, t)
    if t.size == 1:
        return at(x, jnp.reshape(t, ()))
    each = jax.vmap(lambda x, t: at(x[None], t))(x, jnp.reshape(t, (-1,)))
    return Fields(*(v[:, 0] for v in each))


def _fields(interpolant: Interpolant, weights: Array, means: Array, covs: Array, x: Array, t: Array) -> Fields:
    """At x (n, d), t (): conditional means given x of the combinations (weights of x0, x1, z) that the fields are."""
    c, d = interpolant.coefficients(t), x.shape[1]
    mix, slope = jnp.stack([c.alpha, c.beta]), jnp.stack([c.dalpha, c.dbeta])
    cross = jnp.einsum("e,keifj,f->kij", slope, covs, mix)  # Cov(dI/dt, x_t) of each pair of components
    cov = jnp.einsum("e,keifj,f->kij", mix, covs, mix) + c.gamma**2 * jnp.eye(d, dtype=x.dtype)
    chol = jnp.linalg.cholesky(cov)
    whiten = jax.scipy.linalg.solve_triangular(chol, jnp.broadcast_to(jnp.eye(d, dtype=x.dtype), cov.shape), lower=True)
    r = jnp.einsum("kij,nkj->nki", whiten, x[:, None] - jnp.einsum("e,kei->ki", mix, means))
    log_det = jnp.sum(jnp.log(jnp.diagonal(chol, axis1=1, axis2=2)), -1)
    joint = jnp.log(weights) - 0.5 * jnp.sum(r * r, -1) - log_det - 0.5 * d * math.log(2 * math.pi)
    post = jax.nn.softmax(joint, -1)
    solved = jnp.einsum("kji,nkj->nki", whiten, r)  # cov^-1 (x - mean)
    mean = jnp.einsum("nk,nki->ni", post, solved)
    v = jnp.einsum(
        "nk,nki->ni", post, jnp.einsum("e,kei->ki", slope, means) + jnp.einsum("kij,nkj->nki", cross, solved)
    )
    return Fields(v + c.gdg * mean, v, -mean, c.gamma * mean, jax.nn.logsumexp(joint, -1))


def between(interpolant: Interpolant, x0: Mixture, x1: Mixture | None = None) -> Between:
    """Independent ends; x1 = None where it takes no part (one-sided and mirror). ValueError for ends of two widths."""
    if interpolant.two_sided != (x1 is not None):
        need = "two ends" if interpolant.two_sided else "one end: pass x1=None"
        raise ValueError(f"between: {interpolant} is between {need}")
    x1 = Gaussian(np.ones(1), 0 * x0.means[:1], 0 * x0.eigenvalues[:1], x0.eigenvectors[:1]) if x1 is None else x1
    d = x0.means.shape[1]
    if x1.means.shape[1] != d:
        raise ValueError(f"between: x0 has {d} dimensions and x1 {x1.means.shape[1]}; expected the same")
    full = lambda m: np.einsum("kij,kj,klj->kil", m.eigenvectors, m.eigenvalues, m.eigenvectors)
    i, j = (k.ravel() for k in np.meshgrid(*(np.arange(len(m.weights)) for m in (x0, x1)), indexing="ij"))
    covs = np.zeros((len(i), 2, d, 2, d))
    covs[:, 0, :, 0], covs[:, 1, :, 1] = full(x0)[i], full(x1)[j]
    return Between(interpolant, x0.weights[i] * x1.weights[j], np.stack([x0.means[i], x1.means[j]], 1), covs)


def coupled(interpolant: Interpolant, x0: Gaussian, x1: Gaussian, cross: Any) -> Between:
    """Two Gaussians with Cov(x0, x1) = cross, (d, d). ValueError where that is no covariance."""
    model = between(interpolant, x0, x1)
    covs, d = model.covs.copy(), model.means.shape[-1]
    cross = np.asarray(cross, np.float64)
    if cross.shape != (d, d):
        raise ValueError(f"coupled: cross has shape {cross.shape}; expected ({d}, {d})")
    covs[0, 0, :, 1], covs[0, 1, :, 0] = cross, cross.T
    least = np.linalg.eigvalsh(covs.reshape(2 * d, 2 * d)).min()
    if least < -1e-9 * np.abs(covs).max():
        raise ValueError(f"coupled: with this cross covariance (x0, x1) has the eigenvalue {least:.3g}; expected >= 0")
    return Between(interpolant, model.weights, model.means, covs)
