"""Tables that can be computed again: a declared table, cells that are kept, Markdown, CSV and a plot.

An experiment is a module in experiments/ with a `TABLE`. `run` prepares it (trains a model, say), computes the
cells that its folder does not hold yet, one JSON file a cell, and writes table.md, table.csv and plot.png. A run that
was killed goes on where it was. A number that was not computed is shown as a dash.
"""

import csv
import dataclasses
import importlib
import json
import math
import os
import pkgutil
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Cell = Mapping[str, Any]  # the numbers of one cell, JSON-able, the table's metric among them


@dataclass(frozen=True)
class Published:
    """Numbers that a paper prints, read from experiments/papers/*.toml; shown beside ours, never mixed with them."""

    paper: str
    where: str
    setting: str
    columns: tuple[int, ...]
    rows: Mapping[str, tuple[float, ...]]

    @classmethod
    def load(cls, file: str) -> "Published":
        path = Path(__file__).parent / "experiments" / "papers" / file
        found = tomllib.loads(path.read_text())
        rows = {name: tuple(values) for name, values in found["rows"].items()}
        return cls(found["paper"], found["where"], found["setting"], tuple(found["columns"]), rows)


@dataclass(frozen=True)
class Table:
    """What an experiment declares.

    settings   dataclass of its options, with a field `out` (its folder); the command line is made from it
    prepare    (settings) -> context, whatever the cells need; resumable by its own means
    cell       (context, row, column) -> the numbers of that cell, `metric` among them
    finish     (context, cells, out) -> lines of Markdown: checks of claims, pictures; may write files
    highest    the best number of a column, which is shown bold, is the highest and not the lowest
    """

    name: str
    summary: str
    needs: str
    rows: tuple[str, ...]
    columns: tuple[Any, ...]
    row_title: str
    column_title: str
    metric: str
    settings: type
    prepare: Callable[[Any], Any]
    cell: Callable[[Any, str, Any], Cell]
    finish: Callable[[Any, Mapping[tuple[str, Any], Cell], Path], Sequence[str]]
    published: tuple[Published, ...] = ()
    highest: bool = False


def names() -> dict[str, str]:
    """Name -> module of every experiment; fast_sampling.py is called fast-sampling. train_*.py are scripts."""
    import jdiff.experiments as package

    modules = [m.name for m in pkgutil.iter_modules(package.__path__)]
    return {m.replace("_", "-"): f"jdiff.experiments.{m}" for m in modules if not m.startswith(("_", "train_"))}


def find(name: str) -> Table:
    """The table called `name`. ValueError for an unknown one, with the nearest names."""
    from jdiff.solvers import unknown

    known = names()
    if name not in known:
        raise ValueError(unknown("experiment", name, known))
    return importlib.import_module(known[name]).TABLE


def run(table: Table, settings: Any) -> Path:
    """Compute what is missing and write the report; returns its path. ValueError where `out` holds other settings."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    out = Path(settings.out)
    (out / "cells").mkdir(parents=True, exist_ok=True)
    _claim(out, settings)
    context = table.prepare(settings)
    cells: dict[tuple[str, Any], Cell] = {}
    wanted = [(row, column) for column in table.columns for row in table.rows]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(table.name, total=len(wanted))
        for row, column in wanted:
            bar.update(task, description=f"{row}, {table.column_title} {column}")
            file = out / "cells" / (re.sub(r"[^\w.+-]+", "_", f"{row}-{column}") + ".json")
            if not file.exists():
                write_atomically(file, json.dumps(dict(table.cell(context, row, column))))
            cells[row, column] = json.loads(file.read_text())
            bar.advance(task)
        bar.update(task, description=table.name)
    with open(out / "table.csv", "w", newline="") as f:
        writer = csv.writer(f)
        fields = list(next(iter(cells.values())))
        writer.writerow([table.row_title, table.column_title, *fields])
        writer.writerows([row, column, *(cell.get(k, "") for k in fields)] for (row, column), cell in cells.items())
    _plot(table, cells, out / "plot.png")
    lines = [f"# {table.name}", "", table.summary, "", *_settings(settings), "", *_markdown(table, cells), ""]
    lines += table.finish(context, cells, out)
    for published in table.published:
        lines += ["", f"## Published: {published.paper}", "", f"{published.where}. {published.setting}", ""]
        rows = [[name, *map(number, values)] for name, values in published.rows.items()]
        lines += grid([table.row_title, *map(str, published.columns)], rows)
    write_atomically(out / "table.md", "\n".join(lines) + "\n")
    return out / "table.md"


def _claim(out: Path, settings: Any) -> None:
    """The folder is for one set of settings: cells of two must never stand in one table."""
    wanted = {k: v for k, v in dataclasses.asdict(settings).items() if k != "out"}
    file = out / "settings.json"
    if not file.exists():
        return write_atomically(file, json.dumps(wanted, indent=1))
    found = json.loads(file.read_text())
    differ = [k for k in wanted | found if json.loads(json.dumps(wanted.get(k))) != found.get(k)]
    if differ:
        what = ", ".join(f"{k} = {found.get(k)!r} there, {wanted.get(k)!r} now" for k in differ)
        raise ValueError(f"{out} holds cells of other settings ({what}); give another --out, or delete that folder")


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary file beside `path` and rename it, so that a reader or a kill never meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def number(value: Any) -> str:
    """Three significant digits; a dash for what was not computed."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]


def _settings(settings: Any) -> list[str]:
    shown = {k: v for k, v in dataclasses.asdict(settings).items() if k != "out"}
    import jax

    import jdiff

    where = f"jdiff {jdiff.__version__}, JAX {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}"
    return ["Settings: " + ", ".join(f"{k} = {v}" for k, v in shown.items()) + f". Written by {where}."]


def _markdown(table: Table, cells: Mapping[tuple[str, Any], Cell]) -> list[str]:
    """Rows by columns; the best of each column is bold. A cell's "METRIC se" is shown as +- its standard error."""
    value = lambda row, column: cells.get((row, column), {}).get(table.metric)
    first = max if table.highest else min
    best = {c: first((v for r in table.rows if (v := value(r, c)) is not None), default=None) for c in table.columns}

    def shown(row: str, column: Any) -> str:
        text, error = number(value(row, column)), cells.get((row, column), {}).get(f"{table.metric} se")
        text = f"**{text}**" if value(row, column) == best[column] is not None else text
        return text if error is None else f"{text} ± {error:.1g}"

    rows = [[row, *(shown(row, column) for column in table.columns)] for row in table.rows]
    return [f"{table.metric} by {table.column_title}:", "", *grid([table.row_title, *map(str, table.columns)], rows)]


def _plot(table: Table, cells: Mapping[tuple[str, Any], Cell], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = matplotlib.colormaps["tab20"]
    for i, row in enumerate(table.rows):
        points = [(c, cells[row, c][table.metric]) for c in table.columns if (row, c) in cells]
        points = [(c, v) for c, v in points if v is not None]
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, label=row, color=colours(i % 20))
    floors = {cell["floor"] for cell in cells.values() if "floor" in cell}
    for floor in floors:
        axes.axhline(floor, color="black", lw=1, ls=":", label="real, held out")
    scale = "linear" if table.highest else "log"  # shares and decibels; errors and distances
    axes.set(xscale="log", yscale=scale, xlabel=table.column_title, ylabel=table.metric, title=table.name)
    axes.set_xticks(table.columns, list(map(str, table.columns)))
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    if scale == "log":
        decades = np.diff(np.log10(axes.get_ylim()))
        subs = range(1, 10) if decades < 1.5 else (1, 2, 5) if decades < 4 else (1,)  # what fits
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=50))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)
