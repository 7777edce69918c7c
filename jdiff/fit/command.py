"""`jdiff fit-solver`: a solver for a trained model and a number of evaluations, as a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from jdiff import guidance
from jdiff.denoiser import Denoiser
from jdiff.solvers.file import save

from .gradient import table
from .reference import Reference, fingerprint, reference
from .report import report


@dataclass(frozen=True)
class FitConfig:
    """Fit a solver to a trained model and a number of network evaluations. RUN is a folder that `jdiff train` wrote,
    or a .safetensors file. No data is needed: the solver learns to land where a fine solver lands.

      jdiff fit-solver runs/digits --nfe 6 --out six.safetensors
      jdiff sample runs/digits --solver six.safetensors

    Fit with the label and guidance that you sample with. The gain is measured on noise of its own and stands, with
    all settings, in the file (jdiff.solvers.file.metadata).
    """

    nfe: int = 8  # network evaluations of the solver
    out: Path = Path("solver.safetensors")  # the file to write
    train: int = 512  # trajectories to fit on
    valid: int = 256  # trajectories to choose on
    held: int = 512  # trajectories to report on
    steps: int = 48  # Gauss-Newton steps from each start
    batch: int = 64  # trajectories at a time: memory is that of `nfe` evaluations and their gradients
    starts: int = 2  # standard solvers to start from, the best first
    tolerance: float = 2e-3  # of the reference trajectories: rms by which a doubling of their steps still moves them
    label: int | None = None  # one class for all; none: the classes in turn, where the model has classes
    guidance: float = 1.0  # classifier-free guidance scale; 1: none
    ema: float | None = 0.10  # which average of the parameters, by sigma_rel; None: the raw ones
    seed: int = 0  # trajectories are of the seeds 3 seed + 1, + 2 (chosen on), + 3 (reported on)
    references: Path | None = None  # folder that keeps the reference trajectories; default: references beside `out`


@dataclass(frozen=True)
class Labelled:
    """The model for the samples `index`, with labels and guidance: labels in turn, or one for all."""

    classes: int
    label: int | None = None
    guidance: float = 1.0
    null: int = 0

    def __call__(self, model: Denoiser, index: Array) -> Denoiser:
        if not self.classes:
            return model
        y = index % self.classes if self.label is None else jnp.full_like(index, self.label)
        labelled = model.with_cond(y.astype(jnp.int32))
        if self.guidance == 1.0:
            return labelled
        null = jnp.full_like(index, self.null).astype(jnp.int32)
        return guidance.cfg(labelled, model.with_cond(null), self.guidance)


def fit_solver(run: Path, config: FitConfig) -> dict[str, Any]:
    """Fit a solver to the model in `run`, write config.out, print and return its metadata."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from jdiff import checkpoint, train
    from jdiff.cli import _check_condition

    if config.nfe < 1 or min(config.train, config.valid, config.held) < 1:
        raise ValueError(
            f"--nfe, --train, --valid and --held must be at least 1, got {config.nfe}, {config.train}, {config.valid} "
            f"and {config.held}"
        )
    net, _, meta = checkpoint.load_params(run, config.ema)
    _check_condition(net, meta, config)
    model = train.denoiser_from(run, config.ema)
    null = net.null_label if config.guidance != 1.0 else 0
    labels = Labelled(meta["net"]["num_classes"], config.label, config.guidance, null)
    source = Partial(labels, model)
    name, shape = f"{fingerprint(model)} {labels}", net.shape
    folder = config.out.parent / "references" if config.references is None else config.references
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task, printed = bar.add_task("reference trajectories", total=4.0), [-1]

        def tell(completed: float, text: str) -> None:
            bar.update(task, completed=completed, description=text)
            if not bar.console.is_terminal and (tenth := int(2.5 * completed)) > printed[0]:  # a log: a line a tenth
                printed[0] = tenth
                print(f"{completed / 4:4.0%}  {text}", flush=True)

        sets: list[Reference] = []
        for i, n in enumerate((config.train, config.valid, config.held)):
            seed = 3 * config.seed + 1 + i
            file = folder / f"{name.split()[0]}-{seed}.npz"
            sets.append(
                reference(
                    source, n, shape, seed, tolerance=config.tolerance, batch=min(n, 256), file=file, key=name,
                    progress=lambda done, i=i: tell((i + done) / 3, "reference trajectories"),
                )
            )  # fmt: skip
        fit = table(
            source, config.nfe, sets[0], sets[1], steps=config.steps, batch=config.batch, starts=config.starts,
            seed=config.seed, progress=lambda done, text: tell(1 + 3 * done, text),
        )  # fmt: skip
    said = report(source, fit, sets[2])
    options = {"label": config.label, "guidance": config.guidance, "ema": config.ema}
    about = {"model": name, "process": repr(model.process), **options, **fit.meta, **said}
    save(config.out, fit.tableau, about)
    lines = Table("", "rms", "median", title=f"error on {len(sets[2])} held-out noises, {config.nfe} evaluations")
    for title, values in (("fitted", said["fitted"]), (said["standard"], said["standard error"]), ("", said["ratio"])):
        lines.add_row(title or "ratio", *(f"{values[k]:.3g}" for k in ("rms", "median")))
    Console().print(lines)
    print(f"{config.out}: fitted in {fit.meta['seconds']:.0f} s; next: jdiff sample {run} --solver {config.out}")
    return about
