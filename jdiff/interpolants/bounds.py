"""What an imperfect drift costs, and the Schroedinger bridge between Gaussians."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jdiff.denoiser import Denoiser
from jdiff.exact import Gaussian

from .exact import Between, coupled
from .generate import Eps, _check_eps
from .paths import Interpolant


def kl_bound(
    learned: Denoiser,
    reference: Denoiser,
    draws: Callable[[Array, float], Array],
    eps: Eps,
    key: Array,
    nodes: int = 16,
) -> tuple[float, float]:
    """KL(law of x_0 | law of the learned SDE at 0) <= int_0^1 E|v_learned - v_exact|^2 / (4 eps) dt, in nats.

    Girsanov's theorem, and the data-processing inequality (Albergo et al. 2023, section 2.4; there per direction and
    with eps constant); both processes start from the exact law. For the ODE (eps = 0) no such bound exists.

    learned, reference  drifts of `drift`, made with the same eps and direction
    draws               (key, t) -> draws (n, ...) of the exact x_t, such as model.sample of an exact model; t is the
                        interpolant's time
    nodes               of the Gauss-Legendre rule in t; each takes a fresh key. Returns (bound, its standard error)
    ValueError for eps that is not positive, or drifts of two processes.
    """
    if learned.process != reference.process:
        raise ValueError(f"kl_bound: the drifts are of {learned.process} and of {reference.process}")
    at, weights = np.polynomial.legendre.leggauss(nodes)
    t, weights = 0.5 + 0.5 * at, 0.5 * weights
    noise = _check_eps(eps, t)
    if not (noise > 0).all():
        raise ValueError(f"kl_bound: eps is {noise.min():g} at t = {t[np.argmin(noise)]:.4g}; the bound needs eps > 0")
    forward = getattr(learned.process, "forward", False)
    total, variance = 0.0, 0.0
    for i, (time, w, e) in enumerate(zip(t, weights, noise, strict=True)):
        x = draws(jax.random.fold_in(key, i), float(time))
        seen = 1.0 - time if forward else time
        gap = learned(x, seen, "velocity") - reference(x, seen, "velocity")
        square = np.asarray(jnp.sum(jnp.square(gap).reshape(len(x), -1), -1), np.float64) / (4.0 * e)
        total, variance = total + w * square.mean(), variance + w**2 * square.var(ddof=1) / len(x)
    return float(total), float(np.sqrt(variance))


def schrodinger(x0: Gaussian, x1: Gaussian, eps: float) -> Between:
    """The Schroedinger bridge between two Gaussians, of the reference dx = sqrt(2 eps) dW, as an interpolant.

    x_t = (1 - t) x0 + t x1 + sqrt(2 eps t (1 - t)) z, Brownian bridges between the ends of the entropic coupling

        Cov(x0, x1) = C0^1/2 (C0^1/2 C1 C0^1/2 + eps^2)^1/2 C0^-1/2 - eps

    (Janati et al. 2020; Bunne et al. 2023, with their sigma^2 = 2 eps). Its drifts at this eps are the bridge's own; as
    eps -> 0 it is optimal transport, as eps -> infinity the ends become independent. ValueError for eps <= 0 or a
    singular x0.
    """
    if not eps > 0:
        raise ValueError(f"schrodinger: eps is {eps}; expected the reference's noise, > 0")
    if not x0.eigenvalues[0].min() > 0:
        raise ValueError("schrodinger: x0 is singular; expected a covariance of full rank")
    Q, values = x0.eigenvectors[0], x0.eigenvalues[0]
    root, inverse = (Q * np.sqrt(values)) @ Q.T, (Q / np.sqrt(values)) @ Q.T
    inner, vectors = np.linalg.eigh(root @ x1.cov @ root + eps**2 * np.eye(len(values)))
    cross: Any = root @ (vectors * np.sqrt(inner)) @ vectors.T @ inverse - eps * np.eye(len(values))
    return coupled(Interpolant("linear", "brownian", 2.0 * eps), x0, x1, cross)
