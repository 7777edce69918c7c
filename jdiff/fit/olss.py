"""OLSS: every step the best linear combination, in closed form, of the noise and all outputs so far."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import solvers
from jdiff.tableau import Tableau
from jdiff.trace import Solver, trace

from .reference import Source, model_at

RIDGE = 1e-10  # of the largest singular value's square: keeps the weights of nearly equal outputs from exploding


@dataclass(frozen=True)
class Olss:
    """The fitted tableau; its times (n + 1,); what each step leaves of the complete run's state on the set that it was
    fitted on (root mean square), and what a DDIM step from the same point would leave: at least as much."""

    tableau: Tableau
    times: np.ndarray
    residual: np.ndarray
    ddim: np.ndarray


class _Run:
    """The complete run of a fine solver on x, and steps along an accelerated one."""

    def __init__(self, source: Source, x: Any, fine: int, solver: Solver, grid: Any):
        self.denoiser = model_at(source, jnp.arange(len(x)))
        self.x, self.p = jnp.asarray(x), self.denoiser.process
        T = solver(self.p, grid(self.p, fine))
        end, path = jdiff.sample(self.denoiser, T, self.x, trajectory=True)
        del end
        self.states = np.asarray(path.x, np.float64).reshape(T.nfe + 1, -1)  # of evaluation points; sigma = 0 last
        self.t = np.append(np.asarray(T.t), 0.0)
        self.norm = np.hypot(self.p.alpha(self.t), self.p.sigma(self.t))

    def output(self, state: np.ndarray, t: float) -> np.ndarray:
        x = jnp.asarray(state.reshape(self.x.shape), self.x.dtype)
        return np.asarray(self.denoiser(x, t), np.float64).ravel()

    def follow(self, choose: Any) -> tuple[list[int], list[np.ndarray], list[float], list[float]]:
        """Step by step along the accelerated trajectory; choose(k, i, residuals) says where the next one ends."""
        M = len(self.t) - 1
        i, state, at, combination = 0, np.asarray(self.x, np.float64).ravel(), [0], np.ones(1)
        basis, weights, left, left_ddim = [state], [], [], []
        p = self.p
        while i < M:
            basis.append(self.output(state, self.t[i]))
            A, later = np.stack(basis, 1), self.t[i + 1 :]
            ratio = p.sigma(later) / p.sigma(self.t[i])
            w = np.outer(np.append(combination, 0.0), ratio)  # DDIM's step from here, and least squares beside it
            w[-1] += p.alpha(later) - p.alpha(self.t[i]) * ratio
            wanted = self.states[i + 1 :].T - A @ w
            left_ddim_all = np.sqrt(np.mean(wanted**2, 0)) / self.norm[i + 1 :]
            U, S, Vt = np.linalg.svd(A, full_matrices=False)
            w = w + Vt.T @ ((S / (S * S + RIDGE * S[0] ** 2))[:, None] * (U.T @ wanted))
            rest = np.sqrt(np.mean((self.states[i + 1 :].T - A @ w) ** 2, 0)) / self.norm[i + 1 :]
            j = i + 1 + choose(len(weights), i, rest)
            left_ddim.append(float(left_ddim_all[j - i - 1]))
            left.append(float(rest[j - i - 1]))
            weights.append(w[:, j - i - 1])
            combination = weights[-1]
            i, state = j, A @ combination
            at.append(i)
        return at, weights, left, left_ddim


def olss(
    source: Source,
    nfe: int,
    x: Any,
    *,
    times: np.ndarray | None = None,
    fine: int = 200,
    solver: Solver | None = None,
    grid: Any = jdiff.times.uniform,
    bisections: int = 14,
) -> Olss:
    """OLSS (Duan et al. 2023, arXiv 2305.14677): a solver of `nfe` evaluations from a few complete runs.

        x_{k+1} = w_0 x_T + sum_{j<=k} w_j D_j,    w = argmin over trajectories of |x_full(t_{k+1}) - x_{k+1}|^2

    with D_j evaluated along the accelerated trajectory itself. The span is the paper's (it takes eps_j, which is a
    combination of D_j and the point). The least squares correct DDIM's step, with a tiny ridge: nearly equal outputs
    would get huge weights of opposite signs, and no step is worse than DDIM's on the fitted set. Not exact on point
    masses by construction.

    source, x   the model and noise (n, ...) at t_max; a few dozen trajectories do
    times       (nfe + 1,) from t_max to 0, a subset of the complete run's. Default: the paper's search, the least
                tolerance (found by bisection) at which steps, each the longest within it, are no more than nfe
    fine, solver, grid   the complete run: `fine` steps of a solver, default DDIM as in the paper, on a grid

    Residuals are relative to hypot(alpha, sigma). ValueError for times that the complete run does not visit.
    """
    if not 1 <= nfe <= fine:
        raise ValueError(f"olss: NFE is {nfe}; expected 1 to {fine}, the steps of the complete run")
    run = _Run(source, x, fine, solvers.ddim() if solver is None else solver, grid)
    M = len(run.t) - 1
    if times is not None:
        at = [int(np.argmin(np.abs(run.t - t))) for t in np.asarray(times)]
        off = np.abs(run.t[at] - times).max()
        if len(at) != nfe + 1 or at[0] != 0 or at[-1] != M or off > 1e-6 * run.p.t_max or (np.diff(at) <= 0).any():
            raise ValueError(
                f"olss: times must be {nfe + 1} of the complete run's {M + 1}, its first and last included"
            )
        found = run.follow(lambda k, i, rest: at[k + 1] - i - 1)
    else:

        def longest(tolerance: float) -> Any:
            def choose(k: int, i: int, rest: np.ndarray) -> int:
                if k == nfe - 1:
                    return len(rest) - 1  # the last evaluation goes to the end whatever it costs
                room = len(rest) - (nfe - k)  # leave a step for each evaluation to come
                over = np.flatnonzero(rest > tolerance)
                return min(max((int(over[0]) if len(over) else len(rest)) - 1, 0), room)

            return choose

        low, high, found = 0.0, None, None
        tolerance = 1e-2
        for _ in range(bisections):  # the last step's residual against the others': balance them
            now = run.follow(longest(tolerance))
            if found is None or max(now[2]) < max(found[2]):
                found = now
            if now[2][-1] > tolerance:  # the end came too soon: the earlier steps must be longer
                low, tolerance = tolerance, 2 * tolerance if high is None else 0.5 * (tolerance + high)
            else:
                high, tolerance = tolerance, 0.5 * (low + tolerance)
        assert found is not None
    at, weights, left, left_ddim = found
    t = run.t[at]

    def sampler(x: Any, model: Any, noise: Any) -> Any:
        point, outputs = x, []
        for k, w in enumerate(weights):
            outputs.append(model(point, t[k]))
            point = sum((c * D for c, D in zip(w[1:], outputs, strict=True)), w[0] * x)
        return point

    reference = ("Duan et al. 2023 (OLSS), arXiv 2305.14677; fitted to this model",)
    T = trace(sampler, run.p, name=f"olss_{nfe}", order=1, references=reference).validate()
    return Olss(T, t, np.array(left), np.array(left_ddim))
