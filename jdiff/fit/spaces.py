"""What evolution searches: time grids, solver schedules (S3), subsets of times and layers (AutoDiffusion)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jdiff import times
from jdiff.process import Process
from jdiff.solvers import usf
from jdiff.solvers.usf import Decision
from jdiff.tableau import Tableau
from jdiff.trace import Solver

from .free import _ends
from .reference import Reference, Source, model_at
from .score import score
from .search import Found, Space, evolution, ranking


def to_times(process: Process, log_steps: np.ndarray) -> np.ndarray:
    """log_steps (n,) -> n + 1 times from t_max to 0: n - 1 steps in lam and a last one to t_min, of these sizes."""
    first, last = _ends(process)
    steps = np.exp(log_steps - np.max(log_steps))
    lam = first + (last - first) * np.cumsum(steps / steps.sum())[:-1]
    return np.concatenate([[process.t_max], process.t_of_lam(lam), [0.0]])


def from_times(process: Process, t: np.ndarray) -> np.ndarray:
    """The inverse of `to_times`, for a grid from t_max to 0 (steps of nothing are made small ones)."""
    first, last = _ends(process)
    lam = np.concatenate([[first], np.clip(process.lam(t[1:-1]), first, last), [last]])
    return np.log(np.maximum(np.diff(lam), 1e-3 * (last - first)))


def grid(
    source: Source,
    solver: Solver,
    nfe: int,
    ref: Reference,
    *,
    weight: float = 1.0,
    budget: int = 400,
    population: int = 16,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[np.ndarray, Found[np.ndarray]]:
    """Times for a solver and a model: (mu, lambda) evolution of the steps in lam, from the best standard grid.

    Returns (times (n + 1,), what was found). Weighted recombination of the better quarter and a step size that follows
    the success of its own mutations; candidates of all generations run in one compiled program. Report the gain on
    noise that is not `ref`'s.
    """
    process, n = model_at(source, np.asarray(ref.index[:1])).process, solver.steps(nfe)

    def evaluate(many: Sequence[np.ndarray]) -> np.ndarray:
        return score(source, [solver(process, to_times(process, z)) for z in many], ref, weight)

    rng = np.random.default_rng(seed)
    seen = [from_times(process, make(process, n)) for make in times.ALL.values()]
    scores = evaluate(seen)
    mean, size = seen[int(np.argmin(scores))], 0.3
    history = [float(scores.min())]
    while len(seen) < budget:
        draws = rng.normal(size=(min(population, budget - len(seen)), n))
        found = evaluate(now := [mean + size * z for z in draws])
        order = np.argsort(found, kind="stable")[: max(population // 4, 1)]
        w = np.log(len(order) + 1) - np.log(np.arange(1, len(order) + 1))
        mean = mean + size * (w / w.sum()) @ draws[order]
        size *= np.exp(0.3 * (1.0 if found.min() < history[-1] else -0.5))
        seen, scores = seen + now, np.append(scores, found)
        history.append(float(scores.min()))
        if progress is not None:
            progress(len(seen) / budget, f"best {history[-1]:.4g}")
    best = int(np.argmin(scores))
    found = Found(seen[best], float(scores[best]), tuple(history), tuple(seen), scores)
    return to_times(process, seen[best]), found


Schedule = tuple[tuple[float, ...], tuple[Decision, ...]]  # logarithms of the steps in lam, and a decision each


def schedules(nfe: int) -> Space[Schedule]:
    """S3's search space: schedules of at most `nfe` evaluations, with free times."""
    choices = {
        "order": (1, 2, 3), "kind": usf.KINDS, "start": usf.STARTS, "derivative": usf.DERIVATIVES,
        "corrector": (0, 1, 2, 3),
    }  # fmt: skip

    def fit(steps: list[float], decisions: list[Decision]) -> Schedule:
        """As many steps as `nfe` pays for; cheap ones are added, dear last ones made cheaper."""
        while usf.nfe(decisions) > nfe:
            dear = max(range(len(decisions) - 1), key=lambda i: (decisions[i].cost, i))
            if decisions[dear].cost > 1:
                decisions[dear] = replace(decisions[dear], start="multistep")
            else:
                del steps[dear], decisions[dear]
        while usf.nfe(decisions) < nfe:
            steps.insert(0, float(np.mean(steps)))
            decisions.insert(0, Decision(2))
        return tuple(steps), tuple(decisions)

    pick = lambda rng, values: values[rng.integers(len(values))]
    decide = lambda rng: Decision(**{k: pick(rng, v) for k, v in choices.items()})

    def random(rng: np.random.Generator) -> Schedule:
        n = int(rng.integers(max(nfe // 2, 1), nfe + 1))
        return fit(list(rng.normal(0, 0.4, n)), [decide(rng) for _ in range(n)])

    def mutate(rng: np.random.Generator, a: Schedule) -> Schedule:
        steps, decisions = list(a[0]), list(a[1])
        steps = [s + 0.3 * rng.normal() * (rng.random() < 0.5) for s in steps]
        for i in np.flatnonzero(rng.random(len(decisions)) < 1.5 / len(decisions)):
            what = pick(rng, tuple(choices))
            decisions[i] = replace(decisions[i], **{what: pick(rng, choices[what])})
        return fit(steps, decisions)

    def cross(rng: np.random.Generator, a: Schedule, b: Schedule) -> Schedule:
        n = min(len(a[0]), len(b[0]))
        cut = int(rng.integers(0, n + 1))
        return fit([*a[0][:cut], *b[0][cut:]], [*a[1][:cut], *b[1][cut:]])

    def encode(a: Schedule) -> np.ndarray:
        steps = np.exp(np.asarray(a[0]))
        rows = np.zeros((nfe, 11))
        for i, (where, d) in enumerate(zip(np.cumsum(steps / steps.sum()), a[1], strict=True)):
            how = usf.DERIVATIVES.index(d.derivative)
            rows[i] = (1, where, d.order == 2, d.order == 3, d.kind == "eps", d.cost, how == 1, how == 2,
                       d.corrector == 1, d.corrector == 2, d.corrector == 3)  # fmt: skip
        return rows.ravel()

    return Space(random, mutate, cross, encode)


def compile_schedule(process: Process, found: Schedule) -> Tableau:
    """The tableau of an individual of `schedules`."""
    return usf.schedule(found[1])(process, to_times(process, np.asarray(found[0])))


def known_schedules(process: Process, nfe: int) -> list[Schedule]:
    """DDIM, 2M, 3M and UniPC on the standard grids: where S3 starts."""
    lists = ([Decision()], [Decision(2, derivative="halved")], [Decision(2)], [Decision(3)],
             [Decision(2, corrector=2)], [Decision(3, corrector=3)], [Decision(3, "eps")])  # fmt: skip
    steps = [tuple(from_times(process, make(process, nfe)).tolist()) for make in times.ALL.values()]
    return [(s, tuple(d * nfe)) for d in lists for s in steps]


def s3(
    source: Source,
    nfe: int,
    ref: Reference,
    *,
    weight: float = 1.0,
    budget: int = 600,
    population: int = 40,
    predict: bool = True,
    known: bool = True,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[Tableau, Found[Schedule]]:
    """S3 (Liu et al. 2023, arXiv 2312.07243): search solver schedules of `nfe` evaluations for a model.

    Multi-stage: each generation trains a predictor of rank on all schedules that were run, and runs those of many
    mutants and crossings that it likes best. predict=False leaves it out; known=False starts from random schedules
    alone. Their quality is the error on the trajectories `ref`; report a gain on other noise.
    """
    process = model_at(source, np.asarray(ref.index[:1])).process

    def evaluate(many: Sequence[Schedule]) -> np.ndarray:
        values, tables = np.full(len(many), np.inf), {}
        for i, a in enumerate(many):
            try:
                tables[i] = compile_schedule(process, a)
            except ValueError:  # coefficients beyond all bounds
                continue
        if tables:
            values[list(tables)] = score(source, list(tables.values()), ref, weight)
        return values

    found = evolution(
        schedules(nfe), evaluate, initial=known_schedules(process, nfe) if known else (), budget=budget,
        population=population, parents=max(population // 4, 1), predictor=ranking if predict else None, seed=seed,
        progress=progress,
    )  # fmt: skip
    return compile_schedule(process, found.best), found


Subset = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]  # indices into the times, falling; kept blocks of each


def subsets(total: int, k: int, blocks: int = 0, keep: float = 1.0) -> Space[Subset]:
    """AutoDiffusion's search space (Li et al. 2023, arXiv 2309.10438): k of `total` times, and blocks kept at each.

    An individual: (k indices, strictly falling, each below `total`; k masks of `blocks` zeros and ones). keep: the
    share of all k x blocks that may be kept, at most; 1 (or blocks = 0) leaves every mask full.
    """
    if not 1 <= k <= total:
        raise ValueError(f"subsets: expected 1 <= k <= {total} times, got k = {k}")
    allowed = int(np.floor(keep * k * blocks + 1e-9))

    def repair(rng: np.random.Generator, chosen: Any, masks: np.ndarray) -> Subset:
        chosen = {int(c) for c in chosen}
        while len(chosen) < k:
            chosen.add(int(rng.integers(total)))
        chosen = rng.permutation(sorted(chosen))[:k]
        masks = masks.copy()
        kept = np.argwhere(masks == 1)
        for i, j in rng.permutation(kept)[: max(len(kept) - allowed, 0)]:
            masks[i, j] = 0
        missing = np.argwhere(masks == 0)
        for i, j in rng.permutation(missing)[: max(allowed - int(masks.sum()), 0)]:
            masks[i, j] = 1
        return tuple(sorted((int(c) for c in chosen), reverse=True)), tuple(map(tuple, masks.tolist()))

    full = lambda: np.ones((k, blocks), int)

    def mutate(rng: np.random.Generator, a: Subset) -> Subset:
        near = [c + int(rng.integers(-2, 3)) if rng.random() < 0.5 else c for c in a[0]]
        near = [int(rng.integers(total)) if rng.random() < 0.1 else min(max(c, 0), total - 1) for c in near]
        masks = np.array(a[1], int).reshape(k, blocks)
        flip = rng.random(masks.shape) < (1.0 / max(masks.size, 1) if keep < 1 else 0.0)
        return repair(rng, near, np.where(flip, 1 - masks, masks))

    def cross(rng: np.random.Generator, a: Subset, b: Subset) -> Subset:
        masks = [np.array(m, int).reshape(k, blocks) for m in (a[1], b[1])]
        rows = rng.random((k, 1)) < 0.5
        return repair(rng, [x if rng.random() < 0.5 else y for x, y in zip(a[0], b[0], strict=True)],
                      np.where(rows, *masks))  # fmt: skip

    def encode(a: Subset) -> np.ndarray:
        return np.concatenate([np.array(a[0]) / total, np.array(a[1], float).ravel()])

    return Space(lambda rng: repair(rng, [], full()), mutate, cross, encode)
