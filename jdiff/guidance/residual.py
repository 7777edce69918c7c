"""Residual classifier-free guidance: a negative branch that costs nothing, or one evaluation in all."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import PyTree

from jdiff.denoiser import Denoiser, cast_like
from jdiff.predict import convert

from .branches import present
from .schedule import Weight, as_weight, at


def residual_cfg(
    denoiser: Denoiser,
    scale: Weight,
    *,
    source: PyTree | None = None,
    negative: Denoiser | None = None,
    delta: float = 1.0,
) -> Denoiser:
    """Residual CFG of StreamDiffusion (Kodaira et al. 2023, arXiv 2312.12491): the negative branch is a virtual noise.

        eps = delta e + scale (eps_c - delta e),   e = (x_t - alpha X) / sigma

    Self-negative: X = source, the image that is edited, batch axis first; n evaluations for n steps. Onetime-negative:
    X is what `negative` predicts at the first evaluation, remembered in the carry; n + 1. Give one of the two.

    delta  moderates the virtual noise. At 1 the result is x0 = scale D_c - (scale - 1) X, away from the source with
           all that it holds; less keeps more of it. scale 1 is the conditional model whatever delta is.

    Predicts the noise. ValueError for both or none of source and negative, a delta outside [0, 2].
    """
    if (source is None) == (negative is None):
        raise ValueError(
            "residual_cfg: give one of source (self-negative: the edited image) and negative (the unconditional "
            "denoiser, for onetime-negative)"
        )
    if not 0 <= delta <= 2:
        raise ValueError(f"residual_cfg: delta is {delta}; expected a number in [0, 2], and 1 or a little less")
    weights = as_weight(scale, "residual_cfg: scale"), as_weight(float(delta))
    if negative is None:
        init, branch = denoiser.init, Partial(_Residual(), denoiser, jax.tree.map(jnp.asarray, source), weights)
    else:
        present((denoiser, negative), "residual_cfg")
        init, branch = Partial(_first, denoiser.init, negative.init), Partial(_Once(), denoiser, negative, weights)
    return Denoiser(init, branch, denoiser.process, "eps")


@dataclass(frozen=True)
class _Residual:
    def __call__(self, denoiser: Denoiser, source: PyTree, weights: Any, x: PyTree, t: Any, carry: PyTree) -> Any:
        out, carry = denoiser.apply(x, t, carry)
        p = denoiser.process
        eps = convert(p, x, t, cast_like(out, x), denoiser.prediction, "eps")
        virtual = convert(p, x, t, cast_like(source, x), "x0", "eps")
        scale, delta = weights

        def leaf(c: jax.Array, e: jax.Array) -> jax.Array:
            e = delta.astype(e.dtype) * e
            return e + at(scale, t, c) * (c - e)

        return jax.tree.map(leaf, eps, virtual), carry


def _first(one: Partial, two: Partial, x: PyTree) -> PyTree:
    fresh = jnp.ones(jax.tree.leaves(x)[0].shape[0], bool)  # nothing was evaluated yet, a sample
    return fresh, jax.tree.map(jnp.zeros_like, x), one(x), two(x)


@dataclass(frozen=True)
class _Once:
    def __call__(self, denoiser: Denoiser, negative: Denoiser, weights: Any, x: PyTree, t: Any, carry: Any) -> Any:
        fresh, source, one, two = carry

        def look(_: Any) -> Any:
            out, after = negative.apply(x, t, two)
            return convert(negative.process, x, t, cast_like(out, x), negative.prediction, "x0"), after

        source, two = jax.lax.cond(fresh[0], look, lambda kept: kept, (source, two))
        eps, one = _Residual()(denoiser, source, weights, x, t, one)
        return eps, (jnp.zeros_like(fresh), source, one, two)
