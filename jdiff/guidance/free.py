"""Classifier-free guidance and its kin: a better prediction extrapolated away from a worse one."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import PyTree

from jdiff.denoiser import Denoiser

from .branches import Interval, branches, check_number, combine
from .schedule import Weight, as_weight, at, at_steps


def cfg(
    denoiser: Denoiser,
    unconditional: Denoiser | None,
    scale: Weight,
    interval: Interval | None = None,
    *,
    rescale: float = 0.0,
    kind: str | None = None,
    together: bool = True,
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022): unconditional + scale (conditional - unconditional).

    unconditional  the same model without its condition, `model.with_cond(null)`; with another condition it is a
                   negative prompt, which the sample is driven away from
    scale      1 is the conditional model, 0 the unconditional; a number, an array that broadcasts against the sample,
               or a function of t (`guidance.linear`, `cosine`, `beta`, `at_steps`). Numbers and arrays are arguments
               of the compiled program: another scale compiles nothing
    interval   (t_low, t_high): guide only where t_low < t <= t_high, and use the conditional model elsewhere, which
               alone is evaluated there (Kynkäänniemi et al. 2024), in units of the process's time
    rescale    phi of Lin et al. 2023, section 3.4: the share, in [0, 1], of the output that is scaled to the
               conditional output's standard deviation over a sample (their 0.7)
    kind       the prediction that is mixed; it matters to `rescale` alone. Default and published: the model's own
    together   both branches in one batch, where they are one function with two values of `cond`

    2 evaluations. Raises ValueError for a missing branch, two processes, a bad interval, rescale outside [0, 1].
    """
    check_number(rescale, "cfg: rescale", 0.0, 1.0)
    phi = None if isinstance(rescale, (int, float)) and rescale == 0 else as_weight(rescale, "cfg: rescale")
    rule = Partial(_extrapolate, as_weight(scale, "cfg: scale"), phi)
    pair = (denoiser, unconditional)
    return combine(rule, pair, kind=kind, interval=interval, together=together, name="cfg")


def _extrapolate(scale: Any, phi: Any, x: PyTree, t: Any, outs: tuple[PyTree, PyTree]) -> PyTree:
    def leaf(c: jax.Array, u: jax.Array) -> jax.Array:
        guided = u + at(scale, t, c) * (c - u)
        if phi is None:
            return guided
        std = lambda v: jnp.std(v, axis=tuple(range(1, v.ndim)), keepdims=True)
        ratio = std(c) / jnp.maximum(std(guided), jnp.finfo(c.dtype).tiny)
        return guided * (1.0 + at(phi, t, c) * (ratio - 1.0))

    return jax.tree.map(leaf, *outs)


def autoguidance(
    denoiser: Denoiser, weak: Denoiser, scale: Weight, interval: Interval | None = None, *, together: bool = True
) -> Denoiser:
    """Autoguidance (Karras et al. 2024, arXiv 2406.02507): weak + scale (denoiser - weak).

    weak: a worse version of the model, smaller or trained less, under the same condition; any Denoiser on the same
    process, whatever it predicts. scale 1 is the model itself. Otherwise as `cfg`. 1 evaluation of each.
    """
    rule = Partial(_extrapolate, as_weight(scale, "autoguidance: scale"), None)
    return combine(rule, (denoiser, weak), interval=interval, together=together, name="autoguidance")


def cfg_pp(denoiser: Denoiser, unconditional: Denoiser, lam: float, times: Any, *, together: bool = True) -> Denoiser:
    """CFG++ (Chung et al. 2024, arXiv 2406.08070): x0 is guided with lam in [0, 1], the noise is the unconditional one.

        x1 = a1 [D_u + lam (D_c - D_u)] + s1 eps_u            on the grid `times`, with DDIM

    This is `cfg` at the scale lam / (1 - e^-h), h the step in half log-SNR: eps_u = (x - a0 D_u) / s0, so that the
    difference D_c - D_u has the weight lam a1, where in DDIM it has scale (a1 - a0 s1 / s0). So it needs the grid, and
    it is CFG++ for `solvers.ddim` (flow Euler) alone, whose evaluations lie on the grid. 2 evaluations a step.
    """
    check_number(lam, "cfg_pp: lam", 0.0, 1.0)
    t = denoiser.process.check_times(times)
    h = np.diff(denoiser.process.lam(t))
    return cfg(denoiser, unconditional, at_steps(t[:-1], lam / -np.expm1(-h)), together=together)


def cfg_zero(
    denoiser: Denoiser,
    unconditional: Denoiser,
    scale: Weight,
    zero_above: float | None = None,
    *,
    together: bool = True,
) -> Denoiser:
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886), for flows: s v_u + scale (v_c - s v_u), s = <v_c, v_u> / |v_u|^2.

    s is a number a sample, the projection that makes s v_u nearest to v_c. zero_above: the velocity is 0 where
    t > zero_above, for the first steps (the official default is the first step of 28 or 50: times[1], say); None:
    nowhere. Predicts the velocity. 2 evaluations, also where it is 0.
    """
    t_max = denoiser.process.t_max
    if zero_above is not None:
        check_number(float(zero_above), "cfg_zero: zero_above", 0.0, t_max)
    top = as_weight(float(2.0 * t_max if zero_above is None else zero_above))
    rule = Partial(_projected, as_weight(scale, "cfg_zero: scale"), top)
    return combine(rule, (denoiser, unconditional), kind="velocity", together=together, name="cfg_zero")


def _projected(scale: Any, top: Any, x: PyTree, t: Any, outs: tuple[PyTree, PyTree]) -> PyTree:
    along = _dot(outs[0], outs[1]) / jnp.maximum(_dot(outs[1], outs[1]), 1e-8)

    def leaf(c: jax.Array, u: jax.Array) -> jax.Array:
        u = along.reshape(-1, *[1] * (u.ndim - 1)).astype(u.dtype) * u
        return jnp.where(t > top.astype(t.dtype), jnp.zeros_like(c), u + at(scale, t, c) * (c - u))

    return jax.tree.map(leaf, *outs)


def _dot(a: PyTree, b: PyTree) -> jax.Array:
    """The inner product a sample, (batch,)."""
    products = jax.tree.map(lambda a, b: jnp.sum(a * b, axis=tuple(range(1, a.ndim))), a, b)
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def apg(
    denoiser: Denoiser,
    unconditional: Denoiser,
    scale: Weight,
    *,
    eta: float = 0.0,
    norm: float | None = None,
    momentum: float = 0.0,
    together: bool = True,
) -> Denoiser:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416), on x0.

        d = D_c - D_u + momentum d_before, shrunk to a length of at most `norm`;  D_c + (scale - 1)(d_orth + eta d_par)

    d_par is the part of d along D_c, a sample, which saturates images; eta = 1, norm = None and momentum = 0 is `cfg`.
    The paper's settings: eta 0, momentum -0.5 to -0.75, norm 2.5 to 15, which grows with the data's dimension.
    d is remembered in the carry. 2 evaluations.
    """
    if norm is not None and not norm > 0:
        raise ValueError(f"apg: norm is {norm}; expected a length > 0, or None for no limit")
    check_number(momentum, "apg: momentum", -1.0, 1.0)
    pair = (denoiser, unconditional)
    init, evaluate = branches(pair, kind="x0", together=together, name="apg")
    settings = tuple(as_weight(float(v)) for v in (eta, np.finfo(np.float32).max if norm is None else norm, momentum))
    apply = Partial(_Apg(), evaluate, as_weight(scale, "apg: scale"), settings)
    return Denoiser(Partial(_with_zeros, init), apply, denoiser.process, "x0")


def _with_zeros(init: Partial, x: PyTree) -> PyTree:
    return init(x), jax.tree.map(jnp.zeros_like, x)


@dataclass(frozen=True)
class _Apg:
    def __call__(self, evaluate: Partial, scale: Any, settings: Any, x: PyTree, t: Any, carry: Any) -> Any:
        inner, before = carry
        (c, u), inner = evaluate((x, x), t, inner)
        eta, norm, momentum = settings
        d = jax.tree.map(lambda c, u, m: c - u + momentum.astype(c.dtype) * m, c, u, before)
        length = jnp.sqrt(_dot(d, d))
        shrink = jnp.minimum(1.0, norm.astype(length.dtype) / jnp.maximum(length, 1e-12))
        along = shrink * _dot(d, c) / jnp.maximum(_dot(c, c), 1e-12)

        def leaf(d: jax.Array, c: jax.Array) -> jax.Array:
            each = lambda v: v.reshape(-1, *[1] * (c.ndim - 1)).astype(c.dtype)
            parallel = each(along) * c
            step = each(shrink) * d - (1.0 - eta.astype(c.dtype)) * parallel
            return c + (at(scale, t, c) - 1.0) * step

        return jax.tree.map(leaf, d, c), (inner, d)
