"""Guidance: functions Denoiser -> Denoiser. What is nonlinear in the network's output belongs here, not in solvers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import PyTree

from jdiff.denoiser import Denoiser, _call, cast_like
from jdiff.predict import convert


def cfg(
    denoiser: Denoiser, unconditional: Denoiser, scale: Any, interval: tuple[float, float] | None = None
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022): unconditional + scale (conditional - unconditional).

    scale      1 is the conditional model, 0 the unconditional; a number or an array that broadcasts against the
               sample. It is an argument of the compiled program: another scale compiles nothing
    interval   (t_low, t_high): guide only where t_low < t <= t_high, and use the conditional model elsewhere
               (Kynkäänniemi et al. 2024), in units of the process's time

    Where both denoisers are one function with the same parameters and two values of `cond`, the branches are
    evaluated as one batch. Raises ValueError for two different processes, or an empty interval.
    """
    if denoiser.process != unconditional.process:
        raise ValueError(f"cfg needs both models on one process; got {denoiser.process} and {unconditional.process}")
    if interval is not None and not interval[0] < interval[1]:
        raise ValueError(f"cfg: interval is {interval}; expected (t_low, t_high) with t_low < t_high")
    low, high = (None, None) if interval is None else (float(interval[0]), float(interval[1]))
    scale = jnp.asarray(scale, jnp.float32) if isinstance(scale, (int, float)) else scale
    branches = _one_batch(denoiser, unconditional) or Partial(_two_calls, denoiser, unconditional)
    init = Partial(_init, denoiser.init, unconditional.init)
    return Denoiser(init, Partial(_guided, branches, scale, low, high), denoiser.process, denoiser.prediction)


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


def _init(first: Partial, second: Partial, x: PyTree) -> PyTree:
    return first(x), second(x)


def _guided(branches: Partial, scale: Any, low: Any, high: Any, x: PyTree, t: Any, carry: PyTree) -> Any:
    conditional, unconditional, carry = branches(x, t, carry)

    def mix(c: jax.Array, u: jax.Array) -> jax.Array:
        w = jnp.asarray(scale, c.dtype)
        if low is not None:
            w = jnp.where((low < t) & (t <= high), w, jnp.ones_like(w))
        return u + w * (c - u)

    return jax.tree.map(mix, conditional, unconditional), carry


def _two_calls(denoiser: Denoiser, unconditional: Denoiser, x: PyTree, t: Any, carry: PyTree) -> Any:
    c, c_carry = denoiser.apply(x, t, carry[0])
    u, u_carry = unconditional.apply(x, t, carry[1])
    u = convert(denoiser.process, x, t, cast_like(u, x), unconditional.prediction, denoiser.prediction)
    return cast_like(c, x), u, (c_carry, u_carry)


def _one_batch(denoiser: Denoiser, unconditional: Denoiser) -> Partial | None:
    """Both branches as one call of twice the batch, if they are the same lifted function but for `cond`."""
    a, b = denoiser.apply, unconditional.apply
    if not (isinstance(a, Partial) and isinstance(b, Partial) and a.func is b.func is _call):
        return None
    if denoiser.prediction != unconditional.prediction:
        return None
    (bound_a, cond_a), (bound_b, cond_b) = a.args, b.args
    leaves_a, tree_a = jax.tree.flatten(bound_a)
    leaves_b, tree_b = jax.tree.flatten(bound_b)
    same = tree_a == tree_b and all(p is q for p, q in zip(leaves_a, leaves_b, strict=True))
    if not same or cond_a is None or jax.tree.structure(cond_a) != jax.tree.structure(cond_b):
        return None
    cond = jax.tree.map(lambda c, u: jnp.concatenate([jnp.asarray(c), jnp.asarray(u)]), cond_a, cond_b)
    return Partial(_twice_the_batch, bound_a, cond)


def _twice_the_batch(bound: Partial, cond: PyTree, x: PyTree, t: Any, carry: PyTree) -> Any:
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), x)
    time = jnp.concatenate([t, t]) if t.ndim == jax.tree.leaves(x)[0].ndim and t.shape[0] > 1 else t
    out = cast_like(bound(twice, time, cond), twice)
    n = jax.tree.leaves(x)[0].shape[0]
    return jax.tree.map(lambda a: a[:n], out), jax.tree.map(lambda a: a[n:], out), carry
