"""Mask-and-replace diffusion of tokens (VQ-Diffusion: Gu et al. 2022, arXiv 2111.14822, eq. 7 and 8).

A token of K classes has lost its value by time t with probability u(t), u(0) = 0 and u(1) = 1. Of those lost, the
share r stands as [MASK], the rest as a class drawn uniformly. In the paper's symbols:

    alpha_bar = 1 - u        gamma_bar = r u        K beta_bar = (1 - r) u
    between s < t:  alpha = (1 - u_t) / (1 - u_s)    gamma = r (u_t - u_s) / (1 - r u_s)

and K beta = 1 - alpha - gamma >= 0 for any rising u. Written in u and r nothing cancels, so probabilities keep their
relative precision in float32, and their logarithms too. r = 1 is absorbing diffusion, r = 0 is uniform (D3PM).

t is a scalar or broadcasts against the tokens: a time a token. u may depend on the place of a token as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Integer

from jdiff.discrete.draw import categorical
from jdiff.process.base import xp_of


def linear(t: Any) -> Any:
    """u(t) = t: MDLM's and VQ-Diffusion's."""
    return t


@dataclass(frozen=True)
class MaskReplace:
    """classes: K >= 1, the tokens are 0 .. K - 1 and [MASK] is K. share: r in [0, 1]. lost: u(t), rising from 0 to 1,
    of NumPy or JAX arrays alike; what it returns broadcasts against the tokens.

    ValueError where u does not rise from 0 to 1, or r is no share.
    """

    classes: int
    share: float
    lost: Callable[[Any], Any] = linear

    def __post_init__(self):
        if self.classes < 1 or not 0 <= self.share <= 1:
            raise ValueError(f"expected classes >= 1 and a share in [0, 1], got {self.classes} and {self.share}")
        u = np.stack([np.asarray(self.lost(np.float64(t))) for t in np.linspace(0, 1, 257)])
        if abs(u[0]).max() > 1e-9 or abs(u[-1] - 1).max() > 1e-9 or (np.diff(u, axis=0) < -1e-12).any():
            raise ValueError(
                f"lost(t) must rise from 0 at t = 0 to 1 at t = 1, for every token; it goes from {u[0].min():.4g} to "
                f"{u[-1].max():.4g} with steps down to {np.diff(u, axis=0).min():.3g}; an importance may be too large"
            )

    @property
    def mask(self) -> int:
        """The [MASK] token, K."""
        return self.classes

    def check(self, tokens: Any, masked: bool = False) -> None:
        """ValueError for tokens outside the vocabulary; [MASK] is in it where `masked`. On the host: not for traces."""
        x = np.asarray(tokens)
        top = self.classes if masked else self.classes - 1
        if x.dtype.kind not in "iu" or (x.size and (x.min() < 0 or x.max() > top)):
            found = f"values {x.min()} to {x.max()}" if x.size else "none"
            raise ValueError(
                f"expected integer tokens from 0 to {top} ({self.classes} classes{', [MASK] last' if masked else ''}), "
                f"got {x.dtype} {found}; map what is outside to a class, or raise `classes`"
            )

    def levels(self, t: Any) -> tuple[Any, Any, Any]:
        """alpha_bar, beta_bar (of one class) and gamma_bar at time t."""
        u = self.lost(t)
        return 1.0 - u, (1.0 - self.share) * u / self.classes, self.share * u

    def matrix(self, s: float, t: float) -> np.ndarray:
        """Q[i, j] = q(x_t = j | x_s = i), float64 (K + 1, K + 1); s = 0: the marginals. s <= t, scalars; on the host.

        Where u gives each token its own value: (.., K + 1, K + 1).
        """
        us, ut = (np.asarray(self.lost(np.float64(v)), np.float64)[..., None, None] for v in (s, t))
        K, r = self.classes, self.share
        alpha, gamma = (1 - ut) / (1 - us), r * (ut - us) / (1 - r * us)
        beta = (1 - r) * (ut - us) / ((1 - r * us) * (1 - us)) / K
        Q = np.zeros((*us.shape[:-2], K + 1, K + 1))
        Q[..., :K, :K] = alpha * np.eye(K) + beta
        Q[..., :K, K:], Q[..., K, K] = gamma, 1.0
        return Q

    def marginal(self, x0: Integer[Array, "*shape"], t: Any) -> Float[Array, "*shape k"]:
        """q(x_t | x0) over the K classes and [MASK]. ValueError for tokens outside the vocabulary (of concrete x0)."""
        if not isinstance(x0, Tracer):
            self.check(x0)
        keep, replace, masked = (jnp.broadcast_to(v, x0.shape)[..., None] for v in self.levels(t))
        here = jax.nn.one_hot(x0, self.classes, dtype=keep.dtype)
        return jnp.concatenate([keep * here + replace, masked], -1)

    def likelihood(self, x: Integer[Array, "*shape"], t: Any) -> Float[Array, "*shape k"]:
        """q(x_t | x0 = k) for each class k: what an exact posterior needs of the tokens x at time t."""
        keep, replace, masked = (jnp.broadcast_to(v, x.shape)[..., None] for v in self.levels(t))
        here = jax.nn.one_hot(x, self.classes, dtype=keep.dtype)
        return jnp.where((x == self.mask)[..., None], masked, keep * here + replace)

    def diffuse(self, key: Array, x0: Integer[Array, "*shape"], t: Any) -> Integer[Array, "*shape"]:
        """Draws of x_t given x0, int32. ValueError for tokens outside the vocabulary (of concrete x0)."""
        return categorical(key, jnp.log(self.marginal(x0, t)))

    def posterior(
        self, x: Integer[Array, "*shape"], p: Float[Array, "*shape k"], s: Any, t: Any
    ) -> Float[Array, "*shape k1"]:
        """sum_k q(x_s | x_t = x, x0 = k) p_k over the K classes and [MASK], for any s <= t: strides are exact.

        p: a network's p(x0 | x_t); one-hot gives the posterior itself. Rows sum to 1 where those of p do.
        """
        K, r = self.classes, self.share
        us, ut = (jnp.broadcast_to(self.lost(v), x.shape)[..., None].astype(p.dtype) for v in (s, t))
        safe = jnp.where(ut > 0, ut, 1.0)
        seen = (ut - us) / (safe * (1.0 - r * us))  # of a mask: the weight of having been a class at s
        from_mask = jnp.concatenate([seen * ((1.0 - us) * p + (1.0 - r) * us / K), us / safe], -1)
        here = jax.nn.one_hot(x, K, dtype=p.dtype)
        if r == 1:
            kept = here
        else:
            weight = p / ((1.0 - ut) * here + (1.0 - r) * safe / K)  # p_k / q(x_t | k)
            beta = (1.0 - r) * (ut - us) / (1.0 - r * us) / K  # times 1 - u_s, and so alpha: u_s = 1 divides by 0
            total = weight.sum(-1, keepdims=True)
            rest = jnp.where(us < 1, 1.0 - us, 1.0)
            kept = ((1.0 - ut) * here + beta) * (weight * (1.0 - us) + (1.0 - r) * us / K * total) / rest
            kept = jnp.where((ut > us) & (ut > 0), kept, here)
        from_class = jnp.concatenate([kept, jnp.zeros_like(ut)], -1)
        return jnp.where((x == self.mask)[..., None], from_mask, from_class)

    def prior(self, key: Array, shape: tuple[int, ...]) -> Integer[Array, "..."]:
        """Tokens at t = 1, int32: [MASK] with probability r, else a class drawn uniformly."""
        p = jnp.full(self.classes + 1, (1.0 - self.share) / self.classes, jnp.float32).at[-1].set(self.share)
        return categorical(key, jnp.log(jnp.broadcast_to(p, (*shape, self.classes + 1))))


def absorbing(classes: int, lost: Callable[[Any], Any] = linear) -> MaskReplace:
    """All lost tokens are masks: MDLM (Sahoo et al. 2024), MaskGIT's corruption, D3PM's absorbing form."""
    return MaskReplace(classes, 1.0, lost)


def uniform(classes: int, lost: Callable[[Any], Any] = linear) -> MaskReplace:
    """All lost tokens are replaced by a uniform class: multinomial diffusion (Hoogeboom et al. 2021), D3PM."""
    return MaskReplace(classes, 0.0, lost)


def mask_and_replace(classes: int, share: float = 0.9) -> MaskReplace:
    """VQ-Diffusion: gamma_bar rises linearly to 0.9 and K beta_bar to 0.1 (section 4.1 of the paper).

    The official code ends at gamma_bar = 0.99999 instead, which is `share=1 - 1e-6`: next to nothing is replaced.
    """
    return MaskReplace(classes, share)


def spindle(classes: int, importance: Any, share: float = 0.9) -> MaskReplace:
    """M2DM (Kong et al. 2023, arXiv 2308.14480): alpha_bar of token i is 1 - t - F_i sin(pi t).

    importance: F, broadcasts against the tokens, at most 1 / pi in size (else alpha_bar would rise somewhere). Tokens
    with negative F keep their value longer, and so appear first in sampling. F = 0 is `mask_and_replace`. How the paper
    scales its importance scores into F was not found: F is the caller's.
    """
    F = np.asarray(importance, np.float64)

    def lost(t: Any) -> Any:
        xp = xp_of(t)
        return t + xp.asarray(F, np.float64 if xp is np else t.dtype) * xp.sin(np.pi * t)

    return MaskReplace(classes, share, lost)
