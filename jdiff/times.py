"""Time grids: n + 1 strictly falling times from noise to data, float64 on the host.

Every grid runs from `start` (default t_max) to `end` (default 0, the exact data end). A grid whose own formula
cannot reach sigma = 0 (log-SNR, Karras) places n points down to t_min and then appends 0, as EDM does; with
`end` > 0 all n + 1 points follow the formula. A process whose t_max has alpha = 0 (flow, cosine) has no finite
log-SNR there: such grids space their points from a thousandth before t_max, and then move the first to t_max.
"""

from collections.abc import Callable

import numpy as np

from jdiff.process import Process, shift


def _check(process: Process, n: int, start: float | None, end: float) -> float:
    if int(n) != n or n < 1:
        raise ValueError(f"a time grid needs a whole number of steps, at least 1; got {n}")
    start = process.t_max if start is None else float(start)
    if not 0 <= end < start <= process.t_max:
        raise ValueError(f"expected 0 <= end < start <= {process.t_max:g}, got {start=}, {end=} for {process}")
    return start


def _spaced(
    process: Process, n: int, start: float | None, end: float,
    to: Callable[[np.ndarray], np.ndarray], back: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:  # fmt: skip
    """Points evenly spaced in `to(lam)`."""
    start = _check(process, n, start, end)
    first = start if process.alpha(start) > 0 else start - 1e-3 * process.t_max
    last = end if end > 0 else min(process.t_min, 0.5 * first)
    points = n if end == 0 else n + 1
    ends = to(process.lam(np.array([first, last])))
    t = process.t_of_lam(back(np.linspace(ends[0], ends[1], points)))
    t[0] = start
    if end == 0:
        return np.append(t, 0.0)
    t[-1] = end
    return t


def uniform(process: Process, n: int, *, start: float | None = None, end: float = 0.0) -> np.ndarray:
    """Evenly spaced in t."""
    return np.linspace(_check(process, n, start, end), end, int(n) + 1)


def power(process: Process, n: int, k: float = 2.0, *, start: float | None = None, end: float = 0.0) -> np.ndarray:
    """Evenly spaced in t^(1 / k): smaller steps near data the larger k >= 1 (DEIS, Zhang & Chen 2023, their t^k)."""
    if not k > 0:
        raise ValueError(f"power: expected k > 0, got {k}")
    start = _check(process, n, start, end)
    t = np.linspace(start ** (1.0 / k), end ** (1.0 / k), int(n) + 1) ** k
    t[0], t[-1] = start, end
    return t


def quadratic(process: Process, n: int, *, start: float | None = None, end: float = 0.0) -> np.ndarray:
    """Evenly spaced in sqrt(t): small steps near data (DDIM, Song et al. 2021; DEIS's t^2 grid)."""
    return power(process, n, 2.0, start=start, end=end)


def cubic(process: Process, n: int, *, start: float | None = None, end: float = 0.0) -> np.ndarray:
    """Evenly spaced in the cube root of t: smaller steps near data still (DEIS's t^3 grid)."""
    return power(process, n, 3.0, start=start, end=end)


def logsnr(process: Process, n: int, *, start: float | None = None, end: float = 0.0) -> np.ndarray:
    """Evenly spaced in log-SNR (DPM-Solver's choice)."""
    return _spaced(process, n, start, end, lambda lam: lam, lambda lam: lam)


def karras(process: Process, n: int, rho: float = 7.0, *, start: float | None = None, end: float = 0.0) -> np.ndarray:
    """Evenly spaced in (sigma / alpha)^(1 / rho) (Karras et al. 2022, eq. 5)."""
    if not rho > 0:
        raise ValueError(f"karras: expected rho > 0, got {rho}")
    return _spaced(process, n, start, end, lambda lam: np.exp(-lam / rho), lambda u: -rho * np.log(u))


def shifted(process: Process, n: int, a: float = 3.0, *, start: float | None = None, end: float = 0.0) -> np.ndarray:
    """Uniform in t, and then shifted to t' = a t / (1 + (a - 1) t): more steps at high noise for a > 1 (SD3: a = 3).

    For networks that were trained on `process` as it is, or shifted; see `process.shifted` for a = sqrt(dim / 4096).
    """
    if not a > 0:
        raise ValueError(f"shifted: expected a > 0, got {a}")
    start = _check(process, n, start, end)
    first, last = shift(np.array([start, end]), 1.0 / a, process.t_max)
    t = shift(np.linspace(first, last, int(n) + 1), a, process.t_max)
    t[0], t[-1] = start, end
    return t


def graded(times: np.ndarray, levels: int) -> np.ndarray:
    """The grid with its first interval split geometrically: widths h/2^L, h/2^L, h/2^(L-1), ..., h/2 (+ L steps).

    A multistep method starts at order 1; on a graded start its early errors are those of tiny steps, and the whole
    keeps its order (at a cost of L evaluations, so this is for high accuracy, not for few steps).
    """
    if levels < 0:
        raise ValueError(f"graded: levels is {levels}; expected 0 or more")
    t = np.asarray(times, np.float64)
    inner = t[0] + (t[1] - t[0]) * 2.0 ** -np.arange(levels, 0, -1)
    return np.concatenate([t[:1], inner, t[1:]])


ALL = {
    "uniform": uniform, "logsnr": logsnr, "karras": karras, "quadratic": quadratic, "cubic": cubic, "shifted": shifted,
}  # fmt: skip
