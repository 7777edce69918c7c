"""AutoDiffusion (Li et al. 2023, arXiv 2309.10438): a subset of the times, and at each of them a subset of the layers.

net = jdiff.nets.build("DiT-S/2", ...)                      # or any module that takes a mask, net(x, t, blocks=..)
fitness = lambda model, table: distance(jdiff.sample(model, table, x))     # the smaller the better
found = jdiff.fit.autodiffusion(jdiff.denoiser(net, p, "x0"), 4, net.num_blocks, fitness, keep=0.8)
x0 = jdiff.sample(found.model, found.tableau, noise)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from jdiff.denoiser import Denoiser
from jdiff.process import Time
from jdiff.solvers.classic import ddim
from jdiff.tableau import Tableau
from jdiff.trace import Solver

from .search import Found, evolution
from .spaces import Subset, subsets


@dataclass(frozen=True)
class AutoDiffusion:
    """What was found: the model with its masks, the table to run it with, and the stages of the search."""

    model: Denoiser
    tableau: Tableau
    stages: tuple[Found[Subset], ...]


def layered(model: Denoiser, masks: Sequence[Sequence[int]] | np.ndarray) -> Denoiser:
    """`model` with blocks of its net skipped: masks (K, num_blocks), row k for evaluation k of a sampler.

    The net is called with blocks=masks[k] (`jdiff.nets`), 0 where a block is skipped; the count k is the carry, and
    masks are arguments of the compiled program. A sampler of more than K evaluations takes the last row again.
    TypeError for a denoiser that `jdiff.denoiser` did not make, ValueError for masks of another shape.
    """
    rows = jnp.asarray(np.asarray(masks, np.float32))
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"layered: masks has shape {rows.shape}; expected (evaluations, num_blocks)")
    model.with_cond(None)  # refuses what has no condition to replace
    return Denoiser(_first, Partial(_masked, model, rows), model.process, model.prediction)


def _first(x: PyTree) -> Array:
    return jnp.zeros((), jnp.int32)


def _masked(model: Denoiser, rows: Array, x: PyTree, t: Time, k: Array) -> tuple[PyTree, Array]:
    cond = model.apply.args[1]  # type: ignore[attr-defined]
    named = cond if isinstance(cond, dict) else {} if cond is None else {"y": cond}
    out, _ = model.with_cond({**named, "blocks": rows[k]}).apply(x, t, model.init(x))
    return out, k + 1


def autodiffusion(
    model: Denoiser,
    k: int,
    blocks: int,
    fitness: Callable[[Denoiser, Tableau], float],
    *,
    keep: float = 1.0,
    total: int = 100,
    solver: Solver | None = None,
    budget: int = 256,
    population: int = 32,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> AutoDiffusion:
    """Two stages of evolution: k of `total` uniform times with the full net, then times and layers together.

    blocks   num_blocks of the net; keep: the share of the k x blocks that may run (1: all, and no second stage)
    fitness  (denoiser, table) -> a number, the smaller the better; a distance of samples to data in the paper
    solver   of one evaluation a step; default DDIM. The first of the k times is t_max, and the last step goes to 0
    budget   evaluations of `fitness`, half of them in each stage; the second starts from the first's best times
    """
    p, make = model.process, solver or ddim()

    def pair(a: Subset) -> tuple[Denoiser, Tableau]:
        times = np.append(p.t_max * (np.array(a[0]) + 1.0) / total, 0.0)
        times[0] = p.t_max
        return layered(model, np.array(a[1]).reshape(k, blocks)), make(p, times)

    def search(share: float, initial: Sequence[Subset], start: float, end: float) -> Found[Subset]:
        def say(done: float, text: str) -> None:
            if progress is not None:
                progress(start + (end - start) * done, text)

        return evolution(
            subsets(total, k, blocks, share), lambda many: np.array([float(fitness(*pair(a))) for a in many]),
            initial=initial, budget=round(budget * (end - start)), population=population, seed=seed, progress=say,
        )  # fmt: skip

    full = ((1,) * blocks,) * k
    even = tuple(round(total * (k - i) / k) - 1 for i in range(k))
    stages = [search(1.0, [(even, full)], 0.0, 1.0 if keep == 1 else 0.5)]
    if keep < 1:
        rng, best = np.random.default_rng(seed), np.argsort(stages[0].scores)[: population // 2]
        masked = [subsets(total, k, blocks, keep).random(rng)[1] for _ in best]
        stages.append(search(keep, [(stages[0].seen[i][0], m) for i, m in zip(best, masked, strict=True)], 0.5, 1.0))
    return AutoDiffusion(*pair(stages[-1].best), tuple(stages))
