"""The law of samples against network evaluations: sliced Wasserstein distance over its floor, on exact models.

    jdiff reproduce solver-law

20,000 samples of each solver against the exact law: the mean over directions of the squared Wasserstein-2 distance
between the sorted projections and the law's own projected quantiles (a mixture's projection is a one-dimensional
mixture), and its root. The floor is what as many exact draws give. Beside it the best numbers of a survey of published
samplers (papers/peer_survey.toml), deterministic and stochastic, over all its schedules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jdiff
from jdiff import exact, reproduce, solvers, times
from jdiff.experiments import _models, _peers
from jdiff.reproduce import Table

NFE = (5, 8, 10, 20, 25, 50)
HALF = {"gmm2": (50, 25), "gmm64": (20, 10), "gauss8": (20, 10)}  # the best stochastic peer's NFE at 2 floors; half
SETUPS = {  # (solver, start, grid)
    "UniPC-2, flow": ("unipc(order=2)", "flow", "uniform"),
    "DEIS-3 (log-SNR), VP": ("deis(order=3, variable='lam')", "vp", "karras"),
    "DPM-Solver++(2M), sigma": ("dpm_solver_pp(order=2)", "edm", "logsnr"),
    "DDPM, VP": ("ddpm()", "vp", "logsnr"),
    "SDE-DPM-Solver++(2M), sigma": ("dpm_solver_pp(order=2, eta=1.0)", "edm", "logsnr"),
    "SDE-DPM-Solver++(3M), sigma": ("dpm_solver_pp(order=3, eta=1.0)", "edm", "logsnr"),
    "SDE-DPM-Solver++(2M) above 1, flow": ("dpm_solver_pp(order=2, eta=1.0, interval=(1.0, 1e9))", "flow", "uniform"),
    "SA-Solver above 2, flow": ("sa_solver(predictor=2, corrector=2, interval=(2.0, 1e9))", "flow", "uniform"),
    "SA-Solver above 2, flow t^2": ("sa_solver(predictor=2, corrector=2, interval=(2.0, 1e9))", "flow", "quadratic"),
    "SA-Solver, VP": ("sa_solver(predictor=2, corrector=2, interval=None)", "vp", "karras"),
}  # "above 2": noise is drawn at levels sigma/alpha above 2 alone
METRIC = "SW2 / floor"


@dataclass(frozen=True)
class Settings:
    """Options of the experiment; float32."""

    out: str = "runs/solver-law"  # folder of the finished cells and the report
    n: int = 20000  # samples a cell
    chunk: int = 2500  # samples at a time
    projections: int = 64  # directions
    seed: int = 0  # of noise, draws and directions
    models: tuple[str, ...] = _models.NAMES  # which of gmm2, gmm64, gauss8
    nfe: tuple[int, ...] = NFE  # which numbers of evaluations


class Context(NamedTuple):
    settings: Settings
    models: dict[str, exact.Mixture]
    directions: dict[str, np.ndarray]
    quantiles: dict[str, np.ndarray]
    floor: dict[str, float]


def quantiles(model: exact.Mixture, directions: np.ndarray, n: int) -> np.ndarray:
    """The (i + 1/2) / n quantiles of the model's projections, (n, projections): Newton's method from a fine table."""
    from scipy.special import ndtr

    std = np.sqrt(
        np.einsum(
            "kij,kj,klj,ip,lp->kp", *[model.eigenvectors, model.eigenvalues, model.eigenvectors], *[directions] * 2
        )
    )
    means, wanted, found = model.means @ directions, (np.arange(n) + 0.5) / n, []
    for m, s in zip(means.T, std.T, strict=True):
        cdf = lambda x, m=m, s=s: ndtr((x[:, None] - m) / s) @ model.weights
        pdf = lambda x, m=m, s=s: (
            np.exp(-0.5 * ((x[:, None] - m) / s) ** 2) @ (model.weights / (s * np.sqrt(2 * np.pi)))
        )
        table = np.linspace((m - 8 * s).min(), (m + 8 * s).max(), 4096)
        levels = np.maximum.accumulate(cdf(table))
        x = np.interp(wanted, levels, table)
        width = table[1] - table[0]
        for _ in range(3):
            x = x - np.clip((cdf(x) - wanted) / np.maximum(pdf(x), 1e-300), -width, width)
        found.append(x)
    return np.stack(found, 1)


def distance(samples: np.ndarray, directions: np.ndarray, q: np.ndarray) -> float:
    """Sliced Wasserstein-2 distance of samples (n, d) to the law with projected quantiles q (n, projections)."""
    return float(np.sqrt(np.mean((np.sort(samples.astype(np.float64) @ directions, 0) - q) ** 2)))


def prepare(settings: Settings) -> Context:
    """Models, directions, exact quantiles and the floor."""
    for option, names in {"models": _models.NAMES, "nfe": NFE}.items():
        for value in getattr(settings, option):
            if value not in names:
                raise ValueError(f"--{option}: {value!r}; expected some of {', '.join(map(str, names))}")
    models, directions, q, floor = {}, {}, {}, {}
    for i, name in enumerate(settings.models):
        model = models[name] = _models.survey(name)
        u = np.random.default_rng(settings.seed + i).normal(size=(model.means.shape[1], settings.projections))
        directions[name] = u / np.linalg.norm(u, axis=0)
        q[name] = quantiles(model, directions[name], settings.n)
        draws = [np.asarray(model.sample(jax.random.key(1000 + k), settings.n)) for k in range(4)]
        floor[name] = float(np.mean([distance(x, directions[name], q[name]) for x in draws]))
    return Context(settings, models, directions, q, floor)


def cell(context: Context, row: str, nfe: int) -> dict[str, Any]:
    """20,000 samples of one solver on one model."""
    (name, setup), s = row.split(": ", 1), context.settings
    found: dict[str, Any] = {METRIC: None, "SW2": None, "SW2 floor": None, "evaluations": None, "stochastic": None}
    if name not in s.models or nfe not in s.nfe:
        return found
    text, start, grid = SETUPS[setup]
    solver, p, model = solvers.parse(text), _models.STARTS[start], context.models[name]
    try:
        table = solver(p, times.ALL[grid](p, solver.steps(nfe)))
    except ValueError:  # fewer evaluations than the solver's least
        return found
    padded, denoiser = table.pad(max(6, table.registers), max(2, table.noises)), model.denoiser(p)
    keys, samples = jax.random.split(jax.random.key(s.seed)), []
    for first in range(0, s.n, s.chunk):
        index = jax.numpy.arange(first, first + s.chunk)
        x = p.prior(keys[0], (s.chunk, model.means.shape[1]), index)
        samples.append(np.asarray(jdiff.sample(denoiser, padded, x, keys[1], index=index)))
    value = distance(np.concatenate(samples)[: s.n], context.directions[name], context.quantiles[name])
    floor = context.floor[name]
    values = {METRIC: value / floor, "SW2": value, "SW2 floor": floor, "evaluations": table.nfe}
    return found | values | {"stochastic": solver.stochastic}


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    """Each model's table beside the survey's best, and the claim of half the evaluations."""
    lines = ["## Claims", ""]
    best: dict[tuple[str, str, int], tuple[float, str]] = {}
    for (row, nfe), c in cells.items():
        if c["SW2"] is not None:
            name, setup = row.split(": ", 1)
            key = (name, "stochastic" if c["stochastic"] else "ode", nfe)
            best[key] = min(best.get(key, (np.inf, "")), (c["SW2"], setup))
    for name in context.settings.models:
        floor, published = context.floor[name], _peers.SURVEY["sw2"][name]
        full, half = HALF[name]
        few = [(n, *best[name, "stochastic", n]) for n in NFE if n <= half and (name, "stochastic", n) in best]
        if not few:
            continue
        n, value, by = min(few, key=lambda found: found[1])
        verdict = "holds" if value <= 2 * floor else "DOES NOT HOLD"
        lines.append(
            f"- {name}: within 2 floors by a stochastic solver at NFE {half} or fewer, where the best such peer needs "
            f"{full}: {by} {value:.3g} = {value / floor:.2f} floors at NFE {n}: {verdict}."
        )
        lines.append(f"  Floor {floor:.3g} here, {published['floor']:.3g} in the survey.")
    for name in context.settings.models:
        lines += ["", f"## {name}", "", "SW2 of the best here and of the best published."]
        rows = []
        for kind in ("stochastic", "ode"):
            survey = {n: _peers.published("sw2", name, kind, n)[0] for n in NFE if n in _peers.SURVEY["nfe"]}
            mine = {n: best.get((name, kind, n), (None, ""))[0] for n in NFE}
            rows.append([f"{kind}: best published", *(reproduce.number(survey.get(n)) for n in NFE)])
            rows.append([f"{kind}: best here", *(reproduce.number(mine[n]) for n in NFE)])
        lines += ["", *reproduce.grid(["", *map(str, NFE)], rows)]
    _picture(context, cells, out / "law.png")
    found = (
        'The set-ups "above" were found by trying some thirty on these models at NFE 10, as the survey\'s best were.'
    )
    return [*lines, "", found, "", "![sliced Wasserstein distance against NFE](law.png)"]


def _picture(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = context.settings.models
    shape = {"sharex": True, "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 5.5), **shape)
    for name, axis in zip(names, axes[0], strict=True):
        for k, setup in enumerate(SETUPS):
            points = [(n, v) for n in NFE if (v := cells[f"{name}: {setup}", n]["SW2"]) is not None]
            style = "-" if any(cells[f"{name}: {setup}", n]["stochastic"] for n in NFE) else "--"
            if points:
                colour = matplotlib.colormaps["tab20"](k)
                axis.plot(*zip(*points, strict=True), style, color=colour, label=setup, marker="o", ms=3)
        for kind, style in (("stochastic", "-"), ("ode", "--")):
            points = [(n, _peers.published("sw2", name, kind, n)[0]) for n in NFE if n in _peers.SURVEY["nfe"]]
            axis.plot(*zip(*points, strict=True), style, color="black", lw=2.2, label=f"best published, {kind}")
        for times_floor, style in ((1, ":"), (2, "-.")):
            axis.axhline(times_floor * context.floor[name], color="grey", ls=style, lw=1)
        axis.set(xscale="log", yscale="log", title=name, xlabel="network evaluations")
        axis.set_ylim(0.6 * context.floor[name], 40 * context.floor[name])
        axis.set_xticks(NFE, list(map(str, NFE)))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("SW2 of 20,000 samples; grey: 1 and 2 floors")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


TABLE = Table(
    name="solver-law",
    summary="Sliced Wasserstein distance over its floor against NFE on exact models, stochastic and ODE solvers.",
    needs="nothing",
    rows=tuple(f"{name}: {setup}" for name in _models.NAMES for setup in SETUPS),
    columns=NFE,
    row_title="model and solver",
    column_title="NFE",
    metric=METRIC,
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
)
