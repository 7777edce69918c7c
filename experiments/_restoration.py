"""Restoration in anchored processes: held-out digits from a blurred, noisy view, by an exact model or a trained one.

The exact prior is a mixture of ten Gaussians fitted to the training digits, one a class; the view y is the 2 x 2 block
average plus noise, blown up again. E[x0 | x_t, y] is then a closed form: no network, and no training error. A trained
network is a small MLP of (x_t, t, y), three seeds at once.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def posterior(
    images: np.ndarray | None = None, labels: np.ndarray | None = None, see: np.ndarray = POOL, noise: float = NOISE
) -> dict[str, np.ndarray]:
    """x0 | y is sum_k w_k(y) N(m_k(y), C_k): m affine in y, log w quadratic, C in its eigenbasis.

    The view is see x0 + noise, and y is it blown up, its rows in `see`'s span; by default the digits' blocks.
    """
    if images is None or labels is None:
        images, labels = digits("train")
    size = images.shape[1]
    each: dict[str, list[Any]] = {name: [] for name in ("shift", "slope", "values", "vectors", "centre", "root")}
    for k in np.unique(labels):
        mine = images[labels == k]
        prior = np.linalg.inv(np.cov(mine.T) + 0.03 * np.eye(size))  # the ridge keeps flat pixels alive
        values, vectors = np.linalg.eigh(prior + see.T @ see / noise**2)
        cov = (vectors / values) @ vectors.T
        seen = see @ np.linalg.inv(prior) @ see.T + noise**2 * np.eye(len(see))
        each["shift"].append(cov @ prior @ mine.mean(0))
        each["slope"].append(cov @ see.T / noise**2)
        each["values"].append(1 / values)
        each["vectors"].append(vectors)
        each["centre"].append(see @ mine.mean(0))
        each["root"].append(np.linalg.inv(np.linalg.cholesky(seen)))
    return {name: np.stack(v) for name, v in each.items()} | {"see": see}


def components(arrays: dict[str, jax.Array], y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means (n, k, d) and log-weights (n, k) of x0 | y."""
    low = y @ jnp.asarray(arrays["see"].T, y.dtype)
    m = arrays["shift"] + jnp.einsum("kij,nj->nki", arrays["slope"], low)
    whitened = jnp.einsum("kij,nkj->nki", arrays["root"], low[:, None] - arrays["centre"])
    log_w = jnp.sum(jnp.log(jnp.diagonal(arrays["root"], axis1=1, axis2=2)), -1) - 0.5 * jnp.sum(whitened**2, -1)
    return m, log_w


def network(A: anchored.Anchored, arrays: dict[str, jax.Array], x: jax.Array, t: Any, y: jax.Array) -> jax.Array:
    """E[x0 | x_t, y] from the unshifted x_t, as a trained restoration network gives it."""
    m, log_w = components(arrays, y)
    a, s, b = A.process.alpha(t), A.process.sigma(t), A.b(A.process, t)
    z = jnp.einsum("kij,nki->nkj", arrays["vectors"], (x - b * y)[:, None] - a * m)
    var = jnp.maximum(a * a * arrays["values"] + s * s, 1e-9)  # a bridge ends without noise
    r = jax.nn.softmax(log_w - 0.5 * jnp.sum(z * z / var + jnp.log(var), -1), -1)
    each = m + jnp.einsum("kij,nkj->nki", arrays["vectors"], a * arrays["values"] / var * z)
    return jnp.einsum("nk,nki->ni", r, each)


def model(theta: str = "cosine", sigma_inf: float = 0.5) -> tuple[anchored.Anchored, Any]:
    """The mean-reverting process and the exact network of it (a function of x, t, y)."""
    mr = anchored.Anchored(process.mean_reverting(theta, sigma_inf))
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in posterior().items()}
    return mr, jax.tree_util.Partial(partial(network, mr), arrays)


def fidelity(arrays: dict[str, jax.Array], y: jax.Array) -> jax.Array:
    """E[x0 | y] of the exact prior: the restoration of least squared error."""
    m, log_w = components(arrays, y)
    return jnp.einsum("nk,nki->ni", jax.nn.softmax(log_w, -1), m)


# A trained network --------------------------------------------------------------------------------------------------

SEEDS = 3


def mlp(p: process.Process, params: list[Any], x: jax.Array, t: Any, y: jax.Array) -> jax.Array:
    """y plus a function of (x_t, y, log-SNR): an x0 prediction. x and y (batch, d); t a number or (batch, 1)."""
    a, s = p.alpha(t), p.sigma(t)
    level = jnp.broadcast_to(jnp.arctan2(s, jnp.maximum(a, 0.0)), (len(x), 1))
    waves = [f(k * level) for k in (1.0, 2.0, 4.0, 8.0) for f in (jnp.sin, jnp.cos)]
    h = jnp.concatenate([x / jnp.sqrt(1.0 + s * s), y, *waves], 1)
    for w, c in params[:-1]:
        h = jax.nn.gelu(h @ w + c)
    w, c = params[-1]
    return y + h @ w + c


@partial(jax.jit, static_argnames=("A", "pairs", "steps", "width"))
def trained(A: anchored.Anchored, pairs: Any, data: Any, steps: int, width: int = 192) -> list[Any]:
    """Parameters of SEEDS networks, stacked: mean squared error of x0, t uniform, Adam, cosine decay from 2e-3.

    pairs(data, key) -> (x0, y), a fresh batch of training pairs, or (x0, y, noise map).
    """
    p, d = A.process, jax.eval_shape(pairs, data, jax.random.key(0))[0].shape[1]
    sizes = [2 * d + 8, width, width, d]

    def loss(params: Any, key: Any) -> jax.Array:
        draw, time, noise = jax.random.split(key, 3)
        x0, y, *scale = pairs(data, draw)
        t = p.t_max * (1.0 - jax.random.uniform(time, (len(x0), 1)))
        eps = jax.random.normal(noise, x0.shape) * (scale[0] if scale else 1.0)
        x = p.alpha(t) * x0 + A.b(p, t) * y + p.sigma(t) * eps
        return jnp.mean((mlp(p, params, x, t, y) - x0) ** 2)

    tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def train(seed: Any) -> list[Any]:
        key = jax.random.key(seed)
        params = [
            (jax.random.normal(jax.random.fold_in(key, i), (m, n)) * (1.0 if i < 2 else 0.1) / m**0.5, jnp.zeros(n))
            for i, (m, n) in enumerate(itertools.pairwise(sizes))
        ]

        def step(state: Any, k: Any) -> tuple[Any, None]:
            params, opt = state
            updates, opt = tx.update(jax.grad(loss)(params, jax.random.fold_in(key, 10 + k)), opt)
            return (optax.apply_updates(params, updates), opt), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0][0]

    return jax.vmap(train)(jnp.arange(SEEDS))


def restored(
    A: anchored.Anchored, fn: Any, params: Any, tableau: Any, y: jax.Array, key: Any, scale: Any = None
) -> jax.Array:
    """Samples (n, d) from the published start; fn(params, x, t, y) predicts x0 from the unshifted state."""
    denoiser = A.denoiser(fn, "x0", y, params=params, scale=scale)
    x = jdiff.sample(denoiser, tableau, A.prior(key, y, scale=scale), jax.random.fold_in(key, 1))
    return x if scale is None else A.unshift(x, y, 0.0, scale)


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
