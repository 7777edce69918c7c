"""Error against network evaluations on exact models: published samplers, our solvers, the automatic choice, the fit.

    jdiff reproduce solver-frontier
    jdiff reproduce solver-frontier --models gauss8 --nfe 5 10 --out runs/quick
    jdiff reproduce solver-frontier --model-seed 1 --modes 16 --dim 16 --out runs/fresh      models drawn afresh

Three models, three starts (see _models.py). The numbers to beat are a survey's of diffusers, k-diffusion and official
codes (papers/peer_survey.toml), and the same set-ups by our solvers on the same noise (_peers.py). An error is that of
the sample against the exact probability-flow solution at sigma = 0, from the same noise.

On mixtures the rms is that of the few trajectories that end in another mode: on the survey's 256 or 1024 a matter of
one or none of them. So all is measured again on 16 times as many (`--more`), against the survey's set-ups by our
solvers.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jdiff
from jdiff import exact, reproduce, solvers
from jdiff.experiments import _models, _peers
from jdiff.reproduce import Table
from jdiff.solvers.auto import CANDIDATES, V3, ends, measure, squares, tables
from jdiff.solvers.file import save
from jdiff.statistics import Statistics, estimate

NFE = (5, 6, 8, 10, 15, 20, 50)
CALIBRATION = 256  # trajectories in one of auto's batches
AUTO: dict[str, dict[str, Any]] = {"auto": {"batches": 16, "tune": 8}, "default": {}}  # exact models are cheap
CALLS = {"auto": "`solvers.auto` of 16 batches, 8 tuned,", "default": "`solvers.auto` as it is by default"}
TRAINED, USED, VALID = 16384, 2048, 2048  # trajectories of the fit: drawn, used in a round, deciding
FITTED = (5, 6, 8, 10)
ALL = tuple(name for name, make in solvers.ALL.items() if not make().stochastic)
MORE = ("dpm_solver_pp(order=3, as_published=True)", "deis(order=2, variable='lam')")
STANDARD = tuple(dict.fromkeys((*CANDIDATES, *MORE, *ALL)))
TITLE = "auto / best peer (rms)"
WHICH = ("rms", "median")
AGAIN = 4  # of our standard solvers and grids, by rms and by median, are measured on more trajectories
SECONDS = ("auto seconds", "default seconds", "fit seconds", "fit reference seconds")


@dataclass(frozen=True)
class Settings:
    """Options of the experiment; everything is float64."""

    out: str = "runs/solver-frontier"  # folder of the finished cells and the report
    seed: int = _peers.SEED  # of the noise that errors are measured on; 7 is the survey's
    model_seed: int | None = None  # draws models of the same three kinds with this seed; none: the survey's models
    modes: int | None = None  # of the mixtures drawn afresh
    dim: int | None = None  # of the models drawn afresh
    models: tuple[str, ...] = _models.NAMES  # which of gmm2, gmm64, gauss8
    starts: tuple[str, ...] = tuple(_models.STARTS)  # which of vp, edm, flow
    nfe: tuple[int, ...] = NFE  # which numbers of evaluations
    more: int = 16  # times the survey's number of trajectories: others, that all is measured on again; 0: it is not
    fit: bool = True  # also fit a solver to each model at 5 to 10 evaluations


class Case(NamedTuple):
    """A model with a start: noise x (n, d) and where its exact flow ends."""

    model: exact.Mixture
    denoiser: jdiff.Denoiser
    x: jax.Array
    target: np.ndarray


class Context(NamedTuple):
    settings: Settings
    case: Any  # row -> Case
    published: bool


def prepare(settings: Settings) -> Context:
    """Check the options; models, noise and exact flows are made when a cell wants them, and kept in `out`."""
    known = {"models": _models.NAMES, "starts": tuple(_models.STARTS), "nfe": NFE}
    for option, names in known.items():
        for value in getattr(settings, option):
            if value not in names:
                raise ValueError(f"--{option}: {value!r}; expected some of {', '.join(map(str, names))}")
    if settings.more < 0:
        raise ValueError(f"--more is {settings.more}; expected 0 or more times the survey's number of trajectories")
    jax.config.update("jax_enable_x64", True)

    @functools.cache
    def case(row: str, seed: int = settings.seed, n: int | None = None) -> Case:
        name, start = row.split()
        p = _models.STARTS[start]
        given = settings.modes, settings.dim
        model = (
            _models.survey(name) if settings.model_seed is None else _models.fresh(name, settings.model_seed, *given)
        )
        n = n or _models.TRAJECTORIES[name]
        x = _models.noise(model, p, seed, n)
        file = Path(settings.out) / "flows" / f"{name}-{start}-{seed}-{n}.npy"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, _models.flow(model, p, x))
        return Case(model, model.denoiser(p), x, np.load(file))

    return Context(settings, case, settings.model_seed is None and settings.seed == _peers.SEED)


def cell(context: Context, row: str, nfe: int) -> dict[str, Any]:
    """One model, start and number of evaluations: the best peer, our best, the automatic choice and the fit."""
    name, start = row.split()
    kinds = ("peer", "same", "standard", *AUTO, "fit")
    found: dict[str, Any] = {TITLE: None} | {f"{kind} {w}": None for w in WHICH for kind in kinds}
    found |= {f"{kind} {w} by": "" for w in WHICH for kind in kinds}
    found |= {f"{kind} {w} on more{by}": None for w in WHICH for kind in kinds[1:] for by in ("", " by")}
    found |= dict.fromkeys((*(f"{kind} cost" for kind in AUTO), *SECONDS))
    found |= {f"peer {w} by our form": None for w in WHICH}
    found |= {f"{w} of {solver}": None for w in WHICH for solver in STANDARD}
    s = context.settings
    if not (name in s.models and start in s.starts and nfe in s.nfe):
        return found
    case, p = context.case(row), _models.STARTS[start]
    score = functools.partial(_score, case)
    exactly, estimated = _statistics(context, row)
    peers: dict[Any, jdiff.Tableau] = {
        k: build(p, nfe)
        for k, (at, build) in (_peers.SETUPS | _peers.with_statistics(exactly)).items() if at == start
    }  # fmt: skip
    made: dict[Any, jdiff.Tableau] = {k: T for k, (T, _) in tables(p, STANDARD, nfe).items()}
    for text, order in V3.items():
        for given, about in ((exactly, ""), (estimated, ", as auto estimates it")):
            solver = solvers.get("dpm_solver_v3", order=order, statistics=given)
            made |= {(text + about, grid): T for (_, grid), (T, _) in tables(p, (solver,), nfe).items()}
    same, ours = ({k: score(T) for k, T in some.items()} for some in (peers, made))
    ours |= same  # they are our solvers and grids too
    for w in WHICH:
        if context.published:
            found[f"peer {w}"], found[f"peer {w} by"] = _peers.published(w, name, start, nfe)
            form = found[f"peer {w} by"].replace(" (ode)", "")
            found[f"peer {w} by our form"] = same[form][w] if form in same else None
        for kind, errors in (("same", same), ("standard", ours)):
            best = min(errors, key=lambda key: errors[key][w])
            found[f"{kind} {w}"] = errors[best][w]
            found[f"{kind} {w} by"] = _name(best)
        for solver in STANDARD:
            values = [v[w] for key, v in ours.items() if not isinstance(key, str) and key[0] == solver]
            found[f"{w} of {solver}"] = min(values, default=None)
    chosen = {}
    for kind, options in AUTO.items():
        noise, began = _models.noise(case.model, p, 1000 + nfe, CALIBRATION), time.process_time()
        table, report = solvers.auto(case.denoiser, nfe, noise, jax.random.key(nfe), measured=estimated, **options)
        name_of, reached = f"{report.solver} on {report.grid}", score(table)
        found |= {f"{kind} seconds": time.process_time() - began, f"{kind} rms by": name_of}
        found |= {f"{kind} {w}": reached[w] for w in WHICH} | {f"{kind} cost": report.evaluations * report.batch}
        about = {"held out rms and median": report.held_out, "solver": report.solver, "grid": report.grid}
        save(Path(s.out) / kind / f"{name}-{start}-{nfe}.safetensors", table, about)
        chosen[kind] = {name_of: table}
    fitted = None
    if s.fit and nfe in FITTED:
        fitted, values = _fitted(context, row, nfe)
        found |= values
    if s.more:
        best = {k for w in WHICH for k in sorted(ours, key=lambda key: ours[key][w])[:AGAIN]}
        again = {"same": peers, "standard": {k: T for k, T in made.items() if k in best}}
        again |= chosen
        again |= {} if fitted is None else {"fit": {found["fit rms by"]: fitted}}
        found |= _on_more(context.case(row, seed=s.seed + 3000, n=s.more * _models.TRAJECTORIES[name]), again)
    beat = found["peer rms"] if context.published else found["same rms"]
    return found | {TITLE: found["auto rms"] / beat}


def _on_more(case: Case, kinds: Mapping[str, Mapping[Any, jdiff.Tableau]]) -> dict[str, Any]:
    """The best of each kind on these trajectories; our standard solvers include the survey's set-ups."""
    scores = {kind: {key: _score(case, T) for key, T in some.items()} for kind, some in kinds.items()}
    scores["standard"] |= scores["same"]
    found: dict[str, Any] = {}
    for kind, errors in scores.items():
        for w in WHICH:
            best = min(errors, key=lambda key: errors[key][w])
            found |= {f"{kind} {w} on more": errors[best][w], f"{kind} {w} on more by": _name(best)}
    return found


def _name(key: Any) -> str:
    return key if isinstance(key, str) else " on ".join(key)


def _statistics(context: Context, row: str) -> tuple[Statistics, Statistics]:
    """What DPM-Solver-v3 wants to know of the model, made once: exactly but for 1024 draws or more (with exact
    derivatives they give the survey's numbers, whose statistics were exact), and as `auto` itself estimates them."""
    case, folder = context.case(row), Path(context.settings.out) / "statistics"
    files = [folder / f"{'-'.join(row.split())}-{what}.safetensors" for what in ("exact", "auto")]
    if not files[0].exists():
        d = case.x.shape[1]
        n = 1024 if d > 16 else 4096
        exactly = estimate(case.denoiser, (d,), jax.random.key(0), n=n, n_lam=120, batch=512, probes=0)
        noise = _models.noise(case.model, case.denoiser.process, 1000, CALIBRATION)
        estimated, _ = measure(case.denoiser, noise, jax.random.key(1))
        assert isinstance(estimated, Statistics)
        for file, found in zip(files, (exactly, estimated), strict=True):
            found.save(file)
    return Statistics.load(files[0]), Statistics.load(files[1])


def _fitted(context: Context, row: str, nfe: int) -> tuple[jdiff.Tableau, dict[str, Any]]:
    """Every entry and time fitted to other trajectories; others again decide. Kept as a file."""
    from jdiff import fit

    began, sets = time.process_time(), []
    for seed, n in ((1001, TRAINED), (1002, VALID)):
        case = context.case(row, seed=seed, n=n)
        sets.append(fit.Reference(case.x, case.target, np.arange(n), seed))
    made = time.process_time()
    found = fit.table(case.denoiser, nfe, *sets, use=USED, batch=512)
    errors = _score(context.case(row), found.tableau)
    file = Path(context.settings.out) / "fit" / f"{'-'.join(row.split())}-{nfe}.safetensors"
    save(file, found.tableau, {**found.meta, "held out": errors})
    seconds = {"fit seconds": time.process_time() - made, "fit reference seconds": made - began}
    return found.tableau, {f"fit {w}": errors[w] for w in WHICH} | {"fit rms by": found.start} | seconds


def _score(case: Case, table: jdiff.Tableau) -> dict[str, float]:
    each = squares(ends(case.denoiser, table, case.x), case.target)
    return {"rms": float(np.sqrt(np.mean(each))), "median": float(np.sqrt(np.median(each)))}


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    """The targets, cell by cell; tables of ratios; pictures of all solvers."""
    done = {key: cell for key, cell in cells.items() if cell[TITLE] is not None}
    peer = "peer" if context.published else "same"
    lines = [
        "The noise is the survey's own, so its numbers and ours are of the same trajectories. Its numbers have two "
        "digits; a target counts as met up to half a unit of the second."
        if context.published
        else "No published numbers for this noise or these models: the best peer is the best of the survey's set-ups, "
        "by our solvers, on the same noise.",
        "",
        "## Targets",
        "",
    ]
    lines += _targets(done, peer, "", _half_digit if context.published else lambda value: 0.0)
    more = context.settings.more
    if more:
        counts = ", ".join(f"{more * n} of {name}" for name, n in _models.TRAJECTORIES.items())
        lines += ["", f"On {more} times as many other trajectories ({counts}), against the best of the survey's "]
        lines[-1] += "set-ups by our solvers there:"
        lines += ["", *_targets(done, "same", " on more", lambda value: 0.0)]
    exactly = [f"{row} {n}" for (row, n), c in done.items() if (c["fit rms"] or 1.0) < 1e-6]
    if exactly:
        lines += [
            "",
            f"Fitted to an rms below 1e-6: {', '.join(exactly)}. A Gaussian's flow in d dimensions is d factors ",
        ]
        lines[-1] += "(and a mean), which a table with more numbers than that may hit exactly."
    if context.published:
        lines += ["", _agreement(done)]
    for w in WHICH:
        lines += ["", f"## {w}", "", *_ratios(done, peer, w, context.settings.fit)]
        _picture(done, w, peer, out / f"{w}.png")
        lines += ["", f"![{w} error against NFE, all solvers]({w}.png)"]
        if more:
            lines += ["", f"### {w}, on {more} times as many trajectories", ""]
            lines += _ratios(done, "same", f"{w} on more", context.settings.fit)
    lines += ["", "## Solver by solver", "", *_by_solver(done, peer)]
    lines += ["", "## What was chosen", ""]
    rows = [
        [f"{row}, {n}", c["auto rms by"], c["standard rms by"], c[f"{peer} rms by"]] for (row, n), c in done.items()
    ]
    lines += reproduce.grid(["", "solvers.auto", "best standard by rms", "best peer by rms"], rows)
    spent = {what: [c[what] for c in done.values() if c[what] is not None] for what in SECONDS}
    each = [f"{what} {np.mean(v):.1f} (at most {max(v):.1f})" for what, v in spent.items() if v]
    costs = {kind: [c[f"{kind} cost"] / CALIBRATION for c in done.values()] for kind in AUTO}
    calls = [f"{CALLS[kind]} {np.median(v):,.0f} ({min(v):,.0f} to {max(v):,.0f})" for kind, v in costs.items()]
    lines += ["", f"Network evaluations of a batch of {CALIBRATION} that a choice took, median: {'; '.join(calls)}."]
    return [*lines, "", f"CPU time a cell, compilation included: {', '.join(each)}."]


def _targets(done: Mapping, peer: str, where: str, rounding: Any) -> list[str]:
    """What the standard solvers, the automatic choice and the fit should reach, and where they do not."""
    lines = []
    few = {key: cell for key, cell in done.items() if cell["fit rms"] is not None}
    for w in WHICH:
        beat = {key: (b := cell[f"{peer} {w}{where}"]) + rounding(b) for key, cell in done.items()}
        best, at = f"the best peer's {w}", f"{w}{where}"
        claims = [("best of our standard solvers and grids at most", done, "standard", 1.0)]
        claims += [(f"{call} at most 1.1 times", done, kind, 1.1) for kind, call in CALLS.items()]
        limit = 0.5 if w == "rms" else 0.2
        claims += [(f"fitted (NFE 5 to 10) at most {limit} times", few, "fit", limit)] if few else []
        lines += [_target(f"{text} {best}", some, beat, f"{kind} {at}", limit) for text, some, kind, limit in claims]
    return lines


def _ratios(done: Mapping, peer: str, w: str, fit: bool) -> list[str]:
    """A table: the best peer's error `w`, and below it what ours are of it."""
    text = "The best peer's error; below it the ratios to it of our best standard solver, of `solvers.auto` (auto: 16 "
    text += "batches, 8 tuned; default: as it is by default)"
    lines, rows = [text + (", and of the fit." if fit else "."), ""], []
    for row in TABLE.rows:
        if any((row, n) in done for n in NFE):
            rows.append([f"{row}: best peer", *(_number(done.get((row, n)), f"{peer} {w}") for n in NFE)])
        for kind in ("standard", *AUTO, "fit"):
            shown = [_ratio(done.get((row, n)), f"{kind} {w}", f"{peer} {w}") for n in NFE]
            rows += [[f"{row}: {kind}", *shown]] if any(v != "-" for v in shown) else []
    return lines + reproduce.grid(["", *map(str, NFE)], rows)


def _by_solver(done: Mapping, peer: str) -> list[str]:
    """Geometric mean over the cells of an NFE of a solver's median, on the best of its grids, over the best peer's."""
    shown = [n for n in NFE if any(nfe == n for _, nfe in done)]

    def typical(what: str, n: int, model: str = "") -> float | None:
        cells = [c for (row, nfe), c in done.items() if nfe == n and row.startswith(model)]
        pairs = [(c[what], c[f"{peer} median"]) for c in cells]
        ratios = [np.log(a / b) for a, b in pairs if a is not None and np.isfinite(a)]
        return float(np.exp(np.mean(ratios))) if ratios and len(ratios) == len(pairs) else None

    names = {"solvers.auto": "auto median"} | {s: f"median of {s}" for s in STANDARD}
    found = {name: [typical(what, n) for n in shown] for name, what in names.items()}
    found["fitted, mixtures alone"] = [typical("fit median", n, "gmm") for n in shown]
    found = {name: values for name, values in found.items() if any(v is not None for v in values)}
    order = sorted(found, key=lambda name: np.mean([np.log(v) for v in found[name] if v is not None]))
    rows = [[f"`{name}`", *(reproduce.number(v) for v in found[name])] for name in order]
    return [
        "The median error on the best of a solver's grids over that of the best peer in the same cell: geometric mean "
        "over models and starts (a dash: not in all of them).",
        "",
        *reproduce.grid(["NFE", *map(str, shown)], rows),
    ]


def _target(claim: str, cells: Mapping, beat: Mapping, what: str, limit: float) -> str:
    ratios = {key: cell[what] / beat[key] for key, cell in cells.items()}
    over = [f"{row} {nfe} ({ratio:.2f})" for (row, nfe), ratio in ratios.items() if ratio > limit]
    typical = float(np.exp(np.mean(np.log(list(ratios.values())))))
    verdict = "holds" if not over else f"DOES NOT HOLD in {len(over)} of them: {', '.join(over)}"
    return f"- {claim}, in every one of {len(cells)} cells (geometric mean {reproduce.number(typical)}): {verdict}."


def _half_digit(value: float) -> float:
    """Half a unit of the second digit: what a published number may have lost to rounding."""
    return 0.5 * 10.0 ** (np.floor(np.log10(value)) - 1)


def _agreement(done: Mapping) -> str:
    """How our forms of the winning set-ups compare with the published numbers, of two digits."""
    pairs = [
        (f"{row} {nfe} {w}", cell[f"peer {w} by our form"] / cell[f"peer {w}"])
        for (row, nfe), cell in done.items() for w in WHICH if cell[f"peer {w} by our form"] is not None
    ]  # fmt: skip
    off = [f"{name} ({ratio:.2f})" for name, ratio in pairs if abs(ratio - 1) > 0.051]  # 0.5 in 10
    but = f"; off by more than rounding: {', '.join(off)}" if off else ""
    return (
        f"Our forms of the winning set-ups give the published number to its rounding in {len(pairs) - len(off)} of "
        f"{len(pairs)} cases (of {2 * len(done)}; the others won with what has no form here){but}. "
        "(DPM-Solver-v3 had the exact statistics of the model, there and here; `solvers.auto` estimates its own.)"
    )


def _number(cell: Mapping | None, what: str) -> str:
    return "-" if cell is None else reproduce.number(cell[what])


def _ratio(cell: Mapping | None, what: str, of: str) -> str:
    return "-" if cell is None or cell[what] is None else f"{cell[what] / cell[of]:.2f}"


def _picture(done: Mapping, w: str, peer: str, file: Path) -> None:
    """All solvers, each on its best grid: a panel a model and start."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    starts, names = tuple(_models.STARTS), _models.NAMES
    shape = {"sharex": True, "sharey": "row", "layout": "constrained"}
    figure, axes = plt.subplots(len(names), len(starts), figsize=(13, 11), **shape)
    colours = matplotlib.colormaps["tab20"]
    styles = ("-", "--", "-.")
    titles = {"vp": "VP, 1000 levels", "edm": "sigma 80 to 0", "flow": "linear flow"}
    for i, name in enumerate(names):
        for j, start in enumerate(starts):
            row, axis = f"{name} {start}", axes[i, j]
            lines = [
                (solver, f"{w} of {solver}", colours(k % 20), styles[k // 20 % 3], 1.0) for k, solver in enumerate(ALL)
            ]
            lines += [
                ("best published sampler", f"{peer} {w}", "black", "-", 2.6),
                ("solvers.auto", f"auto {w}", "crimson", "-", 2.6),
                ("fitted", f"fit {w}", "crimson", ":", 2.6),
            ]
            for label, what, colour, style, width in lines:
                points = [(n, v) for n in NFE if (v := done.get((row, n), {}).get(what)) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=colour, lw=width, label=label, marker="o", ms=2)
            axis.set(xscale="log", yscale="log", title=f"{name}, {titles[start]}")
            shown = sorted({n for _, n in done})
            axis.set_xticks(shown, list(map(str, shown)))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[i, 0].set_ylabel(f"{w} error")
    for axis in axes[-1]:
        axis.set_xlabel("network evaluations")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    for axis in axes.flat:  # what explodes, or is exact, is not worth the room
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, 1e-7), min(high, 3.0))
    figure.savefig(file, dpi=120)
    plt.close(figure)


TABLE = Table(
    name="solver-frontier",
    summary="Error on exact models against NFE: published samplers, our solvers, the automatic choice, the fit.",
    needs="nothing",
    rows=tuple(f"{name} {start}" for start in _models.STARTS for name in _models.NAMES),
    columns=NFE,
    row_title="model and start",
    column_title="NFE",
    metric=TITLE,
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
)
