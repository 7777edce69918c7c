"""Several models as one: weighted sums, learned mixtures, and factor graphs over regions of the sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from jdiff.denoiser import Denoiser

from .branches import branches, combine
from .schedule import Weight, as_weight, at


# --- weighted sums
def compose(
    denoisers: Sequence[Denoiser],
    weights: Sequence[Weight],
    unconditional: Denoiser | None = None,
    *,
    together: bool = True,
) -> Denoiser:
    """Composed models (Liu et al. 2022, arXiv 2206.01714): the noises' sum, sum_i w_i eps_i, of any weights.

    With `unconditional`: eps_u + sum_i w_i (eps_i - eps_u), a negative weight for what shall not be there. Without:
    scores of a product of experts, prod_i p_i^{w_i} at t = 0 (at t > 0 noising does not commute with the product: the
    samples are those of the product only for steered samplers, `jdiff.steering`). Weights as cfg's scale.

    Predicts the noise. An evaluation of each, in one batch where they are one network.
    """
    if not denoisers or len(denoisers) != len(weights):
        raise ValueError(f"compose: {len(denoisers)} models and {len(weights)} weights; expected one weight a model")
    ws = tuple(as_weight(w, f"compose: weight {i}") for i, w in enumerate(weights))
    models = list(denoisers) + ([] if unconditional is None else [unconditional])
    return combine(Partial(_sum, ws, unconditional is not None), models, kind="eps", together=together, name="compose")


def _sum(ws: tuple[Any, ...], rest: Any, x: PyTree, t: Any, outs: tuple[PyTree, ...]) -> PyTree:
    if len(outs) == len(ws):
        return jax.tree.map(lambda *e: sum(at(w, t, v) * v for w, v in zip(ws, e, strict=True)), *outs)
    return jax.tree.map(lambda *e: e[-1] + sum(at(w, t, v) * (v - e[-1]) for w, v in zip(ws, e, strict=False)), *outs)


# --- learned mixtures
def mix(
    denoisers: Sequence[Denoiser], gate: Callable[..., Array], *, shared: Sequence[int] = (), together: bool = True
) -> Denoiser:
    """x0 = sum_i A_i D_i with weights A = softmax_i(gate(x, t, outs)), a number for each element or for groups.

    gate    gate(x, t, (D_0, D_1, ..)) -> logits (models, *x.shape), or what broadcasts against it, such as
            (models, 1, ..); parameters by `jax.tree_util.Partial(gate, params)`, so that it can be trained through
            `jdiff.losses` or a sampler. Zero logits are the mean of the models
    shared  axes of x over which the logits are averaged first, so that the weights are one there: for motions
            (batch, frame, joint, ..) MixerMDM's (Ruiz-Ponce et al. 2025) global is (1, 2, ..), per-frame (2, ..),
            per-joint (1,), per-frame-joint ()

    For two models A_0 is a sigmoid of the logits' difference (MixerMDM's w, in out_2 + w (out_1 - out_2)); for more it
    is AFA's aggregation (Wang et al. 2024) at the output in place of the features. Predicts x0.
    """
    rule = Partial(_Mixture(tuple(shared)), gate if isinstance(gate, Partial) else Partial(gate))
    return combine(rule, denoisers, kind="x0", together=together, name="mix")


@dataclass(frozen=True)
class _Mixture:
    shared: tuple[int, ...]

    def __call__(self, gate: Partial, x: Array, t: Any, outs: tuple[Array, ...]) -> Array:
        logits = gate(x, t, outs)
        full = (len(outs), *x.shape)
        if logits.ndim != len(full) or any(n not in (1, m) for n, m in zip(logits.shape, full, strict=True)):
            raise ValueError(f"mix: the gate returned {logits.shape}; expected logits that broadcast against {full}")
        if logits.shape[0] != len(outs):
            raise ValueError(f"mix: the gate returned logits for {logits.shape[0]} models, there are {len(outs)}")
        logits = jnp.mean(logits, axis=tuple(a + 1 for a in self.shared), keepdims=True) if self.shared else logits
        weights = jax.nn.softmax(logits, axis=0).astype(x.dtype)
        return sum((w * D for w, D in zip(weights[1:], outs[1:], strict=True)), weights[0] * outs[0])


# --- factor graphs
@dataclass(frozen=True)
class Factor:
    """A model of the slice [start, stop) of the sample along an axis. weight: -1 for the overlap of two others.

    part: a boolean mask over the sample's last axis, the parts that this factor speaks for; None: all.
    """

    denoiser: Denoiser
    start: int
    stop: int
    weight: float = 1.0
    part: Any = None


def factor_graph(factors: Sequence[Factor], length: int, axis: int = 1, *, together: bool = True) -> Denoiser:
    """A long sample from models of its windows: scores of the windows minus those of their overlaps, each by x0.

    DiffCollage (Zhang et al. 2023, arXiv 2303.17076): for a Markov chain of factors p(x) = prod p(window) / prod
    p(overlap), so the weights of the factors that speak for an element add up to 1. Exact on clean Markov data; at
    sigma > 0 a noised chain is not Markov, and the error falls geometrically with the overlap.

    factors  windows with weight 1, overlaps with weight -1; windows of one network and one length are one batch
    length   of the sample along `axis` (counted with the batch axis, so from 1)

    An evaluation a factor, of its window. Predicts x0. ValueError for a factor outside the sample, or an element whose
    weights do not add up to 1.
    """
    if axis < 1:
        raise ValueError(f"factor_graph: axis is {axis}; expected 1 or more: axis 0 is the batch")
    if not factors:
        raise ValueError("factor_graph: no factors; expected windows that cover the sample")
    total, d = np.zeros((length, 1)), 1
    for f in factors:
        if not 0 <= f.start < f.stop <= length:
            raise ValueError(f"factor_graph: a factor spans [{f.start}, {f.stop}); expected a part of [0, {length})")
        part = np.ones(1) if f.part is None else np.asarray(f.part, bool).astype(float)
        if d == 1 and part.size > 1:
            total, d = np.repeat(total, part.size, axis=1), part.size
        total[f.start : f.stop] += f.weight * part
    if np.any(bad := np.abs(total - 1.0) > 1e-6):
        i, j = (int(v) for v in np.argwhere(bad)[0])
        raise ValueError(
            f"factor_graph: the weights at position {i} (part {j}) add up to {total[i, j]:g}; expected 1: windows +1, "
            "the overlaps of neighbours -1"
        )
    spans = tuple((f.start, f.stop) for f in factors)
    models = [f.denoiser for f in factors]
    lengths = [stop - start for start, stop in spans]
    _, evaluate = branches(models, kind="x0", together=together, name="factor_graph", shapes=lengths)
    masks = tuple(None if f.part is None else jnp.asarray(f.part, bool) for f in factors)
    weights = tuple(jnp.asarray(f.weight, jnp.float32) for f in factors)
    graph = _Graph(axis, spans)
    init = Partial(_Start(graph), tuple(m.init for m in models))
    return Denoiser(init, Partial(graph, evaluate, weights, masks), models[0].process, "x0")


@dataclass(frozen=True)
class _Graph:
    axis: int
    spans: tuple[tuple[int, int], ...]

    def windows(self, x: Array) -> tuple[Array, ...]:
        return tuple(jax.lax.slice_in_dim(x, *span, axis=self.axis) for span in self.spans)

    def __call__(self, evaluate: Partial, weights: Any, masks: Any, x: Array, t: Any, carry: Any) -> Any:
        if t.ndim == x.ndim and t.shape[self.axis] > 1:
            raise ValueError("factor_graph takes one time a sample: its windows see parts of the axis")
        outs, carry = evaluate(self.windows(x), t, carry)
        total = jnp.zeros_like(x)
        for (start, stop), w, mask, D in zip(self.spans, weights, masks, outs, strict=True):
            D = w.astype(D.dtype) * (D if mask is None else jnp.where(mask, D, jnp.zeros_like(D)))
            place = (slice(None),) * self.axis + (slice(start, stop),)
            total = total.at[place].add(D)
        return total, carry


@dataclass(frozen=True)
class _Start:
    graph: _Graph

    def __call__(self, inits: tuple[Partial, ...], x: Array) -> tuple[Any, ...]:
        return tuple(init(w) for init, w in zip(inits, self.graph.windows(x), strict=True))


@dataclass(frozen=True)
class Track:
    """A prompt on [start, stop) of a timeline, for some parts of the body: a boolean mask over the last axis."""

    denoiser: Denoiser
    start: int
    stop: int
    part: Any = None


def timeline(
    tracks: Sequence[Track], unconditional: Denoiser, length: int, overlap: int, axis: int = 1, *, together: bool = True
) -> Denoiser:
    """STMC (Petrovich et al. 2024, arXiv 2401.08559): prompts on intervals and parts of the body, as a factor graph.

    For each part its tracks, sorted, cover [0, length) without gaps or overlaps (the owner of each frame; gaps are
    tracks of the unconditional model). Each window is widened by half of `overlap` into its neighbours, and the
    unconditional model's prediction on the `overlap` frames that two share is subtracted once.

    Costs an evaluation a track and one a transition, of the window each. ValueError for parts that leave a frame
    without an owner, or tracks shorter than the overlap.
    """
    if overlap < 2 or overlap % 2:
        raise ValueError(f"timeline: overlap is {overlap}; expected an even number of frames, at least 2")
    half, factors = overlap // 2, []
    for part in dict.fromkeys(None if t.part is None else tuple(np.asarray(t.part, bool)) for t in tracks):
        own = [t for t in tracks if (None if t.part is None else tuple(np.asarray(t.part, bool))) == part]
        own.sort(key=lambda t: t.start)
        ends = [0, *(t.stop for t in own)]
        if [t.start for t in own] != ends[:-1] or ends[-1] != length:
            spans = [(t.start, t.stop) for t in own]
            raise ValueError(f"timeline: tracks {spans} do not cover [0, {length}) once; let `unconditional` fill gaps")
        if short := [(t.start, t.stop) for t in own if t.stop - t.start < overlap]:
            raise ValueError(f"timeline: track {short[0]} is shorter than the overlap, {overlap}")
        for t in own:
            factors.append(Factor(t.denoiser, max(t.start - half, 0), min(t.stop + half, length), 1.0, t.part))
        for t in own[:-1]:
            factors.append(Factor(unconditional, t.stop - half, t.stop + half, -1.0, t.part))
    return factor_graph(factors, length, axis, together=together)
