"""The five things a network may predict, and the linear maps between them.

    x0        the clean sample
    eps       the noise, x = alpha x0 + sigma eps
    v         alpha eps - sigma x0                       (Salimans and Ho 2022)
    score     -eps / sigma                               (grad log p_t(x))
    velocity  dx/dt = alpha' x0 + sigma' eps             (flow matching; t = 1 is noise)

Each is a linear combination of x0 and eps, so with x itself any one gives all the others. Both ends of time are
safe: where a quantity is not determined by the output, the finite value below is returned, never NaN.

    at sigma = 0   eps = 0, the limit of E[eps | x] for any smooth density; score from x0 is 0
    at alpha = 0   x0 from eps or score is 0, the mean of centred data (their outputs say nothing about x0 there)
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jdiff.process import Process, Time
from jdiff.process.base import reciprocal

Prediction = Literal["x0", "eps", "v", "score", "velocity"]
KINDS: tuple[str, ...] = get_args(Prediction)


def check_kind(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"unknown prediction kind {kind!r}; expected one of {', '.join(KINDS)}")
    return kind


def model_time(t: Any, x: PyTree) -> Any:
    """t as the model sees it: float32, or float64 where the sample is float64; never bfloat16. A dict for a system's
    parts at their own times."""
    return jax.tree.map(lambda t: jnp.asarray(t, wide(jax.tree.leaves(x)[0].dtype)), t)


def wide(dtype: Any) -> Any:
    """The dtype of times and coefficients beside a sample of `dtype`: float64 beside float64, else float32."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _x0(p: Process, kind: str, t: Time, x: Any, out: Any) -> Any:
    a, s = p.alpha(t), p.sigma(t)
    if kind == "x0":
        return out
    if kind == "eps":
        return reciprocal(a) * (x - s * out)
    if kind == "score":
        return reciprocal(a) * (x + s * s * out)
    if kind == "v":
        return (1.0 / (a * a + s * s)) * (a * x - s * out)
    da, ds = p.dalpha(t), p.dsigma(t)
    return reciprocal(a * ds - s * da) * (ds * x - s * out)


def _eps(p: Process, kind: str, t: Time, x: Any, out: Any) -> Any:
    a, s = p.alpha(t), p.sigma(t)
    if kind == "x0":
        return reciprocal(s) * (x - a * out)
    if kind == "eps":
        return out
    if kind == "score":
        return -s * out
    if kind == "v":
        return (1.0 / (a * a + s * s)) * (s * x + a * out)
    da, ds = p.dalpha(t), p.dsigma(t)
    return reciprocal(a * ds - s * da) * (a * out - da * x)


def convert(process: Process, x: PyTree, t: Time, out: PyTree, source: str, target: str) -> PyTree:
    """`out`, a prediction of kind `source` made at (x, t), as kind `target`.

    x and out are alike: arrays, pytrees of arrays, or the linear symbols of `jdiff.trace`. t broadcasts against
    every leaf, or is a dict of times for the parts of a system. Raises ValueError for an unknown kind, and for a score
    where the noise is not Gaussian.
    """
    check_kind(source)
    check_kind(target)
    if source == target:
        return out
    if not process.gaussian and "score" in (source, target):
        raise ValueError(
            f"no conversion from {source} to {target} on {process}: without Gaussian noise the velocity does not give "
            "the score; between two densities learn both (jdiff.interpolants.stochastic)"
        )

    leaf = functools.partial(_leaf, source, target)
    return jax.tree.map(leaf, process.each(x), process.at(t, x), x, out)


def _leaf(source: str, target: str, p: Process, t: Any, x: Any, out: Any) -> Any:
    if target == "x0":
        return _x0(p, source, t, x, out)
    eps = _eps(p, source, t, x, out)
    if target == "eps":
        return eps
    if target == "score":
        return -reciprocal(p.sigma(t)) * eps
    x0 = _x0(p, source, t, x, out)
    if target == "v":
        return p.alpha(t) * eps - p.sigma(t) * x0
    return p.dalpha(t) * x0 + p.dsigma(t) * eps


def array_of(x: Any, who: str) -> Array:
    """x as one array, for `who`, which takes no pytrees; TypeError else."""
    if not hasattr(x, "shape") or x.ndim < 2 or x.dtype not in (jnp.float32, jnp.float64):
        what = f"{type(x).__name__} of shape {x.shape}, {x.dtype}" if hasattr(x, "shape") else type(x).__name__
        raise TypeError(f"expected one float32 or float64 array (batch, ...), got {what}; {who} takes no pytrees")
    return jnp.asarray(x)
