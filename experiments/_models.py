"""Exact models that the experiments on solvers share, their starts, and the true flow to compare with.

Three models of a survey of published samplers, kept in papers/exact_models.npz (our own file, made for that survey):

    gmm2    25 sharp modes on a jittered 5 x 5 grid in [-1, 1]^2, standard deviation about 0.04
    gmm64   10 modes in 64 dimensions, means 0.6 N(0, 1), standard deviations 0.15 exp(0.5 N(0, 1))
    gauss8  one Gaussian in 8 dimensions, standard deviations 0.02 to 2, rotated

`fresh` draws others of the same three kinds. Everything is float64 (run with x64 enabled).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import exact, process
from jdiff.process import Process

NAMES = ("gmm2", "gmm64", "gauss8")
TRAJECTORIES = {"gmm2": 1024, "gmm64": 256, "gauss8": 512}
STARTS: dict[str, Process] = {
    "vp": process.vp_discrete(np.linspace(1e-4, 2e-2, 1000)),  # sigma/alpha 157 -> 0
    "edm": process.edm(),  # sigma 80 -> 0
    "flow": process.flow(),  # t = 1 -> 0
}


def survey(name: str) -> exact.Mixture:
    """One of the survey's models: "gmm2", "gmm64" or "gauss8"."""
    file = np.load(Path(__file__).parent / "papers" / "exact_models.npz")
    w, m, c = (file[f"{name}_{what}"] for what in ("weights", "means", "covs"))
    return exact.mixture(w, m, list(c)) if len(w) > 1 else exact.gaussian(m[0], c[0])


def fresh(name: str, seed: int, modes: int | None = None, dim: int | None = None) -> exact.Mixture:
    """A model of the same kind as `survey(name)`, drawn afresh; other numbers of modes and dimensions if given."""
    rng = np.random.default_rng(seed)
    if name == "gauss8":
        d = dim or 8
        Q, _ = np.linalg.qr(rng.normal(size=(d, d)))
        return exact.gaussian(0.3 * rng.normal(size=d), (Q * np.geomspace(0.02, 2.0, d) ** 2) @ Q.T)
    if name == "gmm64":
        k, d = modes or 10, dim or 64
        std = 0.15 * np.exp(0.5 * rng.normal(size=(k, d)))
        return exact.mixture(rng.dirichlet(np.full(k, 5.0)), 0.6 * rng.normal(size=(k, d)), list(std**2))
    if name == "gmm2":
        side, d = round((modes or 25) ** 0.5), dim or 2
        line = np.linspace(-1.0, 1.0, side)
        plane = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
        means = np.concatenate([plane, rng.uniform(-1, 1, size=(len(plane), d - 2))], 1)
        means = means + 0.03 * rng.normal(size=means.shape)
        std = 0.04 * np.exp(0.2 * rng.normal(size=(len(means), d)))
        return exact.mixture(rng.dirichlet(np.full(len(means), 20.0)), means, list(std**2))
    raise ValueError(f"model is {name!r}; expected one of {', '.join(NAMES)}")


def noise(model: exact.Mixture, p: Process, seed: int, n: int) -> jax.Array:
    """n starts (n, d) at t_max, float64."""
    z = np.random.default_rng(seed).normal(size=(n, model.means.shape[1]))
    return jnp.asarray(p.prior_std * z)


def flow(
    model: exact.Mixture, p: Process, x: jax.Array, rtol: float = 1e-8, start: float | None = None, end: float = 0.0
) -> np.ndarray:
    """The probability flow from x at start (default t_max) to end: closed form for a Gaussian, DOP853 otherwise.

    The integration runs along the angle phi, z = cos(phi) x0 + sin(phi) eps, which is smooth from end to end.
    """
    start = p.t_max if start is None else start
    if isinstance(model, exact.Gaussian):
        return np.asarray(model.flow(p, x, start, end))
    import scipy.integrate

    polar = process.vp_cosine(s=1e-12)  # any process knows E[x0 | cos x0 + sin eps]; here t = 2 phi / pi
    denoise = jax.jit(lambda z, t: model.denoiser(polar)(z, t))

    def slope(phi: float, z: np.ndarray) -> np.ndarray:
        z = z.reshape(x.shape)
        D = np.asarray(denoise(z, 2.0 * phi / np.pi))
        eps = (z - np.cos(phi) * D) / np.sin(phi)
        return (np.cos(phi) * eps - np.sin(phi) * D).ravel()

    (a, s), (a1, s1) = ((float(p.alpha(t)), float(p.sigma(t))) for t in (start, end))
    first, last = np.arctan2(s, a), max(np.arctan2(s1, a1), 1e-6)
    z = np.asarray(x) / np.hypot(a, s)
    found = scipy.integrate.solve_ivp(slope, (first, last), z.ravel(), "DOP853", rtol=rtol, atol=0.1 * rtol)
    z = found.y[:, -1].reshape(x.shape)
    return np.hypot(a1, s1) * z if end > 0 else np.asarray(denoise(z, 2.0 * last / np.pi))


def errors(denoiser: jdiff.Denoiser, table: jdiff.Tableau, x: jax.Array, target: np.ndarray) -> dict[str, float]:
    """rms over trajectories and coordinates, and the median over trajectories of each one's rms."""
    each = np.mean((np.asarray(jdiff.sample(denoiser, table, x)) - target) ** 2, 1)
    return {"rms": float(np.sqrt(np.mean(each))), "median": float(np.sqrt(np.median(each)))}
