"""Evolution: over time grids, over solver schedules (S3) and over subsets of times and layers (AutoDiffusion).

One engine, `evolution`, on individuals of any kind: it needs how to make one, how to change one, how to cross two and
what they are worth. Two users of it here say what an individual is; a third (AutoDiffusion) takes the caller's fitness.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Space(Generic[T]):
    """random(rng), mutate(rng, a) and cross(rng, a, b) make individuals; encode(a) is a vector that describes one."""

    random: Callable[[np.random.Generator], T]
    mutate: Callable[[np.random.Generator, T], T]
    cross: Callable[[np.random.Generator, T, T], T]
    encode: Callable[[T], np.ndarray]


@dataclass(frozen=True)
class Found(Generic[T]):
    """best and its score; history: best so far after each generation; all that was evaluated, with the scores."""

    best: T
    score: float
    history: tuple[float, ...]
    seen: tuple[T, ...]
    scores: np.ndarray


def evolution(
    space: Space[T],
    evaluate: Callable[[Sequence[T]], np.ndarray],
    *,
    initial: Sequence[T] = (),
    budget: int = 256,
    population: int = 32,
    parents: int = 8,
    mutation: float = 0.5,
    predictor: "Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]] | None" = None,
    proposals: int = 8,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> Found[T]:
    """Minimise `evaluate`, which scores a list of individuals, in `budget` evaluations.

    The first generation is `initial` and random ones; each later one is made of the best `parents` of all so far, by
    mutation (with that probability) or crossing. With a `predictor` (encodings, scores) -> (encodings -> scores), S3's
    way, `proposals` times as many are made and those that it ranks best are evaluated. The best is never lost.
    """
    if not 1 <= parents <= population <= budget:
        raise ValueError(f"expected 1 <= parents <= population <= budget, got {parents}, {population}, {budget}")
    rng = np.random.default_rng(seed)
    now = list(initial)[:budget]
    now += [space.random(rng) for _ in range(population - len(now))]
    seen: list[T] = []
    scores, history = np.zeros(0), []
    while True:
        now = now[: budget - len(seen)]
        seen += now
        scores = np.append(scores, np.asarray(evaluate(now), np.float64))
        scores = np.where(np.isnan(scores), np.inf, scores)
        order = np.argsort(scores, kind="stable")
        history.append(float(scores[order[0]]))
        if progress is not None:
            progress(len(seen) / budget, f"best {history[-1]:.4g}")
        if len(seen) >= budget:
            return Found(seen[order[0]], history[-1], tuple(history), tuple(seen), scores)
        best = [seen[i] for i in order[:parents]]

        def child(best: list[T] = best) -> T:
            a, b = (best[rng.integers(len(best))] for _ in range(2))
            return space.mutate(rng, a) if rng.random() < mutation else space.cross(rng, a, b)

        if predictor is None:
            now = [child() for _ in range(population)]
        else:
            many = [child() for _ in range(population * proposals)]
            guess = predictor(np.stack([space.encode(a) for a in seen]), scores)
            promising = np.argsort(guess(np.stack([space.encode(a) for a in many])), kind="stable")
            now = [many[i] for i in promising[:population]]


def ranking(
    x: np.ndarray, y: np.ndarray, *, width: int = 32, steps: int = 300, rate: float = 1e-2, seed: int = 0
) -> Callable[[np.ndarray], np.ndarray]:
    """A predictor of quality: a perceptron of one hidden layer that learns to rank (the logistic loss of all pairs).

    x (n, f) encodings, y (n,) scores, the smaller the better. Returns encodings -> predicted scores.
    """
    import jax
    import jax.numpy as jnp
    import optax

    mean, std = x.mean(0), x.std(0) + 1e-6
    rank = np.argsort(np.argsort(y)).astype(np.float32)
    worse = jnp.asarray(np.sign(rank[:, None] - rank[None, :]))
    z = jnp.asarray((x - mean) / std, jnp.float32)
    keys = jax.random.split(jax.random.key(seed), 2)
    first = jax.random.normal(keys[0], (x.shape[1], width), jnp.float32) / np.float32(np.sqrt(x.shape[1]))
    second = jax.random.normal(keys[1], (width,), jnp.float32) / np.float32(np.sqrt(width))
    params = (first, jnp.zeros(width, jnp.float32), second)
    optimiser = optax.adam(rate)

    def net(params: Any, z: Any) -> Any:
        return jnp.tanh(z @ params[0] + params[1]) @ params[2]

    def loss(params: Any) -> Any:
        out = net(params, z)
        decay = sum(jnp.sum(p * p) for p in params)
        return jnp.mean(jnp.logaddexp(0.0, -worse * (out[:, None] - out[None, :]))) + 1e-3 * decay

    def body(state: Any, _: Any) -> Any:
        params, memory = state
        with jax.numpy_dtype_promotion("standard"):
            updates, memory = optimiser.update(jax.grad(loss)(params), memory)
        return (optax.apply_updates(params, updates), memory), None

    (params, _), _ = jax.jit(lambda s: jax.lax.scan(body, s, length=steps))((params, optimiser.init(params)))
    return lambda x: np.asarray(net(params, jnp.asarray((x - mean) / std, jnp.float32)))


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau of two scores: the share of pairs in the same order less that of pairs in the other order."""
    i, j = np.triu_indices(len(a), 1)
    return float(np.mean(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])))
