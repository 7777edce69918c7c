"""Search over starts: golden noise by one step there and back, and reflection on what was sampled before."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jdiff.denoiser import Denoiser
from jdiff.predict import wide

from .free import cfg
from .gradient import predict
from .schedule import as_weight


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
    kind = wide(jax.tree.leaves(x)[0].dtype)
    grid = tuple(jnp.asarray(v, kind) for v in (t, a, s))
    return _there_and_back(denoiser, unconditional, x, grid, as_weight(float(high)), as_weight(float(low)))


@jax.jit
def _there_and_back(denoiser: Denoiser, unconditional: Denoiser, x: PyTree, grid: Any, high: Any, low: Any) -> PyTree:
    t, a, s = grid

    def move(x: PyTree, scale: Any, i: int, j: int) -> PyTree:
        guided = cfg(denoiser, unconditional, scale)
        D, _ = predict(guided, x, t[i], guided.init(x))
        return jax.tree.map(lambda x, D: (s[j] / s[i]) * x + (a[j] - a[i] * s[j] / s[i]) * D, x, D)

    return move(move(x, high, 0, 1), low, 1, 0)


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


def fit_noise_prompt(
    net: Any, pairs: Pairs, labels: Array | None, key: Array, *, steps: int = 500, batch: int = 64, rate: float = 1e-3
) -> Any:
    """Train `jdiff.nets.NoisePromptNet`, or another NNX module net(x, y), on golden pairs: mean squared error, AdamW.

    labels: of the kept pairs, pairs.kept applied, or None. Returns a new module; start from net(x, y) instead of x.
    """
    import optax
    from flax import nnx

    if len(pairs.start) == 0 or (labels is not None and len(labels) != len(pairs.start)):
        raise ValueError(f"fit_noise_prompt: {len(pairs.start)} pairs; expected some, and a label for each if any")
    graph, params = nnx.split(net)
    optimizer = optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=1e-4)

    @jax.jit
    def update(params: Any, state: Any, key: Array) -> Any:
        rows = jax.random.randint(key, (batch,), 0, len(pairs.start))
        y = None if labels is None else labels[rows]
        loss = lambda p: jnp.mean((nnx.merge(graph, p)(pairs.start[rows], y) - pairs.golden[rows]) ** 2)
        slopes = jax.grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats, which strict mode refuses
            updates, state = optimizer.update(slopes, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for k in jax.random.split(key, steps):
        params, state = update(params, state, k)
    return nnx.merge(graph, params)


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
