"""A solver fitted to a model: Gauss-Newton steps on every entry of the table, on trajectories of the model itself."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.process import Process
from jdiff.solvers.auto import CANDIDATES, tables
from jdiff.tableau import Tableau

from .free import Params, from_tableau, to_tableau
from .newton import descend, objective, squares
from .reference import Reference, Source, disjoint, hashes, model_at

ROUNDS = 3  # after each the training trajectories are drawn again and the validation ones looked at


@dataclass(frozen=True)
class Fit:
    """A fitted solver and how it came about.

    start      name of the solver and grid that it began from
    standard   the best of the standard solvers on the validation trajectories, its table beside it
    history    (step, training objective, validation objective) at each look
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


def table(
    source: Source,
    nfe: int,
    train: Reference,
    valid: Reference,
    *,
    steps: int = 48,
    use: int = 1024,
    batch: int = 256,
    weight: float = 1.0,
    starts: int = 2,
    candidates: Mapping[str, Tableau] | None = None,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> Fit:
    """Fit a solver of `nfe` evaluations to a model: every entry and time, by Gauss-Newton steps through the sampler.

    train, valid   trajectories (`jdiff.fit.reference`) with no noise in common; ValueError otherwise
    steps          from each start, in rounds of a third
    use            trajectories of a round: all of `train`, or where it holds more, from the second round on the quarter
                   of `use` that is worst now and others at random, with the weights that make them stand for all
    batch          trajectories at a time; memory is that of back-propagation through `nfe` evaluations of them
    weight         of the logarithm of the mean error beside the mean logarithm (see `objective`)
    starts         how many of the candidates, ranked on the training trajectories, are optimised; the best look on the
                   validation trajectories is kept, of all
    candidates     name -> Tableau to start from; default the standard solvers on the standard grids
    progress       called as progress(fraction done, text) between rounds

    It computes in the dtype of train.x; the table is built from the result in float64. The denoiser is differentiated
    backward in x and forward in t. Report its gain with `report`.
    """
    disjoint(train, valid, "validation")
    began = time.perf_counter()
    process = model_at(source, jnp.asarray(train.index[:1])).process
    candidates = standard(process, nfe) if candidates is None else candidates
    if not candidates:
        raise ValueError(f"no standard solver has {nfe} network evaluations; expected 1 or more, or candidates")
    begins = {name: from_tableau(T, least=1e-3) for name, T in candidates.items()}
    batch = min(batch, len(train))
    error = lambda params, ref: squares(source, params, ref, batch)
    score = lambda params, ref: float(np.nan_to_num(objective(error(params, ref), weight), nan=np.inf))
    few = train[: min(512, use)]
    ranked = sorted(begins, key=lambda name: (score(begins[name], few), name))
    best, history = (np.inf, begins[ranked[0]], ranked[0]), []
    rng, firsts = np.random.default_rng(seed), ranked[:starts]
    for s, name in enumerate(firsts):
        params, damping = begins[name], 1e-3
        for r in range(ROUNDS + 1):
            now = score(params, valid)
            if now < best[0]:
                best = (now, params, name)
            if progress is not None:
                progress((s + r / ROUNDS) / len(firsts), f"from {name}: objective {now:.3f}")
            if r < ROUNDS:
                rows, shares = _chosen(error(params, train) if r and len(train) > use else None, len(train), use, rng)
                some, key = train[rows], jax.random.fold_in(jax.random.key(seed), s * ROUNDS + r)
                history.append((r * steps // ROUNDS, objective(error(params, some), weight, shares), now))
                options = {"steps": -(-steps // ROUNDS), "batch": batch, "weight": weight, "shares": shares}
                params, damping = descend(source, params, some, key, damping=damping, **options)
    reference = ("Shaul et al. 2024, bespoke non-stationary solvers, arXiv 2403.01329; fitted to this model",)
    fitted = to_tableau(process, best[1], f"fitted_{nfe}", reference)
    top = min(ranked[:8], key=lambda name: score(begins[name], valid))
    meta = {
        "nfe": nfe, "start": best[2], "steps": steps, "use": use, "batch": batch, "weight": weight, "seed": seed,
        "train": len(train), "train seed": train.seed, "valid": len(valid), "valid seed": valid.seed,
        "tolerance": train.tolerance, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    seen = hashes(train) | hashes(valid)
    return Fit(fitted, best[1], best[2], (top, candidates[top]), tuple(history), seen, meta)


def _chosen(now: np.ndarray | None, n: int, use: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a round, and the share of the whole that each stands for. now (n,): the squares of all, or none."""
    if n <= use:
        return np.arange(n), np.full(n, 1.0 / n)
    worst = 0 if now is None else use // 4
    order = rng.permutation(n) if now is None else np.argsort(-np.nan_to_num(now, nan=np.inf))
    rest = rng.permutation(order[worst:])[: use - worst]
    shares = np.concatenate([np.ones(worst), np.full(len(rest), (n - worst) / len(rest))]) / n
    return np.concatenate([order[:worst], rest]), shares
