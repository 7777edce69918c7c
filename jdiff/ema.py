"""Exponential moving averages with power-function profiles (Karras et al. 2024, EDM2, arXiv 2312.02696).

The average at step t weighs the parameters of step tau by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]:
its length is a fixed share of the training so far, whatever the number of steps. The name of a profile is that
share, sigma_rel = std(p) / t: 0.05 and 0.10 are tracked unless said. From snapshots of these two, taken along the
way, the average of ANY length can be rebuilt after training (`posthoc`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int, PyTree

from jdiff.predict import wide

SIGMA_RELS = (0.05, 0.10)
_LARGEST = 1.0 / np.sqrt(12.0)  # sigma_rel of gamma = 0, the plain mean; beyond it the past outweighs the present


def sigma_rel_of_gamma(gamma: float) -> float:
    """Standard deviation of p over t: (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2)."""
    return float(np.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0))


def gamma_of_sigma_rel(sigma_rel: float) -> float:
    """The exponent of the profile whose relative standard deviation is sigma_rel, in (0, 1/sqrt(12)].

    The largest root of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1. ValueError outside the range.
    """
    if not 0 < sigma_rel <= _LARGEST * (1 + 1e-12):
        raise ValueError(f"sigma_rel is {sigma_rel}; expected 0 < sigma_rel <= 1/sqrt(12) = {_LARGEST:.4f}")
    r = float(sigma_rel) ** -2
    return float(np.roots([1.0, 7.0, 16.0 - r, 12.0 - r]).real.max())


def init(params: PyTree, sigma_rels: Sequence[float] = SIGMA_RELS) -> tuple[PyTree, ...]:
    """One copy of params a profile, at least float32. Its values do not matter: the first update replaces them."""
    copy = lambda p: jnp.array(p, wide(p.dtype), copy=True)
    for s in sigma_rels:
        gamma_of_sigma_rel(s)
    return tuple(jax.tree.map(copy, params) for _ in sigma_rels)


def update(
    ema: tuple[PyTree, ...], params: PyTree, t: Int[Array, ""] | int, sigma_rels: Sequence[float] = SIGMA_RELS
) -> tuple[PyTree, ...]:
    """The averages after step t = 1, 2, ...: ema <- beta ema + (1 - beta) params, beta = (1 - 1/t)^(gamma + 1).

    Over unit steps this is the continuous average exactly, of parameters that are constant between steps.
    """

    def average(tree: PyTree, sigma_rel: float) -> PyTree:
        # 1 - beta through log1p and expm1: in float32 1 - 1/t has lost 1/t by t = 10^6
        rest = -jnp.expm1((gamma_of_sigma_rel(sigma_rel) + 1.0) * jnp.log1p(-1.0 / jnp.asarray(t, jnp.float32)))
        return jax.tree.map(lambda e, p: e + rest.astype(e.dtype) * (p.astype(e.dtype) - e), tree, params)

    return tuple(average(tree, s) for tree, s in zip(ema, sigma_rels, strict=True))


def profile_product(gamma_a: Any, t_a: Any, gamma_b: Any, t_b: Any) -> Float64[np.ndarray, "*shape"] | np.floating:
    """Inner product of two profiles, the integral of p_a p_b over time (closed form); arguments broadcast.

    (a + 1)(b + 1) min(t_a, t_b)^(a + b + 1) / ((a + b + 1) t_a^(a + 1) t_b^(b + 1)) for gammas a and b
    """
    gamma_a, t_a, gamma_b, t_b = (np.asarray(x, np.float64) for x in (gamma_a, t_a, gamma_b, t_b))
    m = np.minimum(t_a, t_b)
    shape = (m / t_a) ** (gamma_a + 1) * (m / t_b) ** (gamma_b + 1) / m  # ratios: powers of t would overflow
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shape


def posthoc_weights(
    times: Sequence[float], sigma_rel: float, tracked: Sequence[float] = SIGMA_RELS, at: float | None = None
) -> Float64[np.ndarray, "snapshots profiles"]:
    """Weights of the averages `tracked` at `times` whose sum is nearest to the profile sigma_rel ending at `at`.

    Least squares between the profiles as functions of time (the paper's appendix C). at: step, default the last
    of `times`. ValueError for times that are not positive and different, for an `at` outside (0, the last], and
    where the sum misses the profile by more than a tenth of its norm: its weights would not even sum to 1.
    """
    t = np.asarray(times, np.float64)
    if t.ndim != 1 or t.size == 0 or (t <= 0).any() or len(np.unique(t)) != t.size:
        raise ValueError(f"times of the snapshots must be positive and different, got {list(times)}")
    end = float(t.max() if at is None else at)
    if not 0 < end <= t.max():
        raise ValueError(f"at is {end:g}; the snapshots end at step {t.max():g}")
    gammas = np.array([gamma_of_sigma_rel(s) for s in tracked])
    tt, gg = np.repeat(t, len(gammas)), np.tile(gammas, len(t))
    gram = profile_product(gg[:, None], tt[:, None], gg[None], tt[None])
    gamma = gamma_of_sigma_rel(sigma_rel)
    right = profile_product(gg, tt, gamma, end)
    scale = 1.0 / np.sqrt(np.diag(gram))  # unit diagonal: profiles of early steps are tall
    weights = scale * np.linalg.lstsq(gram * scale[:, None] * scale, right * scale, rcond=1e-13)[0]
    norm = profile_product(gamma, end, gamma, end)
    miss = np.sqrt(max(norm - 2 * weights @ right + weights @ gram @ weights, 0.0) / norm)
    if miss > 0.1:
        raise ValueError(
            f"{len(t)} snapshots of sigma_rel {', '.join(map(str, tracked))} give the profile {sigma_rel} at step "
            f"{end:g} only to {miss:.0%}; choose a length nearer to those, or take snapshots more often"
        )
    return weights.reshape(len(t), len(gammas))


def posthoc(
    snapshots: Sequence[tuple[PyTree, ...]],
    times: Sequence[float],
    sigma_rel: float,
    tracked: Sequence[float] = SIGMA_RELS,
    at: float | None = None,
) -> PyTree:
    """The average of profile sigma_rel, from snapshots taken during training; summed in float64 on the host.

    snapshots[i] holds the averages `tracked` at step times[i], as `update` returns them. Arrays keep their dtype.
    """
    weights = posthoc_weights(times, sigma_rel, tracked, at)
    if len(snapshots) != len(times) or any(len(s) != len(tracked) for s in snapshots):
        raise ValueError(
            f"expected {len(times)} snapshots of {len(tracked)} averages each, got {[len(s) for s in snapshots]}"
        )
    trees = [
        (w, tree)
        for row, snapshot in zip(weights, snapshots, strict=True)
        for w, tree in zip(row, snapshot, strict=True)
    ]

    def combine(*leaves: Any) -> Array:
        total = sum(w * np.asarray(leaf, np.float64) for (w, _), leaf in zip(trees, leaves, strict=True))
        return jnp.asarray(total, leaves[0].dtype)

    return jax.tree.map(combine, *(tree for _, tree in trees))
