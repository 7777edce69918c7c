"""Exact models of a finite data set: the posterior mean is a weighted mean of its points, for any noise."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from jdiff import noise
from jdiff.denoiser import Denoiser, _no_carry
from jdiff.predict import model_time
from jdiff.process import Process, Time


@dataclass(frozen=True)
class Points:
    """Points y_i, (K, ...), drawn with `weights` (K,); float64 on the host. See `points`."""

    data: np.ndarray
    weights: np.ndarray

    def denoiser(self, process: Process) -> Denoiser:
        """E[x0 | x_t] as a Denoiser; t is anything that broadcasts against the sample. At sigma = 0: the nearest point.

        Differences to all points are formed, batch x K x d numbers, so that float32 is enough.
        """
        return Denoiser(
            Partial(_no_carry), Partial(_apply, self._arrays(), Partial(_Posterior(process))), process, "x0"
        )

    def log_density(self, process: Process, x: Float[Array, "batch ..."], t: Time) -> Float[Array, " batch"]:
        """log p_t(x) at t > 0."""
        return jax.nn.logsumexp(_joint(process, self._arrays(), x, model_time(t, x)), -1)

    def sample(self, key: Array, n: int, dtype: Any = None) -> Float[Array, "n ..."]:
        """n draws of the points; draw i depends on the key and on i alone."""
        dtype = jnp.float32 if dtype is None else dtype
        u = jax.scipy.stats.norm.cdf(noise.normal(key, jax.ShapeDtypeStruct((n,), dtype)))
        return jnp.asarray(self.data, dtype)[jnp.searchsorted(jnp.asarray(np.cumsum(self.weights)[:-1], dtype), u)]

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(divide="ignore"):
            return np.log(self.weights), self.data


def _joint(process: Process, arrays: Any, x: Array, t: Array) -> Array:
    """log w_i + log p_t(x | y_i), (batch, K)."""
    log_w, data = (jnp.asarray(v, x.dtype) for v in arrays)
    a, s = (jnp.broadcast_to(v, x.shape)[:, None] for v in (process.alpha(t), jnp.maximum(process.sigma(t), 1e-12)))
    z = ((x[:, None] - a * data) / s).reshape(len(x), len(data), -1)
    volume = jnp.sum(jnp.log(s).reshape(len(x), 1, -1), -1)
    return log_w + process.log_kernel(jnp.sum(z * z, -1), z.shape[-1]) - volume


@dataclass(frozen=True)
class _Posterior:
    process: Process

    def __call__(self, arrays: Any, x: Array, t: Array) -> Array:
        r = jax.nn.softmax(_joint(self.process, arrays, x, t), -1)
        return (r @ jnp.asarray(arrays[1], x.dtype).reshape(r.shape[1], -1)).reshape(x.shape)


def _apply(arrays: Any, posterior: Partial, x: Array, t: Array, carry: Any) -> tuple[Array, Any]:
    return posterior.func(arrays, x, t), carry


def points(data: Any, weights: Any = None) -> Points:
    """The law of a finite data set: data (K, ...), weights (K,) summing to 1, default equal. ValueError else.

    Its denoiser is what a network with no error learns: weights ~ w_i (|x - y_i|^2 + D sigma^2)^(-(N + D) / 2) on
    `process.pfgmpp(D)`, and the softmax of -|x - alpha y_i|^2 / (2 sigma^2) where the noise is Gaussian.
    """
    data = np.asarray(data, np.float64)
    if data.ndim < 2 or not len(data) or not np.isfinite(data).all():
        raise ValueError(f"points: data has shape {data.shape}; expected finite numbers (K, ...), one point a row")
    weights = np.full(len(data), 1.0 / len(data)) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (len(data),) or weights.min() < 0 or abs(weights.sum() - 1) > 1e-6:
        raise ValueError(
            f"points: weights have shape {weights.shape} and sum {weights.sum():.6g}; expected ({len(data)},), 1"
        )
    return Points(data, weights / weights.sum())
