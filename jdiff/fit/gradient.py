"""A solver fitted to a model by gradient: Adam on every entry of the table, on trajectories of the model itself."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jdiff.process import Process
from jdiff.solvers.auto import CANDIDATES, tables
from jdiff.tableau import Tableau

from .free import Params, coefficients, from_tableau, rollout, to_tableau
from .reference import Reference, Source, as_argument, disjoint, hashes, model_at


@dataclass(frozen=True)
class Fit:
    """A fitted solver and how it came about.

    start      name of the solver and grid that it began from
    standard   the best of the standard solvers on the validation trajectories, its table beside it
    history    (step, training loss, validation loss) at each look
    seen       hashes of the noises that were fitted or chosen on: no gain is reported on these
    """

    tableau: Tableau
    params: Params
    start: str
    standard: tuple[str, Tableau]
    history: tuple[tuple[int, float, float], ...]
    seen: frozenset[bytes]
    meta: Mapping[str, Any]


def standard(process: Process, nfe: int, names: Sequence[str] = CANDIDATES) -> dict[str, Tableau]:
    """ "solver on grid" -> Tableau: what `solvers.auto` tries (`auto.tables`), as far as it is of the free table's form
    and spends `nfe` evaluations."""
    found = {}
    for (name, grid), (T, _) in tables(process, tuple(names), nfe).items():
        with contextlib.suppress(ValueError):  # not exact on point masses (Euler in t, say), or a time met twice
            from_tableau(T)
            if T.nfe == nfe:
                found[f"{name} on {grid}"] = T
    return found


def objective(squares: Array, weight: float) -> Array:
    """mean log e^2 + weight log mean e^2 of the mean squares e^2 (n,) of the trajectories' errors: the first term is
    for the typical one, the second for the few that end in another mode. Free of scale."""
    tiny = jnp.finfo(squares.dtype).eps ** 2
    return jnp.mean(jnp.log(squares + tiny)) + weight * jnp.log(jnp.mean(squares) + tiny)


def _squares(source: Any, params: Params, x: Array, target: Array, index: Array) -> Array:
    denoiser = model_at(source, index)
    points, _ = rollout(denoiser, coefficients(denoiser.process, params), x)
    return jnp.mean((points[-1] - target) ** 2, axis=tuple(range(1, x.ndim)))


_jit_squares = jax.jit(_squares)


def squares(source: Source, params: Params, ref: Reference, batch: int = 1024) -> np.ndarray:
    """Mean squared error of each trajectory of `ref`, (n,) float64."""
    dtype = jnp.asarray(ref.x).dtype
    params, parts = jax.tree.map(lambda a: jnp.asarray(a, dtype), params), []
    for first in range(0, len(ref), batch):
        r = ref[first : first + batch]
        e = _jit_squares(as_argument(source), params, jnp.asarray(r.x), jnp.asarray(r.target), jnp.asarray(r.index))
        parts.append(np.asarray(e, np.float64))
    return np.concatenate(parts)


@functools.cache
def _optimiser(rate: float, steps: int) -> Any:
    import optax

    warm = optax.warmup_cosine_decay_schedule(0.1 * rate, rate, max(steps // 50, 1), steps, 0.01 * rate)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(warm, b2=0.99))


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _chunk(source: Any, data: Any, state: Any, key: Array, n: int, batch: int, optimiser: Any, weight: float) -> Any:
    """n steps of the optimiser, each on `batch` trajectories drawn from `data` = (x, target, index)."""
    import optax

    def body(state: Any, key: Array) -> Any:
        params, memory = state
        rows = jax.random.randint(key, (batch,), 0, data[0].shape[0])
        loss = lambda params: objective(_squares(source, params, *(a[rows] for a in data)), weight)
        value, grad = jax.value_and_grad(loss)(params)
        sane = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grad)]).all()
        grad = jax.tree.map(lambda g: jnp.where(sane, g, jnp.zeros_like(g)), grad)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats, which strict mode refuses
            updates, memory = optimiser.update(grad, memory, params)
        return (optax.apply_updates(params, updates), memory), value

    return jax.lax.scan(body, state, jax.random.split(key, n))


def table(
    source: Source,
    nfe: int,
    train: Reference,
    valid: Reference,
    *,
    steps: int = 2000,
    batch: int = 256,
    rate: float = 0.02,
    weight: float = 3.0,
    starts: int = 2,
    candidates: Mapping[str, Tableau] | None = None,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> Fit:
    """Fit a solver of `nfe` evaluations to a model: every entry and every time, by Adam through the sampler.

    train, valid   trajectories (`jdiff.fit.reference`) with no noise in common; ValueError otherwise
    batch          trajectories a step; memory is that of back-propagation through `nfe` evaluations of them
    weight         of the logarithm of the mean square error beside the mean logarithm (see `objective`)
    starts         how many of the candidates, ranked on the training trajectories, are optimised; the best look on the
                   validation trajectories is kept, of all
    candidates     name -> Tableau to start from; default the standard solvers on the standard grids
    progress       called as progress(fraction done, text) between compiled chunks

    It computes in the dtype of train.x; the table is built from the result in float64. Report its gain with `report`.
    """
    disjoint(train, valid, "validation")
    began = time.perf_counter()
    process = model_at(source, jnp.asarray(train.index[:1])).process
    candidates = standard(process, nfe) if candidates is None else candidates
    if not candidates:
        raise ValueError(f"no standard solver has {nfe} network evaluations; expected 1 or more, or candidates")
    begins = {name: from_tableau(T, least=1e-3) for name, T in candidates.items()}
    dtype, batch = jnp.asarray(train.x).dtype, min(batch, len(train))
    score = lambda params, ref: float(objective(jnp.asarray(squares(source, params, ref)), weight))
    few = train[: max(batch, 512)]
    ranked = sorted(begins, key=lambda name: (np.nan_to_num(score(begins[name], few), nan=np.inf), name))
    best = (np.inf, begins[ranked[0]], ranked[0])
    chunks = 20
    steps = max(chunks, steps // chunks * chunks)
    optimiser, history = _optimiser(rate, steps), []
    data = (jnp.asarray(train.x), jnp.asarray(train.target), jnp.asarray(train.index))
    firsts = ranked[:starts]
    for s, name in enumerate(firsts):
        params = jax.tree.map(lambda a: jnp.asarray(a, dtype), begins[name])
        state = (params, optimiser.init(params))
        key = jax.random.fold_in(jax.random.key(seed), s)
        for c in range(chunks + 1):
            now = score(state[0], valid)
            if now < best[0]:
                best = (now, state[0], name)
            if progress is not None:
                done = (s + c / chunks) / len(firsts)
                progress(done, f"from {name}: objective {now:.3f}")
            if c < chunks:
                key_c = jax.random.fold_in(key, c)
                state, losses = _chunk(
                    as_argument(source), data, state, key_c, steps // chunks, batch, optimiser, float(weight)
                )
                history.append((c * steps // chunks, float(losses.mean()), now))
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), best[1])
    reference = ("Shaul et al. 2024, bespoke non-stationary solvers, arXiv 2403.01329; fitted to this model",)
    fitted = to_tableau(process, params, f"fitted_{nfe}", reference)
    top = min(ranked[:8], key=lambda name: score(begins[name], valid))
    meta = {
        "nfe": nfe, "start": best[2], "steps": steps, "batch": batch, "rate": rate, "weight": weight, "seed": seed,
        "train": len(train), "train seed": train.seed, "valid": len(valid), "valid seed": valid.seed,
        "tolerance": train.tolerance, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    seen = hashes(train) | hashes(valid)
    return Fit(fitted, params, best[2], (top, candidates[top]), tuple(history), seen, meta)
