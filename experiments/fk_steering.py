"""FK steering on a mixture whose tilted law is known: potentials, base steps and particles.

    jdiff reproduce fk-steering

Target exp(r(x)) p(x) with r(x) = x on three modes at -2, 0 and 2: the same modes, shifted by their variance and
reweighted, in closed form. So every error is exact: of the potentials with few particles, of the base sampler with few
steps, and of the published code, which drops the weights of steps at which it does not resample.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from jdiff import exact, process, reproduce, solvers, steering, times
from jdiff.reproduce import Table

WEIGHTS, MEANS, VARIANCE, LAM = np.array([0.5, 0.3, 0.2]), np.array([-2.0, 0.0, 2.0]), 0.16, 1.0
MODEL = exact.mixture(WEIGHTS, MEANS[:, None], [VARIANCE] * 3)
PARTICLES = (4, 16, 64, 256, 1024, 4096)
FEW = 4  # resampling times of the rows that say "4 times", as in the paper


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/fk-steering"  # folder of the finished cells and the report
    total: int = 16_384  # particles a cell, in independent groups
    seed: int = 0


class Row(NamedTuple):
    steps: int = 400
    potential: str | None = "difference"  # None: no steering
    few: bool = True
    threshold: float = 0.5
    scheme: str = "systematic"
    proposal: bool = False
    published: bool = False


ROWS: dict[str, Row] = {
    "no steering": Row(potential=None),
    "importance sampling": Row(potential="last"),
    "difference": Row(),
    "max": Row(potential="max"),
    "sum": Row(potential="sum"),
    "difference, resampled at any step": Row(few=False),
    "max, resampled at any step": Row(potential="max", few=False),
    "sum, resampled at any step": Row(potential="sum", few=False),
    "difference, multinomial": Row(scheme="multinomial"),
    "difference, gradient proposal": Row(proposal=True),
    "difference, 25 steps": Row(25),
    "difference, 50 steps": Row(50),
    "difference, 100 steps": Row(100),
    "difference, 200 steps": Row(200),
    "difference, 800 steps": Row(800),
    "max, 25 steps": Row(25, "max"),
    "sum, 25 steps": Row(25, "sum"),
    "importance sampling, 25 steps": Row(25, "last"),
    "difference, weights dropped (published code)": Row(published=True),
}


def target() -> tuple[np.ndarray, float, float]:
    """Mode weights, mean and log normalising constant of exp(lambda x) p(x)."""
    log_w = np.log(WEIGHTS) + LAM * MEANS + 0.5 * LAM**2 * VARIANCE
    log_z = float(np.logaddexp.reduce(log_w))
    w = np.exp(log_w - log_z)
    return w, float(w @ (MEANS + LAM * VARIANCE)), log_z


def reward(x: Array) -> Array:
    return x[:, 0]


def potential(row: Row, groups: int) -> steering.Potential:
    """The row's potential."""
    if row.potential is None:
        return steering.NONE
    right = steering.fk(reward, LAM, row.potential)
    return steering.Potential(right.init, Partial(_Dropped(groups), right.weigh)) if row.published else right


@dataclass(frozen=True)
class _Dropped:
    """As published: where the effective size of a step's own weights is above half, nothing is resampled and the
    weights are dropped, while the rewards that later differences start from move on."""

    groups: int

    def __call__(self, weigh: Callable[..., Any], key: Array, step: steering.Step, memory: Any) -> tuple[Array, Any]:
        increment, memory = weigh(key, step, memory)
        own = increment.reshape(self.groups, -1)
        keep = steering.ess(own) < 0.5 * own.shape[1]
        return jnp.where(keep[:, None], own, 0.0).ravel(), memory


def prepare(settings: Settings) -> Settings:
    return settings


def cell(settings: Settings, name: str, n: int) -> dict[str, Any]:
    """Mean, mode weights and log Z over settings.total / n groups of n particles, with standard errors over groups."""
    row, p = ROWS[name], process.vp_linear()
    tableau = solvers.ddpm()(p, times.logsnr(p, row.steps))
    groups = settings.total // n
    keys = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), n), 2)
    x = p.prior(keys[0], (groups * n, 1))
    at = tuple(int(k) for k in np.linspace(0.2, 0.8, FEW) * row.steps) if row.few else None
    proposal = steering.guided(reward, LAM) if row.proposal else None
    out = steering.sample(
        MODEL.denoiser(p), tableau, x, keys[1], potential(row, groups), proposal=proposal, groups=groups,
        threshold=row.threshold, scheme=row.scheme, at=at, final=False,
    )  # fmt: skip
    w = np.asarray(jax.nn.softmax(out.log_w, -1), np.float64)
    x = np.asarray(out.x, np.float64).reshape(groups, n)
    modes = np.stack([(w * (np.argmin(np.abs(x[..., None] - MEANS), -1) == k)).sum(1) for k in range(3)], 1)
    weights, mean, log_z = target()
    means = (w * x).sum(1)
    error = lambda v: float(v.std(0, ddof=1) / np.sqrt(len(v))) if len(v) > 1 else float("nan")
    z = np.exp(np.asarray(out.log_z, np.float64) - log_z)
    return {
        "error of the mean": abs(float(means.mean()) - mean), "mean": float(means.mean()), "mean se": error(means),
        "spread of the mean": float(means.std(ddof=1)), "best of n": float(x.max(1).mean()),
        "total variation of modes": float(0.5 * np.abs(modes.mean(0) - weights).sum()),
        "Z over the exact": float(z.mean()), "Z se": error(z),
        "effective size": float(np.asarray(out.info.ess[-1]).mean()), "groups": groups,
    }  # fmt: skip


def finish(context: Settings, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    weights, mean, log_z = target()
    at = lambda row, n, what: cells[row, n][what]
    base = WEIGHTS @ MEANS
    lines = [
        f"Exact: mean {mean:.3f} (unsteered {base:.3f}), mode weights {np.round(weights, 3).tolist()}, log Z "
        f"{log_z:.3f}. {context.total:,} particles a cell in groups of the column; the mean over groups, weighted.", "",
        "## Standard error of the mean (over groups), Z over the exact, effective size at the end", "",
    ]  # fmt: skip
    for row in ROWS:
        parts = [
            f"n = {n}: {at(row, n, 'mean'):.3f} ± {at(row, n, 'mean se'):.3f}, Z {at(row, n, 'Z over the exact'):.3f}, "
            f"size {at(row, n, 'effective size'):.0f}"
            for n in (PARTICLES[0], PARTICLES[-1])
        ]
        lines.append(f"- {row}: {'; '.join(parts)}")
    n = PARTICLES[-1]
    lines += ["", "## Claims", ""]
    for row in ("difference", "max", "sum"):
        off, bound = at(row, n, "error of the mean"), 3 * at(row, n, "mean se") + 0.02 * mean
        lines.append(
            f"- {row}, 400 steps, n = {n}: mean off by {off:.3f}, expected at most 3 standard errors + 2 % = "
            f"{bound:.3f}: {'holds' if off <= bound else 'DOES NOT HOLD'}."
        )
    order = [at("importance sampling", 4, "mean"), at("difference", 4, "mean"), mean]
    lines.append(
        f"- at 4 particles the difference potential comes nearer than importance sampling: {order[1]:.3f} against "
        f"{order[0]:.3f}, exact {mean:.3f}: {'holds' if order[0] < order[1] else 'DOES NOT HOLD'}."
    )
    few, some, many = (
        at(row, n, "error of the mean") for row in ("difference, 25 steps", "difference, 100 steps", "difference")
    )
    lines.append(
        f"- the base sampler's own error falls with its steps: {few:.3f}, {some:.3f}, {many:.3f} at 25, 100 and 400 "
        f"(some 400 are needed to reach the law within noise): {'holds' if few > some > many else 'DOES NOT HOLD'}."
    )
    off = at("difference, weights dropped (published code)", n, "error of the mean")
    lines.append(f"- dropping the weights of skipped resamplings leaves an error of {off:.3f}, for any n.")
    return lines


TABLE = Table(
    name="fk-steering",
    summary="Error of a steered mixture's mean: potentials, base steps, particles, against the exact tilted law.",
    needs="nothing: an exact model",
    rows=tuple(ROWS),
    columns=PARTICLES,
    row_title="potential",
    column_title="particles",
    metric="error of the mean",
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
)
