"""The rows of Feynman-Kac correctors (`jdiff.steering.correctors`): steps, weights, the start's constant; float64."""

from typing import Any, NamedTuple

import numpy as np

from jdiff.process import Process
from jdiff.steering.reverse import moves


class Rows(NamedTuple):
    """Of each step: its times, x1 = keep x + gain x0s + heun (x0s at t1 - x0s) + noise z with the x0 predictions (and
    the reward's pull), and the shares of the weights' rates per half log-SNR. Steps in front."""

    t: Any
    t1: Any
    keep: Any
    gain: Any  # (m + 1,): of each model's x0, and of the pull (sigma^2 / alpha) grad U
    heun: Any  # (m + 1,)
    noise: Any
    share: Any  # of the weight's rate; trapezoid in half log-SNR over the nodes
    offset: Any  # log of the start's constant, in the first row
    powers: Any  # (m,) b
    velocity: Any  # (m,) c
    sigma: Any
    tilt: Any  # (2,): sigma^2 beta / alpha at t and t1
    along: Any  # (2,): d log alpha / d lam, dt / d lam
    worth: Any  # (3,): factors in the log-weight of r here, of dr / d lam here, and of r of the new sample


def rows(p: Process, times: Any, d: int, of: Any) -> Rows:
    """The rows of the corrector `of` for samples of d elements."""
    t = p.check_times(times)
    if t.ndim != 1:
        raise ValueError(f"corrector: times have shape {t.shape}; expected (n + 1,), one grid for all elements")
    b, c, K = np.array(of.powers), np.array(of.velocity), len(t) - 1
    B = b.sum()
    if np.ndim(of.noise) and np.shape(of.noise) != (K,):
        raise ValueError(f"corrector: noise has shape {np.shape(of.noise)} for {K} steps; expected a number or ({K},)")
    n = np.broadcast_to(np.asarray(of.noise, np.float64), (K,))
    pulls = 0.5 * (c + n[:, None] * b)  # of each model
    k = pulls.sum(1)
    if not (k > 0).all():
        i = int(np.argmin(k))
        raise ValueError(
            f"corrector: sum(velocity) + noise sum(powers) = {2 * k[i]:g} at step {i + 1}; it must be positive, for "
            "particles to be drawn to the data: choose another velocity, or more noise"
        )
    m = moves(p, t, k, n, of.as_published)
    parts = np.concatenate([pulls, 0.5 * n[:, None]], 1) / k[:, None]  # of the models, and of the reward
    first = int(m.out_of_noise)
    if first:  # the prior's power again at the next time, without weights
        parts[0], m.h[0] = np.append(b / B, 0.0), 0.0
    gain = m.reach[:, None] * parts
    finite = np.where(np.isfinite(m.h), 0.25 * m.h, 0.0)  # each interval's share at either end: trapezoid
    left = np.where(np.isfinite(m.h), 0.25 * m.h, 0.5)  # into sigma = 0 the rate in r is held
    rho = m.sigma[first] / m.alpha[first]  # of the start
    offset = 0.5 * d * ((1 - B) * np.log(2 * np.pi * rho**2) - np.log(B)) + d * (1 - B) * np.log(m.alpha[-1])
    nodes = np.arange(K if m.into_data else K + 1)  # above 0 a last row completes the weights
    ends = lambda v, w: (np.append(v, 0.0) + np.append(0.0, w))[nodes]
    still = lambda v: np.concatenate([v, np.zeros((1, *v.shape[1:]))])[nodes]
    share = still(-0.5 * np.expm1(-m.h)) if of.as_published else ends(left, finite)
    two = (m.second != 0) & (of.order == 2)
    keep = np.append(m.keep, 1.0)[nodes]
    t1 = np.append(np.where(two, t[1:], t[:-1]), t[-1])[nodes]  # without a second look: anywhere safe
    beta = _beta(of, m.alpha, m.sigma, K)
    worth = np.stack([ends(0.5 * np.diff(beta), 0.5 * np.diff(beta)), beta[nodes] * ends(finite, finite)], 1)
    worth = np.concatenate([worth, np.zeros((len(nodes), 1))], 1)
    worth[0, 0] += beta[0]
    if m.into_data:  # the last change of U exactly
        worth[-1] += [-0.5 * (beta[-1] + beta[-2]), 0.0, beta[-1]]
    with np.errstate(divide="ignore", invalid="ignore"):
        f = p.dalpha(t) / m.alpha
        slope = f - p.dsigma(t) / m.sigma  # d lam / dt
        along = np.nan_to_num(np.stack([f / slope, 1.0 / slope], 1), posinf=0.0, neginf=0.0)[nodes]
        tilt = np.nan_to_num(m.sigma**2 * beta / m.alpha, posinf=0.0)
    return Rows(
        t[nodes], t1, keep, still(gain), still(m.second[:, None] * gain), still(m.std), share,
        np.where(nodes == 0, offset, 0.0), np.tile(b, (len(nodes), 1)), np.tile(c, (len(nodes), 1)), m.sigma[nodes],
        np.stack([tilt, np.append(tilt[1:], 0.0)], 1)[nodes], along, worth,
    )  # fmt: skip


def _beta(of: Any, a: np.ndarray, s: np.ndarray, K: int) -> np.ndarray:
    """beta at the K + 1 times."""
    beta = np.asarray(of.strength if of.reward is not None else 0.0, np.float64)
    if beta.ndim == 0:
        beta = beta * a**2 / (a**2 + s**2)
    if beta.shape != (K + 1,) or not np.isfinite(beta).all():
        raise ValueError(
            f"corrector: strength has shape {beta.shape}; expected a finite number, or one a time ({K + 1},)"
        )
    return beta
