"""What a run writes for people: metrics.csv, TensorBoard events, and a progress bar or plain lines.

A resumed run cuts metrics.csv back to the step it resumes from and goes on: no row is lost or doubled.
"""

import csv
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Log(NamedTuple):
    """row(step, metrics) writes one row; tick(step) moves the bar."""

    row: Any
    tick: Any


def cut_csv(path: str | os.PathLike, step: int, columns: tuple[str, ...]) -> None:
    """Keep the complete rows of steps <= step (all columns must be `columns`, the first "step"); atomic."""
    path = Path(path)
    rows: list[list[str]] = []
    if path.exists():
        lines = path.read_text().split("\n")[:-1]  # without its newline a last line is not complete
        rows = [r for r in csv.reader(lines) if len(r) == len(columns) and r[0].isdigit() and int(r[0]) <= step]
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    os.replace(temporary, path)


@contextmanager
def open_log(
    directory: Path, columns: tuple[str, ...], *, start: int, steps: int, tensorboard: bool, quiet: bool
) -> Iterator[Log]:
    """Log to metrics.csv (columns: "step" and the metrics' names), TensorBoard and the terminal.

    quiet: nothing on the terminal. Elsewhere than on a terminal, a plain line a row in place of the bar. Of several
    processes the first logs.
    """
    if jax.process_index():
        yield Log(lambda step, metrics: None, lambda step: None)
        return
    cut_csv(directory / "metrics.csv", start, columns)
    writer = None
    if tensorboard:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(str(directory), purge_step=start + 1 if start else None)
    bar = _bar(steps, start) if sys.stdout.isatty() and not quiet else None
    with open(directory / "metrics.csv", "a", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")

        def row(step: int, metrics: Mapping[str, float]) -> None:
            rows.writerow([step, *(f"{metrics[name]:.9g}" for name in columns[1:])])
            file.flush()
            if writer:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, step)
            text = f"loss {metrics['loss']:.4f}  {metrics['images_per_second']:.0f} images/s"
            if bar:
                bar.update(bar.task_ids[0], text=text)
            elif not quiet:
                left = (steps - step) * metrics["seconds_per_step"]
                print(f"step {step}/{steps}  {text}  {left:.0f} s left", flush=True)

        def tick(step: int) -> None:
            if bar:
                bar.update(bar.task_ids[0], completed=step)

        try:
            if bar:
                bar.start()
            yield Log(row, tick)
        finally:
            if bar:
                bar.stop()
            if writer:
                writer.close()


def _bar(steps: int, start: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        refresh_per_second=4,
    )
    bar.add_task("train", total=steps, completed=start, text="compiling ...")
    return bar
