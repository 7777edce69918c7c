"""Empirical model statistics: what DPM-Solver-v3 knows of a model beforehand (Zheng et al. 2023, section 3 and C.1).

With y = x / alpha, D the x0 prediction and lam = log(alpha / sigma), the flow is dy/dlam = D - y. Three coefficients a
noise level, each a number or one an element of the sample, make what is left of it to a polynomial small and slow:

    f = (sigma eps - l x) / alpha = (1 - l) y - D         l = E[sigma diag(d eps/dx)] = 1 - E[alpha diag(dD/dx)]
    df/dlam = s f + b + (little)                          (s, b): least squares along the flow, element by element

They hang on the model alone, not on the process: y and lam are all that they see. A guided model is another model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jdiff.denoiser import Denoiser

RIDGE = 1e-6  # of the variances that make up f: where f is the same for all samples (a Gaussian), s is 0 and not 0/0


@dataclass(frozen=True)
class Statistics:
    """A table over half log-SNR: lam (N + 1,) rising from noise to data; l, s, b (N + 1, *d), float64 on the host.

    *d broadcasts against one sample; () is one number for all elements. `note` says where it came from.
    """

    lam: np.ndarray
    l: np.ndarray
    s: np.ndarray
    b: np.ndarray
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("lam", "l", "s", "b"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        if self.lam.ndim != 1 or len(self.lam) < 4 or not (np.diff(self.lam) > 0).all():
            raise ValueError(
                f"statistics: lam has shape {self.lam.shape}; expected at least 4 values, rising from noise to data"
            )
        for name in ("l", "s", "b"):
            value = getattr(self, name)
            if value.shape[:1] != self.lam.shape or value.shape != self.l.shape:
                raise ValueError(
                    f"statistics: {name} has shape {value.shape}; expected ({len(self.lam)}, *d), as lam and l have"
                )
            if not np.isfinite(value).all():
                raise ValueError(f"statistics: {name} holds values that are not finite; estimate it on a model that is")

    def save(self, path: str | Path) -> Path:
        """Write a .safetensors file; returns its path."""
        from safetensors.numpy import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ("lam", "l", "s", "b")}
        save_file(arrays, path, {"format": "jdiff statistics 1", "note": self.note})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read what `save` wrote. FileNotFoundError or ValueError say what is wrong with the file."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"no statistics at {path}; make them with: jdiff statistics RUN --out {path}")
        try:
            with safe_open(path, "numpy") as file:
                note = (file.metadata() or {}).get("note", "")
                arrays = {name: file.get_tensor(name) for name in ("lam", "l", "s", "b")}
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a file of statistics ({error}); expected one that `jdiff statistics` wrote"
            ) from None
        return cls(**arrays, note=note)


def constant(l: float = 1.0, s: float = 0.0, b: float = 0.0) -> Statistics:
    """The same l, s, b at all noise levels. (1, 0, 0) is data prediction, (0, -1, 0) noise prediction."""
    lam = np.linspace(-60.0, 60.0, 5)
    return Statistics(lam, *(np.full(5, float(v)) for v in (l, s, b)), note=f"constant {l:g}, {s:g}, {b:g}")


def levels(process: Any, n: int, start: float | None = None, end: float | None = None) -> np.ndarray:
    """n + 1 half log-SNRs, evenly spaced, from time `start` to time `end`: what `jdiff.times.logsnr` may visit."""
    inside = process.t_max if process.alpha(process.t_max) > 0 else 0.999 * process.t_max
    first: float = inside if start is None else start
    last: float = process.t_min if end is None else end
    if not 0 < last < first <= process.t_max or process.alpha(first) == 0:
        raise ValueError(f"statistics: expected 0 < end < start, with alpha > 0 at start; got {first} and {last}")
    return np.linspace(process.lam(first), process.lam(last), n + 1)


def estimate(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    key: Array,
    *,
    data: np.ndarray | None = None,
    n: int = 1024,
    n_lam: int = 240,
    batch: int = 256,
    probes: int | None = None,
    start: float | None = None,
    end: float | None = None,
    progress: Callable[[Any], Any] = lambda steps: steps,
) -> Statistics:
    """Estimate l, s, b of a model, element by element, on n samples and n_lam + 1 noise levels.

    shape     of one sample. What the denoiser holds for each sample (labels) must be for a batch of `batch`
    data      samples (N, *shape) to noise, the same ones at all levels; None: points on the model's own trajectories
              from the prior (UniPC-2 on the table's levels), which needs no data and serves guided models too
    n, batch  samples in all, and at a time; n is rounded up to whole batches
    probes    random signs a sample (Hutchinson) for the diagonal of the Jacobian; 0: exact, a derivative an element;
              None: 1, or exact up to 16 elements
    start, end  times of the table's ends, default t_max (or just inside it, where alpha = 0) and t_min
    progress  wraps the sequence of batches, e.g. `rich.progress.track`

    Costs about 3 + 2 probes evaluations a sample and level (forward-mode derivatives). Float32 is enough.
    """
    if n < 2 or n_lam < 4 or batch < 1 or (probes is not None and probes < 0):
        raise ValueError(
            f"statistics: expected n >= 2, n_lam >= 4, batch >= 1, probes >= 0; got {n=}, {n_lam=}, {batch=}, {probes=}"
        )
    if data is not None and np.shape(data)[1:] != tuple(shape):
        raise ValueError(f"statistics: data has shape {np.shape(data)}; expected (N, {', '.join(map(str, shape))})")
    size = int(np.prod(shape))
    probes = (0 if size <= 16 else 1) if probes is None else int(probes)
    lam = levels(denoiser.process, n_lam, start, end)
    count, guess = 0, np.zeros((n_lam + 1, *shape))
    mean, scatter = np.zeros((n_lam + 1, 4, *shape)), np.zeros((n_lam + 1, 3, 3, *shape))
    for i in progress(range(-(-n // batch))):
        keys = jax.random.split(jax.random.fold_in(key, i), 3)
        if data is None:
            points = _trajectory(denoiser, lam, (batch, *shape), keys[0])
        else:
            rows = np.arange(i * batch, (i + 1) * batch) % len(data)
            points = _diffused(denoiser, lam, jnp.asarray(data[rows], jnp.float32), keys[0])
        look = lambda guess, points=points, key=keys[1]: [
            np.asarray(v, np.float64)
            for v in _moments(denoiser, *(jnp.asarray(a, points.dtype) for a in (lam, guess)), points, key, probes)
        ]
        if i == 0:
            guess = look(guess)[0][:, 0].astype(np.float32).astype(np.float64)
        new_mean, new_scatter = look(guess)
        shift = new_mean - mean
        scatter += new_scatter + shift[:, 1:, None] * shift[:, None, 1:] * (count * batch / (count + batch))
        count += batch
        mean += shift * (batch / count)
    where = "data" if data is not None else "its own samples"
    note = f"{count} of {where}, {n_lam + 1} levels, {f'{probes} probe(s)' if probes else 'exact diagonal'}"
    return _solve(lam, guess, mean, scatter / count, note)


def _trajectory(denoiser: Denoiser, lam: np.ndarray, shape: tuple[int, ...], key: Array) -> Array:
    """Points of the model's own flow at all levels, (N + 1, *shape)."""
    from jdiff import execute, solvers

    p = denoiser.process
    first = [] if p.alpha(p.t_max) > 0 and np.isclose(p.lam(p.t_max), lam[0]) else [p.t_max]
    times = np.concatenate([first, p.t_of_lam(lam)])
    times[0] = min(times[0], p.t_max)
    table = solvers.unipc(2, lower_order_final=False)(p, times)
    return execute.sample(denoiser, table, p.prior(key, shape), trajectory=True)[1].x[len(first) :]


@jax.jit
def _noised(alpha: Array, sigma: Array, x0: Array, eps: Array) -> Array:
    column = lambda v: v.reshape(-1, *(1,) * x0.ndim)
    return column(alpha) * x0 + column(sigma) * eps


def _diffused(denoiser: Denoiser, lam: np.ndarray, x0: Array, key: Array) -> Array:
    p, eps = denoiser.process, jax.random.normal(key, x0.shape, x0.dtype)
    levels = (jnp.asarray(v(p.t_of_lam(lam)), x0.dtype) for v in (p.alpha, p.sigma))
    return _noised(*levels, x0, eps)


@jax.jit(static_argnums=5)
def _moments(
    denoiser: Denoiser, lam: Array, guess: Array, points: Array, key: Array, probes: int
) -> tuple[Array, Array]:
    """At each level, of (k, y, r, r'): means (N + 1, 4, *d), and scatter of the last three (N + 1, 3, 3, *d).

    k = alpha diag(dD/dx); r = guess y - D, with a guess at k (f itself but for a little, so that float32 sees no large
    numbers cancel) and r' = guess y' - D', along the flow. probes 0: the exact diagonal.
    """
    p = denoiser.process
    shape = points.shape[2:]
    size = int(np.prod(shape))

    def predict(y: Array, lam: Array) -> Array:
        t = p.t_of_lam(lam)
        return denoiser(p.alpha(t) * y, t)

    def diagonal(y: Array, lam: Array, key: Array) -> Array:
        along = lambda v: v * jax.jvp(lambda y: predict(y, lam), (y,), (v,))[1]
        if probes:
            signs = lambda k: jax.random.rademacher(k, y.shape, y.dtype)
            return jnp.mean(jax.lax.map(lambda k: along(signs(k)), jax.random.split(key, probes)), 0)
        basis = jnp.eye(size, dtype=y.dtype).reshape(size, *shape)
        each = jax.lax.map(lambda e: jnp.mean(along(jnp.broadcast_to(e, y.shape)), 0), basis)
        return jnp.broadcast_to(jnp.sum(each, 0), y.shape)

    def level(point: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        lam, guess, x, key = point
        y = x / p.alpha(p.t_of_lam(lam))
        D, slope = jax.jvp(predict, (y, lam), (predict(y, lam) - y, jnp.ones_like(lam)))
        found = jnp.stack([y, guess * y - D, guess * (D - y) - slope])
        means = jnp.mean(found, 1)
        centred = found - means[:, None]
        means = jnp.concatenate([jnp.mean(diagonal(y, lam, key), 0)[None], means])
        return means, jnp.einsum("ab...,cb...->ac...", centred, centred)

    return jax.lax.map(level, (lam, guess, points, jax.random.split(key, len(lam))))


def _solve(lam: np.ndarray, guess: np.ndarray, mean: np.ndarray, cov: np.ndarray, note: str) -> Statistics:
    """l, s, b from the moments: f and df/dlam are linear in (y, r, r'), given k(lam), the guess and their slopes."""
    from scipy.interpolate import CubicSpline

    k, means = mean[:, 0], mean[:, 1:]
    dk, more = CubicSpline(lam, k).derivative()(lam), k - guess
    one, nil = np.ones_like(k), np.zeros_like(k)
    f = np.stack([more, one, nil], 1)  # k y - D
    df = np.stack([dk + more * (guess - 1.0), -more, one], 1)  # with y' = D - y = (guess - 1) y - r
    bilinear = lambda a, b: np.einsum("na...,nac...,nc...->n...", a, cov, b)
    ridge = RIDGE * (2.0 * k**2 * cov[:, 0, 0] + cov[:, 1, 1]) + np.finfo(np.float64).tiny
    s = bilinear(f, df) / (bilinear(f, f) + ridge)
    b = np.sum(df * means, 1) - s * np.sum(f * means, 1)
    return Statistics(lam, 1.0 - k, s, b, note)
