"""Gauss-Newton steps on the free table (`jdiff.fit.free`): a few dozen do what thousands of a gradient method do.

With r_i = x_K - target of trajectory i and J_i its derivative in the P parameters, one step solves

    (H + damping diag H) step = -sum_i w_i J_i^T r_i,       H = sum_i w_i J_i^T J_i,       w_i = d objective / d |r_i|^2

(the objective is concave in each |r_i|^2, so that the weighted sum of squares lies above it). J_i itself is never
formed: H is the mean of sum_i w_i (J_i^T s_i)(J_i^T s_i)^T over random signs s_i, of which one a trajectory is enough
where there are several trajectories a parameter. So a step costs two passes backward. And a pass backward to the points
x_k alone gives every trajectory its own derivatives: those by the weights of D_j in x_k are products of the two.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from jdiff.solvers.auto import floored

from .free import Coefficients, Params, coefficients, evaluate, rollout
from .reference import Reference, as_argument, model_at

SHARE = 3.0  # the most that one trajectory may weigh in a step, of the average one's leverage


def objective(squares: Any, weight: float = 1.0, shares: Any = None) -> float:
    """mean log e^2 + weight log (mean e)^2 of the mean squares e^2 (n,) of the trajectories' errors: the first term is
    for the typical one, the second for the few that end in another mode (the tail of such errors falls as 1 / e^2, so
    that the mean of e hears every size of them alike, and that of e^2 the largest alone). Free of scale.

    shares  (n,): of each trajectory in the means; default equal. Infinite where a square is not finite
    """
    e, shares = floored(squares), 1.0 / len(squares) if shares is None else shares
    value = float(np.sum(shares * np.log(e)) + 2.0 * weight * np.log(np.sum(shares * np.sqrt(e))))
    return value if np.isfinite(value) else np.inf


def _slopes(squares: Any, weight: float, shares: np.ndarray) -> np.ndarray:
    """The derivatives of `objective` by the squares."""
    e = floored(squares)
    return shares / e + weight * shares / (np.sqrt(e) * np.sum(shares * np.sqrt(e)))


@jax.jit
def _end(source: Any, params: Params, x: Array, target: Array, index: Array) -> Array:
    denoiser = model_at(source, index)
    points, _ = rollout(denoiser, coefficients(denoiser.process, params), x)
    return jnp.mean((points[-1] - target) ** 2, axis=tuple(range(1, x.ndim)))


@jax.jit
def _derivatives(source: Any, params: Params, x: Array, target: Array, index: Array, signs: Array) -> Any:
    """J_i^T r_i and J_i^T s_i of each trajectory, both (n, P)."""
    denoiser = model_at(source, index)
    p, dtype = denoiser.process, x.dtype
    flat, back = ravel_pytree(params)
    chain = jax.jacfwd(lambda flat: ravel_pytree(coefficients(p, back(flat)))[0])(flat).astype(dtype)
    co = Coefficients(*(a.astype(dtype) for a in coefficients(p, params)))

    def nudged(nudges: Array) -> Any:
        points, outputs = rollout(denoiser, co, x, nudges)
        return points[-1], (points, outputs)

    end, backward, (points, D) = jax.vjp(nudged, jnp.zeros((len(co.c), *x.shape), dtype), has_aux=True)

    def in_time(row: Any) -> Array:
        point, t = row
        look = lambda t: evaluate(denoiser, point, t, denoiser.init(point))[0]
        return jax.jvp(look, (t,), (jnp.ones_like(t),))[1]

    asked = jnp.concatenate([x[None], points[:-1]])
    flat_in = lambda a: a.reshape(*a.shape[: a.ndim - target.ndim + 1], -1)  # one axis a sample
    slope, x, D = flat_in(jax.lax.map(in_time, (asked, co.t))), flat_in(x), flat_in(D)

    def pull(u: Array) -> Array:
        by_point = flat_in(backward(u)[0])
        by_output = jnp.einsum("ij,ind->jnd", co.b, by_point)
        parts = [("knd,knd->nk", by_output, slope), ("knd,nd->nk", by_point, x), ("ind,jnd->nij", by_point, D)]
        found = [jnp.einsum(*part).reshape(len(x), -1) for part in parts]
        return jnp.concatenate(found, 1) @ chain

    return pull(end - target), pull(signs)


def _batches(ref: Reference, batch: int, *more: Array) -> Any:
    """Slices of (x, target, index, *more), the last filled up with copies: one shape, one compilation."""
    for first in range(0, len(ref), batch):
        rows = np.minimum(np.arange(first, first + batch), len(ref) - 1)
        yield tuple(jnp.asarray(a)[rows] for a in (ref.x, ref.target, ref.index, *more))


def squares(source: Any, params: Params, ref: Reference, batch: int = 256) -> np.ndarray:
    """Mean squared error of each trajectory of `ref`, (n,), in the dtype of ref.x."""
    params = _cast(params, ref)
    parts = [np.asarray(_end(as_argument(source), params, *part)) for part in _batches(ref, batch)]
    return np.concatenate(parts)[: len(ref)]


def _cast(params: Params, ref: Reference) -> Params:
    dtype = jnp.asarray(ref.x).dtype
    return Params(*(jnp.asarray(a, dtype) for a in params))


def descend(
    source: Any,
    params: Params,
    ref: Reference,
    key: Array,
    *,
    steps: int,
    batch: int = 256,
    weight: float = 1.0,
    shares: np.ndarray | None = None,
    damping: float = 1e-3,
) -> tuple[Params, float]:
    """At most `steps` Gauss-Newton steps on the trajectories `ref`; returns the parameters, float64, and the damping.

    Each step lowers the objective, with trajectories that would rule it (near the border of two modes a derivative is
    as large as one likes, and holds nowhere) weighing less in that step. It stops where three in a row do not.
    """
    shares = np.full(len(ref), 1.0 / len(ref)) if shares is None else shares
    params = Params(*(np.asarray(a, np.float64) for a in params))
    now, share, failed = squares(source, params, ref, batch), SHARE, 0
    for k in range(steps):
        signs = jax.random.rademacher(jax.random.fold_in(key, k), np.shape(ref.x), jnp.asarray(ref.x).dtype)
        rows = [
            [np.asarray(a, np.float64) for a in _derivatives(as_argument(source), _cast(params, ref), *part)]
            for part in _batches(ref, batch, signs)
        ]
        by_error, by_signs = (np.concatenate(a)[: len(ref)] for a in zip(*rows, strict=True))
        w = _slopes(now, weight, shares)
        sane = np.isfinite(by_error).all(1) & np.isfinite(by_signs).all(1) & np.isfinite(w)
        by_error, by_signs, w = (
            np.where(sane[:, None] if a.ndim > 1 else sane, a, 0.0) for a in (by_error, by_signs, w)
        )
        by_signs = np.sqrt(w)[:, None] * by_signs
        used = np.square(by_signs).sum(0) > 0
        less = _even(by_signs[:, used], share)
        G = np.sqrt(less)[:, None] * by_signs[:, used]
        H, g = G.T @ G, (less * w) @ by_error[:, used]
        value = functools.partial(objective, weight=weight, shares=shares * less)
        before = value(now)
        for _ in range(6):
            change = np.zeros(len(used))
            change[used] = -np.linalg.solve(H + damping * np.diag(np.diag(H)), g)
            tried = _moved(params, np.clip(change, -1.0, 1.0))
            new = squares(source, tried, ref, batch)
            if np.isfinite(new).all() and value(new) < before:
                params, now, damping, failed = tried, new, max(damping / 3.0, 1e-6), 0
                break
            damping *= 4.0
        else:
            failed, share, damping = failed + 1, share / 2.0, min(damping, 1.0)
            if failed == 3:
                break
    return params, damping


def _even(G: np.ndarray, most: float) -> np.ndarray:
    """(n,) at most 1: what the squares of the rows of G (n, P) are multiplied with, so that the leverage of each,
    G_i (G^T G)^-1 G_i^T, is at most `most` times the average (nearly: four looks)."""
    less, allowed = np.ones(len(G)), most * G.shape[1] / len(G)
    for _ in range(4 if allowed < 1 else 0):
        H = (less[:, None] * G).T @ G
        H += 1e-9 * np.diag(np.diag(H))
        leverage = np.clip(less * np.sum(G * np.linalg.solve(H, G.T).T, 1), 1e-12, 1.0 - 1e-12)
        less = less * np.minimum(1.0, allowed / (1.0 - allowed) * (1.0 - leverage) / leverage)  # if it were one alone
    return less


def _moved(params: Params, change: np.ndarray) -> Params:
    ends = np.cumsum([a.size for a in params])[:-1]
    return Params(*(a + c.reshape(a.shape) for a, c in zip(params, np.split(change, ends), strict=True)))
