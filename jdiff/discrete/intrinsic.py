"""NeoDiff's intrinsic time of a token (Li et al. 2025, arXiv 2505.22165): a Poisson counter, rescaled and cut.

At extrinsic time t each token has counted s ~ Poisson(lambda(t)) events by itself, and its own time is tau = c / s_max,

    c = clip(round(lambda + w (s - lambda) / sqrt(lambda)), 0, s_max),        w(t) the standard deviation wanted,

so that the spread over tokens is w / s_max rather than sqrt(lambda) / s_max. Without `spread` w = sqrt(lambda): c is
s itself, cut at s_max. Then s_max = 1 is absorbing diffusion (tau = 0 with probability exp(-lambda)), and lambda =
s_max t with s_max to infinity gives all tokens the time t, with variance t / s_max.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclass(frozen=True)
class PoissonTime:
    """The law of tau in {0, 1 / s_max, .., 1} at time t. s_max >= 1; rate: lambda(t) >= 0; spread: w(t) or None.

    Functions of JAX arrays. NeoDiff's released training script: s_max = 99, rate = spread = s_max t ("constant_same"),
    so a standard deviation of t before the cut; `released` gives it.
    """

    s_max: int
    rate: Callable[[Any], Any]
    spread: Callable[[Any], Any] | None = None
    support: int = 0  # the largest s told apart; 0: ten standard deviations above lambda(1)

    def __post_init__(self):
        if self.s_max < 1:
            raise ValueError(f"PoissonTime: expected s_max >= 1, got {self.s_max}")

    @classmethod
    def released(cls, s_max: int = 99) -> "PoissonTime":
        """rate = spread = s_max t, as the official script trains with.

        Not copied: the official code sets the COUNT of tokens with t > 0.99 to 1, meant as the time 1 when counts were
        still divided by s_max; such tokens get tau = 1 / s_max, nearly clean, at the noise end.
        """
        return cls(s_max, lambda t: s_max * t, lambda t: s_max * t)

    def counts(self, t: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape m"], Float[Array, "*shape m"]]:
        """The counts c that s = 0, 1, .. become at time t, and the probabilities of s (the last has the tail)."""
        top = float(self.rate(np.float64(1.0)))
        m = self.support or int(np.ceil(top + 10.0 * np.sqrt(top) + 10.0))
        s, rate = jnp.arange(m + 1, dtype=t.dtype), self.rate(t)[..., None]
        log_p = jax.scipy.special.xlogy(s, rate) - rate - jax.scipy.special.gammaln(s + 1.0)
        p = jnp.exp(log_p)
        p = p.at[..., -1].add(jnp.maximum(1.0 - p.sum(-1), 0.0))
        if self.spread is None:
            c = jnp.broadcast_to(s, p.shape)
        else:
            std = jnp.sqrt(jnp.where(rate > 0, rate, 1.0))
            c = jnp.round(rate + self.spread(t)[..., None] * (s - rate) / std)
        return jnp.clip(c, 0.0, float(self.s_max)), p

    def marginal(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape k"]:
        """P(tau = k / s_max), k = 0 .. s_max."""
        c, p = self.counts(t)
        k = jnp.arange(self.s_max + 1, dtype=t.dtype)
        return jnp.where(c[..., None, :] == k[:, None], p[..., None, :], 0.0).sum(-1)

    def tau(self, u: Float[Array, "*shape"], t: Float[Array, "*shape2"]) -> Float[Array, "*shape3"]:
        """The intrinsic time at the uniform number u and time t (they broadcast): the inverse distribution function.

        A rank (j + 1/2) / n of a token among n in place of u gives the pseudo labels that train the time predictor.
        """
        c, p = self.counts(t)
        first = (jnp.cumsum(p, -1) <= u[..., None]).sum(-1)
        first = jnp.minimum(first, p.shape[-1] - 1)
        c = jnp.broadcast_to(c, (*first.shape, c.shape[-1]))
        return jnp.take_along_axis(c, first[..., None], -1)[..., 0] / self.s_max
