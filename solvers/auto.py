"""One automatic choice of solver and grid for a model and a number of evaluations, by calibration on the model.

    table, report = jdiff.solvers.auto(denoiser, 8, x, key)       # x: some noise, (batch, ...), as for jdiff.sample
    samples = jdiff.sample(denoiser, table, noise)

Solvers are data, so trying one costs no compilation: every candidate, of any NFE, runs in one compiled program on the
same noise, and is compared with where the model's own probability flow ends. A race: all candidates on one batch, the
best of them on four, the best of those on all, the grids of the best few improved by a short search. What is reported
for the chosen one is its error on a batch that the choice did not see.

Among the candidates is DPM-Solver-v3, whose statistics are estimated on the model by the way (`jdiff.statistics`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jdiff import noise, statistics, times
from jdiff.denoiser import Denoiser
from jdiff.execute import rows, stepper
from jdiff.process import Process
from jdiff.tableau import Tableau
from jdiff.trace import Solver

CANDIDATES = (
    "dpm_solver_pp(order=2)", "deis(order=3)", "deis(order=3, variable='lam')", "unipc(order=2)", "unipc(order=3)",
    "unipc(order=3, lower_order_final=False)", "unipc(order=3, prediction='eps')", "unipc(order=4)",
    "unipc(order=4, prediction='eps')", "ghvb(order=3)", "ghvb",
)  # fmt: skip
V3 = {f"dpm_solver_v3(order={order})": order for order in (2, 3)}  # tried with statistics of the model
RACE = ((1, 64), (4, 16), (None, 12))  # (on so many of the batches, so many stay); None: on all
ROWS, REGISTERS = 2048, 6  # tables are filled up to these: one compiled program for all


@dataclass(frozen=True)
class Trial:
    """A solver on a grid, and its errors on the calibration noise: rms over trajectories and values, and the median
    over trajectories of each one's rms."""

    solver: str
    grid: str
    rms: float
    median: float


@dataclass(frozen=True)
class Report:
    """What `auto` did. `held_out`: the chosen one on noise that the choice did not see; `reference_error`: rms and
    median of what halving the reference's steps changes; `evaluations`: network evaluations spent, each on a batch of
    `batch` samples; `trials`: the race's last round, best first."""

    nfe: int
    solver: str
    grid: str
    times: np.ndarray
    held_out: tuple[float, float]
    reference_error: tuple[float, float]
    reference_steps: int
    evaluations: int
    batch: int
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        rms, median = self.held_out
        doubt = self.reference_error[1] > 0.2 * median or self.reference_error[0] > 0.5 * rms
        lines = [
            f"NFE {self.nfe}: {self.solver} on {self.grid}",
            f"error on held-out noise: rms {rms:.3g}, median {median:.3g}; reference good to "
            f"rms {self.reference_error[0]:.2g}, median {self.reference_error[1]:.2g} ({self.reference_steps} steps)"
            + ("; NOT GOOD ENOUGH to rank these solvers" if doubt else ""),
            f"cost: {self.evaluations} network evaluations of {self.batch} samples",
        ]
        lines += [f"  {t.solver} on {t.grid}: rms {t.rms:.3g}, median {t.median:.3g}" for t in self.trials[:5]]
        return "\n".join(lines)


def auto(
    denoiser: Denoiser,
    nfe: int,
    x: PyTree,
    key: Array | None,
    *,
    candidates: Sequence[str | Solver] = CANDIDATES,
    batches: int = 4,
    tune: int = 3,
    steps: int | None = None,
    measured: statistics.Statistics | bool = True,
) -> tuple[Tableau, Report]:
    """The deterministic solver and grid that follow this model's probability flow best with `nfe` evaluations.

    x           starting noise (batch, ...), float32 or float64: the first of the calibration batches, and the shape
                of the others; a few dozen to a few hundred samples
    key         draws the other batches: `batches` - 1 for the choice, one for the reported error
    batches     for the choice: all candidates run on one, 64 of them on four, 16 of those on all
    candidates  solvers, or texts that `solvers.parse` reads; each runs on every grid of `grids`
    tune        how many of the best get their grid improved; 0: none
    steps       of the first reference (doubled until halving them changes little); default 8 nfe, at least 128
    measured    the model's statistics, with which DPM-Solver-v3 is a candidate too; True: estimated here where x is one
                array and the denoiser has derivatives forward (about 5 evaluations at each of 61 noise levels, of two
                batches; give them where you choose for several NFE: `measure(denoiser, x, key)`); False: none

    Guidance and thresholding are part of the denoiser. Ranked by `rank`: mostly the root mean square, which hears the
    few trajectories that end in another mode, and the typical error. Where such are rarer than one of all calibration
    samples, nothing tells solvers apart by them: more batches do. The same arguments give the same choice. Returns
    (table, report). ValueError for nfe < 1, an empty batch, or a missing key.
    """
    from jdiff import solvers

    if int(nfe) != nfe or nfe < 1:
        raise ValueError(f"NFE is {nfe}; expected a whole number of network evaluations, at least 1")
    if batches < 1:
        raise ValueError(f"auto: batches is {batches}; expected at least 1")
    if key is None:
        raise ValueError("auto draws further batches of noise: pass key=jax.random.key(seed)")
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(x)]
    if not leaves or np.ndim(leaves[0]) < 1 or np.shape(leaves[0])[0] < 1:
        raise ValueError("auto: x holds no batch; expected starting noise (batch, ...), at least one sample")
    p, x = denoiser.process, jax.tree.map(jnp.asarray, x)
    more = lambda i: jax.tree.map(lambda z: p.prior_std * z, noise.normal(jax.random.fold_in(key, i), x))
    starts = [x, *(more(i) for i in range(1, batches + 1))]  # the last is held out
    named = {s if isinstance(s, str) else s.name: solvers.parse(s) if isinstance(s, str) else s for s in candidates}

    made, spent = tables(p, tuple(candidates), int(nfe)), 0
    if not made:
        raise ValueError(f"auto: no candidate can be built with NFE {nfe}")
    if measured is True:
        measured, spent = measure(denoiser, x, jax.random.fold_in(key, batches + 1))
    if measured:
        v3 = {text: solvers.get("dpm_solver_v3", order=order, statistics=measured) for text, order in V3.items()}
        named |= v3
        made |= {(text, grid): T for text, s in v3.items() for (_, grid), T in tables(p, (s,), int(nfe)).items()}

    def errors(table: Tableau, which: Sequence[int]) -> np.ndarray:
        nonlocal spent
        spent += table.nfe * len(which)
        return np.concatenate([np.zeros(0), *(squares(ends(denoiser, table, starts[i]), targets[i]) for i in which)])

    # The reference, doubled until it is good enough for the first few candidates that one would try anyway.
    n = steps or max(128, 8 * nfe)
    targets, gap, cost = _reference(denoiser, starts, n)
    spent += cost
    scale = min(_figures(errors(table, [0])) for table, _ in list(made.values())[:: max(1, len(made) // 16)])
    size = np.sqrt(np.mean([np.mean(np.square(leaf)) for leaf in jax.tree.leaves(targets)]))
    rounding = 50.0 * float(jnp.finfo(leaves[0].dtype).eps) * float(size)
    while n < 2048 and (gap[1] > 0.02 * scale[1] + rounding or gap[0] > 0.1 * scale[0] + rounding):
        n *= 2
        targets, gap, cost = _reference(denoiser, starts, n, targets)
        spent += cost

    trials: dict[tuple[str, str], np.ndarray] = {name: np.zeros(0) for name in made}
    order, used = list(made), 0
    for upto, keep in RACE:
        seen, used = used, min(upto or batches, batches)
        trials = {name: np.append(trials[name], errors(made[name][0], range(seen, used))) for name in order}
        order = sorted(order, key=lambda name: rank(trials[name]))[: max(keep, 4 * tune)]
    trials = {name: trials[name] for name in order}
    for name in order[:tune]:
        found = _tuned(p, named[name[0]], made[name][1], lambda t: errors(t, range(batches)), trials[name])
        if found is not None:
            better = (name[0], f"{name[1]}, tuned")
            made[better], trials[better] = found[:2], found[2]
    order = sorted(trials, key=lambda name: rank(trials[name]))
    table, t = made[order[0]]
    held_out = _figures(errors(table, [batches]))
    ranking = tuple(Trial(*name, *_figures(trials[name])) for name in order)
    batch = int(np.shape(leaves[0])[0])
    return table, Report(nfe, *order[0], t, held_out, gap, n, spent, batch, ranking)


def measure(denoiser: Denoiser, x: PyTree, key: Array) -> tuple[statistics.Statistics | bool, int]:
    """(statistics of a model that `auto` tries DPM-Solver-v3 with, False where there are none; the evaluations spent).

    x: a batch (batch, ...), for its shape. None for samples that are trees, or without derivatives forward.
    """
    if not isinstance(x, (jax.Array, np.ndarray)):
        return False, 0
    try:
        found = statistics.estimate(denoiser, x.shape[1:], key, n=2 * len(x), batch=len(x), n_lam=60)
    except TypeError:  # a function with derivatives backward alone
        return False, 0
    probes = int(np.prod(x.shape[1:])) if np.prod(x.shape[1:]) <= 16 else 1  # as `estimate` has it
    return found, 2 * 61 * (3 + 2 * probes)


def grids(p: Process) -> dict[str, Callable[[int], np.ndarray]]:
    """The time grids that `auto` tries, by name: each a function of the number of steps."""
    found: dict[str, Callable[[int], np.ndarray]] = {}
    for m in (1, 3, 10):  # where the last step, to sigma = 0, starts: sigma/alpha is m times that of t_min
        late = dataclasses.replace(p, t_min=float(p.t_of_lam(p.lam(p.t_min) - np.log(m))))
        where = "0 after t_min" if m == 1 else f"0 after {m} t_min"
        for name in ("logsnr", "karras", "quadratic", "cubic"):
            found[f"{name} to {where}"] = functools.partial(_to, late, name)
    for name in ("uniform", "quadratic", "cubic"):
        found[f"{name} to 0"] = functools.partial(times.ALL[name], p)
    for name in ("logsnr", "karras", "uniform", "quadratic", "cubic"):
        found[f"{name} to t_min"] = functools.partial(times.ALL[name], p, end=p.t_min)
    return found


def _to(p: Process, name: str, n: int) -> np.ndarray:
    """n - 1 steps to t_min and one to 0."""
    return np.append(times.ALL[name](p, n - 1, end=p.t_min) if n > 1 else p.t_max, 0.0)


Tables = dict[tuple[str, str], tuple[Tableau, np.ndarray]]


def tables(p: Process, candidates: Sequence[str | Solver], nfe: int) -> Tables:
    """(solver, grid) -> (tableau, times): every candidate on every grid of `grids`, as far as `nfe` pays for it.

    ValueError for a stochastic candidate: its sample lies on no trajectory that it could be compared with.
    """
    return {key: value for c in candidates for key, value in _tables_of(p, c, nfe).items()}


@functools.lru_cache(maxsize=256)
def _tables_of(p: Process, candidate: str | Solver, nfe: int) -> Tables:
    from jdiff import solvers

    solver = solvers.parse(candidate) if isinstance(candidate, str) else candidate
    name, found = candidate if isinstance(candidate, str) else solver.name, {}
    if solver.stochastic:
        raise ValueError(f"auto: {name} draws noise; a sample of it lies on no trajectory to compare with")
    for grid, make in grids(p).items():
        try:
            t = make(solver.steps(nfe))
            table = solver(p, t)
        except ValueError:  # too few evaluations for this solver, or entries beyond what a tableau may hold
            continue
        if table.nfe <= nfe and min(table.t) >= p.t_min * (1.0 - 1e-9):  # no network is asked below t_min
            found[name, grid] = table, t
    return found


def ends(denoiser: Denoiser, table: Tableau, x: PyTree) -> PyTree:
    """`jdiff.sample` of a deterministic tableau, compiled once for all of them, whatever their length: for calibration.

    Coefficients a dimension are a second program.
    """
    dtype, plain = jax.tree.leaves(x)[0].dtype, np.ndim(table.A) == 3 and table.E is None
    table = table.pad(max(REGISTERS, table.registers), 0)
    n = ROWS if plain else ROWS // 32
    n = -(-table.nfe // n) * n
    fill = lambda v: np.pad(np.asarray(v), [(0, n - table.nfe), *[(0, 0)] * (v.ndim - 1)])
    program, h0 = jax.tree.map(fill, rows(table, dtype)), np.asarray(table.h0, dtype)
    return _ends(denoiser, program, np.int32(table.nfe), h0, x)


@jax.jit
def _ends(denoiser: Denoiser, program: Any, count: Array, h0: Array, x: PyTree) -> PyTree:
    init, step = stepper(denoiser, h0, jnp.zeros((h0.shape[0], 0), h0.dtype))
    body = lambda k, state: step(None, state, jax.tree.map(lambda v: v[k], program))[0]
    return jax.lax.fori_loop(0, count, body, init(None, x)).x


def squares(a: PyTree, b: PyTree) -> np.ndarray:
    """Mean square distance of each sample, (batch,) float64."""
    host = lambda tree: [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    each = [np.square(u - v).reshape(len(u), -1) for u, v in zip(host(a), host(b), strict=True)]
    return np.concatenate(each, 1).mean(1)


def _reference(
    denoiser: Denoiser, starts: Sequence[PyTree], n: int, half: Sequence[PyTree] | None = None
) -> tuple[list[PyTree], tuple[float, float], int]:
    """Where the flow ends, by n steps; (rms, median) of the change from n / 2 steps; the evaluations spent."""
    solve = lambda n: [ends(denoiser, _fine_table(denoiser.process, n), x) for x in starts]
    spent = n * len(starts) if half is not None else (n + n // 2) * len(starts)
    half = solve(n // 2) if half is None else half
    full = solve(n)
    return full, _figures(np.concatenate([squares(a, b) for a, b in zip(full, half, strict=True)])), spent


@functools.lru_cache(maxsize=16)
def _fine_table(p: Process, n: int) -> Tableau:
    from .adams import deis

    return deis(3, "rho")(p, _fine(p, n))


def _fine(p: Process, n: int) -> np.ndarray:
    """Evenly spaced in asinh(rho / c), rho = sigma / alpha, down to rho = 0, never asking the network below t_min."""
    start = p.t_max if p.alpha(p.t_max) > 0 else p.t_max * (1 - 1e-3)
    first, least = np.exp(-float(p.lam(start))), np.exp(-float(p.lam(p.t_min)))
    c = least
    for _ in range(50):
        c = least / np.sinh(np.arcsinh(first / c) / n)
    rho = c * np.sinh(np.linspace(np.arcsinh(first / c), 0.0, n + 1))
    t = p.t_of_lam(-np.log(rho[:-1]))
    t[0] = p.t_max
    return np.append(t, 0.0)


def _figures(each: np.ndarray) -> tuple[float, float]:
    """(rms, median) of mean squares; infinite where a sample is not finite."""
    each = np.where(np.isfinite(each), each, np.inf)
    return float(np.sqrt(np.mean(each))), float(np.sqrt(np.median(each)))


def rank(squares: Any) -> float:
    """mean log e^2 + 3 log mean e^2 of the mean squares e^2 (n,) of the trajectories' errors: the typical one and, with
    more weight, the root mean square. Free of scale; infinite where a square is not finite."""
    e = floored(squares)
    value = float(np.mean(np.log(e)) + 3.0 * np.log(np.mean(e)))
    return value if np.isfinite(value) else np.inf


def floored(squares: Any) -> np.ndarray:
    """Float64, above the square of the rounding of what it came in."""
    eps = np.finfo(np.asarray(squares).dtype).eps
    return np.maximum(np.asarray(squares, np.float64), eps**2)


def _tuned(
    p: Process, solver: Solver, t: np.ndarray, errors: Callable[[Tableau], np.ndarray], each: np.ndarray
) -> tuple[Tableau, np.ndarray, np.ndarray] | None:
    """A better grid nearby: the inner points move in log-SNR by a smooth function with three coefficients."""
    lam = p.lam(t[1:-1])
    if len(lam) == 0:
        return None
    v = np.linspace(0.0, 1.0, len(lam) + 2)[1:-1]
    shapes = np.stack([1.0 - v, 4.0 * v * (1.0 - v), v]) * (np.ptp(lam) / max(len(lam) - 1, 1) or 1.0)
    low, high = p.lam(t[0]), p.lam(max(t[-1], p.t_min))

    def attempt(c: np.ndarray) -> tuple[Tableau, np.ndarray, np.ndarray] | None:
        moved = lam + c @ shapes
        inside = moved[0] > low and (moved[-1] < high if t[-1] > 0 else moved[-1] <= high)
        if not (inside and np.all(np.diff(moved) > 0)):
            return None
        grid = np.concatenate([t[:1], p.t_of_lam(moved), t[-1:]])
        try:
            table = solver(p, grid)
        except ValueError:
            return None
        return table, grid, errors(table)

    c, step, best, found = np.zeros(3), 0.5, rank(each), None
    for _ in range(5):
        moved = False
        for i in range(3):
            for sign in (step, -step):
                trial = attempt(c + sign * np.eye(3)[i])
                if trial is not None and rank(trial[2]) < best:
                    c, best, found, moved = c + sign * np.eye(3)[i], rank(trial[2]), trial, True
                    break
        step = step if moved else step / 2
    return found
