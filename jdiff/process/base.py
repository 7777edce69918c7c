"""The base of all processes, and the helpers that let one source run on the host and under a trace."""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jdiff import noise

Time = Any  # float, NumPy array or JAX array; any shape that broadcasts against the sample


def xp_of(t: Time) -> ModuleType:
    """JAX for JAX arrays, NumPy for all else."""
    return jnp if isinstance(t, jax.Array) else np


def float_(t: Time) -> Any:
    """t itself where it is a JAX array, float64 else."""
    return t if isinstance(t, jax.Array) else np.asarray(t, np.float64)


def interp(t: Time, at: np.ndarray, values: np.ndarray) -> Any:
    """`values` at the rising times `at`, straight between them, at time t (after `float_`)."""
    return (
        np.interp(t, at, values) if xp_of(t) is np else jnp.interp(t, *(jnp.asarray(v, t.dtype) for v in (at, values)))
    )


def reciprocal(x: Any) -> Any:
    """1 / x, and 0 where x is 0."""
    xp = xp_of(x)
    return xp.where(x == 0, 0.0, 1.0 / xp.where(x == 0, 1.0, x))


class Posterior(NamedTuple):
    """q(x_s | x_t, x0) = N(x x_t + x0 x0, var): two coefficients and a variance."""

    x: Any
    x0: Any
    var: Any


class Mismatch(NamedTuple):
    """The start of sampling against the true law at t_max: mean (start - true) = x0 x0 + y y, and std start - true."""

    x0: float
    y: float
    std: float


@dataclass(frozen=True)
class Process:
    """Base of all processes; frozen and hashable, so that it may be a static argument of compiled functions."""

    t_min: float
    t_max: float
    gaussian = True  # x_t is alpha x0 + sigma eps, eps standard normal; False: deterministic solvers, no score

    def alpha(self, t: Time) -> Any:
        """Signal scale at time t, shaped like t."""
        raise NotImplementedError

    def sigma(self, t: Time) -> Any:
        """Noise standard deviation at time t, shaped like t."""
        raise NotImplementedError

    def dalpha(self, t: Time) -> Any:
        """d alpha / dt."""
        raise NotImplementedError

    def dsigma(self, t: Time) -> Any:
        """d sigma / dt; huge but finite where sigma has an infinite slope (VP processes at t = 0)."""
        raise NotImplementedError

    def t_of_lam(self, lam: Any) -> Any:
        """The time at which the half log-SNR is lam; +inf gives 0."""
        raise NotImplementedError

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior from which sampling starts."""
        return float(self.sigma(self.t_max))

    def lam(self, t: Time) -> Any:
        """Half log-SNR log(alpha / sigma): rises from noise to data; +inf at t = 0, -inf where alpha = 0."""
        t = float_(t)
        with np.errstate(divide="ignore"):
            return xp_of(t).log(self.alpha(t)) - xp_of(t).log(self.sigma(t))

    def drift(self, t: Time) -> Any:
        """f(t) of the forward SDE dx = f x dt + g dW: d log alpha / dt."""
        return self.dalpha(t) / self.alpha(t)

    def diffusion(self, t: Time) -> Any:
        """g(t) of the forward SDE: g^2 = d sigma^2/dt - 2 f sigma^2 (Kingma et al. 2021, eq. 2)."""
        s = self.sigma(t)
        g2 = 2.0 * s * self.dsigma(t) - 2.0 * self.drift(t) * s * s
        return xp_of(g2).sqrt(xp_of(g2).maximum(g2, 0.0))

    def each(self, x: PyTree) -> PyTree:
        """The process of each leaf of a sample: this one (see `system`)."""
        return jax.tree.map(lambda _: self, x)

    def split(self, c: Any, x: PyTree) -> PyTree:
        """A coefficient of a tableau for each leaf of a sample: this one (see `system`)."""
        return jax.tree.map(lambda _: c, x)

    def at(self, t: Time, x: PyTree) -> PyTree:
        """The time of each leaf of a sample: t; what has the sample's structure is taken leaf by leaf."""
        return t if jax.tree.structure(t) == jax.tree.structure(x) else jax.tree.map(lambda _: t, x)

    def told(self, t: Any) -> Any:
        """An array of times as a network is told it: as it is (see `system`)."""
        return t

    def check(self, x: PyTree) -> None:
        """ValueError for a sample that this process cannot have; values that are being traced are not looked at."""

    def noise(self, key: Array, like: PyTree, index: Array | None = None) -> PyTree:
        """Standard normal noise, shaped like `like`: that of SDE solvers' steps, and of `kernel` unless said."""
        return noise.normal(key, like, index)

    def spread(self, t: Time) -> Any:
        """sigma^2 / c, where the chain is x_t = (c_t / c_s) x_s + what does not depend on x_s; +inf where c = 0.

        c is alpha unless a chain says otherwise (ResShift only adds: c = 1). x_s given x_t depends on it.
        """
        a, s = self.alpha(t), self.sigma(t)
        xp = xp_of(a)
        return xp.where(a == 0, xp.inf, s * s / xp.where(a == 0, 1.0, a))

    def posterior(self, s: Time, t: Time) -> Posterior:
        """q(x_s | x_t, x0) of the chain, for any 0 <= s < t <= t_max: Gaussian conditioning, once for every process.

        Cov(x_s, x_t | x0) = (c_t / c_s) sigma_s^2, so x_t's coefficient is k = spread(s) / spread(t), that of x0
        alpha_s - k alpha_t, and the variance sigma_s^2 - k^2 sigma_t^2. ValueError for times outside the support.
        """
        if not isinstance(s, jax.Array) and not isinstance(t, jax.Array):
            late = np.any(np.asarray(t) > self.t_max * (1 + 1e-12))
            if late or np.any(np.asarray(s) < 0) or np.any(np.asarray(s) >= np.asarray(t)):
                raise ValueError(f"posterior: expected 0 <= s < t <= {self.t_max:g} of {self}, got {s=}, {t=}")
        k = self.spread(s) / self.spread(t)
        var = self.sigma(s) ** 2 - (k * self.sigma(t)) ** 2
        return Posterior(k, self.alpha(s) - k * self.alpha(t), xp_of(var).maximum(var, 0.0))

    def mismatch(self) -> Mismatch:
        """How far `prior` is from the law at t_max, which has mean alpha x0 and standard deviation sigma."""
        return Mismatch(-float(self.alpha(self.t_max)), 0.0, self.prior_std - float(self.sigma(self.t_max)))

    def kernel(self, key: Array, like: PyTree, index: Array | None = None) -> PyTree:
        """eps of x_t = alpha x0 + sigma eps, shaped like `like`: in `diffuse`, the prior and the losses."""
        return self.noise(key, like, index)

    def log_kernel(self, square: Any, n: int) -> Any:
        """Log-density of `kernel` in n dimensions where |eps|^2 is `square`."""
        return -0.5 * square - 0.5 * n * math.log(2.0 * math.pi)

    def mix(self, x0: PyTree, eps: PyTree, t: Time) -> PyTree:
        """alpha(t) x0 + sigma(t) eps, leaf by leaf."""
        mixed = lambda p, t, x, e: p.alpha(t) * x + p.sigma(t) * e
        return jax.tree.map(mixed, self.each(x0), self.at(t, x0), x0, eps)

    def diffuse(self, key: Array, x0: PyTree, t: Time, index: Array | None = None) -> PyTree:
        """A draw of x_t given x0; sample i's noise depends on key and index[i] (default i) alone."""
        x0 = jax.tree.map(jnp.asarray, x0)
        t = jax.tree.map(lambda t: jnp.asarray(t, jax.tree.leaves(x0)[0].dtype), t)
        self.check(x0)
        return self.mix(x0, self.kernel(key, x0, index), t)

    def prior(self, key: Array, shape: Any, index: Array | None = None, dtype: Any = None) -> PyTree:
        """Noise at t_max, shape (batch, ...) or a pytree of such: what sampling starts from; keyed as in `diffuse`."""
        leaf = lambda s: jax.ShapeDtypeStruct(s, jnp.float32 if dtype is None else dtype)
        like = jax.tree.map(leaf, shape, is_leaf=lambda s: isinstance(s, tuple))
        return jax.tree.map(lambda p, z: p.prior_std * z, self.each(like), self.kernel(key, like, index))

    def check_times(self, t: Any, name: str = "times") -> np.ndarray:
        """Host check of a time grid: finite, inside [0, t_max], strictly falling, at least two. Float64 copy."""
        t = np.asarray(t, np.float64)
        if t.ndim < 1 or t.shape[0] < 2:
            raise ValueError(f"{name} has shape {t.shape}; expected (n + 1,) with n >= 1 steps, from noise to data")
        if not np.isfinite(t).all():
            i = int(np.argwhere(~np.isfinite(t))[0][0])
            raise ValueError(f"{name}[{i}] is {t[i]}; every time must be finite")
        if t.min() < 0 or t.max() > self.t_max * (1 + 1e-12):
            bad = t.flat[int(np.argmax((t < 0) | (t > self.t_max * (1 + 1e-12))))]
            raise ValueError(
                f"{name} holds {bad:.6g}, outside [0, {self.t_max:g}] of {self}; 0 is data, {self.t_max:g} noise"
            )
        bad = np.argwhere(np.diff(t, axis=0) >= 0)
        if len(bad):
            i = int(bad[0][0])
            what = "is repeated" if np.any(t[i] == t[i + 1]) else "rises"
            raise ValueError(
                f"{name} must fall strictly from noise to data, but {what}: {name}[{i}] = {t[i]}, {name}[{i + 1}] = "
                f"{t[i + 1]}; drop repeated times, or reverse a grid that runs from data to noise"
            )
        return t


def check_t_min(t_min: float, t_max: float) -> float:
    if not 0 < t_min < t_max:
        raise ValueError(
            f"expected 0 < t_min < {t_max:g}, got {t_min=}; the exact data end t = 0 is always in the range"
        )
    return float(t_min)
