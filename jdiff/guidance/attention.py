"""Perturbed attention: the model guided away from itself with some attention heads blurred to the identity."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial

from jdiff.denoiser import Denoiser, _call

from .branches import Interval
from .free import cfg
from .schedule import Weight, as_weight

Head = tuple[int, int]


def perturbed(denoiser: Denoiser, u: Any) -> Denoiser:
    """The model with attention maps A' = (1 - u) A + u I: u (layers, heads) in [0, 1], 0 for a head that is left alone.

    For a net of `jdiff.nets` (or one that takes a keyword `perturb` of shape (batch or 1, layers, heads)) as lifted by
    `jdiff.denoiser` or loaded by `train.denoiser_from`. u is an argument of the program. ValueError for u outside
    [0, 1]; TypeError for a denoiser that is no lifted net.
    """
    if not isinstance(denoiser.apply, Partial) or denoiser.apply.func is not _call:
        raise TypeError("perturbed: needs a net lifted by jdiff.denoiser; perturb it before other wrappers")
    if not isinstance(u, Tracer):
        values = np.asarray(u)
        if values.ndim != 2 or not ((values >= 0) & (values <= 1)).all():
            raise ValueError(
                f"perturbed: u has shape {values.shape} and values in [{values.min():g}, {values.max():g}]; expected "
                "(layers, heads) with values in [0, 1]"
            )
    cond = denoiser.apply.args[1]
    cond = dict(cond) if isinstance(cond, dict) else {} if cond is None else {"y": cond}
    cond["perturb"] = jnp.asarray(u, jnp.float32)[None]
    return replace(denoiser, apply=Partial(_call, denoiser.apply.args[0], cond))


def head_mask(heads: Iterable[Head], shape: tuple[int, int], u: float = 1.0) -> np.ndarray:
    """u for the (layer, head) pairs, 0 elsewhere; shape (layers, heads). ValueError for a pair outside it."""
    mask = np.zeros(shape, np.float32)
    for layer, head in heads:
        if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
            raise ValueError(f"head_mask: (layer, head) = {(layer, head)}; expected a pair below {shape}")
        mask[layer, head] = u
    return mask


def soft_pag(
    denoiser: Denoiser, u: Any, scale: Weight, interval: Interval | None = None, *, together: bool = True
) -> Denoiser:
    """SoftPAG (Ahn et al. 2025, arXiv 2506.10978): out + scale (out - out with perturbed heads). u as in `perturbed`.

    u = 0 (or scale = 0) is the model itself; u = 1 for all heads of a layer is PAG (Ahn et al. 2024) on that layer. No
    second condition is needed, so unconditional models can be guided. With classifier-free guidance of scale s beside
    it: `compose([model, perturbed(model, u)], [s + scale, -scale], unconditional)`. 2 evaluations, in one batch.
    """
    excess = as_weight(scale, "soft_pag: scale")
    plain = perturbed(denoiser, jnp.zeros(np.shape(u), jnp.float32))
    whole = Partial(_one_more, excess) if callable(excess) else excess + jnp.ones((), excess.dtype)
    return cfg(plain, perturbed(denoiser, u), whole, interval, together=together)


def _one_more(excess: Partial, t: Any) -> jax.Array:
    return 1.0 + excess(t)


class Hunt(NamedTuple):
    """What `head_hunter` found: the heads in the order of their choice, the score after each round, sets scored."""

    heads: tuple[Head, ...]
    scores: tuple[float, ...]
    evaluations: int


def head_hunter(
    score: Callable[[Sequence[Head]], float], candidates: Sequence[Head], k: int = 1, rounds: int = 3
) -> Hunt:
    """HeadHunter (Ahn et al. 2025): greedy rounds, each scoring the chosen heads with one more and keeping the top k.

    score(heads) is the user's objective, larger is better, of samples drawn with these heads perturbed: a small fixed
    set of prompts and seeds, and others to report. Costs up to rounds x len(candidates) scorings.
    """
    left = list(dict.fromkeys(candidates))
    if k < 1 or rounds < 1 or k * rounds > len(left):
        raise ValueError(f"head_hunter: k = {k}, rounds = {rounds}; expected 1 <= k rounds <= {len(left)} candidates")
    chosen: list[Head] = []
    history, count = [], 0
    for _ in range(rounds):
        scores = [float(score((*chosen, head))) for head in left]
        count += len(scores)
        if not np.isfinite(scores).all():
            bad = left[int(np.argmin(np.isfinite(scores)))]
            raise ValueError(f"head_hunter: the score with head {bad} is not finite")
        best = np.argsort(scores, kind="stable")[::-1][:k]
        history.append(float(scores[best[0]]))
        chosen += [left[i] for i in best]
        left = [head for i, head in enumerate(left) if i not in set(best.tolist())]
    return Hunt(tuple(chosen), tuple(history), count)
