"""Stochastic interpolants between any two densities (Albergo, Boffi and Vanden-Eijnden 2023, arXiv 2303.08797).

    interpolant = interpolants.Interpolant("linear", "brownian")               # (1 - t) x0 + t x1 + sqrt(t (1 - t)) z
    loss_b, loss_s = (interpolants.objective(interpolant, f, apply) for f in ("b", "s"))
    b, s = (interpolants.field(interpolant, apply, params=p) for p in (params_b, params_s))
    x0 = jdiff.sample(*interpolants.stochastic(interpolant, times, 0.5, b=b, s=s), x1, key)           # eps = 0.5
    x1 = jdiff.sample(*interpolants.stochastic(interpolant, times, 0.5, b=b, s=s, forward=True), x0, key)
    ode = interpolants.drift(interpolant, b=b)                                 # any deterministic solver of jdiff

With x1 Gaussian noise the one-sided interpolant is a `Process` (`flow`, `trigonometric`, `vp_linear`), and everything
else in jdiff applies to it; SiT's stochastic sampler is `solvers.sit`.
"""

from .bounds import kl_bound, schrodinger
from .exact import Between, Fields, between, coupled
from .generate import Transport, drift, field, sde, stochastic
from .objectives import objective
from .paths import FIELDS, GAMMAS, PATHS, Coefficients, Interpolant, one_sided

__all__ = [
    "FIELDS",
    "GAMMAS",
    "PATHS",
    "Between",
    "Coefficients",
    "Fields",
    "Interpolant",
    "Transport",
    "between",
    "coupled",
    "drift",
    "field",
    "kl_bound",
    "objective",
    "one_sided",
    "schrodinger",
    "sde",
    "stochastic",
]
