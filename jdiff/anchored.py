"""Processes with an anchor y: x_t = a(t) x0 + b(t) y + s(t) eps, as ordinary processes of a shifted state.

    x' = x_t - b(t) y = a(t) x0 + s(t) eps

is a `Process` with alpha = a and sigma = s, so every solver, grid and guidance rule applies to x' as it is. The shift
is exact, and x0 and eps mean the same on both sides. At t = 0 there is no shift: the sample is the sample.

    mr = jdiff.anchored.Anchored(jdiff.process.mean_reverting())            # b = 1 - a
    denoiser = mr.denoiser(network, "eps", y)                              # network(x, t, y) sees the unshifted x
    x = mr.prior(key, y)                                                   # y + sigma_inf z, shifted
    sample = jdiff.sample(denoiser, jdiff.solvers.mrs()(mr.process, times), x)

`ALL` has one constructor a paper. A noise map, as UPSR's, is `scale`: x' = (x_t - b y) / scale, and the sample is
scale times what comes out, `unshift(x, y, 0.0, scale)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jdiff import process as processes
from jdiff.denoiser import Denoiser
from jdiff.denoiser import denoiser as lift
from jdiff.predict import check_kind, model_time
from jdiff.process import Mismatch, Process, Time
from jdiff.process.base import float_, interp, xp_of


# The anchor's weight ------------------------------------------------------------------------------------------------
def reverting(process: Process, t: Time) -> Any:
    """b = 1 - a: the mean moves from x0 to y."""
    return 1.0 - process.alpha(t)


def halfway(process: Process, t: Time) -> Any:
    """b = (1 - a) / 2, Resfusion's 1 - sqrt(alpha_bar): the mean moves from x0 to y / 2."""
    return 0.5 * (1.0 - process.alpha(t))


def relayed(process: Process, t: Time) -> Any:
    """b = rate s of RDEIC's relay (`process.relay`): the anchor's share of what a pretrained network calls noise."""
    return process.rate * process.sigma(t)  # pyright: ignore[reportAttributeAccessIssue]


def whole(process: Process, t: Time) -> Any:
    """b = 1, also at t = 0: the process of x0 around y (DiffuseVAE's second form)."""
    return xp_of(float_(t)).ones_like(float_(t))


@dataclass(frozen=True)
class Aggregated:
    """b of MT-Diffusion (Chen et al. 2024, arXiv 2407.17571): x_i = r_i (x_{i-1} + w_i y) + noise, r_i = a_i / a_{i-1}.

    weights: w_1 .. w_n at the levels t = i / n; b is straight between them. y is the sum of the modalities' encodings.
    """

    weights: tuple[float, ...]

    def __call__(self, process: Process, t: Time) -> Any:
        at = np.arange(len(self.weights) + 1) / len(self.weights)
        a = process.alpha(at)
        return interp(float_(t), at, np.append(0.0, a[1:] * np.cumsum(np.asarray(self.weights) / a[:-1])))


# The process --------------------------------------------------------------------------------------------------------
class Posterior(NamedTuple):
    """q(x_s | x_t, x0, y) = N(x x_t + x0 x0 + y y, var), of the unshifted state."""

    x: Any
    x0: Any
    y: Any
    var: Any


@dataclass(frozen=True)
class Anchored:
    """x_t = a x0 + b y + s eps: `process` gives a and s, `b(process, t)` the anchor's weight, 0 at t = 0.

    guess: what the start of sampling puts in x0's place, times y: 1 for the anchor, 0 for nothing.
    """

    process: Process
    b: Callable[[Process, Time], Any] = reverting
    guess: float = 1.0

    def shift(self, x: PyTree, y: PyTree, t: Time, scale: PyTree | None = None) -> PyTree:
        """(x - b(t) y) / scale: from the process's state to the state that solvers see. scale: shaped like x, or 1."""
        check_anchor(x, y)
        b = self.b(self.process, model_time(t, x))
        x = jax.tree.map(lambda x, y: x - b * y, x, y)
        return x if scale is None else jax.tree.map(jnp.divide, x, scale)

    def unshift(self, x: PyTree, y: PyTree, t: Time, scale: PyTree | None = None) -> PyTree:
        """scale x + b(t) y: back again."""
        x = x if scale is None else jax.tree.map(jnp.multiply, x, scale)
        return self.shift(x, jax.tree.map(jnp.negative, y), t)

    def posterior(self, s: Time, t: Time) -> Posterior:
        """q(x_s | x_t, x0, y) of the published chain, 0 <= s < t <= t_max; see `Process.posterior`."""
        k, x0, var = self.process.posterior(s, t)
        return Posterior(k, x0, self.b(self.process, s) - k * self.b(self.process, t), var)

    def mismatch(self) -> Mismatch:
        """The published start against the true law a x0 + b y + s eps at t_max: mean a (guess y - x0), and its std."""
        x0, _, std = self.process.mismatch()
        return Mismatch(x0, -self.guess * x0, std)

    def prior(self, key: Array, y: PyTree, index: Array | None = None, scale: PyTree | None = None) -> PyTree:
        """The published start (guess a + b) y + prior_std z, z standard normal, in shifted form: like y, batch first.

        `mismatch` says how far that is from the true law: for SGMSE+ 22 % of y - x0 in the mean, for ResShift 2 %.
        """
        a, z = self.guess * float(self.process.alpha(self.process.t_max)), self.process.noise(key, y, index)
        scaled = y if scale is None else jax.tree.map(jnp.divide, y, scale)
        return jax.tree.map(lambda y, z: a * y + self.process.prior_std * z, scaled, z)

    def denoiser(
        self,
        fn: Callable[..., PyTree],
        prediction: str,
        y: PyTree,
        *,
        params: PyTree | None = None,
        scale: PyTree | None = None,
    ) -> Denoiser:
        """A network fn([params,] x, t, y) that sees the unshifted x, as a Denoiser of the shifted state.

        y: batch axis first, shaped like the sample. prediction: a kind of `jdiff.predict`, of the unshifted process
        ("velocity" is d x_t / dt with b'(t) y in it), or

        "residual"         y - x0 (RDDM's SM-Res; Resfusion's "residual")
        "residual, noise"  a pair (y - x0, eps), both used: x0 = x_t - b (y - x0) - s eps (RDDM's SM-Res-N); b = 1 - a
        "resnoise"         eps + (1 - r) s / (1 - r^2) (y - x0), r = sqrt(alpha_t) of the level (Resfusion)
        "angular"          the v of IR-SDE and MRS: dx/dphi along a = cos phi; b = 1 - a

        ValueError for a kind that this process does not have; with a scale there are x0, eps and the residual ones.
        """
        own = {"residual", "residual, noise", "resnoise", "angular"}
        if prediction not in own:
            check_kind(prediction)
        if prediction in ("residual, noise", "angular") and self.b is not reverting:
            raise ValueError(f"prediction {prediction!r} is defined where b = 1 - a, and here b is {self.b}")
        if prediction == "resnoise" and not isinstance(self.process, processes.Resfusion):
            raise ValueError(f"prediction 'resnoise' is Resfusion's (process.resfusion); the process is {self.process}")
        if scale is not None and prediction not in ("x0", "eps", "residual", "residual, noise"):
            raise ValueError(f"prediction {prediction!r} has no form under a noise map; expected x0, eps or a residual")
        seen = _Seen(fn, self, prediction, scale is not None)
        cond = y if scale is None else (y, scale)
        return lift(seen, self.process, "x0" if prediction in own else prediction, params=params, cond=cond)


def check_anchor(x: PyTree, y: PyTree) -> None:
    """ValueError where the anchor has another structure or another shape than the sample."""
    if jax.tree.structure(x) != jax.tree.structure(y):
        raise ValueError(
            f"the anchor is {jax.tree.structure(y)}, the sample {jax.tree.structure(x)}; they must be alike"
        )
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(
                f"the anchor has shape {jnp.shape(b)} beside a sample of shape {jnp.shape(a)}; resize it first "
                "(an upsampled input, a decoded latent): one anchor a sample"
            )


@dataclass(frozen=True)
class _Seen:
    """fn on the unshifted state; equal ones compare equal, so nothing is compiled twice."""

    fn: Callable[..., PyTree]
    anchored: Anchored
    prediction: str
    scaled: bool = False

    def __call__(self, *args: Any) -> PyTree:
        *params, x, t, cond = args
        y, scale = cond if self.scaled else (cond, None)
        p, kind = self.anchored.process, self.prediction
        seen = self.anchored.unshift(x, y, t, scale)
        out = self.fn(*params, seen, t, y)
        if kind == "residual":
            out = jax.tree.map(jnp.subtract, y, out)
        elif kind == "residual, noise":
            b, s, (residual, eps) = self.anchored.b(p, t), p.sigma(t), out
            eps = eps if scale is None else jax.tree.map(jnp.multiply, eps, scale)
            out = jax.tree.map(lambda x, r, e: x - b * r - s * e, seen, residual, eps)
        elif kind == "resnoise":
            base, s = p.base, p.sigma(t)  # pyright: ignore[reportAttributeAccessIssue]
            c = s / (1.0 + base.alpha(t) / base.alpha(jnp.maximum(t - 1.0 / len(base.betas), 0.0)))
            out = jax.tree.map(lambda x, o, y: (x - s * (o - c * y)) / (p.alpha(t) + s * c), x, out, y)
        elif kind == "velocity":
            slope = jax.jvp(lambda t: self.anchored.b(p, t), (t,), (jnp.ones_like(t),))[1]
            out = jax.tree.map(lambda v, y: v - slope * y, out, y)
        elif kind == "angular":  # v = v' + sin(phi) y and x0 = a x' - sin(phi) v'
            a = p.alpha(t)
            sin = jnp.sqrt(1.0 - a * a)
            out = jax.tree.map(lambda v, x, y: a * x - sin * (v - sin * y), out, x, y)
        return out if scale is None or kind == "eps" else jax.tree.map(jnp.divide, out, scale)


# Papers -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Side:
    """A network fn(x, t, y) of consecutive Brownian bridges, at signed time: t towards the next frame, -t the previous.

    The two bridges share x0, the frame between, and one network knows its side by the sign (Lyu et al. 2024; the
    official index is T (1 + side t)). A sample starts AT y, the frame of its side: `process.brownian_bridge(t_max=1)`.
    """

    fn: Callable[..., PyTree]
    side: int

    def __post_init__(self) -> None:
        if self.side not in (-1, 1):
            raise ValueError(f"a bridge has the sides 1 (next frame) and -1 (previous), got {self.side}")

    def __call__(self, *args: Any) -> PyTree:
        *params, x, t, y = args
        return self.fn(*params, x, self.side * t, y)


def uncertainty(guess: Array, y: Array, low: float = 0.4, most: float = 0.1) -> Array:
    """UPSR's noise map, in [low, 1]: low where the first guess g(y) agrees with y, 1 where they differ by 2 `most`."""
    if not (0 < low <= 1 and most > 0):
        raise ValueError(f"uncertainty: expected 0 < low <= 1 and most > 0, got {low=}, {most=}")
    check_anchor(guess, y)
    return low + (1.0 - low) / most * jnp.minimum(0.5 * jnp.abs(guess - y), most)


ALL: dict[str, Callable[[], Anchored]] = {
    "ir_sde": lambda: Anchored(processes.mean_reverting(end=0.01)),
    "sgmse_ouve": lambda: Anchored(processes.ouve()),
    "sgmse_bbed": lambda: Anchored(processes.bbed()),
    "sgmse_sb": lambda: Anchored(processes.sb_ve()),
    "resshift": lambda: Anchored(processes.resshift()),
    "resshift_journal": lambda: Anchored(processes.resshift(4, min_noise=0.2)),
    "upsr": lambda: Anchored(processes.resshift(5, kappa=2.5, power=0.2)),
    "rddm": lambda: Anchored(processes.rddm()),
    "resfusion": lambda: Anchored(processes.resfusion(), halfway),
    "bbdm": lambda: Anchored(processes.brownian_bridge()),
    "cbbd": lambda: Anchored(processes.brownian_bridge(0.5, t_max=1.0)),
    "rdeic": lambda: Anchored(processes.relay(), relayed),
    "diffusevae": lambda: Anchored(processes.vp_discrete(np.linspace(1e-4, 0.02, 1000)), whole, guess=0.0),
    "dddm_vc": lambda: Anchored(processes.vp_linear(0.05, 20.0)),
    "mt_diffusion": lambda: Anchored(
        processes.vp_discrete(np.linspace(1e-4, 0.02, 1000)), Aggregated((1e-3,) * 1000), guess=0.0
    ),
}
