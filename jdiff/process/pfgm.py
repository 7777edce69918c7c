"""PFGM++ (Xu et al. 2023, arXiv 2302.04265): EDM's process with a heavy-tailed kernel, from Poisson flows to diffusion.

Data in N dimensions get D more. The kernel p(x | x0) ~ (|x - x0|^2 + r^2)^(-(N + D) / 2), r = sigma sqrt(D), has the
radius R = r sqrt(R1 / (1 - R1)), R1 ~ Beta(N/2, D/2), and a uniform direction. As R1 / (1 - R1) is a ratio of two gamma
variables and |z|^2 / 2 of a normal z is the upper one, that is

    x = x0 + sigma eps,     eps = z sqrt(D / chi^2_D),     z ~ N(0, I), chi^2_D one number a sample

(Student's t): the noise of EDM times a factor that tends to 1 for D to infinity. eps does not depend on sigma, so the
field E[dx / dsigma | x] = (x - E[x0 | x]) / sigma carries the kernel's law exactly, and EDM's loss and ODE stay.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jdiff import noise

from .base import Posterior, Process, Time
from .straight import EDM, edm

RADIUS = 1 << 30  # the key of chi^2, far from those of a sample's arrays


@dataclass(frozen=True)
class PFGMPP(EDM):
    D: float
    gaussian = False

    def kernel(self, key: Array, like: PyTree, index: Array | None = None) -> PyTree:
        z = self.noise(key, like, index)
        first = jax.tree.leaves(z)[0]
        dtype = jnp.float64 if first.dtype == jnp.float64 else jnp.float32
        half = jnp.asarray(0.5 * self.D, dtype)
        gamma = noise.each(
            jax.random.fold_in(key, RADIUS), len(first), index, lambda k: jax.random.gamma(k, half, (), dtype)
        )
        factor = jnp.sqrt(half / gamma)
        return jax.tree.map(lambda z: factor.reshape(-1, *[1] * (z.ndim - 1)).astype(z.dtype) * z, z)

    def posterior(self, s: Time, t: Time) -> Posterior:
        raise ValueError(f"posterior: {self} is no chain with Gaussian steps; it has a flow alone")

    def log_kernel(self, square: Any, n: int) -> Any:
        half = 0.5 * (n + self.D)
        constant = math.lgamma(half) - math.lgamma(0.5 * self.D) - 0.5 * n * math.log(self.D * math.pi)
        return constant - half * jnp.log1p(square / self.D)


def pfgmpp(D: float = 2048.0, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Process:
    """PFGM++ with D augmented dimensions: `edm` whose noise is Student's t. D = 1 is PFGM, D = inf IS `edm`.

    D: 1 or more, whole or not. Published: 2048 (CIFAR-10), 128 (FFHQ 64). r = sigma sqrt(D), so that EDM's times,
    preconditioning and loss weights serve every D. All arrays of a sample share one radius. Deterministic solvers only:
    for finite D there is no reverse SDE with Gaussian noise, and the velocity does not give the score. The noise has
    variance D / (D - 2), and none for D <= 2. In float32 no chi^2 at D = 1 is below 1e-14.
    ValueError for D < 1.
    """
    if not D >= 1:
        raise ValueError(f"pfgmpp: D is {D}; expected the number of augmented dimensions, 1 or more (inf: EDM)")
    process = edm(sigma_min, sigma_max)
    return process if math.isinf(D) else PFGMPP(process.t_min, process.t_max, float(D))
