"""Stability regions of solvers, computed from their tables alone.

The test equation is dy/du = z/h y on steps of equal length h in u, where y = x/alpha. `variable` says what u is:

    "sigma"   u = sigma/alpha: eps = z/h y. For solvers whose slopes are eps (PLMS, GHVB, DEIS in rho, Heun)
    "lam"     u = half log-SNR: D = (1 + z/h) y. For exponential integrators of D (DPM-Solver++, UniPC)

A table's registers then go through one linear map after another. Registers change places while a method's past moves
on, so that one row's map says nothing; over 60 steps (a multiple of every cycle of up to six places) the product is
closed, and the 60th roots of its eigenvalues are one step's. In "lam" coefficients depend on h too; it is 1/80 here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdiff import process
from jdiff.trace import Solver

CYCLE, WARM = 60, 10


def amplification(solver: Solver, z: Any, variable: str = "sigma") -> np.ndarray:
    """Moduli (*z.shape, R) of the eigenvalues of one step, largest first; z complex, any shape.

    z = h times the equation's eigenvalue; h counts towards the data: a decaying solution has Re z < 0.
    """
    return _moduli(*_steps(solver, variable), z)


def interval(solver: Solver, variable: str = "sigma", longest: float = 8.0) -> float:
    """Length of the real-axis stability interval: the largest r with |amplification| <= 1 on all of [-r, 0]."""
    steps, r = _steps(solver, variable), np.linspace(0.0, longest, 321)
    for _ in range(3):
        bad = np.flatnonzero(_moduli(*steps, -r)[..., 0] > 1.0 + 1e-6)
        if not len(bad):
            return longest
        r = np.linspace(r[max(bad[0] - 1, 0)], r[bad[0]], 17)
    return float(r[0])


def _steps(solver: Solver, variable: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A, B, the gain's factor of z) of the rows of CYCLE steps after the first ones."""
    if variable not in ("sigma", "lam"):
        raise ValueError(f"stability: variable is {variable!r}; expected 'sigma' or 'lam'")
    n = WARM + CYCLE + WARM  # the first steps climb to the order, the last may be of lower order
    u = np.arange(n + 1, 0.0, -1.0)
    t = u if variable == "sigma" else np.exp((u - 1.0 - n / 2) / n)  # steps of 1 in sigma, of 1/n in lam
    table = solver(process.edm(sigma_min=1e-9, sigma_max=1e3), t)
    if table.nfe % n:
        raise ValueError(f"stability: {solver.name} makes {table.nfe} evaluations in {n} steps; expected equal steps")
    some = slice(WARM * (table.nfe // n), (WARM + CYCLE) * (table.nfe // n))
    # eps = -z x (h = -1 in sigma) means D = (1 + t z) x; in lam, D = (1 + n z) x
    factor = np.asarray(table.t) if variable == "sigma" else np.full(table.nfe, float(n))
    return np.asarray(table.A)[some], np.asarray(table.B)[some, :, 0], factor[some]


def _moduli(A: np.ndarray, B: np.ndarray, factor: np.ndarray, z: Any) -> np.ndarray:
    z = np.asarray(z, np.complex128)
    M = np.broadcast_to(np.eye(A.shape[1], dtype=complex), (*z.shape, *A.shape[1:])).copy()
    for a, b, f in zip(A, B, factor, strict=True):
        step = np.broadcast_to(a, M.shape).astype(complex)
        step[..., 0] += (1.0 + f * z)[..., None] * b
        M = step @ M
    return -np.sort(-(np.abs(np.linalg.eigvals(M)) ** (1.0 / CYCLE)), axis=-1)


def plot(panels: Mapping[str, Mapping[str, Solver]], path: Path, variable: str = "sigma") -> Path:
    """Draw stability regions: a panel each, a curve a solver (label -> solver); the inside of a curve is stable."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    x, y = np.linspace(-3.2, 0.6, 191), np.linspace(-1.9, 1.9, 191)
    z = x[None, :] + 1j * y[:, None]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    size = (3.4 * columns, 3.6 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.ravel()[len(panels) :]:
        ax.set_axis_off()
    for ax, (title, solvers) in zip(axes.ravel(), panels.items(), strict=False):
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(solvers)))
        for colour, (label, solver) in zip(colours, solvers.items(), strict=True):
            ax.contour(x, y, amplification(solver, z, variable)[..., 0], levels=[1.0 + 1e-6], colors=[colour])
            ax.plot([], [], color=colour, label=label)
        ax.axhline(0, color="black", lw=0.5)
        ax.axvline(0, color="black", lw=0.5)
        ax.set(title=title, xlabel="Re z", ylabel="Im z", aspect="equal")
        ax.legend(fontsize=7, loc="upper left", framealpha=0.6)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    from jdiff.solvers import ghvb, heavy_ball

    betas = (1.0, 0.8, 0.5, 0.3)
    panels = {f"GHVB, order {k}": {f"beta {b:g}": ghvb(k, b) for b in betas} for k in (1, 2, 3, 4)}
    panels |= {f"heavy ball, order {k}": {f"beta {b:g}": heavy_ball(k, b) for b in betas} for k in (2, 4)}
    panels["PLMS"] = {f"order {k}": ghvb(k, 1.0) for k in (1, 2, 3, 4)}
    print(plot(panels, Path("docs/stability.png")))
