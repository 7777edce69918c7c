"""Where sampling starts: transported to the data's noised law, searched for, or one step above a flawed schedule.

ot = starts.semidiscrete_ot(key, process.diffuse(key, data, t_mid))      # DPM-OT: skip the steps above t_mid
x = starts.expressway(denoiser, tableau_from_t_mid, ot, noise)

found = starts.search_start(key, h, y, target, shape=(32, 32, 3))        # OBC-SR: one good x_T for every y
x_T = starts.one_more_step(key, psi, process, noise)                     # OMS: repair alpha_T > 0
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jdiff import noise
from jdiff.denoiser import Denoiser
from jdiff.execute import sample
from jdiff.process import Process
from jdiff.tableau import Tableau


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OTMap:
    """x -> the target y_i that maximises <x, y_i> + h_i: the gradient of Brenier's potential.

    targets (n, ...); h (n,), of mean 0; mass (n,) and centres (n, d): each cell's share of the source and its mean,
    measured on fresh draws. A pytree; samples have their batch axis in front.
    """

    targets: Array
    h: Array
    mass: Array
    centres: Array

    def heights(self, x: Array) -> Float[Array, "batch n"]:
        """<x, y_i> + h_i."""
        return _flat(x) @ _flat(self.targets).T + self.h

    def cell(self, x: Array) -> Integer[Array, " batch"]:
        """The index of each x's target."""
        return jnp.argmax(self.heights(x), -1)

    def __call__(self, x: Array) -> Array:
        return self.targets[self.cell(x)]

    def interpolate(self, x: Array, k: int, angle: float) -> Array:
        """A mixture of the k highest targets, weighted by 1 / distance from x to their cells' centres.

        A neighbour joins where its angle to the first, between the normals (y, -1) of Brenier's potential, is at most
        `angle` radians: a sharp edge parts two modes. angle = 0 is the plain map; k = 2 and pi joins any two.
        """
        if not 1 <= k <= len(self.h):
            raise ValueError(f"interpolate: k is {k}; expected 1 to {len(self.h)}, the number of targets")
        y = _flat(self.targets)
        _, near = jax.lax.top_k(self.heights(x), k)
        normal = jnp.concatenate([y, -jnp.ones_like(y[:, :1])], 1)
        normal = normal / jnp.linalg.norm(normal, axis=1, keepdims=True)
        # by atan2: arccos loses half the digits at small angles, and an angle of 0 must be 0
        first, others = normal[near[:, :1]], normal[near]
        between = 2.0 * jnp.arctan2(jnp.linalg.norm(first - others, axis=-1), jnp.linalg.norm(first + others, axis=-1))
        distance = jnp.linalg.norm(_flat(x)[:, None] - self.centres[near], axis=-1)
        w = jnp.where(between <= angle, 1.0 / jnp.maximum(distance, 1e-12), 0.0)
        mixed = jnp.einsum("nk,nkd->nd", w / w.sum(1, keepdims=True), y[near])
        return mixed.reshape(x.shape)


def semidiscrete_ot(
    key: Array,
    targets: Array,
    weights: Array | None = None,
    *,
    source: str = "normal",
    steps: int = 1000,
    draws: int | None = None,
    learning_rate: float = 0.1,
    decay: bool = True,
) -> OTMap:
    """Optimal transport (squared distance) from a standard normal source to n weighted points: DPM-OT.

    Li et al. 2023 (arXiv 2307.11308). The potential h minimises the convex E max_i(<x, y_i> + h_i) - sum nu_i h_i,
    whose gradient is each cell's share of the source less its weight: Adam on a Monte-Carlo histogram, the mean of h
    taken off. Look at `mass` of the result: it should be the weights.

    targets (n, ...), float32 or float64: noised data at the level where sampling will start; weights (n,), uniform
    source   "normal", or "uniform" in [0, 1]: what the official code fits to, though it then maps normal noise
    draws    of a step, default 10 n as published; memory is n times the least of it and 4096
    decay    the rate falls to 0 as a cosine. False: it stays, as in the official code (which has up to 10,000 steps,
             doubles the draws and lowers the rate by a fifth when stuck, three times); h then jitters for ever
    Raises ValueError for weights that are no distribution, or fewer than two targets.
    """
    n = len(targets)
    nu = jnp.full(n, 1.0 / n, targets.dtype) if weights is None else jnp.asarray(weights, targets.dtype)
    if n < 2 or nu.shape != (n,) or not (jnp.all(nu > 0) and jnp.abs(nu.sum() - 1) < 1e-4):
        raise ValueError(
            f"semidiscrete_ot: {n} targets with weights of shape {nu.shape} that sum to {float(nu.sum()):.4g}; "
            "expected at least two targets and one positive weight each, summing to 1"
        )
    if source not in ("normal", "uniform"):
        raise ValueError(f"semidiscrete_ot: source is {source!r}; expected 'normal' or 'uniform'")
    draws = 10 * n if draws is None else draws
    chunk = min(draws, 4096)
    h, mass, centres = _fit(key, _flat(targets), nu, source, chunk, -(-draws // chunk), steps, learning_rate, decay)
    return OTMap(targets, h, mass, centres)


@jax.jit(static_argnums=(3, 4, 5, 6, 7, 8))
def _fit(
    key: Array, y: Array, nu: Array, source: str, chunk: int, batches: int, steps: int, rate: float, decay: bool
) -> tuple[Array, Array, Array]:
    n, d = y.shape
    draw = jax.random.normal if source == "normal" else jax.random.uniform

    def cells(key: Array, h: Array) -> tuple[Array, Array]:
        x = draw(key, (chunk, d), y.dtype)
        return x, jnp.argmax(x @ y.T + h, -1)

    def share(key: Array, h: Array) -> Array:
        count = lambda i, c: c.at[cells(jax.random.fold_in(key, i), h)[1]].add(1.0)
        return jax.lax.fori_loop(0, batches, count, jnp.zeros(n, y.dtype)) / (batches * chunk)

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        h, m, v = state
        g = share(jax.random.fold_in(key, i), h) - nu
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g  # Adam; like the official code, without bias correction
        falling = rate * (0.5 + 0.5 * jnp.cos(i.astype(y.dtype) * (jnp.pi / steps))) if decay else rate
        h = h - falling * m / (jnp.sqrt(v) + 1e-8)
        return h - h.mean(), m, v

    zero = jnp.zeros(n, y.dtype)
    h, _, _ = jax.lax.fori_loop(0, steps, step, (zero, zero, zero))

    def measure(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        x, cell = cells(jax.random.fold_in(jax.random.fold_in(key, steps), i), h)
        return found[0].at[cell].add(1.0), found[1].at[cell].add(x)

    rounds = 16 * batches
    count, total = jax.lax.fori_loop(0, rounds, measure, (zero, jnp.zeros((n, d), y.dtype)))
    return h, count / (rounds * chunk), total / jnp.maximum(count, 1.0)[:, None]


def _flat(x: Array) -> Array:
    return x.reshape(len(x), -1)


def expressway(denoiser: Denoiser, tableau: Tableau, ot: OTMap, x: Array, key: Array | None = None) -> Array:
    """Standard normal x to noised data at the tableau's first time by `ot`, then the tableau: DPM-OT's sampler."""
    return sample(denoiser, tableau, ot(x), key)


class Found(NamedTuple):
    """The best start (...), the candidates (K, ...) and their scores (K,), lower is better."""

    start: Array
    candidates: Array
    scores: Array


def squared_error(x: Array, target: Array) -> Array:
    """Mean squared error of each sample."""
    return jnp.mean(_flat(x - target) ** 2, -1)


def search_start(
    key: Array,
    h: Callable[[Array, Any], Array],
    y: Any,
    target: Array,
    shape: tuple[int, ...],
    *,
    candidates: int = 100,
    metric: Callable[[Array, Array], Array] = squared_error,
    std: float = 1.0,
    chunk: int = 8,
) -> Found:
    """OBC-SR: of K random x_T the one that restores a reference set best, to be shared by every new condition.

    Ma et al. 2023 (arXiv 2305.15357). `h(x_T, y)`: any deterministic sampler, from x_T (n, *shape) and the conditions
    y (n, ...) to samples; it is traced. target (n, ...): the references. metric(sample, target) -> (n,), lower is
    better (the paper's is LPIPS). std: `process.prior_std`. chunk: candidates sampled at once.
    """
    if candidates < 1:
        raise ValueError(f"search_start: candidates is {candidates}; expected at least 1")
    n = len(target)
    draws = std * noise.normal(key, jax.ShapeDtypeStruct((candidates, *shape), target.dtype))

    @jax.jit
    def scores(draws: Array, y: Any, target: Array) -> Array:
        score = lambda x: jnp.mean(metric(h(jnp.broadcast_to(x, (n, *shape)), y), target))
        return jax.lax.map(score, draws, batch_size=min(chunk, candidates))

    found = scores(draws, y, target)
    return Found(draws[jnp.argmin(found)], draws, found)


def one_more_step(
    key: Array,
    psi: Callable[[Array], Array],
    process: Process,
    x: Array,
    *,
    fresh: float = 1.0,
    as_published: bool = False,
) -> Array:
    """One More Step: from pure noise x to the process's own law at t_max, where alpha > 0.

    Hu et al. 2023 (arXiv 2311.15744). `psi(x)` is a v network at alpha = 0, where v = -x0: x0 = -psi(x), trained on
    E|x0 + psi(x)|^2. As x says nothing about x0 there, the best psi is minus the mean of x0 given the prompt, and

        x_T = alpha_T x0 + sqrt(sigma_T^2 - c^2) x + c z,     c = fresh sigma_T

    has the exact mean of x_T, and a covariance that lacks alpha_T^2 Cov(x0). x: standard normal, batch axis first.
    fresh: 1, all noise new (the official code), to 0, none. as_published: the official code scales z by the variance
    sigma_T^2 instead of its root (0.24 % less noise at Stable Diffusion's alpha_T^2 = 0.0047, 4.1 % at 0.08).
    """
    if not 0 <= fresh <= 1:
        raise ValueError(f"one_more_step: fresh is {fresh}; expected 0 to 1")
    a, s = (jnp.asarray(f(process.t_max), x.dtype) for f in (process.alpha, process.sigma))
    c = fresh * s
    spread = c * c if as_published else c
    return -a * psi(x) + jnp.sqrt(jnp.maximum(s * s - c * c, 0.0)) * x + spread * noise.normal(key, x)
