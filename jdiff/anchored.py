"""Processes with an anchor y: x_t = a(t) x0 + b(t) y + s(t) eps, as ordinary processes of a shifted state.

    x' = x_t - b(t) y = a(t) x0 + s(t) eps

is a `Process` with alpha = a and sigma = s, so every solver, grid and guidance rule applies to x' as it is. The shift
is exact, and x0 and eps mean the same on both sides. At t = 0 there is no shift: the sample is the sample.

    mr = jdiff.anchored.Anchored(jdiff.process.mean_reverting())            # b = 1 - a
    denoiser = mr.denoiser(network, "eps", y)                              # network(x, t, y) sees the unshifted x
    x = mr.prior(key, y)                                                   # y + sigma_inf z, shifted
    sample = jdiff.sample(denoiser, jdiff.solvers.mrs()(mr.process, times), x)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jdiff.denoiser import Denoiser
from jdiff.denoiser import denoiser as lift
from jdiff.predict import model_time
from jdiff.process import Process, Time


def reverting(process: Process, t: Time) -> Any:
    """b = 1 - a: the mean moves from x0 to y."""
    return 1.0 - process.alpha(t)


@dataclass(frozen=True)
class Anchored:
    """x_t = a x0 + b y + s eps: `process` gives a and s, `b(process, t)` the anchor's weight, 0 at t = 0."""

    process: Process
    b: Callable[[Process, Time], Any] = reverting

    def shift(self, x: PyTree, y: PyTree, t: Time) -> PyTree:
        """x - b(t) y: from the process's state to the state that solvers see."""
        b = self.b(self.process, model_time(t, x))
        return jax.tree.map(lambda x, y: x - b * y, x, y)

    def unshift(self, x: PyTree, y: PyTree, t: Time) -> PyTree:
        """x + b(t) y: back again."""
        return self.shift(x, jax.tree.map(jnp.negative, y), t)

    def prior(self, key: Array, y: PyTree, index: Array | None = None) -> PyTree:
        """The published start y + prior_std z, z standard normal, in shifted form: shaped like y, batch axis first.

        The true law there is a(T) x0 + b(T) y + s(T) eps: for mean reversion the start is off by a(T) (y - x0) in the
        mean and 1 / sqrt(1 - a(T)^2) in the standard deviation (a(T) = 0.005: 1.3e-5).
        """
        noisy = self.process.diffuse(key, jax.tree.map(jnp.zeros_like, y), self.process.t_max, index)
        scale = self.process.prior_std / float(self.process.sigma(self.process.t_max))
        return self.shift(jax.tree.map(lambda y, z: y + scale * z, y, noisy), y, self.process.t_max)

    def denoiser(
        self, fn: Callable[..., PyTree], prediction: str, y: PyTree, *, params: PyTree | None = None
    ) -> Denoiser:
        """A network fn([params,] x, t, y) that sees the unshifted x, as a Denoiser of the shifted state.

        prediction: a kind of `jdiff.predict`, of the unshifted process ("velocity" is d x_t / dt with b'(t) y in it);
        or "angular", the v of IR-SDE and MRS: dx/dphi along a = cos phi, with b = 1 - a. y: batch axis first.
        """
        seen = _Seen(fn, self, prediction)
        return lift(seen, self.process, "x0" if prediction == "angular" else prediction, params=params, cond=y)


@dataclass(frozen=True)
class _Seen:
    """fn on the unshifted state; equal ones compare equal, so nothing is compiled twice."""

    fn: Callable[..., PyTree]
    anchored: Anchored
    prediction: str

    def __call__(self, *args: Any) -> PyTree:
        *params, x, t, y = args
        process, b = self.anchored.process, self.anchored.b
        out = self.fn(*params, self.anchored.unshift(x, y, t), t, y)
        if self.prediction == "velocity":
            slope = jax.jvp(lambda t: b(process, t), (t,), (jnp.ones_like(t),))[1]
            return jax.tree.map(lambda v, y: v - slope * y, out, y)
        if self.prediction == "angular":  # v = v' + sin(phi) y and x0 = a x' - sin(phi) v'
            a = process.alpha(t)
            sin = jnp.sqrt(1.0 - a * a)
            return jax.tree.map(lambda v, x, y: a * x - sin * (v - sin * y), out, x, y)
        return out
