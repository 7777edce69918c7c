"""Ratios for DC-Solver (Zhao et al. 2024, section 3): searched step by step, and predicted for other settings.

path = reference_path(guided, times, x)                      # 10 noises are enough
found = search_ratios(guided, times, x, path)
table = jdiff.solvers.dc_solver(found.ratios)(guided.process, times)

predict = fit_cpr({(4.0, 10): found.ratios, ...})            # (guidance scale, NFE) -> ratios
table = jdiff.solvers.dc_solver(predict(6.0, 12))(process, other_times)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jdiff import execute, solvers
from jdiff.denoiser import Denoiser
from jdiff.solvers import compensated
from jdiff.tableau import Tableau
from jdiff.trace import grid, trace


def reference_path(denoiser: Denoiser, times: Any, x: Array, substeps: int = 64) -> Array:
    """The model's flow from x at `times` (n + 1,), by `substeps` steps of DDIM in each interval: (n + 1, batch, *d).

    The paper takes 1000-step DDIM; 64 substeps of 10 intervals are of that fineness.
    """
    t = denoiser.process.check_times(times)
    part = np.arange(substeps) / substeps
    fine = np.append((t[:-1, None] + np.diff(t)[:, None] * part).ravel(), t[-1])
    return execute.sample(denoiser, solvers.ddim()(denoiser.process, fine), x, trajectory=True)[1].x[::substeps]


class Found(NamedTuple):
    """ratios, one a step; root mean square distance of the end to the reference's, with them and with UniPC."""

    ratios: tuple[float, ...]
    error: float
    error_without: float


def search_ratios(
    denoiser: Denoiser,
    times: Any,
    x: Array,
    reference: Array,
    *,
    order: int = 2,
    dc_order: int = 2,
    variant: str = "bh2",
    lower_order_final: bool = True,
    bounds: tuple[float, float] = (0.0, 2.0),
    scan: int = 9,
) -> Found:
    """Ratios of `dc_solver` on `times` for this model, one after the other: each minimises the mean square distance of
    the next (corrected) point to `reference` (n + 1, batch, *d), which starts at x.

    A scan of `bounds` with `scan` points, then Brent's method around the best: about 25 evaluations of the batch a
    step. The paper runs 40 iterations of AdamW from 1 instead. A step whose best is no better than ratio 1 keeps 1,
    and where all steps together end farther from the reference than UniPC (greedy steps may), all ratios are 1.
    One compiled program serves all steps: rows of the tableau are its arguments.
    """
    from scipy.optimize import minimize_scalar

    p = denoiser.process
    g = grid(p, times)
    if np.shape(reference) != (g.n + 1, *np.shape(x)):
        raise ValueError(
            f"reference has shape {np.shape(reference)}; expected {(g.n + 1, *np.shape(x))}: x at all times"
        )
    if not bounds[0] < 1 < bounds[1] or scan < 3:
        raise ValueError(f"search_ratios: expected bounds around 1 and scan >= 3, got {bounds=}, {scan=}")
    options = (order, dc_order, variant, lower_order_final)
    dtype = jnp.asarray(x).dtype
    R, ratios = max(order, dc_order + 1) + 3, [1.0] * g.n

    def table(k: int, ratio: float) -> tuple[Tableau, Any]:
        each = [*ratios[:k], ratio, *ratios[k + 1 :]]
        T = trace(lambda y, model, noise: compensated.run(g, y, model, each, *options, stop=k), p).pad(R, 0)
        return T, execute.rows(T, dtype)

    take = lambda rows, k: jax.tree.map(lambda a: a[k], rows)
    for k in range(dc_order, g.n):
        T, rows = table(k, 1.0)
        state = execute.State(tuple(jnp.asarray(h, dtype) * x for h in T.h0), denoiser.init(x))
        for j in range(k):
            state = _advance(denoiser, state, take(rows, j))

        def loss(ratio: float, k: int = k, state: Any = state) -> float:
            T, rows = table(k, float(ratio))
            for j in range(k, T.nfe):
                state = _advance(denoiser, state, take(rows, j))
            return float(jnp.mean((state.x - reference[k + 1]) ** 2))

        ratios[k] = _minimise(loss, bounds, scan, minimize_scalar)
    end = lambda solver: execute.sample(denoiser, solver(p, times), x) - reference[-1]
    error, without = (
        float(jnp.sqrt(jnp.mean(end(solvers.dc_solver(r, *options)) ** 2))) for r in (tuple(ratios), None)
    )
    return Found(tuple(ratios), error, without) if error <= without else Found((1.0,) * g.n, without, without)


@jax.jit
def _advance(denoiser: Denoiser, state: Any, row: Any) -> Any:
    R = row.A.shape[0]
    return execute.stepper(denoiser, jnp.zeros(R), jnp.zeros((R, 0))).step(None, state, row)[0]


def _minimise(loss: Callable[[float], float], bounds: tuple[float, float], scan: int, brent: Any) -> float:
    """The best of a scan and of Brent's method beside it; 1 where nothing is better than 1."""
    places = np.linspace(*bounds, scan)
    values = np.array([loss(r) for r in places])
    values = np.where(np.isfinite(values), values, np.inf)
    i = int(np.argmin(values))
    near = brent(loss, bounds=(places[max(i - 1, 0)], places[min(i + 1, scan - 1)]), method="bounded",
                 options={"xatol": 1e-3})  # fmt: skip
    best = min([(values[i], float(places[i])), (float(near.fun), float(near.x))])
    return best[1] if best[0] < loss(1.0) else 1.0


@dataclass(frozen=True)
class Cascade:
    """ratio(step) = sum c[j, k, l] (step/NFE)^j (scale/12)^k (NFE/50)^l, steps counted from 1; 1 for the first ones."""

    coefficients: np.ndarray
    first: int = 2

    def __call__(self, scale: float, nfe: int) -> tuple[float, ...]:
        """The ratios of nfe steps at guidance `scale`."""
        found = _powers(scale, nfe, self.first, self.coefficients.shape) @ self.coefficients.ravel()
        return (*(1.0,) * min(self.first, nfe), *map(float, found))


def _powers(scale: float, nfe: int, first: int, shape: tuple[int, ...]) -> np.ndarray:
    """(steps after the first, coefficients): what each coefficient is multiplied with."""
    if int(nfe) != nfe or nfe < 1:
        raise ValueError(f"NFE is {nfe}; expected a whole number of steps, at least 1")
    place = np.arange(first + 1, nfe + 1) / nfe
    power = lambda v, n: np.asarray(v, np.float64)[..., None] ** np.arange(n)
    scales, sizes = power(scale / 12.0, shape[1]), power(nfe / 50.0, shape[2])
    return np.einsum("ij,k,l->ijkl", power(place, shape[0]), scales, sizes).reshape(len(place), -1)


def fit_cpr(
    found: Mapping[tuple[float, int], Sequence[float]], degrees: tuple[int, int, int] = (3, 2, 2), first: int = 2
) -> Cascade:
    """Cascade polynomial regression: from ratios of some (guidance scale, NFE) pairs to those of any, by least squares.

    degrees  in step/NFE, guidance scale and NFE (the paper's 3, 2, 2); lowered to the number of different scales, and
             of NFEs, less one. The paper fits the same polynomial by iteration; it is linear in its coefficients
    first    how many ratios are 1 for want of outputs (dc_order)
    """
    if not found:
        raise ValueError("fit_cpr: no ratios; expected a mapping {(guidance scale, NFE): ratios}")
    for (scale, nfe), ratios in found.items():
        if len(ratios) != nfe:
            raise ValueError(f"fit_cpr: {len(ratios)} ratios for scale {scale}, NFE {nfe}; expected one a step")
    scales, sizes = ({pair[i] for pair in found} for i in (0, 1))
    shape = (degrees[0] + 1, min(degrees[1] + 1, len(scales)), min(degrees[2] + 1, len(sizes)))
    A = np.concatenate([_powers(scale, nfe, first, shape) for scale, nfe in found])
    b = np.concatenate([np.asarray(ratios, np.float64)[first:] for ratios in found.values()])
    if len(b) == 0:
        raise ValueError(f"fit_cpr: every ratio is among the first {first}, which are 1; expected larger NFEs")
    return Cascade(np.linalg.lstsq(A, b, rcond=None)[0].reshape(shape), first)
