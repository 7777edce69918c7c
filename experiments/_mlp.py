"""A small MLP on the 8 x 8 digits as vectors of 64: seconds to train, for claims about trained networks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jdiff
from jdiff import data, losses, metrics
from jdiff.denoiser import edm_precondition
from jdiff.metrics.digits import classify_digits, load_weights
from jdiff.process import Process

SIGMA_DATA = 0.75


def digits() -> tuple[jax.Array, np.ndarray]:
    """The train half: images (898, 64) float32 in [-1, 1], and labels."""
    half = data.load("digits", split="train")
    images = jnp.asarray(data.from_uint8(half.images, 16))
    return images.reshape(len(images), 64), np.asarray(half.labels)


def reference() -> np.ndarray:
    """Features of the held-out half."""
    return metrics.embed(metrics.digit_features(), data.load("digits", split="test"))


def features(x: np.ndarray) -> np.ndarray:
    """Features of samples (n, 64), clipped to [-1, 1]."""
    return metrics.embed(metrics.digit_features(), np.clip(x, -1, 1).reshape(-1, 8, 8, 1), batch_size=len(x))


def classes(x: np.ndarray) -> np.ndarray:
    """The classifier's label of samples (n, 64)."""
    logits = classify_digits(load_weights()[0], jnp.asarray(np.clip(x, -1, 1).reshape(-1, 8, 8, 1)))
    return np.asarray(logits).argmax(-1)


def denoiser(p: Process, params: Any) -> jdiff.Denoiser:
    return jdiff.denoiser(edm_precondition(net, p, SIGMA_DATA), p, "x0", params=params)


def net(params: list[dict[str, jax.Array]], x: jax.Array, t: jax.Array, y: None = None) -> jax.Array:
    """Residual MLP on flat digits; every layer sees the time's Fourier features."""
    w = 2.0 ** jnp.arange(6, dtype=x.dtype)
    angle = jnp.broadcast_to(t, (len(x), 1)) * w
    time = jnp.concatenate([jnp.cos(angle), jnp.sin(angle), jnp.ones_like(angle)], 1)
    first, *middle, last = params
    h = x @ first["w"] + time @ first["t"]
    for layer in middle:
        h = h + jax.nn.silu(h @ layer["w"] + time @ layer["t"]) @ layer["out"]
    return jax.nn.silu(h) @ last["w"] + time @ last["t"]


def init(key: jax.Array, width: int, layers: int = 3) -> list[dict[str, jax.Array]]:
    draw = lambda i, a, b, gain=1.0: gain * jax.random.normal(jax.random.fold_in(key, i), (a, b)) / np.sqrt(a)
    middle = [
        {"w": draw(3 * i + 1, width, width), "t": draw(3 * i + 2, 18, width), "out": draw(3 * i + 3, width, width, 0.3)}
        for i in range(layers)
    ]
    first = {"w": draw(100, 64, width), "t": draw(101, 18, width)}
    return [first, *middle, {"w": draw(102, width, 64, 0.1), "t": draw(103, 18, 64, 0.1)}]


@functools.partial(jax.jit, static_argnums=(0, 3))
def trained(p: Process, digits: jax.Array, params: Any, steps: int, key: jax.Array) -> Any:
    """The network's parameters, trained."""
    return fitted(edm_precondition(net, p, SIGMA_DATA), p, digits, params, steps, key)


def fitted(apply: Any, p: Process, digits: jax.Array, params: Any, steps: int, key: jax.Array) -> Any:
    """Parameters of apply(params, x, t, y) -> x0 by EDM's loss: Adam, cosine rate from 2e-3; their moving average."""
    loss = losses.denoising_loss(
        apply, p, "x0", weighting="edm", time=losses.log_normal(p), sigma_data=SIGMA_DATA, stratified=True
    )
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, steps)))

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, average, state = carry
        batch = digits[jax.random.randint(key, (128,), 0, len(digits))]
        slope = jax.grad(lambda q: loss(q, key, batch).mean())(params)
        change, state = optimiser.update(slope, state)
        params = optax.apply_updates(params, change)
        average = jax.tree.map(lambda a, q: 0.998 * a + 0.002 * q, average, params)
        return (params, average, state), None

    return jax.lax.scan(step, (params, params, optimiser.init(params)), jax.random.split(key, steps))[0][1]
