"""Digits as 16 tokens, 16 codes of 2 x 2 patches found by k-means; a small transformer over them; scores of samples."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx

from jdiff import data, discrete, metrics
from jdiff.nets import conditioning, dit, layers

CODES, LENGTH = 16, 16


@functools.cache
def codebook() -> np.ndarray:
    """(16, 4) float32: Lloyd's k-means of the train half's patches, 40 turns from 16 random distinct ones."""
    patches = _patches(images("train")).reshape(-1, 4)
    centres = np.random.default_rng(0).choice(np.unique(patches, axis=0), CODES, replace=False)
    for _ in range(40):
        nearest = ((patches[:, None] - centres) ** 2).sum(-1).argmin(1)
        centres = np.stack([patches[nearest == k].mean(0) for k in range(CODES)])
    return centres.astype(np.float32)


def images(split: str) -> np.ndarray:
    """(n, 8, 8, 1) float32 in [-1, 1]."""
    half = data.load("digits", split=split)
    return np.asarray(half.take(np.arange(len(half)))["image"])


def _patches(x: np.ndarray) -> np.ndarray:
    return rearrange(x, "n (h p) (w q) 1 -> n (h w) (p q)", p=2, q=2)


def encode(x: np.ndarray) -> np.ndarray:
    """Images -> tokens (n, 16) int32."""
    return ((_patches(x)[:, :, None] - codebook()) ** 2).sum(-1).argmin(-1).astype(np.int32)


def decode(tokens: np.ndarray) -> np.ndarray:
    """Tokens -> images."""
    return rearrange(codebook()[tokens], "n (h w) (p q) -> n (h p) (w q) 1", h=4, p=2)


@functools.cache
def _features(split: str, decoded: bool) -> np.ndarray:
    x = images(split)
    return metrics.embed(metrics.digit_features(), decode(encode(x)) if decoded else x)


def score(tokens: np.ndarray) -> dict[str, float]:
    """Fréchet distance of decoded samples to the held-out digits coded and decoded; `floor`: of the train half."""
    moments = lambda f: metrics.Moments.init(f.shape[1]).update(jnp.asarray(f))
    distance = lambda f: metrics.frechet_distance(moments(f), moments(_features("test", True))).value
    found = metrics.embed(metrics.digit_features(), decode(np.asarray(tokens)))
    return {"Fréchet distance": distance(found), "floor": distance(_features("train", True))}


def summary(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean of `score` over seeds with its standard error (None of one seed)."""
    distances = [found["Fréchet distance"] for found in scores]
    error = float(np.std(distances, ddof=1) / np.sqrt(len(distances))) if len(distances) > 1 else None
    return {
        "Fréchet distance": float(np.mean(distances)),
        "Fréchet distance se": error,
        "floor": scores[0]["floor"],
    }


class TokenNet(nnx.Module):
    """Logits (b, 16, 16) of the clean tokens, from tokens in 0 .. 16 and a time that broadcasts against them."""

    def __init__(self, width: int = 64, depth: int = 3, *, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": rngs}
        table = lambda rows: nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, width), jnp.float32))
        self.codes, self.places = table(CODES + 1), table(LENGTH)
        self.time = conditioning.Conditioning(
            64, width, 0, False, time_scale=1000.0, label_std=0.02, param_dtype=jnp.float32, rngs=rngs
        )
        self.blocks = nnx.List([dit.Block(width, 4, 4.0, **options) for _ in range(depth)])
        self.out = layers.Linear(width, CODES, kernel_init=layers.zeros, **options)

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.asarray(t, jnp.float32)
        h = self.codes[...][x] + self.places[...]
        c = self.time(jnp.broadcast_to(t, jnp.broadcast_shapes(t.shape, (1, 1))), None)
        for block in self.blocks:
            h = block(h, c)
        return self.out(layers.layer_norm(h))


Network = Callable[[Any, Any], Any]


def time_free(apply: Callable[..., Any]) -> Callable[..., Any]:
    """The masked loss of a network that never sees the time; "count", which has no 1 / t."""
    return discrete.masked_loss(lambda params, x, t: apply(params, x, 0 * t), CODES, form="count")


def trained(make_loss: Callable[..., Any], steps: int, seed: int, file: Path) -> Network:
    """Adam, cosine rate from 2e-3, moving average of the parameters; kept in `file` (.npz), and read where it is there.

    make_loss(apply) -> a loss of `jdiff.discrete`, apply(params, x, t) -> logits. Batches of 64 of 898 digits.
    """
    graph, params = nnx.split(TokenNet(rngs=nnx.Rngs(seed)))
    loss = make_loss(lambda params, x, t: nnx.merge(graph, params)(x, t))
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, steps)))
    digits = jnp.asarray(encode(images("train")))

    @jax.jit
    def run(params: Any, key: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, average, state = carry
            batch = digits[jax.random.choice(key, len(digits), (64,), replace=False)]
            slope = jax.grad(lambda p: loss(p, key, batch).mean())(params)
            change, state = optimiser.update(slope, state)
            params = optax.apply_updates(params, change)
            average = jax.tree.map(lambda a, p: 0.99 * a + 0.01 * p, average, params)
            return (params, average, state), None

        carry = (params, params, optimiser.init(params))
        return jax.lax.scan(step, carry, jax.random.split(key, steps))[0][1]

    if not file.exists():
        with open(file.with_suffix(".part"), "wb") as part:
            np.savez(part, *map(np.asarray, jax.tree.leaves(run(params, jax.random.key(seed)))))
        file.with_suffix(".part").replace(file)
    with np.load(file) as kept:
        average = jax.tree.unflatten(
            jax.tree.structure(params), [jnp.asarray(kept[f"arr_{i}"]) for i in range(len(kept))]
        )
    return lambda x, t: nnx.merge(graph, average)(x, t)
