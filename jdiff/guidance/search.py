"""Search over starts: golden noise by one step there and back, and reflection on what was sampled before."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jdiff.denoiser import Denoiser

from .free import cfg
from .gradient import predict


def golden_noise(
    denoiser: Denoiser, unconditional: Denoiser, x: PyTree, times: Any, high: float = 5.5, low: float = 1.0
) -> PyTree:
    """The start of Golden Noise (Zhou et al. 2024, arXiv 2411.09502): DDIM's first step at the guidance scale `high`,
    and its inversion at `low`.

    x: starts at times[0], batch axis first; the step is from times[0] to times[1]. To first order the result is
    x + k (high - low)(D_c - D_u) s0 / s1, k as in `guidance.step_gain`. 4 evaluations, in two batches of two.
    """
    p = denoiser.process
    t = p.check_times(times)[:2]
    a, s = p.alpha(t), p.sigma(t)
    if s[1] == 0:
        raise ValueError("golden_noise: times[1] is the data end, which has no inverse; give a grid of more steps")
    at = lambda scale, x, t: predict(d := cfg(denoiser, unconditional, scale), x, jnp.asarray(t, _dtype(x)), d.init(x))
    move = lambda x, D, i, j: jax.tree.map(lambda x, D: (s[j] / s[i]) * x + (a[j] - a[i] * s[j] / s[i]) * D, x, D)
    z = move(x, at(high, x, t[0])[0], 0, 1)
    return move(z, at(low, z, t[1])[0], 1, 0)


def _dtype(x: PyTree) -> Any:
    return jax.tree.leaves(x)[0].dtype


class Pairs(NamedTuple):
    """`start` and `golden` of the pairs kept; `kept` and `gain` (in reward) of all n."""

    start: Array
    golden: Array
    kept: np.ndarray
    gain: np.ndarray


def golden_pairs(
    denoiser: Denoiser,
    unconditional: Denoiser,
    x: Array,
    times: Any,
    reward: Callable[[Array], Array],
    high: float = 5.5,
    low: float = 1.0,
) -> Pairs:
    """Starts and their golden noises, where the reward rose: the data that a noise-prompt network is trained on.

    reward(start) -> (n,): samples from the starts and scores them, under the same conditions, larger is better.
    """
    golden = golden_noise(denoiser, unconditional, x, times, high, low)
    gain = np.asarray(reward(golden)) - np.asarray(reward(x))
    if gain.shape != (len(x),) or not np.isfinite(gain).all():
        raise ValueError(f"golden_pairs: the reward returned shape {gain.shape}; expected ({len(x)},), finite")
    kept = gain > 0
    return Pairs(x[kept], golden[kept], kept, gain)


class Reflected(NamedTuple):
    """What `reflect_loop` found: the accepted sample or else the one of the best score, and how it went."""

    sample: Any
    accepted: bool
    tries: int
    memory: tuple[tuple[Any, Any], ...]


def reflect_loop(
    sample: Callable[[tuple[tuple[Any, Any], ...], int], Any],
    judge: Callable[[Any], tuple[float, Any]],
    *,
    budget: int,
    memory: int = 3,
    accept: float = 1.0,
) -> Reflected:
    """Reflect-DiT's loop (Li et al. 2025, arXiv 2503.12271): sample, be judged, and sample again in view of it.

    sample(memory, i) -> the i-th sample, given up to `memory` latest pairs (sample, feedback), oldest first; empty at
    first. judge(sample) -> (score, feedback); a score of at least `accept` ends the loop. Best-of-N is the same with
    memory = 0. Costs up to `budget` samples.
    """
    if budget < 1 or memory < 0:
        raise ValueError(f"reflect_loop: budget is {budget} and memory {memory}; expected at least 1, and 0 or more")
    seen: list[tuple[Any, Any]] = []
    best: tuple[float, Any] = (-np.inf, None)
    for i in range(budget):
        x = sample(tuple(seen[-memory:] if memory else ()), i)
        score, feedback = judge(x)
        if not np.isfinite(score):
            raise ValueError(f"reflect_loop: the judge's score of try {i} is {score}; expected a finite number")
        best = max(best, (float(score), x), key=lambda b: b[0])
        seen.append((x, feedback))
        if score >= accept:
            return Reflected(x, True, i + 1, tuple(seen))
    return Reflected(best[1], False, budget, tuple(seen))
