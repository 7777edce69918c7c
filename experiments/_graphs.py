"""A graph whose features and adjacency are jointly Gaussian: exact coupled scores, and the laws of GDSS's samplers.

Flat vectors u hold x (n * f numbers) and then the upper triangle of adj, row by row.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff.process import System


@dataclass(frozen=True, eq=False)
class JointGaussian:
    """N(mean, cov) of u, for graphs of n nodes with f features."""

    n: int
    f: int
    mean: np.ndarray
    cov: np.ndarray

    @classmethod
    def random(cls, n: int = 3, f: int = 2, seed: int = 0) -> "JointGaussian":
        """Variances about 0.3 to 3, features and edges strongly correlated."""
        rng = np.random.default_rng(seed)
        d = n * f + n * (n - 1) // 2
        root = rng.normal(size=(d, d)) / np.sqrt(d) + 0.4 * rng.normal(size=(d, 1)) / np.sqrt(d) + 0.2 * np.eye(d)
        return cls(n, f, rng.normal(size=d), root @ root.T)

    @property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        return np.triu_indices(self.n, 1)

    def flat(self, graph: Mapping[str, Any]) -> Any:
        x, adj = graph["x"], graph["adj"]
        return jnp.concatenate([x.reshape(len(x), -1), adj[:, *self.edges]], -1)

    def graph(self, u: Any) -> dict[str, Any]:
        k = self.n * self.f
        upper = jnp.zeros((len(u), self.n, self.n), u.dtype).at[:, *self.edges].set(u[:, k:])
        return {"x": u[:, :k].reshape(-1, self.n, self.f), "adj": upper + jnp.swapaxes(upper, 1, 2)}

    def scales(self, system: System, t: Any, what: str = "alpha") -> Any:
        """alpha (sigma, drift, diffusion) of each entry of u at time t."""
        k, d = self.n * self.f, len(self.mean)
        x, adj = (getattr(system.part(name), what)(t) for name in ("x", "adj"))
        pick = np.arange(d) < k
        return jnp.where(pick, x, adj) if isinstance(t, jax.Array) else np.where(pick, x, adj)

    def denoiser(self, system: System) -> jdiff.Denoiser:
        """E[u_0 | u_t] by Gaussian conditioning, at a scalar time."""

        def x0(graph: Any, t: Any) -> Any:
            u = self.flat(graph)
            a, s = (self.scales(system, t, what).astype(u.dtype) for what in ("alpha", "sigma"))
            mean, cov = jnp.asarray(self.mean, u.dtype), jnp.asarray(self.cov, u.dtype)
            gain = jnp.linalg.solve(a[:, None] * cov * a + jnp.diag(s * s), a[:, None] * cov)
            return self.graph(mean + (u - a * mean) @ gain)

        return jdiff.denoiser(x0, system, "x0")

    def noised(self, system: System, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of u at time t."""
        a, s = self.scales(system, t), self.scales(system, t, "sigma")
        return a * self.mean, a[:, None] * self.cov * a + np.diag(s * s)

    def law(
        self,
        system: System,
        times: np.ndarray,
        sampler: str,
        snr: float = 0.0,
        temperature: float = 1.0,
        as_published: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance after "s4" (noise kept in the last step), or "em": Euler-Maruyama, with snr > 0 after a
        Langevin step of its own score. From the exact law at times[0]; closed form, float64.
        """
        mean, cov = self.noised(system, times[0])
        eye = np.eye(len(mean))
        for t, end in itertools.pairwise(times):
            h, mid = t - end, 0.5 * (t + end)
            centre, var = self.noised(system, t)
            J = -np.linalg.inv(var)  # score = J (u - centre)
            a, a_mid, a_end = (self.scales(system, v) for v in (t, mid, end))
            s, s_mid, s_end = (self.scales(system, v, "sigma") for v in (t, mid, end))
            f, g2 = self.scales(system, t, "drift"), self.scales(system, t, "diffusion") ** 2
            e = 2.0 * (a / a_end * snr * s) ** 2
            if sampler == "s4":
                k1, k2 = a_mid / a, a_end / a_mid
                v1, v2 = (k1 * s) ** 2 - s_mid**2, (k2 * s_mid) ** 2 - s_end**2
                if as_published:
                    v1, v2 = v1 / k1**2, v2 / k2**2
                pull = np.diag(k2) @ (k1[:, None] * np.diag(e) + np.diag(g2 * h)) @ J
                M, Q = np.diag(k1 * k2) + pull, (k1 * k2) ** 2 * 2 * e * temperature**2 + k2**2 * v1 + v2
                mean, cov = k1 * k2 * mean + pull @ (mean - centre), M @ cov @ M.T + np.diag(Q)
                continue
            if snr:
                M = eye + np.diag(e) @ J
                mean, cov = mean + e * (J @ (mean - centre)), M @ cov @ M.T + np.diag(2 * e * temperature**2)
            M = np.diag(1 - f * h) + np.diag(g2 * h) @ J
            mean, cov = (1 - f * h) * mean + g2 * h * (J @ (mean - centre)), M @ cov @ M.T + np.diag(g2 * h)
        return mean, cov

    def error(self, system: System, t: float, mean: Any, cov: Any) -> tuple[float, float]:
        """Relative errors (Frobenius norms) of a mean and a covariance of u at time t."""
        right = self.noised(system, t)
        off = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip((mean, cov), right, strict=True)]
        return off[0], off[1]
