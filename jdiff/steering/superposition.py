"""Superposition of diffusion models (Skreta, Atanackovic et al. 2025, SuperDiff, arXiv 2412.17762).

A sample is moved by sum_i kappa_i score_i, sum kappa = 1, while log q_i of every model is followed along its path,
without a likelihood computation: by Ito's formula, for ANY path z of noise n (z = x / alpha, r = sigma^2 / alpha^2
falling by dr),

    d log q_i = <S_i, dz> - 1/2 |S_i|^2 dr + (n - 1)/2 div S_i dr,

so that the reverse SDE (n = 1) needs no divergence, and the ODE (n = 0) does. "or": kappa = softmax(T log q_i + l_i),
which for T = 1 is the score of the mixture with weights exp(l_i). "and": kappa from the linear equations that keep all
log q_i + l_i equal; where the models agree, and the equations say nothing, kappa is uniform. "average": kappa uniform.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdiff import execute, noise
from jdiff.denoiser import Denoiser
from jdiff.predict import array_of, model_time, wide
from jdiff.process import Process
from jdiff.steering.reverse import moves
from jdiff.steering.together import Together, check_divergence, combine, inner, probes, together

MODES = ("or", "and", "average")


class State(NamedTuple):
    """The sample, log q_i of the noised laws at it, and the models' carry; samples in front."""

    x: Array
    log_q: Float[Array, "batch m"]
    carry: Any


class Info(NamedTuple):
    """Of each step: the point evaluated, the x0 prediction used, log q_i at that point, and kappa."""

    x: Array
    outputs: tuple[Array, ...]
    log_q: Float[Array, "*steps batch m"]
    kappa: Float[Array, "*steps batch m"]


class Result(NamedTuple):
    """The sample (batch, ...), log q_i at the last positive time (batch, m), and the infos stacked over steps."""

    x: Array
    log_q: Float[Array, "batch m"]
    info: Info


class Rows(NamedTuple):
    """x1 = keep x + reach D + noise z; log q_i changes by live (<S_i, dz> - 1/2 |S_i|^2 dr) + trace (-sigma div eps_i)
    + square (d - |z|^2) + shift. Steps in front."""

    t: Any
    keep: Any
    reach: Any
    noise: Any
    sigma: Any
    live: Any  # 0 out of alpha = 0 and into sigma = 0
    going: Any  # (3,): factors of sum kappa eps and of the noise in -dz / rho0, and dr / r0
    square: Any
    trace: Any
    shift: Any
    done: Any  # the share of the way behind after this step, for the bias of "and"


def rows(process: Process, times: Any, d: int, noise: Any = 1.0, variance: float | None = None) -> Rows:
    """The rows of a superposition over times (n + 1,) for samples of d elements; noise n >= 0, a number or (n,)."""
    t = process.check_times(times)
    if t.ndim != 1:
        raise ValueError(f"superpose: times have shape {t.shape}; expected (n + 1,), one grid for all elements")
    K = len(t) - 1
    if np.shape(noise) not in ((), (K,)) or not (np.isfinite(noise).all() and np.min(noise) >= 0):
        raise ValueError(f"superpose: noise is {noise}; expected n >= 0, a number or one for each of the {K} steps")
    n = np.broadcast_to(np.asarray(noise, np.float64), (K,))
    m = moves(process, t, 0.5 * (1.0 + n), n)
    live = np.isfinite(m.h)
    drop = np.where(live, -np.expm1(-m.h), 0.0)  # (r0 - r1) / r0
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = m.sigma / m.alpha
        stretch = np.where(live, m.alpha[1:] / m.alpha[:-1], 1.0)
        wave = np.where(live, m.std / (m.alpha[1:] * rho[:-1]), 0.0)
        reach = np.where(live, m.reach / m.alpha[1:], 0.0)
        flat = np.where(live, rho[:-1] ** 2 / ((variance or 0.0) + rho[:-1] ** 2), 0.0)
    square = 0.0 * flat if variance is None else 0.5 * flat * wave**2
    shift = -d * np.log(stretch)
    if m.out_of_noise:
        shift[0] = -d * np.log(m.sigma[1] / m.sigma[0])
    going, trace = np.stack([reach, -wave, drop], 1), 0.5 * (n - 1.0) * drop
    done = np.arange(1, K + 1) / K
    return Rows(t[:-1], m.keep, m.reach, m.std, m.sigma[:-1], live * 1.0, going, square, trace, shift, done)


def superpose(
    models: Sequence[Denoiser], times: Any, x: Array, key: Array, mode: str = "or", *, temperature: Any = 1.0,
    bias: Any = 0.0, noise: Any = 1.0, variance: float | None = None, divergence: str = "exact", number: int = 1,
    log_q: Array | None = None,
) -> Result:  # fmt: skip
    """Sample a superposition of m models on one process: one XLA program.

    times        (n + 1,) from t_max; where they end at 0, the step into 0 is the x0 prediction
    x            (batch, ...) noise of the process's prior
    mode         "or", "and" or "average"
    temperature  T of "or"; the paper's tables use 1 and 100
    bias         l_i, a number or (m,); in "and" it enters evenly over the steps
    noise        n: 1 the reverse SDE, 0 the probability flow; other than 1 needs a divergence, "exact" or "hutchinson"
                 with `number` probes
    variance     of the data a dimension, if known: Ito's formula errs by 1/2 (dz' J dz - n tr J dr) a step, J the
                 score's slope; that of a Gaussian of this variance is then taken off, the same for all models and 0 on
                 average. None: as published
    log_q        (batch, m) at the start; default that of the prior for all

    ValueError for models on different processes and whatever else does not fit.
    """
    pair = together(models, "superpose")
    x, m = array_of(x, "superpose"), len(pair)
    if mode not in MODES:
        raise ValueError(f"superpose: mode is {mode!r}; expected one of {', '.join(MODES)}")
    if variance is not None and not variance >= 0:
        raise ValueError(f"superpose: variance is {variance}; expected the data's a dimension, or None")
    check_divergence("superpose", divergence, number)
    if np.shape(bias) not in ((), (m,)):
        raise ValueError(f"superpose: bias has shape {np.shape(bias)} for {m} models; expected a number or ({m},)")
    over = jax.tree.map(lambda a: jnp.asarray(a, wide(x.dtype)), rows(pair.process, times, x[0].size, noise, variance))
    if log_q is None:
        s = float(pair.process.sigma(np.asarray(times, np.float64)[0]))
        prior = -0.5 * inner(x, x) / s**2 - 0.5 * x[0].size * np.log(2 * np.pi * s**2)
        log_q = jnp.broadcast_to(prior[:, None], (len(x), m))
    how = (mode, bool(np.any(np.asarray(noise) != 1)), divergence, number)
    one = lambda v: jnp.broadcast_to(jnp.asarray(v, x.dtype), (m,))
    out, info = _run(pair, over, x, jnp.asarray(log_q, x.dtype), one(temperature), one(bias), key, how)
    return Result(out.x, out.log_q, info)


def _run_(models, over, x, log_q, temperature, bias, key, how) -> tuple[State, Info]:
    base = stepper(models, *how, temperature=temperature, bias=bias)
    start = execute.Stepper(lambda key, x: base.init(key, x)._replace(log_q=log_q), base.step)
    return execute.run(start, over, x, key)


_run = jax.jit(_run_, static_argnums=7)


def stepper(
    models: Together, mode: str, trace: bool, divergence: str, number: int, *, temperature: Array, bias: Array
) -> execute.Stepper:
    """The Stepper over `rows`; init sets log q to 0: `superpose` starts it from the prior's."""

    def init(key: Array | None, x: Array) -> State:
        return State(x, jnp.zeros((x.shape[0], len(models)), x.dtype), models.init(x))

    def traces(key: Array, x: Array, t: Array, carry: Any) -> Array:
        slope = jax.linearize(lambda x: models.apply(x, t, carry)[1], x)[1]
        e = probes(jax.random.fold_in(key, 1 << 20), x, divergence, number)
        return jnp.sum(jax.vmap(lambda e: jax.vmap(lambda v: inner(e, v))(slope(e)))(e), 0).T

    def step(key: Array | None, state: State, row: Rows) -> tuple[State, Info]:
        x, t, key = state.x, model_time(row.t, state.x), execute._key(key)
        x0, eps, carry = models.apply(x, t, state.carry)
        z = noise.normal(key, x)
        gram = jax.vmap(lambda a: jax.vmap(lambda b: inner(a, b))(eps))(eps).transpose(2, 0, 1)  # (batch, m, m)
        along, wave, drop = row.going
        ours = lambda v: jax.vmap(lambda e: inner(e, v))(eps).T  # (batch, m)
        # log q_i changes by (along sum_j kappa_j <e_i, e_j> + still_i) + what is common to all
        still = wave * ours(z) - 0.5 * drop * jnp.diagonal(gram, axis1=1, axis2=2)
        extra = -row.sigma * row.trace * traces(key, x, t, state.carry) if trace else jnp.zeros_like(state.log_q)
        if mode == "or":
            kappa = jax.nn.softmax(temperature * state.log_q + bias, -1)
        else:
            kappa = jnp.full_like(state.log_q, 1.0 / len(models))
        if mode == "and":
            level = state.log_q + row.done * bias + extra + row.live * (along * jnp.mean(gram, -1) + still)
            kappa = kappa - _equalise(eps, row.live * along, level)
        D = combine(kappa, x0)
        new = row.keep * x + row.reach * D + row.noise * z
        change = row.live * (along * jnp.sum(gram * kappa[:, None], -1) + still) + extra
        common = row.shift + row.square * (x[0].size - inner(z, z))
        return State(new, state.log_q + change + common[:, None], carry), Info(x, (D,), state.log_q, kappa)

    return execute.Stepper(init, step)


def _equalise(eps: Array, factor: Array, level: Array) -> Array:
    """y, sum y = 0, for which level_i - factor sum_j <e_i, e_j> y_j is the same for all i; the shortest such."""
    apart = eps - jnp.mean(eps, 0)
    gram = factor * jax.vmap(lambda a: jax.vmap(lambda b: inner(a, b))(apart))(apart).transpose(2, 0, 1)
    values, vectors = jnp.linalg.eigh(gram)
    size = jnp.abs(factor) * jnp.mean(jax.vmap(inner)(eps, eps), 0)
    tiny = jnp.finfo(eps.dtype).eps
    smallest = (30.0 * tiny) ** 2 * size[:, None] + 10.0 * len(eps) * tiny * values[:, -1:]
    inverse = jnp.where(values > smallest, 1.0 / jnp.where(values > smallest, values, 1.0), 0.0)
    level = level - jnp.mean(level, -1, keepdims=True)
    y = jnp.sum(vectors * (inverse * jnp.sum(vectors * level[..., None], 1))[:, None], -1)
    return y - jnp.mean(y, -1, keepdims=True)
