"""Markov chains beside solvers: Langevin correctors (score SDE) and the Langevin-Gibbs chain of denoising MCMC.

None of this is a tableau: a corrector's step length depends on the data (a ratio of norms), a Metropolis step accepts
or rejects, and a Gibbs step draws a noise level. They are Steppers, run by `jdiff.run`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PyTree

from jdiff import noise, process, times
from jdiff.denoiser import Denoiser, cast_like
from jdiff.exact import Mixture
from jdiff.execute import Info, Rows, State, Stepper, rows, run, sample, stepper
from jdiff.predict import convert, model_time, wide
from jdiff.tableau import Tableau
from jdiff.trace import Solver

from .sde import reverse_diffusion

CORRECTOR = 1_000_000  # folded into a row's key; the predictor's own noises fold in 0, 1, ..


class Chain(NamedTuple):
    """A Stepper, the rows that it runs over, and the network evaluations that they cost: `chain.sample(x, key)`."""

    stepper: Stepper
    rows: PyTree
    nfe: int

    def sample(self, x: PyTree, key: Array) -> PyTree:
        return run(self.stepper, self.rows, x, key)[0].x


# 1. Predictor-corrector --------------------------------------------------------------------------------------------


def langevin_corrector(
    denoiser: Denoiser,
    table: Tableau,
    snr: float = 0.16,
    steps: int = 1,
    norms: str = "level",
    dtype: Any = np.float32,
    index: Integer[Array, " batch"] | None = None,
    temperature: float = 1.0,
) -> Chain:
    """A table's Stepper with `steps` of Langevin dynamics before each row (Song et al. 2021, algorithms 4 and 5):

        x <- x + e score + sqrt(2 e) temperature z,      e = 2 A^2 (snr r)^2

    On a system each part has its own e (GDSS, whose scale_eps is `temperature`; 1 elsewhere). A^2 is the published
    alpha: 1 on VE, 1 - beta (the squared ratio of the alphas over the row's step) on VP. snr: 0.16 (CIFAR-10) and
    0.075 (CelebA-HQ) in the paper. norms says what r = |z| / |score| is:

    "level"   sigma, which it is for pure noise: one e a level, and so the law is right and samples are independent.
              As a tableau: `solvers.predictor_corrector`
    "batch"   the ratio of the batch's mean norms, as published: a sample depends on the batch that it is in
    "sample"  each sample's own. A step that depends on x has another stationary law, p(x) / e(x), and in few
              dimensions 1 / |score|^2 has no mean: on a Gaussian in 2 d the variance came out 28 times too large

    A row is corrected where moving register 0 moves the whole state: the other registers hold past outputs or
    nothing. So Heun is corrected before each step but not between its stages, DPM-Solver++ before every row.
    ValueError for a table that carries an older state along (UniPC's corrector; DEIS and PLMS, whose past eps hold
    it). `dtype` is the sample's.
    """
    if snr < 0 or steps < 0:
        raise ValueError(f"langevin_corrector: snr and steps must not be negative, got {snr=}, {steps=}")
    check_norms("langevin_corrector", norms)
    if np.ndim(table.t) > 1:
        raise ValueError("langevin_corrector: the tableau has a time an element; a corrector needs one time a row")
    free = np.array([all(n == "" or n.startswith("D") for n in row[1:]) for row in table.record.names[:-1]])
    if 2 * free.sum() < table.nfe:
        raise ValueError(
            f"langevin_corrector: rows of {table.record.name} carry state beside register 0; take a solver of one "
            "register, such as ddpm, ddim, reverse_diffusion or euler_maruyama, or heun or dpm_solver_pp"
        )
    p = denoiser.process
    each = [_scale(part, np.asarray(table.t, np.float64), norms) for part in parts_of(p)]
    scale = np.stack(each, -1) if isinstance(p, process.System) else each[0]
    base = stepper(denoiser, *(jnp.asarray(v, dtype) for v in (table.h0, table.c0)), index=index)

    def correct(key: Array, state: State, row: Rows, scale: Array) -> State:
        x, carry, t = state.x, state.carry, model_time(row.t, state.x)
        for m in range(steps):
            out, carry = denoiser.apply(x, t, carry)
            score = convert(p, x, t, cast_like(out, x), denoiser.prediction, "score")
            z = p.noise(jax.random.fold_in(key, CORRECTOR + m), x, index)
            x = langevin(p, x, score, z, scale, snr, norms, temperature)
        return State((x, *state.registers[1:]), carry)

    def step(key: Any, state: State, row: tuple[Rows, Array, Array]) -> tuple[State, Info]:
        base_row, corrected, scale = row
        state = jax.lax.cond(corrected, lambda s: correct(key, s, base_row, scale), lambda s: s, state)
        return base.step(key, state, base_row)

    every = (rows(table, dtype), jnp.asarray(free), jnp.asarray(scale, dtype))
    return Chain(Stepper(base.init, step), every, table.nfe + steps * int(free.sum()))


def check_norms(who: str, norms: str) -> None:
    if norms not in ("level", "batch", "sample"):
        raise ValueError(f"{who}: norms is {norms!r}; expected 'level', 'batch' or 'sample'")


def parts_of(p: process.Process) -> list[process.Process]:
    return [part for _, part in p.parts] if isinstance(p, process.System) else [p]


def _scale(p: process.Process, t: np.ndarray, norms: str) -> np.ndarray:
    """A, and with norms = "level" times sigma, at the times of a table's rows."""
    a = p.alpha(t)
    return a / np.append(a[1:], 1.0) * (p.sigma(t) if norms == "level" else 1.0)


def langevin(p: Any, x: PyTree, score: PyTree, z: PyTree, scale: Array, snr: float, norms: str, temperature: float):
    """One Langevin step of `langevin_corrector`, with e = 2 (scale snr |z|/|score|)^2 for each part of a system."""
    if isinstance(p, process.System):
        part = lambda i, name, q: langevin(q, x[name], score[name], z[name], scale[i], snr, norms, temperature)
        return {name: part(i, name, q) for i, (name, q) in enumerate(p.parts)}
    norm = lambda v: jnp.sqrt(sum(jnp.sum(leaf.reshape(len(leaf), -1) ** 2, 1) for leaf in jax.tree.leaves(v)))
    ratio = jnp.ones((1,), scale.dtype)
    if norms != "level":
        ratio = norm(z) / norm(score) if norms == "sample" else (norm(z).mean() / norm(score).mean())[None]
    e = 2.0 * (scale * snr * ratio) ** 2

    def leaf(x: Array, s: Array, z: Array) -> Array:
        each = jnp.reshape(e, (-1,) + (1,) * (x.ndim - 1)).astype(x.dtype)
        return x + each * s + temperature * jnp.sqrt(2.0 * each) * z

    return jax.tree.map(leaf, x, score, z)


def langevin_pc(
    denoiser: Denoiser,
    n: int,
    snr: float = 0.16,
    steps: int = 1,
    eps: float = 1e-3,
    as_published: bool = False,
    dtype: Any = np.float32,
) -> Chain:
    """Score SDE's predictor-corrector sampler: n reverse-diffusion steps, a corrector before each; NFE n (1 + steps).

    Uniform times from t_max to eps in n - 1 steps, and then 0; on `edm` (VE) geometric times. as_published: norms
    over the batch, and on VP n steps of length t_max / n at linspace(t_max, eps, n), the last mean without noise
    (see `sde.euler_maruyama`).
    """
    if n < 2:
        raise ValueError(f"langevin_pc: n is {n}; expected at least 2 predictor steps")
    p = denoiser.process
    ve = isinstance(p, process.EDM)
    t = times.logsnr(p, n - 1, end=p.t_min) if ve else times.uniform(p, n - 1, end=eps)
    short = as_published and not ve
    table = reverse_diffusion(short)(p, t if short else np.append(t, 0.0))
    return langevin_corrector(denoiser, table, snr, steps, "batch" if as_published else "level", dtype)


# 2. Denoising MCMC -------------------------------------------------------------------------------------------------


class Level(NamedTuple):
    """State of the chain on (y, level): y = x/alpha has noise levels[level]; `low` is the lowest visited since init."""

    x: Float[Array, "batch ..."]
    level: Integer[Array, " batch"]
    low_x: Float[Array, "batch ..."]
    low: Integer[Array, " batch"]


def level_posterior(model: Mixture, levels: Any) -> Callable[[Array], Array]:
    """y (batch, d) -> log p(level | y) + const, (batch, L), of an exact model: all levels equally likely a priori."""
    edm = process.edm(sigma_min=float(np.min(levels)) / 2, sigma_max=float(np.max(levels)) * 2)
    return lambda y: jax.vmap(lambda s: model.log_density(edm, y, s))(jnp.asarray(levels, y.dtype)).T


def langevin_gibbs(
    denoiser: Denoiser,
    levels: Any,
    classify: Callable[[Array], Array],
    eta: float,
    *,
    argmax: bool = False,
    log_density: Callable[[Array, Array], Array] | None = None,
) -> Stepper:
    """Denoising Langevin Gibbs (Kim and Ye 2023, DMCMC, algorithm 1): a chain on p(y | sigma) p(sigma).

        y     <- y + eta/2 score(y; sigma) + sqrt(eta) z          one network evaluation
        sigma <- a draw of p(sigma | y), or its argmax as published

    levels       (L,) noise levels sigma/alpha, falling; the paper's are 1000, geometric from sigma_max to 0.01
    classify     y -> logits (batch, L): a noise-level classifier, or `level_posterior` of an exact model
    eta          step length; small beside the square of the data's finest scale (0.8 in the official demo, in pixels)
    log_density  (y, sigma (batch,)) -> (batch,): the Langevin step is then Metropolised (MALA), and the chain exact
                 for exact models; the published chain is not

    `init(key, (y, level))` starts at levels (batch,) int, or classifies where the level is None. Rows are anything
    of the length wanted, such as `jnp.arange(n_skip)`.
    """
    levels = np.asarray(levels, np.float64)
    if levels.ndim != 1 or len(levels) < 2 or not (np.diff(levels) < 0).all() or levels[-1] <= 0:
        raise ValueError(f"langevin_gibbs: levels must be a falling vector of noise levels > 0, got {levels}")
    if not eta > 0:
        raise ValueError(f"langevin_gibbs: eta is {eta}; expected a step length > 0")
    p = denoiser.process
    all_times = p.t_of_lam(-np.log(levels))

    def score(y: Array, level: Array) -> Array:
        tail = (-1,) + (1,) * (y.ndim - 1)
        sigma, t = (jnp.asarray(v, y.dtype)[level].reshape(tail) for v in (levels, all_times))
        return (denoiser(p.alpha(t) * y, t) - y) / sigma**2

    def draw(key: Array, y: Array) -> Array:
        logits = classify(y)
        if argmax:
            return jnp.argmax(logits, -1)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(y)))
        return jax.vmap(jax.random.categorical)(keys, logits)

    def init(key: Any, start: tuple[Array, Array | None]) -> Level:
        y, level = start
        level = draw(key, y) if level is None else level
        return Level(y, level, y, level)

    def move(key: Array, y: Array, level: Array) -> Array:
        here = score(y, level)
        step_key, uniform_key = jax.random.split(key)
        new = y + 0.5 * eta * here + np.sqrt(eta).astype(y.dtype) * noise.normal(step_key, y)
        if log_density is None:
            return new
        sigma = jnp.asarray(levels, y.dtype)[level]
        flat = lambda v: jnp.sum(v.reshape(len(v), -1) ** 2, 1)
        log_q = lambda there, start, s: -flat(there - start - 0.5 * eta * s) / (2.0 * eta)
        log_ratio = log_density(new, sigma) - log_density(y, sigma)
        log_ratio += log_q(y, new, score(new, level)) - log_q(new, y, here)
        u = jax.scipy.stats.norm.cdf(noise.normal(uniform_key, log_ratio))
        return jnp.where((jnp.log(u) < log_ratio).reshape((-1,) + (1,) * (y.ndim - 1)), new, y)

    def step(key: Any, state: Level, row: Any) -> tuple[Level, Array]:
        move_key, level_key = jax.random.split(key)
        y = move(move_key, state.x, state.level)
        level = draw(level_key, y)
        lower = level > state.low  # a later level is a lower noise
        low_x = jnp.where(lower.reshape((-1,) + (1,) * (y.ndim - 1)), y, state.low_x)
        return Level(y, level, low_x, jnp.maximum(level, state.low)), level

    return Stepper(init, step)


def denoise_from_levels(
    denoiser: Denoiser,
    levels: Any,
    solver: Solver,
    n: int,
    grid: Callable[..., np.ndarray] = times.karras,
    tweedie: float | None = 0.01,
) -> Callable[[Array, Array, Array | None], Array]:
    """(y, level, key) -> samples: each sample by `solver` in n steps from its own noise level, then Tweedie.

    One table a level, all of one shape; a sample takes its level's table by index, so different starts are one
    program. grid(process, n, start=t) gives a level's times. tweedie: a last denoising at this noise level (0.01 on
    CIFAR-10, 0.001 on CelebA-HQ; one evaluation), None for none, as the grid ends at sigma = 0 anyway.
    """
    p = denoiser.process
    starts = p.t_of_lam(-np.log(np.asarray(levels, np.float64)))
    tables = [solver(p, grid(p, n, start=float(t))) for t in starts]
    R, Z = max(T.registers for T in tables), max(T.noises for T in tables)
    stacked = jax.tree.map(lambda *v: np.stack(v), *(T.pad(R, Z).replace(record=tables[0].record) for T in tables))

    def denoise(y: Array, level: Array, key: Array | None = None) -> Array:
        one = lambda table, x, key: sample(denoiser, table, x[None], key)[0]
        mine = jax.tree.map(lambda v: jnp.asarray(v, wide(y.dtype))[level], stacked)
        a = jnp.asarray(p.alpha(starts), y.dtype)[level].reshape((-1,) + (1,) * (y.ndim - 1))
        keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(y)))
        x = jax.vmap(one, in_axes=(0, 0, None if keys is None else 0))(mine, a * y, keys)
        return x if tweedie is None else denoiser(x, float(p.t_of_lam(-np.log(tweedie))))

    return denoise


def dmcmc(
    chain: Stepper, denoise: Callable[[Array, Array, Array | None], Array], n_skip: int
) -> Callable[[Array, tuple[Array, Array]], tuple[Array, tuple[Array, Array]]]:
    """Denoising MCMC (Kim and Ye 2023): (key, (y, level)) -> (samples, the chain's next (y, level)).

    n_skip moves of `langevin_gibbs`, of which the state with the lowest noise (the start among them) is denoised by
    `denoise_from_levels`; the chain goes on from its last state. NFE a sample: n_skip, the solver's, and Tweedie's.
    n_skip = 0 is the solver itself. The chain must have warmed up: start it from samples with noise added.
    """
    if n_skip < 0:
        raise ValueError(f"dmcmc: n_skip is {n_skip}; expected 0 or more moves")

    def draw(key: Array, start: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        chain_key, solver_key = jax.random.split(key)
        state = chain.init(jax.random.fold_in(chain_key, 0), start)
        if n_skip:
            state, _ = run(chain, jnp.arange(n_skip), start, chain_key)
        return denoise(state.low_x, state.low, solver_key), (state.x, state.level)

    return draw
