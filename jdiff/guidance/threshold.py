"""Thresholding: the x0 prediction kept inside the range of the data."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import PyTree

from jdiff.denoiser import Denoiser, cast_like
from jdiff.predict import convert


def threshold(denoiser: Denoiser, quantile: float | None = 0.995, limit: Any = 1.0) -> Denoiser:
    """The denoiser with its x0 prediction kept inside [-limit, limit], the range of the data.

    quantile   dynamic thresholding (Saharia et al. 2022, section 2.3; DPM-Solver++, section 6): with s the quantile
               of |x0| over a sample's elements, where s > limit x0 is clipped to [-s, s] and scaled by limit / s.
               None: static thresholding, x0 is clipped to [-limit, limit]

    The result predicts x0. For images, not for latents, whose range means nothing. ValueError for a quantile outside
    (0, 1] or a limit that is not positive.
    """
    if quantile is not None and not 0 < quantile <= 1:
        raise ValueError(f"threshold: quantile is {quantile}; expected a number in (0, 1], or None for static clipping")
    if isinstance(limit, (int, float)) and not limit > 0:
        raise ValueError(f"threshold: limit is {limit}; expected the data's largest absolute value, > 0")
    limit = jnp.asarray(limit, jnp.float32) if isinstance(limit, (int, float)) else limit
    q = None if quantile is None else jnp.asarray(quantile, jnp.float32)
    return Denoiser(denoiser.init, Partial(_thresholded, denoiser, q, limit), denoiser.process, "x0")


def _thresholded(denoiser: Denoiser, quantile: Any, limit: Any, x: PyTree, t: Any, carry: PyTree) -> Any:
    out, carry = denoiser.apply(x, t, carry)
    x0 = convert(denoiser.process, x, t, cast_like(out, x), denoiser.prediction, "x0")

    def leaf(D: jax.Array) -> jax.Array:
        top = jnp.asarray(limit, D.dtype)
        if quantile is None:
            return jnp.clip(D, -top, top)
        axes = tuple(range(1, D.ndim))
        s = jnp.maximum(jnp.quantile(jnp.abs(D), quantile.astype(D.dtype), axis=axes, keepdims=True), top)
        return jnp.clip(D, -s, s) * (top / s)

    return jax.tree.map(leaf, x0), carry
