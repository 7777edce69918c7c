"""Exact models: Gaussians, Gaussian mixtures and (jdiff.finite) sets of points; denoiser and densities in closed form.

For data sum_k w_k N(m_k, C_k) the noised law of any process is a mixture too, with means alpha m_k and covariances
alpha^2 C_k + sigma^2 I, and the denoiser is the posterior mean. Public, for calibrating a solver, a guidance rule or
a metric on something whose answer is known. Samples have shape (batch, d); images are flattened by the caller.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from jdiff import noise
from jdiff.denoiser import Denoiser, _no_carry
from jdiff.finite import Points, points
from jdiff.predict import model_time
from jdiff.process import Process, Time
from jdiff.tableau import Tableau

__all__ = ["Gaussian", "Mixture", "Points", "gaussian", "mixture", "points"]


@dataclass(frozen=True)
class Mixture:
    """Gaussian mixture over K components in d dimensions; float64 on the host.

    weights (K,); means (K, d); eigenvalues (K, d) and eigenvectors (K, d, d, columns) of the covariances.
    """

    weights: np.ndarray
    means: np.ndarray
    eigenvalues: np.ndarray
    eigenvectors: np.ndarray

    def denoiser(self, process: Process) -> Denoiser:
        """E[x0 | x_t] as a Denoiser. t: a scalar, (batch, 1), or one a coordinate, (d,) or (batch, d).

        ValueError for a process whose noise is not Gaussian (see `points`).
        """
        if not process.gaussian:
            raise ValueError(
                f"exact: noised by {process} this is no Gaussian mixture; exact.points works with any kernel"
            )
        return Denoiser(Partial(_no_carry), Partial(_apply, self._arrays(), Partial(_Law(process))), process, "x0")

    def log_density(self, process: Process, x: Float[Array, "batch d"], t: Time) -> Float[Array, " batch"]:
        """log p_t(x), the exact log-density of the noised law at time t (t as in `denoiser`)."""
        return _Law(process)(self._arrays(), x, model_time(t, x))[1]

    def score(self, process: Process, x: Float[Array, "batch d"], t: Time) -> Float[Array, "batch d"]:
        """grad_x log p_t(x)."""
        return self.denoiser(process)(x, t, "score")

    def sample(self, key: Array, n: int, dtype: Any = None) -> Float[Array, "n d"]:
        """n exact data samples; sample i depends on the key and on i alone."""
        dtype = jnp.float32 if dtype is None else dtype
        component, value = jax.random.split(key)
        draws = noise.normal(component, jax.ShapeDtypeStruct((n,), dtype))
        edges = jnp.asarray(np.cumsum(self.weights)[:-1], dtype)
        k = jnp.searchsorted(edges, jax.scipy.stats.norm.cdf(draws))
        z = noise.normal(value, jax.ShapeDtypeStruct((n, self.means.shape[1]), dtype))
        root = jnp.asarray(self.eigenvectors * np.sqrt(self.eigenvalues)[:, None, :], dtype)
        return jnp.asarray(self.means, dtype)[k] + jnp.einsum("nij,nj->ni", root[k], z)

    @property
    def mean(self) -> np.ndarray:
        return self.weights @ self.means

    @property
    def cov(self) -> np.ndarray:
        covs = np.einsum("kij,kj,klj->kil", self.eigenvectors, self.eigenvalues, self.eigenvectors)
        centred = self.means - self.mean
        return np.einsum("k,kij->ij", self.weights, covs + centred[:, :, None] * centred[:, None, :])

    def _arrays(self) -> tuple[np.ndarray | None, ...]:
        """log weights, means, eigenvalues, eigenvectors; None for the last where all are the identity: no rotation."""
        plain = np.array_equal(self.eigenvectors, np.broadcast_to(np.eye(self.means.shape[1]), self.eigenvectors.shape))
        with np.errstate(divide="ignore"):
            return np.log(self.weights), self.means, self.eigenvalues, None if plain else self.eigenvectors


@dataclass(frozen=True)
class _Law:
    """(x0 prediction, log-density) of a mixture at (x, t); the process is static."""

    process: Process

    def __call__(self, arrays: Any, x: Array, t: Array) -> tuple[Array, Array]:
        log_w, means, values = (jnp.asarray(a, x.dtype) for a in arrays[:3])
        vectors = None if arrays[3] is None else jnp.asarray(arrays[3], x.dtype)
        a, s = self.process.alpha(t), self.process.sigma(t)
        if t.ndim and t.shape[-1] > 1:
            return _per_coordinate(log_w, means, values, vectors, a, s, x)
        if vectors is None and t.size == 1 and x.dtype == jnp.float64:
            return _by_products(log_w, means, values, jnp.reshape(a, ()), jnp.reshape(s, ()), x)
        a, s = (jnp.reshape(v, (-1, 1)) for v in (a, s))  # (batch or 1, 1)
        z = x[:, None] - a[:, None] * means
        z = z if vectors is None else jnp.einsum("kij,nki->nkj", vectors, z)  # in each eigenbasis
        var = (a * a)[:, None] * values + (s * s)[:, None]
        gain = jnp.where(values > 0, a[:, None] * values / jnp.where(var > 0, var, 1.0), 0.0)
        shift = gain * z if vectors is None else jnp.einsum("kij,nkj->nki", vectors, gain * z)
        each = means + shift
        log_p = -0.5 * (jnp.sum(z * z * (1.0 / var), -1) + jnp.sum(jnp.log(2 * np.pi * var), -1))
        return _mix(log_w, log_p, each)


def _by_products(log_w, means, values, a, s, x):
    """Diagonal covariances at one noise level, by matrix products: several times as fast. Squares are multiplied out,
    which float64 can afford (x^2 / var stays below 1e10 above sigma = 1e-5) and float32 cannot."""
    var = a * a * values + s * s  # (k, d)
    inverse = 1.0 / jnp.where(var > 0, var, 1.0)
    m = a * means
    centre = jnp.mean(m, 0)
    z, m = x - centre, m - centre
    square = (z * z) @ inverse.T - 2.0 * (z @ (m * inverse).T) + jnp.sum(m * m * inverse, 1)
    joint = log_w - 0.5 * (square + jnp.sum(jnp.log(2 * np.pi * var), 1))
    r = jax.nn.softmax(joint, -1)
    gain = a * values * inverse
    return r @ (means - a * gain * means) + x * (r @ gain), jax.nn.logsumexp(joint, -1)


def _per_coordinate(log_w, means, values, vectors, a, s, x):
    """One noise level a coordinate: covariances no longer share an eigenbasis, so they are solved."""
    vectors = jnp.eye(x.shape[-1], dtype=x.dtype)[None] if vectors is None else vectors
    covs = jnp.einsum("kij,kj,klj->kil", vectors, values, vectors)
    a, s = (jnp.broadcast_to(v, x.shape)[:, None] for v in (a, s))  # (n, 1, d)
    cross = covs * a[..., None, :]  # Cov(x0, x_t)
    var = a[..., :, None] * cross + jnp.eye(x.shape[-1], dtype=x.dtype) * (s * s)[..., None, :]
    chol = jnp.linalg.cholesky(var)
    r = x[:, None] - a * means
    whitened = jax.scipy.linalg.solve_triangular(chol, r[..., None], lower=True)
    solved = jax.scipy.linalg.solve_triangular(chol, whitened, lower=True, trans=1)[..., 0]
    log_det = 2.0 * jnp.sum(jnp.log(jnp.diagonal(chol, axis1=-2, axis2=-1)), -1)
    log_p = -0.5 * (jnp.sum(whitened[..., 0] ** 2, -1) + log_det + x.shape[-1] * float(np.log(2 * np.pi)))
    return _mix(log_w, log_p, means + jnp.einsum("nkij,nkj->nki", cross, solved))


def _mix(log_w: Array, log_p: Array, each: Array) -> tuple[Array, Array]:
    joint = log_w + log_p
    # a sum, not a batch of tiny matrix products: XLA fuses it with what made `each`
    return jnp.sum(jax.nn.softmax(joint, -1)[..., None] * each, 1), jax.nn.logsumexp(joint, -1)


def _apply(arrays: Any, law: Partial, x: Array, t: Array, carry: Any) -> tuple[Array, Any]:
    return law.func(arrays, x, t)[0], carry


@dataclass(frozen=True)
class Gaussian(Mixture):
    """One Gaussian: its probability flow is an affine map, and so is any solver's law on it."""

    def flow(self, process: Process, x: Float[Array, "batch d"], t0: Time, t1: Time) -> Float[Array, "batch d"]:
        """The exact probability-flow map from time t0 to t1, for scalar times: what a perfect ODE solver returns."""
        m, Q, values = self.means[0], self.eigenvectors[0], self.eigenvalues[0]
        std = [np.sqrt(process.alpha(t) ** 2 * values + process.sigma(t) ** 2) for t in (t0, t1)]
        matrix = jnp.asarray((Q * (std[1] / std[0])) @ Q.T, x.dtype)
        centre = [jnp.asarray(process.alpha(t) * m, x.dtype) for t in (t0, t1)]
        return centre[1] + (x - centre[0]) @ matrix

    def law(
        self, tableau: Tableau, mean: np.ndarray | None = None, cov: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean (d,) and covariance (d, d) of a solver's output: closed form, on the host, without Monte Carlo.

        (mean, cov) is the law it starts from; the default is the exact noised law at the tableau's first time, so
        that what differs from the exact law at the last time is the solver's error alone. SDE solvers included: in
        each eigendirection the denoiser is affine, and mean and covariance of the R registers are propagated.
        """
        p, m, Q, values = tableau.record.process, self.means[0], self.eigenvectors[0], self.eigenvalues[0]
        a0, s0 = p.alpha(tableau.t[0]), p.sigma(tableau.t[0])
        mean = a0 * m if mean is None else mean
        cov = (Q * (a0**2 * values + s0**2)) @ Q.T if cov is None else cov
        start_mean, start_cov, centre = Q.T @ mean, Q.T @ cov @ Q, Q.T @ m
        if not np.allclose(start_cov, np.diag(np.diag(start_cov)), atol=1e-12 * np.abs(start_cov).max()):
            raise ValueError("law: the starting covariance must share its eigenvectors with the Gaussian's")
        d, R = len(m), tableau.registers
        means = np.asarray(tableau.h0)[None] * start_mean[:, None]
        covs = np.einsum("r,q,i->irq", tableau.h0, tableau.h0, np.diag(start_cov)) + tableau.c0 @ tableau.c0.T
        for k in range(tableau.nfe):
            a, s = p.alpha(tableau.t[k]), p.sigma(tableau.t[k])
            var = a**2 * values + s**2
            gain = np.where(var > 0, a * values / np.where(var > 0, var, 1.0), 0.0)  # D = centre + gain (x - a centre)
            M = np.broadcast_to(np.asarray(tableau.A[k]), (d, R, R)).copy()
            B = np.asarray(tableau.B[k])[:, 0]
            M[:, :, 0] += gain[:, None] * B
            means = np.einsum("irq,iq->ir", M, means) + ((1.0 - gain * a) * centre)[:, None] * B
            if tableau.E is not None:
                means = means + Q.T @ np.broadcast_to(np.asarray(tableau.E[k]).reshape(R, -1), (R, d)).T
            C = np.asarray(tableau.C[k])
            covs = np.einsum("irq,iqp,isp->irs", M, covs, M) + C @ C.T
        return Q @ means[:, 0], (Q * covs[:, 0, 0]) @ Q.T


def _eigen(cov: Any, d: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    cov = np.asarray(cov, np.float64)
    if cov.ndim < 2:
        if cov.ndim == 1 and cov.shape != (d,):
            raise ValueError(f"{what} has shape {cov.shape}; expected a number, ({d},) variances or ({d}, {d})")
        values, vectors = np.broadcast_to(cov, (d,)).copy(), np.eye(d)
    elif cov.shape == (d, d) and np.array_equal(cov, np.diag(np.diag(cov))):
        values, vectors = np.diag(cov).copy(), np.eye(d)
    elif cov.shape == (d, d) and np.allclose(cov, cov.T, rtol=1e-8, atol=1e-12 * np.abs(cov).max()):
        values, vectors = np.linalg.eigh(0.5 * (cov + cov.T))
    else:
        raise ValueError(f"{what} has shape {cov.shape}; expected a number, ({d},) or a symmetric ({d}, {d})")
    if not np.isfinite(values).all() or values.min() < -1e-10 * max(values.max(), 1e-300):
        raise ValueError(f"{what} is not positive semi-definite: its smallest eigenvalue is {values.min():.3g}")
    return np.maximum(values, 0.0), vectors


def gaussian(mean: Any, cov: Any) -> Gaussian:
    """N(mean, cov): mean (d,), cov a number, (d,) variances or a symmetric (d, d), also singular."""
    mean = np.atleast_1d(np.asarray(mean, np.float64))
    if mean.ndim != 1:
        raise ValueError(f"mean has shape {mean.shape}; expected (d,)")
    values, vectors = _eigen(cov, len(mean), "cov")
    return Gaussian(np.ones(1), mean[None], values[None], vectors[None])


def mixture(weights: Any, means: Any, covs: Any) -> Mixture:
    """sum_k w_k N(m_k, C_k): weights (K,) summing to 1, means (K, d), covs one a component, each as in `gaussian`."""
    weights, means = np.asarray(weights, np.float64), np.asarray(means, np.float64)
    if means.ndim != 2 or weights.shape != means.shape[:1] or len(covs) != len(means):
        raise ValueError(
            f"expected weights (K,), means (K, d) and K covariances; got {weights.shape}, {means.shape} and {len(covs)}"
        )
    if weights.min() < 0 or abs(weights.sum() - 1) > 1e-6:
        raise ValueError(
            f"weights must be non-negative and sum to 1; they sum to {weights.sum():.6g}, smallest {weights.min():.3g}"
        )
    eigen = [_eigen(c, means.shape[1], f"covs[{k}]") for k, c in enumerate(covs)]
    return Mixture(weights / weights.sum(), means, np.stack([v for v, _ in eigen]), np.stack([q for _, q in eigen]))
