"""Samplers of tokens, as Steppers: `jdiff.run` and steering serve them. A tableau cannot say this: no vector states.

    ancestral       any `MaskReplace`: x_s from sum_k q(x_s | x_t, k) p(k | x_t), over any grid
    masked          absorbing diffusion over a grid: each mask is revealed with probability (t - s) / t
    first_hitting   absorbing diffusion without a grid: the next mask to fall, at its exact time (FHS)
    confident       block by block, the most confident tokens first (SDAR)

network(tokens, t) -> logits (batch, length, K) of the clean tokens; t is a scalar, (length,) or (batch, 1).
Sample i's draws depend on the key and on its place alone, and are exact in float32 (jdiff.discrete.draw).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from jdiff.discrete.draw import categorical, exponential
from jdiff.discrete.process import MaskReplace
from jdiff.execute import Stepper, _key

Network = Callable[[Integer[Array, "batch length"], Any], Float[Array, "batch length tokens"]]


class Tokens(NamedTuple):
    """The state: tokens (batch, length), int32."""

    x: Integer[Array, "batch length"]


class Hitting(NamedTuple):
    """The state of `first_hitting`: tokens, and the time (batch,) of the last that was revealed."""

    x: Integer[Array, "batch length"]
    t: Float[Array, " batch"]


class Revealed(NamedTuple):
    """A step's info: the tokens before it, the network's log-probabilities of the clean ones as `outputs[0]`, and
    which samples needed this evaluation: their sum over steps counts evaluations."""

    x: Integer[Array, "batch length"]
    outputs: tuple[Float[Array, "batch length tokens"]]
    evaluated: Bool[Array, " batch"]


def _each(key: Array, draw: Callable[..., Any], *args: Array) -> Any:
    """draw(key of sample i, args[i]) for each sample."""
    keyed = lambda i, *a: draw(jax.random.fold_in(key, i), *a)
    return jax.vmap(keyed)(jnp.arange(len(args[0]), dtype=jnp.uint32), *args)


def _log_p(network: Network, x: Array, t: Any) -> Array:
    return jax.nn.log_softmax(network(x, t).astype(jnp.float32), -1)


def _start(key: Array | None, x: Array) -> Tokens:
    return Tokens(x.astype(jnp.int32))


def ancestral(network: Network, process: MaskReplace) -> Stepper:
    """The reparametrised sampler of VQ-Diffusion (eq. 11). Rows are `rows(times)`, the start `process.prior(..)`.

    Tokens are drawn one by one given x_t: the law is exact as the grid is refined, or for one token.
    """

    def step(key: Array | None, state: Tokens, row: Array) -> tuple[Tokens, Revealed]:
        key, (t, s) = _key(key), row
        log_p = _log_p(network, state.x, t)
        found = jnp.log(process.posterior(state.x, jnp.exp(log_p), s, t))
        return Tokens(_each(key, categorical, found)), Revealed(state.x, (log_p,), jnp.ones(len(state.x), bool))

    return Stepper(_start, step)


def masked(network: Network, mask: int) -> Stepper:
    """The ancestral sampler of absorbing diffusion, alpha_t = 1 - t (Sahoo et al. 2024, arXiv 2406.07524, eq. 7).

    Rows are `rows(times)`; the start is `jnp.full((batch, length), mask)`. Which masks fall is drawn apart from what
    they become, so that K categories share no draw with [MASK].
    """

    def step(key: Array | None, state: Tokens, row: Array) -> tuple[Tokens, Revealed]:
        key, (t, s) = _key(key), row
        log_p = _log_p(network, state.x, t)
        stay = jnp.broadcast_to(s / jnp.where(t > 0, t, 1.0), log_p.shape[1:2])

        def draw(key: Array, log_p: Array) -> tuple[Array, Array]:
            which, what = jax.random.split(key)
            return exponential(which, stay.shape) < -jnp.log(stay), categorical(what, log_p)

        now, tokens = _each(key, draw, log_p)
        hidden = state.x == mask
        return Tokens(jnp.where(hidden & now, tokens, state.x)), Revealed(state.x, (log_p,), hidden.any(-1))

    return Stepper(_start, step)


def first_hitting(network: Network, mask: int, at_once: int = 1) -> Stepper:
    """The first-hitting sampler (Zheng et al. 2024, arXiv 2409.02908, algorithm 1), alpha_t = 1 - t.

    With n masks left at time t the next falls at t U^(1/n), and is any of them: L evaluations and L categorical draws,
    in law the limit of `masked` on ever finer grids. Rows: any array of L entries or more, such as `jnp.arange(L)`,
    (L / at_once, rounded up); a step without masks changes nothing. The network sees the time (batch, 1) of the fall.

    at_once: masks revealed at one evaluation (the paper's parallel decoding), each from the same output. The paper's
    extrapolation of outputs between evaluations is not here.
    """
    if at_once < 1:
        raise ValueError(f"first_hitting: expected at_once >= 1, got {at_once}")

    def init(key: Array | None, x: Array) -> Hitting:
        return Hitting(x.astype(jnp.int32), jnp.ones(len(x), jnp.float32))

    def fall(key: Array, x: Array, t: Array) -> tuple[Array, Array, Array]:
        """The places of the next masks, in order; the time of the first; and of the last."""
        when, where = jax.random.split(key)
        clocks = jnp.where(x == mask, exponential(where, x.shape), jnp.inf)
        places = jnp.argsort(clocks)[:at_once].astype(jnp.int32)
        left = jnp.maximum((x == mask).sum() - jnp.arange(len(places)), 1).astype(jnp.float32)
        gone = jnp.cumsum(exponential(when, places.shape) / left)
        times = t * jnp.exp(-jnp.where((x == mask)[places], gone, 0.0))
        return places, times[0], times.min()

    def step(key: Array | None, state: Hitting, row: Any) -> tuple[Hitting, Revealed]:
        when, what = jax.random.split(_key(key))
        places, first, last = _each(when, fall, state.x, state.t)
        log_p = _log_p(network, state.x, first[:, None])
        here = jnp.take_along_axis(state.x, places, 1)
        tokens = _each(what, categorical, jnp.take_along_axis(log_p, places[..., None], 1))
        x = jnp.put_along_axis(state.x, places, jnp.where(here == mask, tokens, here), 1, inplace=False)
        return Hitting(x, last), Revealed(state.x, (log_p,), (state.x == mask).any(-1))

    return Stepper(init, step)


def confident(network: Network, mask: int, size: int, at_once: int = 1, threshold: float | None = None) -> Stepper:
    """SDAR's block-wise decoding: blocks of `size` tokens from left to right, inside one the most confident first.

    Every mask of the block is drawn, and the `at_once` draws of largest probability stay ("low_confidence_static");
    with a threshold all draws of larger probability, if they are more ("dynamic"; the official default is 0.85). The
    next block begins when this one has no mask. Rows: any array of length / at_once entries, the most that are needed.
    size = 1 is autoregressive sampling, exact in law; else the order depends on what was drawn, and the law is sharper.
    The network sees all tokens (later blocks are masks) and t = share of masks, (batch, 1); to attend to no later
    block, and to keep keys and values of earlier ones, is its own affair. ValueError where `at_once` does not divide
    `size`.
    """
    if size < 1 or at_once < 1 or size % at_once:
        raise ValueError(f"confident: expected at_once that divides the block's size, got {size=}, {at_once=}")

    def step(key: Array | None, state: Tokens, row: Any) -> tuple[Tokens, Revealed]:
        hidden = state.x == mask
        log_p = _log_p(network, state.x, hidden.mean(-1, keepdims=True, dtype=jnp.float32))
        tokens = _each(_key(key), categorical, log_p)
        block = jnp.arange(state.x.shape[1], dtype=jnp.int32) // size
        active = hidden & (block == (hidden.argmax(-1).astype(jnp.int32) // size)[:, None])
        sure = jnp.where(active, jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0], -jnp.inf)
        rank = jnp.argsort(jnp.argsort(-sure, -1), -1)
        now = active & (rank < at_once)
        if threshold is not None:
            now = active & ((rank < at_once) | (sure > math.log(threshold)))
        return Tokens(jnp.where(now, tokens, state.x)), Revealed(state.x, (log_p,), hidden.any(-1))

    return Stepper(_start, step)


def rows(times: Any) -> Array:
    """(n, 2) float32 rows (t, s) of a falling grid (n + 1,) from 1 to 0; of grids (n + 1, length), a time a token,
    (n, 2, length): each falls from 1 to 0, and may rest. ValueError for any other."""
    t = np.asarray(times, np.float64)
    good = t.ndim in (1, 2) and len(t) >= 2 and (t[0] == 1).all() and (t[-1] == 0).all()
    if not good or (t.ndim == 1 and not (np.diff(t) < 0).all()) or (np.diff(t, axis=0) > 0).any():
        raise ValueError(f"expected times that fall from 1 to 0, got {np.array2string(t, threshold=6)}")
    return jnp.asarray(np.stack([t[:-1], t[1:]], 1), jnp.float32)


def blocks(length: int, size: int, steps: int) -> np.ndarray:
    """Times (n + 1, length) for `rows`: blocks of `size` tokens from left to right, each in `steps` steps from 1 to 0.

    n = steps * length / size. ValueError where size does not divide length.
    """
    if size < 1 or steps < 1 or length % size:
        raise ValueError(f"blocks: expected a size that divides the length, got {length=}, {size=}, {steps=}")
    k, block = np.arange(steps * length // size + 1)[:, None], np.arange(length) // size
    return np.clip(1.0 - (k - block * steps) / steps, 0.0, 1.0)


def draws(mask: int, m: int = 1) -> Callable[[Array, Any], Array]:
    """For `steering.fk(draws=..)`: m samples (m, batch, length) of the clean tokens, each token drawn by itself.

    From the network's output at the step's start, with the tokens that the step revealed kept. An intermediate reward
    of tokens needs whole tokens: there is no mean of them.
    """

    def draw(key: Array, step: Any) -> Array:
        x, log_p = step.after.x, step.info.outputs[0]
        found = categorical(key, jnp.broadcast_to(log_p, (m, *log_p.shape)))
        return jnp.where(x == mask, found, x)

    return draw
