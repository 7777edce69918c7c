"""The local dimension of the data, read off a model: noise is removed across the data's manifold and not along it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jdiff import noise
from jdiff.denoiser import Denoiser
from jdiff.ode.variables import flow_slope, position, scale

from .divergence import jacobian


def singular_values(
    denoiser: Denoiser, x: Float[Array, "batch d"], t: float, *, method: str = "score_svd", key: Array | None = None,
    n: int = 64, end: float | None = None, steps: int = 64,
) -> Float[Array, "batch d"]:  # fmt: skip
    """The numbers, falling, from which `intrinsic_dim` reads the dimension; arguments as there."""
    p = denoiser.process
    if method not in ("score_svd", "flow_svd"):
        raise ValueError(f"intrinsic_dim: method is {method!r}; expected 'score_svd' or 'flow_svd'")
    if not 0 < t < p.t_max:
        raise ValueError(f"intrinsic_dim: t is {t}; expected a small time > 0, of noise far below the data's curvature")
    d = x.shape[1]
    if method == "score_svd":
        if key is None or n < d:
            raise ValueError(f"intrinsic_dim: score_svd needs a key and n >= {d} noised copies, got {n=}")
        around = jnp.repeat(jnp.asarray(x), n, 0)
        score = denoiser(p.mix(around, noise.normal(key, around), jnp.asarray(t, x.dtype)), t, "score")
        return jnp.linalg.svd(score.reshape(len(x), n, d), compute_uv=False)
    last = 0.9 * p.t_max if end is None else float(end)
    u = jnp.asarray(np.linspace(position(p, "lam", t), position(p, "lam", last), steps + 1), x.dtype)

    def step(z: Array, ends: tuple[Array, Array]) -> tuple[Array, None]:
        h = ends[1] - ends[0]
        f = lambda u, z: flow_slope(denoiser, "lam", u, z)
        k1 = f(ends[0], z)
        k2 = f(ends[0] + 0.5 * h, z + 0.5 * h * k1)
        k3 = f(ends[0] + 0.5 * h, z + 0.5 * h * k2)
        return z + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + f(ends[1], z + h * k3)), None

    encode = lambda x: jax.lax.scan(step, x / jnp.asarray(scale(p, "lam", t), x.dtype), (u[:-1], u[1:]))[0]
    return 1.0 / jnp.linalg.svd(jacobian(encode, jnp.asarray(x)), compute_uv=False)[:, ::-1]


def intrinsic_dim(denoiser: Denoiser, x: Float[Array, "batch d"], t: float, **options: Any) -> Int[Array, " batch"]:
    """The data's dimension at each of x (batch, d), data at time t: from 1 to d - 1, (batch,).

    method  "score_svd" (Stanczuk et al. 2022, arXiv 2212.12611): scores at `n` noised copies of x span the normal
            space, and the values are theirs; needs `key`. "flow_svd" (Horvat and Pfister 2024, arXiv 2402.03845): the
            derivative of the flow from `end` (default 0.9 t_max) to x at time t, by `steps` Runge-Kutta steps in
            log-SNR: noise that points off the manifold is shrunk
    t       the noise there must be small beside the manifold's curvature, and well above what the model resolves

    Singular values of scores are large across the manifold and are parted by their largest difference, as published;
    those of the flow are large along it and are parted by the largest ratio. The model has to be
    conservative for either to mean anything: see `gauge_residual`.
    """
    values = singular_values(denoiser, x, t, **options)
    if options.get("method", "score_svd") == "score_svd":
        return x.shape[1] - 1 - jnp.argmax(values[:, :-1] - values[:, 1:], 1)
    return jnp.argmax(values[:, :-1] / values[:, 1:], 1) + 1
