"""Absorbing (masked) diffusion over tokens: a Stepper, so that `jdiff.run` and steering serve it too.

A clean token stays with probability alpha_t = 1 - t and is `mask` otherwise; going from time t to s < t each masked
token is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t), drawn from the network's posterior of it
(Sahoo et al. 2024, arXiv 2406.07524, eq. 7; Shi et al. 2024). A tableau cannot say this: the state is not a vector.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jdiff.execute import Stepper, _key

Network = Callable[[Integer[Array, "batch length"], Any], Float[Array, "batch length tokens"]]


class Tokens(NamedTuple):
    """The state: tokens (batch, length), int32."""

    x: Integer[Array, "batch length"]


class Revealed(NamedTuple):
    """A step's info: the tokens before it, and the network's log-probabilities of the clean ones, as `outputs[0]`."""

    x: Integer[Array, "batch length"]
    outputs: tuple[Float[Array, "batch length tokens"]]


def masked(network: Network, mask: int) -> Stepper:
    """The ancestral sampler. network(tokens, t) -> logits (batch, length, vocabulary) of the clean tokens.

    Rows are `rows(times)`; the start is `jnp.full((batch, length), mask)`. Sample i's draws depend on the key and on
    its place alone. Categorical draws are Gumbel-max in float32: fine for vocabularies far below 1e6.
    """

    def init(key: Array | None, x: Array) -> Tokens:
        return Tokens(x.astype(jnp.int32))

    def step(key: Array | None, state: Tokens, row: Array) -> tuple[Tokens, Revealed]:
        key, (t, s) = _key(key), row
        log_p = jax.nn.log_softmax(network(state.x, t).astype(jnp.float32), -1)
        reveal = (t - s) / t  # (alpha_s - alpha_t) / (1 - alpha_t)

        def draw(i: Array, log_p: Array) -> tuple[Array, Array]:
            which, what = jax.random.split(jax.random.fold_in(key, i))
            now = jax.random.uniform(which, log_p.shape[:1], jnp.float32) < reveal
            return now, jax.random.categorical(what, log_p).astype(jnp.int32)

        now, tokens = jax.vmap(draw)(jnp.arange(len(state.x), dtype=jnp.uint32), log_p)
        return Tokens(jnp.where((state.x == mask) & now, tokens, state.x)), Revealed(state.x, (log_p,))

    return Stepper(init, step)


def rows(times: Any) -> Array:
    """(K, 2) float32 rows (t, s) of a falling grid from 1 to 0. ValueError for any other."""
    t = np.asarray(times, np.float64)
    if t.ndim != 1 or len(t) < 2 or t[0] != 1 or t[-1] != 0 or not (np.diff(t) < 0).all():
        raise ValueError(f"expected times that fall from 1 to 0, got {np.array2string(t, threshold=6)}")
    return jnp.asarray(np.stack([t[:-1], t[1:]], 1), jnp.float32)


def draws(mask: int, m: int = 1) -> Callable[[Array, Any], Array]:
    """For `steering.fk(draws=..)`: m samples (m, batch, length) of the clean tokens, each token drawn by itself.

    From the network's output at the step's start, with the tokens that the step revealed kept. An intermediate reward
    of tokens needs whole tokens: there is no mean of them.
    """

    def draw(key: Array, step: Any) -> Array:
        x, log_p = step.after.x, step.info.outputs[0]
        found = jax.random.categorical(key, log_p, shape=(m, *x.shape)).astype(jnp.int32)
        return jnp.where(x == mask, found, x)

    return draw
