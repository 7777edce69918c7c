"""Papers' claims about solvers, tested: methods in rows, NFE in columns; each claim is a number and its bound.

    smooth = Exact(exact.mixture(...), process.vp_linear(), end=1e-3)
    TABLE = table(
        "deis", "DEIS against DDIM on an exact mixture.",
        rows={"DDIM": Run("ddim", smooth), "tAB-DEIS, r = 3": Run("deis(order=4)", smooth, "quadratic")},
        nfe=(10, 20, 40),
        claims=(Claim("a third of DDIM's error at NFE 10", lambda e: e("tAB-DEIS, r = 3", 10) / e("DDIM", 10), 0.33),),
    )

A problem says what is sampled and what is measured: `Exact` trajectories against the true flow, the `Law` of samples
of an exact model, or `Digits`, trained models on real data. A table shows one metric; claims see every number.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jdiff
from jdiff import exact, metrics, reproduce, solvers, times, train
from jdiff import process as processes
from jdiff.experiments import _digits, _models
from jdiff.process import Process
from jdiff.reproduce import Published, Table
from jdiff.trace import Solver

Measure = Callable[[jdiff.Tableau], dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: Annotated[str, tyro.conf.arg(help="folder of the finished cells and the report")]
    n: Annotated[int, tyro.conf.arg(help="trajectories on exact models (laws: 20,000; digits: 500 a model)")] = 256
    seed: Annotated[int, tyro.conf.arg(help="of the initial noise (digits: models and noise 0, 1 and 2)")] = 0


@dataclass(frozen=True, eq=False)
class Exact:
    """Starts drawn from the noised law at `start`; error against the true flow at `end`, float64."""

    model: exact.Mixture
    process: Process
    start: float | None = None  # None: from the prior at t_max
    end: float = 0.0

    def prepare(self, settings: Settings) -> Measure:
        """rms over trajectories and coordinates, and the median over trajectories of each one's rms."""
        with jax.enable_x64(True):
            p, t0 = self.process, self.process.t_max if self.start is None else self.start
            x = _models.noise(self.model, p, settings.seed, settings.n)
            if self.start is not None:
                x0 = self.model.sample(jax.random.key(settings.seed), settings.n, jnp.float64)
                x = p.alpha(t0) * x0 + (p.sigma(t0) / p.prior_std) * x
            goal, denoiser = _models.flow(self.model, p, x, start=t0, end=self.end), self.model.denoiser(p)

        def measure(tableau: jdiff.Tableau) -> dict[str, Any]:
            with jax.enable_x64(True):
                return _models.errors(denoiser, tableau, x, goal)

        return measure


@dataclass(frozen=True, eq=False)
class Law:
    """20,000 samples of an exact model from the prior to data: sliced Wasserstein distance to as many exact draws."""

    model: exact.Mixture
    process: Process
    start: float | None = None
    end: float = 0.0
    n: int = 20_000

    def prepare(self, settings: Settings) -> Measure:
        keys = jax.random.split(jax.random.key(settings.seed), 5)
        draws = [np.asarray(self.model.sample(key, self.n)) for key in keys[:2]]
        distance = lambda x, y: float(metrics.sliced_wasserstein(keys[4], x, y).value)
        x, floor = self.process.prior(keys[2], draws[0].shape), distance(*draws)

        def measure(tableau: jdiff.Tableau) -> dict[str, Any]:
            found = np.asarray(jdiff.sample(self.model.denoiser(self.process), tableau, x, keys[3]))
            return {"sliced Wasserstein": distance(found, draws[0]), "floor": floor}

        return measure


@dataclass(frozen=True, eq=False)
class Digits:
    """The trained digits models of three seeds ("flow", "vp_linear"): Fréchet distance to held-out digits.

    wrap: what is done to each Denoiser first.
    """

    kind: str = "vp_linear"
    start: float | None = None
    end: float = 0.0
    n: int = 500
    wrap: Callable[[jdiff.Denoiser], jdiff.Denoiser] = lambda denoiser: denoiser

    @property
    def process(self) -> Process:
        return processes.ALL[self.kind]()

    def prepare(self, settings: Settings) -> Measure:
        from jdiff.experiments.fast_sampling import score

        reference, models = _digits_models(self.kind, self.n)
        models = [(self.wrap(denoiser), x) for denoiser, x in models]

        def measure(tableau: jdiff.Tableau) -> dict[str, Any]:
            found, outside = [], []
            padded = tableau.pad(max(6, tableau.registers), max(1, tableau.noises))  # most solvers: one program an NFE
            for seed, (denoiser, x) in enumerate(models):
                y = np.asarray(jdiff.sample(denoiser, padded, x, jax.random.key(seed + 1)))
                outside.append(float(np.mean(np.abs(y) > 1.05)))
                features = metrics.embed(metrics.digit_features(), np.clip(y, -1, 1), batch_size=self.n)
                found.append(score(features, reference)["Fréchet distance"])
            error = float(np.std(found, ddof=1) / np.sqrt(len(found)))
            mean = {"Fréchet distance": float(np.mean(found)), "out of range": float(np.mean(outside))}
            each = {f"Fréchet distance {seed}": value for seed, value in enumerate(found)}
            return {**mean, "Fréchet distance se": error, **each}

        return measure


@functools.cache
def _digits_models(kind: str, n: int) -> tuple[np.ndarray, list[tuple[jdiff.Denoiser, jax.Array]]]:
    """Features of the held-out digits; the models of three seeds, each with its noise (n, 8, 8, 1)."""
    from jdiff import data

    labels, models = jnp.arange(n, dtype=jnp.int32) % 10, []
    for seed in (0, 1, 2):
        denoiser = train.denoiser_from(_digits.trained(kind, seed), ema=0.10, labels=labels)
        models.append((denoiser, denoiser.process.prior(jax.random.key(seed), (n, 8, 8, 1))))
    return metrics.embed(metrics.digit_features(), data.load("digits", split="test")), models


class Problem(Protocol):
    """`Exact`, `Law`, `Digits`, or an experiment's own: hashable, with the ends of its time grids and a `prepare`."""

    @property
    def process(self) -> Process: ...
    @property
    def start(self) -> float | None: ...
    @property
    def end(self) -> float: ...
    def prepare(self, settings: Any) -> Measure: ...


class Run(NamedTuple):
    """A row: a solver (as text, or itself) on a problem, with a grid of `jdiff.times` (or a function like those)."""

    solver: str | Solver
    problem: Problem
    grid: str | Callable[..., np.ndarray] = "logsnr"


class Claim(NamedTuple):
    """`value(e)` is at most `at_most`, and at least `at_least`; e(row, nfe, metric=the table's) reads the cells."""

    text: str
    value: Callable[[Callable[..., float]], float]
    at_most: float | None = None
    at_least: float | None = None

    def line(self, e: Callable[..., float]) -> str:
        """The claim, what was found, and whether it holds."""
        bounds = [f"at most {self.at_most:g}"] if self.at_most is not None else []
        bounds += [f"at least {self.at_least:g}"] if self.at_least is not None else []
        try:
            value = self.value(e)
        except TypeError:  # a cell without a number
            return f"- {self.text}: not computed."
        inside = (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)
        return f"- {self.text}: {value:.3g}, expected {' and '.join(bounds)}: {'holds' if inside else 'DOES NOT HOLD'}."


def table(
    name: str,
    summary: str,
    *,
    rows: Mapping[str, Run],
    nfe: Sequence[int],
    claims: Sequence[Claim],
    metric: str = "median",
    notes: Sequence[str] = (),
    published: tuple[Published, ...] = (),
) -> Table:
    """The experiment. metric: "median", "rms" (Exact), "sliced Wasserstein" (Law), "Fréchet distance" (Digits)."""

    def prepare(settings: Settings) -> tuple[Settings, dict[Any, Measure]]:
        return settings, {}

    def cell(context: tuple[Settings, dict[Any, Measure]], row: str, column: int) -> dict[str, Any]:
        settings, measures = context
        run = rows[row]
        problem, solver = run.problem, solvers.parse(run.solver) if isinstance(run.solver, str) else run.solver
        if problem not in measures:
            measures[problem] = problem.prepare(settings)
        grid = times.ALL[run.grid] if isinstance(run.grid, str) else run.grid
        try:
            t = grid(problem.process, solver.steps(column), start=problem.start, end=problem.end)
        except ValueError:  # fewer evaluations than the solver's least
            return {metric: None, "evaluations": None}
        tableau = solver(problem.process, t)
        return {metric: None, **measures[problem](tableau), "evaluations": tableau.nfe}

    def finish(context: Any, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
        e: Callable[..., Any] = lambda row, column, what=metric: cells[row, column].get(what)
        return [*notes, *(["", "## Claims", "", *(claim.line(e) for claim in claims)] if claims else [])]

    out = ("out", Settings.__annotations__["out"], dataclasses.field(default=f"runs/{name}"))
    settings = dataclasses.make_dataclass("Settings", [out], bases=(Settings,), frozen=True)
    return Table(
        name=name,
        summary=summary,
        needs="nothing: exact models, or digits models that it trains where runs/models lacks them",
        rows=tuple(rows),
        columns=tuple(nfe),
        row_title="method",
        column_title="NFE",
        metric=metric,
        settings=settings,
        prepare=prepare,
        cell=cell,
        finish=finish,
        published=published,
    )
