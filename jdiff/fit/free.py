"""The full non-stationary table: every entry of a deterministic solver free, and its times too.

    x_k = c_k x_T + S_k sum_{j<k} w_kj D_j,     sum_j w_kj = 1,     D_j = denoise(x_j, t_j),     x_K the sample

with t falling from t_max, c_K = 0 and S_K = 1, so that whatever the numbers a point mass is solved exactly. A point at
the noise level of its time has c_k = sigma(t_k) / sigma(T) and S_k = alpha(t_k) - alpha(T) c_k; the fit may move both,
for a point with errors in it is not at that level (measured on a 64-dimensional mixture at 5 evaluations: median
error 0.012 with the levels tied, 0.005 with them free). Every known deterministic solver that is exact on point
masses is such a table (bespoke non-stationary solvers, Shaul et al. 2024, arXiv 2403.01329), and so a start.

The free numbers: v_kj = w_k0 + .. + w_kj, the weights of D_j - D_{j+1} (along the flow D is close to a martingale,
whose increments are uncorrelated, so the problem is well conditioned in them); the logarithms of the steps in lam; and
the logarithms of what the levels are moved by.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jdiff.denoiser import Denoiser, cast_like
from jdiff.predict import convert, wide
from jdiff.process import Process
from jdiff.tableau import Tableau
from jdiff.trace import trace


class Params(NamedTuple):
    """log_steps (K,): softmax gives K steps in lam, the last one from the last evaluation to t_min; v (K, K): row k is
    of x_{k+1}, entries j < k are used; level (2, K): logarithms of c and S over their values at the times' levels,
    all but the last used."""

    log_steps: Any
    v: Any
    level: Any


class Coefficients(NamedTuple):
    """t (K,) times; c (K,) weights of x_T, and b (K, K) of the outputs, in the points x_1 .. x_K."""

    t: Any
    c: Any
    b: Any


def _ends(p: Process) -> tuple[float, float]:
    """lam at the start (just inside, where alpha = 0 there) and at t_min."""
    first = p.t_max if p.alpha(p.t_max) > 0 else p.t_max * (1 - 1e-3)
    return float(p.lam(first)), float(p.lam(p.t_min))


def coefficients(p: Process, params: Params) -> Coefficients:
    """Of NumPy parameters in float64, of JAX ones in their own dtype: the same formulas."""
    xp = jnp if isinstance(params.v, jax.Array) else np
    K = params.v.shape[0]
    steps = params.log_steps - params.log_steps.max()
    steps = xp.exp(steps) / xp.exp(steps).sum()
    first, last = _ends(p)
    lam = first + (last - first) * xp.cumsum(steps)[:-1]
    t = p.t_of_lam(lam)
    aT, sT = float(p.alpha(p.t_max)), float(p.sigma(p.t_max))
    end = lambda value: xp.full(1, value, params.v.dtype)
    c = xp.concatenate([p.sigma(t) / sT, end(0.0)])
    S = xp.concatenate([p.alpha(t), end(1.0)]) - aT * c
    inner = (np.arange(K) < K - 1).astype(params.v.dtype)
    c, S = c * xp.exp(inner * params.level[0]), S * xp.exp(inner * params.level[1])
    lower = np.tril(np.ones((K, K)), -1).astype(params.v.dtype)
    v = params.v * lower + np.eye(K, dtype=params.v.dtype)
    w = xp.concatenate([v[:, :1], v[:, 1:] - v[:, :-1]], 1) * (lower + np.eye(K, dtype=params.v.dtype))
    return Coefficients(xp.concatenate([end(p.t_max), t]), c, S[:, None] * w)


def from_tableau(T: Tableau, least: float = 1e-12) -> Params:
    """A known solver in this form, exactly (up to the last digits), as a start.

    One that ends at t_min has its last point taken as the sample: the noise that is left there is dropped, and the
    weights of the outputs are made to sum to 1. least: of all of lam, the share that a step has at least (a last
    evaluation at t_min leaves a step of nothing).

    ValueError for what is not of this form: noise, times that do not fall strictly, another start than t_max, an end
    above t_min, or a point that is not at the noise level of its time.
    """
    p, t, name = T.record.process, np.asarray(T.t), T.record.name
    if T.stochastic or np.ndim(T.A) > 3 or T.E is not None or T.record.outputs > 1 or T.record.prediction != "x0":
        raise ValueError(f"{name}: expected a deterministic tableau with scalar coefficients and no constants")
    if t[0] != p.t_max or (np.diff(t) >= 0).any() or t[-1] <= 0:
        raise ValueError(f"{name}: expected times that fall strictly from t_max = {p.t_max:g}, got {t}")
    U = T.unrolled()[1:]
    sT, aT = p.sigma(p.t_max), p.alpha(p.t_max)
    total = U[-1, 1:].sum()
    if -1e-12 <= U[-1, 0] * sT <= p.sigma(p.t_min) * (1 + 1e-9) and total > 0.5:
        U[-1] = np.append(0.0, U[-1, 1:] / total)
    c = np.append(p.sigma(t[1:]) / sT, 0.0)
    S = np.append(p.alpha(t[1:]), 1.0) - aT * c
    off = np.abs(U[:, 0] - c).max() + np.abs(U[:, 1:].sum(1) - S).max()
    if off > 1e-8:
        raise ValueError(f"{name}: not exact on point masses from t_max to sigma = 0 (off by {off:.2g})")
    first, last = _ends(p)
    lam = np.clip(p.lam(t[1:]), first, last)
    steps = np.maximum(np.diff(np.concatenate([[first], lam, [last]])), least * (last - first))
    v = np.tril(np.cumsum(U[:, 1:] / S[:, None], 1), -1)
    return Params(np.log(steps), v, np.zeros((2, len(t))))


def to_tableau(p: Process, params: Params, name: str = "fitted", references: tuple[str, ...] = ()) -> Tableau:
    """The Tableau of these parameters, built in float64 on the host."""
    t, c, b = coefficients(p, Params(*(np.asarray(a, np.float64) for a in params)))

    def sampler(x: Any, model: Any, noise: Any) -> Any:
        point, outputs = x, []
        for k in range(len(t)):
            outputs.append(model(point, t[k]))
            point = sum((b[k, j] * D for j, D in enumerate(outputs)), c[k] * x)
        return point

    return trace(sampler, p, name=name, order=1, references=references).validate()


def evaluate(denoiser: Denoiser, point: Array, t: Array, carry: Any) -> tuple[Array, Any]:
    """(the x0 prediction, the carry)."""
    out, carry = denoiser.apply(point, t, carry)
    return convert(denoiser.process, point, t, cast_like(out, point), denoiser.prediction, "x0"), carry


def rollout(denoiser: Denoiser, co: Coefficients, x: Array, nudges: Array | None = None) -> tuple[Array, Array]:
    """The points x_1 .. x_K (K, N, ...) and the outputs (K, N, ...): one scan, differentiable in `co`.

    nudges (K, N, ...): added to the points, for derivatives by them
    """
    dtype, K = x.dtype, co.c.shape[0]
    cast = lambda a: jnp.asarray(a, dtype)

    def body(state: Any, row: Any) -> Any:
        point, outputs, carry = state
        k, t, c, b, nudge = row
        D, carry = evaluate(denoiser, point, t, carry)
        outputs = outputs.at[k].set(D)
        point = c * x + jnp.tensordot(b, outputs, 1)
        point = point if nudge is None else point + nudge
        return (point, outputs, carry), point

    rows = (jnp.arange(K), jnp.asarray(co.t, wide(dtype)), cast(co.c), cast(co.b), nudges)
    start = (x, jnp.zeros((K, *x.shape), dtype), denoiser.init(x))
    (_, outputs, _), points = jax.lax.scan(body, start, rows)
    return points, outputs
