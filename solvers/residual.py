"""RDDM's sampler in its own terms, the residual and the noise: a tableau of two outputs a row."""

from typing import Any

import numpy as np

from jdiff.process import Process
from jdiff.tableau import Tableau
from jdiff.trace import Model, Noise, Value, trace


def residual_path(process: Process, times: Any, eta: float = 0.0) -> Tableau:
    """RDDM's DDIM-like steps along any path through (residual, noise) (Liu et al. 2024, arXiv 2308.13712, eq. 13):

        I_s = I_t - (abar_t - abar_s) res - (bbar_t - sqrt(bbar_s^2 - c^2)) eps + c z,
        c^2 = eta (bbar_t^2 - bbar_s^2) bbar_s^2 / bbar_t^2

    The state is I itself, NOT shifted, and the Denoiser returns the pair (res, eps) with res = I_in - I_0: lift
    fn(x, t, y) -> (res, eps) with prediction "x0", for no conversion. times (n + 1,), or (n + 1, 2): one time for the
    residual, one for the noise, so that they leave in any order ((1, 1), (0, 1), (0, 0) is the residual first); the
    network is told both, t of shape (2,). abar = 1 - alpha and bbar = sigma, of `process.rddm`. Where both times
    are one, this is ddim(eta) of the shifted state. ValueError for times that rise, or a step that moves nothing.
    """
    t = np.asarray(times, np.float64)
    if t.ndim not in (1, 2) or len(t) < 2 or t.shape[1:] not in ((), (2,)):
        raise ValueError(f"residual_path: times has shape {t.shape}; expected (n + 1,) or (n + 1, 2), n >= 1")
    steps = np.diff(t, axis=0).reshape(len(t) - 1, -1)
    if not (np.isfinite(t).all() and t.min() >= 0 and t.max() <= process.t_max and (steps <= 0).all()):
        raise ValueError(f"residual_path: times must fall or stay, in [0, {process.t_max:g}], got {t.tolist()}")
    if (steps == 0).all(1).any():
        raise ValueError(f"residual_path: step {int(np.argmax((steps == 0).all(1)))} moves neither residual nor noise")
    if not 0 <= eta <= 1:
        raise ValueError(f"residual_path: expected 0 <= eta <= 1, got {eta}")
    both = t if t.ndim == 2 else np.stack([t, t], 1)
    gone, left = 1.0 - process.alpha(both[:, 0]), process.sigma(both[:, 1])  # abar, bbar

    def sampler(x: Value, model: Model, noise: Noise) -> Value:
        for i in range(len(t) - 1):
            residual, eps = model(x, t[i])
            b0, b1 = left[i], left[i + 1]
            c = b1 * np.sqrt(eta * max(1.0 - (b1 / b0) ** 2, 0.0)) if b0 > 0 else 0.0
            x = x - (gone[i] - gone[i + 1]) * residual - (b0 - np.sqrt(b1**2 - c**2)) * eps
            if c > 0:
                x = x + c * noise()
        return x

    return trace(sampler, process, name="residual_path", outputs=2, references=("Liu et al. 2024 (RDDM), eq. 13",))
