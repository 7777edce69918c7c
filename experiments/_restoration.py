"""Restoration with an exact model: held-out digits from a blurred, noisy view, in mean-reverting diffusion.

The prior is a mixture of ten Gaussians fitted to the training digits, one a class; the view y is the 2 x 2 block
average plus noise, blown up again. E[x0 | x_t, y] is then a closed form: no network, and no training error.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import anchored, data, metrics, process, solvers, times
from jdiff.experiments._claims import Measure, Settings

NOISE = 0.1  # standard deviation of the view's noise; pixels are in [-1, 1]
POOL = np.zeros((16, 64))
for i in range(64):
    POOL[(i // 16) * 4 + (i % 8) // 2, i] = 0.25


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 64) in [-1, 1] and labels."""
    found = data.load("digits", split=split)
    batch = found.take(np.arange(len(found.labels)))
    return np.asarray(batch["image"], np.float64).reshape(-1, 64), np.asarray(batch["label"])


def view(x0: np.ndarray, seed: int) -> np.ndarray:
    """y (n, 64): blocks averaged, noise added, blocks repeated."""
    low = x0 @ POOL.T + NOISE * np.random.default_rng(seed).normal(size=(len(x0), 16))
    return low @ (4.0 * POOL)


def posterior() -> dict[str, np.ndarray]:
    """x0 | y is sum_k w_k(y) N(m_k(y), C_k): m affine in y, log w quadratic, C in its eigenbasis."""
    images, labels = digits("train")
    each: dict[str, list[Any]] = {name: [] for name in ("shift", "slope", "values", "vectors", "centre", "root")}
    for k in range(10):
        mine = images[labels == k]
        prior = np.linalg.inv(np.cov(mine.T) + 0.03 * np.eye(64))  # the ridge keeps flat pixels alive
        values, vectors = np.linalg.eigh(prior + POOL.T @ POOL / NOISE**2)
        cov = (vectors / values) @ vectors.T
        seen = POOL @ np.linalg.inv(prior) @ POOL.T + NOISE**2 * np.eye(16)
        each["shift"].append(cov @ prior @ mine.mean(0))
        each["slope"].append(cov @ POOL.T / NOISE**2)
        each["values"].append(1 / values)
        each["vectors"].append(vectors)
        each["centre"].append(POOL @ mine.mean(0))
        each["root"].append(np.linalg.inv(np.linalg.cholesky(seen)))
    return {name: np.stack(v) for name, v in each.items()}


def network(p: process.Process, arrays: dict[str, jax.Array], x: jax.Array, t: Any, y: jax.Array) -> jax.Array:
    """E[x0 | x_t, y] from the unshifted x_t, as a trained restoration network gives it."""
    low = y @ jnp.asarray(POOL.T, x.dtype)
    m = arrays["shift"] + jnp.einsum("kij,nj->nki", arrays["slope"], low)
    whitened = jnp.einsum("kij,nkj->nki", arrays["root"], low[:, None] - arrays["centre"])
    log_w = jnp.sum(jnp.log(jnp.diagonal(arrays["root"], axis1=1, axis2=2)), -1) - 0.5 * jnp.sum(whitened**2, -1)
    a, s = p.alpha(t), p.sigma(t)
    z = jnp.einsum("kij,nki->nkj", arrays["vectors"], (x - (1.0 - a) * y)[:, None] - a * m)
    var = a * a * arrays["values"] + s * s
    r = jax.nn.softmax(log_w - 0.5 * jnp.sum(z * z / var + jnp.log(var), -1), -1)
    each = m + jnp.einsum("kij,nkj->nki", arrays["vectors"], a * arrays["values"] / var * z)
    return jnp.einsum("nk,nki->ni", r, each)


def model(theta: str = "cosine", sigma_inf: float = 0.5) -> tuple[anchored.Anchored, Any]:
    """The mean-reverting process and the exact network of it (a function of x, t, y)."""
    mr = anchored.Anchored(process.mean_reverting(theta, sigma_inf))
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in posterior().items()}
    return mr, jax.tree_util.Partial(partial(network, mr.process), arrays)


@dataclass(frozen=True)
class Restoration:
    """`n` held-out digits, from y + sigma_inf z; error to the original, and the law by the digits' features."""

    n: int = 500
    start: float | None = None
    end: float = 1 / 101  # the official code's last state

    @property
    def process(self) -> process.Process:
        return process.mean_reverting("cosine", 0.5)

    def prepare(self, settings: Settings) -> Measure:
        from jdiff.experiments.fast_sampling import score

        mr, fn = model()
        x0 = digits("test")[0][: self.n]
        y = jnp.asarray(view(x0, settings.seed), jnp.float32)
        x = mr.prior(jax.random.key(settings.seed), y)
        denoiser = mr.denoiser(fn, "x0", y)
        features = lambda v: metrics.embed(
            metrics.digit_features(), np.clip(v, -1, 1).reshape(-1, 8, 8, 1).astype(np.float32), batch_size=self.n
        )
        reference = features(x0)
        sample = lambda T: np.asarray(jdiff.sample(denoiser, T, x, jax.random.key(settings.seed + 1)))
        fine = solvers.mrs(3)(self.process, times.logsnr(self.process, 200, end=self.end))
        flow = sample(fine)

        def measure(tableau: jdiff.Tableau) -> dict[str, Any]:
            found = sample(tableau)
            return {
                "RMSE": float(np.sqrt(np.mean((np.clip(found, -1, 1) - x0) ** 2))),
                "rms to flow": None if tableau.stochastic else float(np.sqrt(np.mean((found - flow) ** 2))),
                "Fréchet distance": score(features(found), reference)["Fréchet distance"],
                "input": float(np.sqrt(np.mean((np.asarray(y) - x0) ** 2))),
            }

        return measure
