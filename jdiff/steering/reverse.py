"""Steps of the reverse SDE with any pull k and noise n, exact for x0 predictions that are held: on the host, float64.

In z = x / alpha and r = sigma^2 / alpha^2, dz = k (D - z) / r dtau + sqrt(n) dW runs from r0 to r1 < r0. With the
x0 prediction D held it is solved by

    z1 = D + q (z - D) + sqrt(V) noise,      q = (r1 / r0)^k,      V = n r1 (1 - (r1 / r0)^(2 k - 1)) / (2 k - 1):

k = n = 1 is DDPM's ancestral step, k = 1/2 and n = 0 DDIM's.
"""

from typing import NamedTuple

import numpy as np

from jdiff.process import Process


class Moves(NamedTuple):
    """K steps x1 = keep x + reach D + std noise, and what else their users need; alpha and sigma at K + 1 times."""

    alpha: np.ndarray
    sigma: np.ndarray
    lam: np.ndarray  # half log-SNR (K + 1)
    h: np.ndarray  # log (r0 / r1), inf out of alpha = 0 and into sigma = 0
    keep: np.ndarray
    reach: np.ndarray
    std: np.ndarray
    second: np.ndarray  # Heun: x1 += second reach (D at t1 - D)

    @property
    def into_data(self) -> bool:
        return bool(self.sigma[-1] == 0)

    @property
    def out_of_noise(self) -> bool:
        return bool(self.alpha[0] == 0)


def moves(p: Process, t: np.ndarray, k: np.ndarray, n: np.ndarray, euler: bool = False) -> Moves:
    """The steps over the times t (K + 1), for k, n (K,). Out of alpha = 0 the pure noise is kept, scaled, and D added.

    euler: Euler-Maruyama in r, for comparison with codes that take it.
    """
    a, s = p.alpha(t), p.sigma(t)
    with np.errstate(divide="ignore", invalid="ignore"):
        lam = np.log(a) - np.log(s)
        h = 2.0 * np.diff(lam)
        ratio, rho = a[1:] / a[:-1], s / a
        decay, two = np.exp(-k * h), np.where(k == 0.5, 1.0, 2.0 * k - 1.0)
        spread = np.where(k == 0.5, h, -np.expm1(-two * h) / two)
        variance = np.where(np.isfinite(h), n * rho[1:] ** 2 * spread, 0.0)
        second = np.where(np.isfinite(h), 1.0 / (1.0 - decay) - 1.0 / (k * h), 0.0)
        if euler:
            decay, variance, second = 1.0 + k * np.expm1(-h), -n * rho[:-1] ** 2 * np.expm1(-h), 0.0 * second
        keep, reach, std = ratio * decay, a[1:] * (1.0 - decay), a[1:] * np.sqrt(variance)
    if a[0] == 0:
        keep[0], reach[0], std[0] = s[1] / s[0], a[1], 0.0
    return Moves(a, s, lam, h, keep, reach, std, second)
