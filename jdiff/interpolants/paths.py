"""Stochastic interpolants: x_t = I(t, x0, x1) + gamma(t) z between any two densities, and what follows from it.

Time as everywhere in jdiff: x0, at t = 0, is data; x1, at t = 1, the other end. The paper (Albergo, Boffi and
Vanden-Eijnden 2023, arXiv 2303.08797) has its x0 and x1, and so t and 1 - t, the other way round. The names of the
fields are the paper's, their signs those of this time:

    b    E[dx_t/dt | x_t = x]        the velocity of the probability flow dx = b dt
    v    E[dI/dt | x_t = x]          b = v + gamma' eta = v - gamma gamma' s
    s    grad log p_t(x)             s = -eta / gamma
    eta  E[z | x_t = x]              (the official code's eta is -E[z])

Where x1 takes no part (one-sided and mirror interpolants, x_t = alpha x0 + gamma z) any one field gives all others.
Between two densities two are needed: one of b and v, one of s and eta.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from jdiff import predict
from jdiff.process import Process, Time
from jdiff.process.base import float_, reciprocal, xp_of

FIELDS = ("b", "v", "s", "eta")
KIND = {"b": "velocity", "s": "score", "eta": "eps"}  # of a one-sided interpolant, which is a Process


class Coefficients(NamedTuple):
    """x_t = alpha x0 + beta x1 + gamma z at the times t, with the slopes; gdg = gamma gamma' is finite at both ends."""

    alpha: Any
    beta: Any
    gamma: Any
    dalpha: Any
    dbeta: Any
    gdg: Any


# Paths: (t, gamma, gdg) -> alpha, beta, dalpha, dbeta ----------------------------------------------------------------


def _linear(t: Time, gamma: Any, gdg: Any) -> tuple[Any, ...]:
    one = xp_of(t).ones_like(t)
    return 1.0 - t, t, -one, one


def _trigonometric(t: Time, gamma: Any, gdg: Any) -> tuple[Any, ...]:
    xp, u = xp_of(t), 0.5 * math.pi * t
    r = xp.sqrt(1.0 - gamma * gamma)
    a, b, dr = xp.cos(u), xp.sin(u), -gdg / r
    return r * a, r * b, dr * a - 0.5 * math.pi * r * b, dr * b + 0.5 * math.pi * r * a


def _encoding_decoding(t: Time, gamma: Any, gdg: Any) -> tuple[Any, ...]:
    xp, u = xp_of(t), math.pi * t
    weight, slope, none = xp.cos(u) ** 2, -math.pi * xp.sin(2.0 * u), xp.zeros_like(t)
    first = lambda value: xp.where(t <= 0.5, value, none)
    second = lambda value: xp.where(t <= 0.5, none, value)
    return first(weight), second(weight), first(slope), second(slope)


def _mirror(t: Time, gamma: Any, gdg: Any) -> tuple[Any, ...]:
    none = xp_of(t).zeros_like(t)
    return xp_of(t).ones_like(t), none, none, none


PATHS = {
    "linear": _linear,
    "trigonometric": _trigonometric,
    "encoding_decoding": _encoding_decoding,
    "mirror": _mirror,
}


# Latent noise: t -> gamma, gamma gamma' ------------------------------------------------------------------------------


def _none(t: Time) -> tuple[Any, Any]:
    return xp_of(t).zeros_like(t), xp_of(t).zeros_like(t)


def _brownian(t: Time) -> tuple[Any, Any]:
    return xp_of(t).sqrt(xp_of(t).maximum(t * (1.0 - t), 0.0)), 0.5 - t


def _quadratic(t: Time) -> tuple[Any, Any]:
    return t * (1.0 - t), t * (1.0 - t) * (1.0 - 2.0 * t)


def _sine_squared(t: Time) -> tuple[Any, Any]:
    gamma = xp_of(t).sin(math.pi * t) ** 2
    return gamma, math.pi * gamma * xp_of(t).sin(2.0 * math.pi * t)


def _sigmoid(t: Time) -> tuple[Any, Any]:
    """Two logistic steps of width 1/10 around the middle, moved so that the ends are 0 (the official code's)."""
    step = lambda u: 1.0 / (1.0 + xp_of(u).exp(-u))
    slope = lambda u: 10.0 * step(u) * (1.0 - step(u))
    up, down = 10.0 * (t - 0.5) + 1.0, 10.0 * (t - 0.5) - 1.0
    gamma = step(up) - step(down) - (step(np.float64(-4.0)) - step(np.float64(-6.0))).item()
    return gamma, gamma * (slope(up) - slope(down))


GAMMAS: dict[str, Callable[[Time], tuple[Any, Any]]] = {
    "none": _none,
    "brownian": _brownian,
    "quadratic": _quadratic,
    "sine_squared": _sine_squared,
    "sigmoid": _sigmoid,
}


@dataclass(frozen=True)
class Interpolant:
    """x_t = I(t, x0, x1) + gamma(t) z, z standard normal and independent of (x0, x1); frozen and hashable.

    path    "linear" (1 - t, t); "trigonometric" sqrt(1 - gamma^2) (cos, sin)(pi t / 2); "encoding_decoding": cos^2
            (pi t) of x0 up to t = 1/2 and of x1 beyond, meant for gamma = "sine_squared"; "mirror": x0 at both ends,
            without x1; a `Process`, for the one-sided interpolant alpha x0 + sigma z (see `one_sided`); or a function
            I(t, x0, x1) of your own, of JAX arrays, I(0, ..) = x0 and I(1, ..) = x1
    gamma   "none", "brownian" sqrt(t (1 - t)), "quadratic" t (1 - t), "sine_squared" sin^2(pi t), "sigmoid", or a
            function t -> (gamma, gamma gamma') of your own
    a       multiplies gamma^2: a = 2 with "brownian" is sqrt(2 t (1 - t))

    ValueError for an unknown name, a < 0, a gamma that is negative, not 0 at an end, or 1 and more where the path is
    trigonometric, and a path that does not start at x0 and end at x1.
    """

    path: str | Process | Callable[..., Any] = "linear"
    gamma: str | Callable[..., Any] = "brownian"
    a: float = 1.0

    def __post_init__(self) -> None:
        for value, known, what in ((self.path, PATHS, "path"), (self.gamma, GAMMAS, "gamma")):
            if isinstance(value, str) and value not in known:
                raise ValueError(f"Interpolant: {what} is {value!r}; expected one of {', '.join(known)}")
        if isinstance(self.path, Process):
            if self.path.t_max != 1 or not self.path.gaussian:
                raise ValueError(f"Interpolant: {self.path} ends at t = {self.path.t_max:g}; expected one on [0, 1]")
            return
        if not self.a >= 0:
            raise ValueError(f"Interpolant: a is {self.a}; gamma^2 = a (..) needs a >= 0")
        t = np.linspace(0.0, 1.0, 257)
        gamma = np.asarray(self._gamma(t)[0])
        if not (gamma >= -1e-12).all():
            i = int(np.argmin(gamma))
            raise ValueError(f"Interpolant: gamma({t[i]:.4g}) = {gamma[i]:.4g}; gamma must not be negative")
        if max(gamma[0], gamma[-1]) > 1e-6:
            raise ValueError(
                f"Interpolant: gamma is {gamma[0]:.3g} at t = 0 and {gamma[-1]:.3g} at t = 1; expected 0 at both, so "
                "that x_t starts at x0 and ends at x1"
            )
        if self.path == "trigonometric" and gamma.max() >= 1:
            raise ValueError(
                f"Interpolant: gamma reaches {gamma.max():.3g}; the trigonometric path has sqrt(1 - gamma^2) in it and "
                "needs gamma < 1: take a smaller a"
            )
        if not isinstance(self.path, str):
            x0, x1 = jnp.asarray([0.3, -1.0]), jnp.asarray([2.0, 0.5])
            ends = [np.asarray(self.path(jnp.asarray(t, x0.dtype), x0, x1)) for t in (0.0, 1.0)]
            if not np.allclose(ends[0], x0, atol=1e-5) or not np.allclose(ends[1], x1, atol=1e-5):
                raise ValueError(
                    f"Interpolant: path(t, {x0}, {x1}) is {ends[0]} at t = 0 and {ends[1]} at t = 1; expected x0 and x1"
                )

    @property
    def two_sided(self) -> bool:
        """Whether x1 takes part."""
        return self.path != "mirror" and not isinstance(self.path, Process)

    def _gamma(self, t: Time) -> tuple[Any, Any]:
        gamma, gdg = (GAMMAS[self.gamma] if isinstance(self.gamma, str) else self.gamma)(float_(t))
        return math.sqrt(self.a) * gamma, self.a * gdg

    def coefficients(self, t: Time) -> Coefficients:
        """At times t in [0, 1]: host numbers in float64, or JAX arrays in their dtype. TypeError for a path I(..)."""
        t = float_(t)
        if isinstance(p := self.path, Process):
            sigma, none = p.sigma(t), xp_of(t).zeros_like(t)
            return Coefficients(p.alpha(t), none, sigma, p.dalpha(t), none, sigma * p.dsigma(t))
        if not isinstance(self.path, str):
            raise TypeError(f"{self} is given as a function I(t, x0, x1): it has no coefficients alpha and beta")
        gamma, gdg = self._gamma(t)
        alpha, beta, dalpha, dbeta = PATHS[self.path](t, gamma, gdg)
        return Coefficients(alpha, beta, gamma, dalpha, dbeta, gdg)

    def noise(self, t: Time) -> tuple[Any, Any, Any]:
        """gamma, gamma', gamma gamma' at t; gamma' is given as 0 where it is infinite."""
        if isinstance(p := self.path, Process):
            return p.sigma(t), p.dsigma(t), p.sigma(t) * p.dsigma(t)
        gamma, gdg = self._gamma(t)
        return gamma, gdg * reciprocal(gamma), gdg

    def mean(self, t: Array, x0: Array, x1: Array | None) -> tuple[Array, Array]:
        """I(t, x0, x1) and dI/dt; t broadcasts against the sample. ValueError where x1 is missing, or unlike x0."""
        if self.two_sided and (x1 is None or x1.shape != x0.shape or x1.dtype != x0.dtype):
            got = "None" if x1 is None else f"{x1.shape}, {x1.dtype}"
            raise ValueError(f"x0 is {x0.shape}, {x0.dtype} and x1 is {got}; expected two arrays alike, pair by pair")
        if not self.two_sided and x1 is not None:
            raise ValueError(f"{self} has one data end: pass x1=None")
        if not isinstance(own := self.path, (str, Process)):
            t = jnp.broadcast_to(t, x0.shape[:1] + (1,) * (x0.ndim - 1))
            return jax.jvp(lambda t: own(t, x0, x1), (t,), (jnp.ones_like(t),))
        c = self.coefficients(t)
        if x1 is None:
            return c.alpha * x0, c.dalpha * x0
        return c.alpha * x0 + c.beta * x1, c.dalpha * x0 + c.dbeta * x1

    def convert(self, t: Time, want: str, x: Any = None, **known: Any) -> Any:
        """The field `want` at (x, t) from those that are known: convert(t, "b", v=v, s=s). Signs as in the module.

        x is needed where x1 takes no part. ValueError for a field that these do not give: a score of an interpolant
        without latent noise or at a time without (traced times give 0 there), b of a score alone, a score of b and v.
        """
        if bad := [name for name in (want, *known) if name not in FIELDS]:
            raise ValueError(f"unknown field {bad[0]!r}; expected one of {', '.join(FIELDS)}")
        if want in known:
            return known[want]
        if isinstance(p := self.path, Process):
            return self._one_sided(p, t, want, x, known)
        gamma, dgamma, gdg = self.noise(t if not (a := _array(known)) else jnp.asarray(t, a[0].dtype))
        if self.path == "mirror":  # v = 0
            if want == "v":
                return 0.0 * next(iter(known.values()), 0.0)
            if "b" in known and not known.keys() & {"s", "eta"}:
                self._divisible(gdg, t, want, "b alone gives the score where gamma' is not 0; elsewhere learn s")
                known = {"s": -known["b"] * reciprocal(gdg)}
            known = {"v": 0.0, **known}
        if want in ("s", "eta"):
            if not known.keys() & {"s", "eta"}:
                raise ValueError(self._missing(want, known, "learn s or eta beside it"))
            if want == "eta":
                return -gamma * known["s"]
            if "s" in known:
                return known["s"]
            self._divisible(gamma, t, want, "eta = E[z | x] says nothing of the score where gamma = 0")
            return -known["eta"] * reciprocal(gamma)
        other = "v" if want == "b" else "b"
        if other not in known or not known.keys() & {"s", "eta"}:
            raise ValueError(self._missing(want, known, f"{want} needs {other}, and s or eta"))
        sign = 1.0 if want == "b" else -1.0
        return known[other] + sign * (-gdg * known["s"] if "s" in known else dgamma * known["eta"])

    def _one_sided(self, p: Process, t: Time, want: str, x: Any, known: dict[str, Any]) -> Any:
        if not known or x is None:
            raise ValueError(f"{want} of a one-sided interpolant needs x and one of {', '.join(FIELDS)}")
        source, value = next(iter(known.items()))
        t = jnp.asarray(t, a[0].dtype) if (a := _array(known)) else t
        if source == "v":  # v = alpha' E[x0 | x]
            self._divisible(p.dalpha(t), t, want, "v = alpha' E[x0 | x] says nothing where alpha' = 0")
            source, value = "x0", value * reciprocal(p.dalpha(t))
        if want == "v":
            return p.dalpha(t) * predict.convert(p, x, t, value, KIND.get(source, source), "x0")
        return predict.convert(p, x, t, value, KIND.get(source, source), KIND[want])

    def _divisible(self, value: Any, t: Time, want: str, why: str) -> None:
        """A host check: traced times pass."""
        if not isinstance(value, Tracer) and np.any(zero := np.asarray(value) == 0):
            at = np.broadcast_to(np.asarray(t), zero.shape)[zero].flat[0]
            raise ValueError(f"no {want} at t = {at:g} of {self}: {why}")

    def _missing(self, want: str, known: dict[str, Any], how: str) -> str:
        return f"no conversion from {' and '.join(known) or 'nothing'} to {want} of {self}: {how}"


def _array(known: dict[str, Any]) -> list[Any]:
    return [v for v in known.values() if isinstance(v, jax.Array)]


def one_sided(process: Process) -> Interpolant:
    """x_t = alpha x0 + sigma z, the interpolant to Gaussian noise: the process itself, which all of jdiff runs on.

    "linear" is `flow()`, "trigonometric" `trigonometric()`, SBDM's `vp_linear()`; the last two, and flow, are SiT's.
    """
    return Interpolant(process, "none")
