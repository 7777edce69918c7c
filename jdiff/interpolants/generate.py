"""Sampling an interpolant, in both directions: dx = b dt, or with noise of any size eps(t) >= 0.

    backward, from x1 to data    x <- x - (b - eps s) dt + sqrt(2 eps dt) z       (the paper's forward SDE, in its time)
    forward, from data to x1     x <- x + (b + eps s) dt + sqrt(2 eps dt) z

The law at every time is that of x_t, whatever eps. A drift is a `Denoiser` that predicts "velocity" on a `Transport`,
and so all deterministic solvers of jdiff run on it as they are (of `flow`, whose x0 = x - t v: Euler on x0 there is
Euler on v here), as do `jdiff.ode`, steering, and guidance; the SDE is a tableau. Going forward is going backward in
tau = 1 - t.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from jdiff.denoiser import Denoiser, cast_like
from jdiff.denoiser import denoiser as lift
from jdiff.predict import model_time
from jdiff.process import Flow
from jdiff.tableau import Tableau
from jdiff.trace import Model, Noise, Value, trace

from .paths import Interpolant

Eps = float | Callable[[Any], Any]


@dataclass(frozen=True)
class Transport(Flow):
    """The process of an interpolant's drift: `flow` in name, of which the velocity alone means anything.

    No score, no noise of a Gaussian prior: `predict.convert`, stochastic solvers and `prior` say so.
    """

    interpolant: Interpolant
    forward: bool = False
    gaussian = False

    def prior(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self} starts from samples of its other end, not from noise: pass those as x")


def field(
    interpolant: Interpolant, fn: Callable[..., PyTree], *, params: PyTree | None = None, cond: PyTree | None = None
) -> Denoiser:
    """A network of one field (b, v, s or eta; arguments as in `jdiff.denoiser`), for `drift`: guide it as a Denoiser.

    Rules of guidance that are linear in the outputs (`guidance.cfg`) mean here what they mean for the field.
    """
    return lift(fn, Transport(1e-3, 1.0, interpolant), "velocity", params=params, cond=cond)


def drift(interpolant: Interpolant, eps: Eps = 0.0, *, forward: bool = False, **fields: Denoiser) -> Denoiser:
    """The drift of the SDE with noise eps (0: of the ODE) from the fields that are known, as a velocity Denoiser.

    fields: Denoisers made by `field`, one of b and v and one of s and eta (b alone where eps = 0; any one where x1
    takes no part): drift(interpolant, 0.5, b=b, s=s). eps: a number, an argument of the compiled program, or a function
    of t. forward: from data to the other end, in tau = 1 - t. ValueError for fields that do not give b (and s).
    """
    _check_eps(eps, np.linspace(0.0, 1.0, 65))
    quiet = not callable(eps) and not np.any(np.asarray(eps))
    for want in ("b",) if quiet else ("b", "s"):
        interpolant.convert(0.37, want, x=0.0, **dict.fromkeys(fields, 0.0))  # does it exist
    noise = Partial(eps) if callable(eps) else None if quiet else jnp.asarray(eps, float)
    rule = _Drift(interpolant, forward, tuple(fields))
    models = tuple(fields.values())
    init = Partial(_init, tuple(d.init for d in models))
    return Denoiser(init, Partial(rule, noise, models), Transport(1e-3, 1.0, interpolant, forward), "velocity")


def _init(inits: tuple[Any, ...], x: PyTree) -> PyTree:
    return tuple(init(x) for init in inits)


@dataclass(frozen=True)
class _Drift:
    interpolant: Interpolant
    forward: bool
    names: tuple[str, ...]

    def __call__(self, eps: Any, models: Any, x: Array, t: Array, carry: Any) -> tuple[Array, Any]:
        t = model_time(1.0 - t if self.forward else t, x)
        outs, carries = zip(*(d.apply(x, t, c) for d, c in zip(models, carry, strict=True)), strict=True)
        known = {name: cast_like(out, x) for name, out in zip(self.names, outs, strict=True)}
        b = self.interpolant.convert(t, "b", x=x, **known)
        b = -b if self.forward else b
        if eps is None:
            return b, carries
        e = eps(t) if callable(eps) else eps.astype(x.dtype)
        return b - e * self.interpolant.convert(t, "s", x=x, **known), carries


def _check_eps(eps: Eps, t: Any) -> np.ndarray:
    values = np.broadcast_to(np.asarray(eps(t) if callable(eps) else eps, np.float64), np.shape(t))
    if not (values >= 0).all() or not np.isfinite(values).all():
        i = int(np.argmin(np.where(np.isfinite(values), values, -np.inf)))
        raise ValueError(f"eps is {values[i]:.4g} at t = {t[i]:.4g}; the noise must be finite and not negative")
    return values


def sde(transport: Transport, times: Any, eps: Eps, method: str = "euler", as_published: bool = False) -> Tableau:
    """The tableau of dx = v dt + sqrt(2 eps) dW on a drift made with the same eps and direction.

    times   (n + 1,) from 1 to 0 (tau = 1 - t where the transport goes forward), on the host
    method  "euler": Euler-Maruyama, of weak order 1. "heun": the noise first, with eps at the step's start, and then a
            Heun step of the drift, 2 evaluations; of weak order 1 too, but with the ODE's 2 where eps is small
    as_published: the official code's Heun, which evaluates both slopes at the step's end (then the ODE's order is 1)

    What steering sees of a row (`info.outputs`) is x - t v with "euler", where the drift points to, and v with "heun",
    whose last slope is at t = 0, where x - t v would say nothing of v.
    ValueError for an unknown method, times outside [0, 1] or not falling, eps < 0.
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"sde: method is {method!r}; expected 'euler' or 'heun'")
    t = transport.check_times(times)
    e = _check_eps(eps, 1.0 - t if transport.forward else t)

    def sampler(x: Value, model: Model, noise: Noise) -> Value:
        for i in range(len(t) - 1):
            dt = t[i] - t[i + 1]
            kick = np.sqrt(2.0 * e[i] * dt)
            if method == "euler":
                x = x - dt * model(x, t[i], kind="velocity") + (kick * noise() if kick > 0 else 0.0)
                continue
            x = x + (kick * noise() if kick > 0 else 0.0)
            first = model(x, t[i + 1] if as_published else t[i], kind="velocity")
            second = model(x - dt * first, t[i + 1], kind="velocity", label="second slope")
            x = x - (0.5 * dt) * first - (0.5 * dt) * second
        return x

    reference = "Albergo, Boffi and Vanden-Eijnden 2023, arXiv 2303.08797, section 2.3"
    name, kind = f"interpolant_sde_{method}", "x0" if method == "euler" else "velocity"
    return trace(sampler, transport, name=name, order=1, references=(reference,), prediction=kind).validate()


def stochastic(
    interpolant: Interpolant,
    times: Any,
    eps: Eps,
    *,
    forward: bool = False,
    method: str = "euler",
    as_published: bool = False,
    **fields: Denoiser,
) -> tuple[Denoiser, Tableau]:
    """`drift` and its `sde`: sample = jdiff.sample(*stochastic(interpolant, times, eps, b=b, s=s), x1, key).

    Another eps or grid of the same length compiles nothing (a function eps: once each). Arguments as there; times fall
    from 1 to 0 in either direction. ValueError where eta is known and the score is asked for at gamma = 0: let the grid
    start a little later, learn s, or let eps be 0 there.
    """
    model = drift(interpolant, eps, forward=forward, **fields)
    table = sde(model.process, times, eps, method, as_published)  # pyright: ignore[reportArgumentType]
    t = np.asarray(table.t, np.float64)
    t = 1.0 - t if forward else t
    if interpolant.two_sided or interpolant.path == "mirror":
        noisy = t[_check_eps(eps, t) > 0] if "s" not in fields else t[:0]
        if len(noisy):
            interpolant.convert(noisy, "s", x=0.0, **dict.fromkeys(fields, 0.0))
    return model, table
