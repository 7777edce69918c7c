"""What each schedule of frames gains and loses, exactly: an AR(1) Gaussian video with the denoiser of any noise levels.

    jdiff reproduce video-schedules

The denoiser E[x0 | frames, each at its own time] is known, and with it a deterministic solver is an affine map, so mean
and covariance of its videos are closed forms: no network, no Monte Carlo. Columns are evaluations a frame.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jdiff
from jdiff import process, reproduce, schedules, solvers, times
from jdiff.data.synthetic.video import ar1
from jdiff.experiments._claims import Claim
from jdiff.reproduce import Table

FLOW = process.flow()


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: Annotated[str, tyro.conf.arg(help="folder of the finished cells and the report")] = "runs/video-schedules"
    frames: Annotated[int, tyro.conf.arg(help="frames of a video")] = 16
    rho: Annotated[float, tyro.conf.arg(help="correlation of neighbouring frames")] = 0.9


SCHEDULES: dict[str, Callable[[int, int], np.ndarray]] = {
    "together": schedules.synchronous,
    "lag 1 (pyramid)": lambda frames, K: schedules.staircase(frames, K, 1),
    "lag K / 2": lambda frames, K: schedules.staircase(frames, K, max(K // 2, 1)),
    "autoregressive": schedules.autoregressive,
    "blocks of 4, lag K": lambda frames, K: schedules.autoregressive(frames, K, block=4),
}
SOLVERS = {"DDIM": "ddim", "UniPC-2": "unipc(order=2)"}
ROWS = {f"{name}, {solver}": (name, solver) for solver in SOLVERS for name in SCHEDULES}


def law(table: jdiff.Tableau, model: Any, known: np.ndarray, value: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the videos, known frames at `value`: from the images of 0 and of each basis vector."""
    free = np.flatnonzero(~known)
    x = np.where(known, value, np.zeros((1 + len(free), len(known))))
    x[np.arange(1, 1 + len(free)), free] = 1.0
    y = np.asarray(jdiff.sample(model.denoiser(FLOW), table, jnp.asarray(x)))
    matrix = (y[1:] - y[0]).T
    return y[0], matrix @ matrix.T  # the noise at t = 1 is standard normal


def conditional(cov: np.ndarray, known: np.ndarray, value: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of a centred Gaussian video given the known frames."""
    a, b = np.ix_(~known, known), np.ix_(known, known)
    gain = cov[a] @ np.linalg.inv(cov[b])
    mean, out = np.full(len(known), value), np.zeros_like(cov)
    mean[~known] = gain @ np.full(known.sum(), value)
    out[np.ix_(~known, ~known)] = cov[np.ix_(~known, ~known)] - gain @ cov[a].T
    return mean, out


def cell(settings: Settings, row: str, column: int) -> dict[str, Any]:
    name, solver = ROWS[row]
    with jax.enable_x64(True):
        model = ar1(settings.frames, settings.rho)
        none, first = np.zeros(settings.frames, bool), np.arange(settings.frames) == 0
        table = solvers.parse(SOLVERS[solver])(FLOW, times.uniform(FLOW, column))
        M = SCHEDULES[name](settings.frames, table.nfe)
        mean, cov = law(schedules.scheduled(table, M), model, none)
        error = cov - model.cov
        neighbours = np.diag(cov, 1) / np.sqrt(np.diag(cov)[1:] * np.diag(cov)[:-1])
        clip = schedules.scheduled(table, schedules.given(M, first))
        found, spread = law(clip, model, first, 1.0)
        right, exact = conditional(model.cov, first, 1.0)
    done = schedules.latency(M)
    return {
        "covariance error": float(np.linalg.norm(error) / np.linalg.norm(model.cov)),
        "mean error": float(np.abs(mean).max()),
        "neighbours' correlation": float(neighbours.mean()),
        "image to video, mean error": float(np.abs(found - right).max()),
        "image to video, covariance error": float(np.linalg.norm(spread - exact) / np.linalg.norm(exact)),
        "network calls": int(len(M) - 1),
        "calls to the first frame": int(done.min()),
        "frames a call, most": int(schedules.active(M).max()),
    }


CLAIMS = (
    *(
        Claim(
            f"{solver}, {K} evaluations: covariance error of one frame after the other over that of all together",
            lambda e, solver=solver, K=K: e(f"autoregressive, {solver}", K) / e(f"together, {solver}", K),
            at_most=1.0,
        )
        for solver in SOLVERS
        for K in (5, 20)
    ),
    Claim(
        "UniPC-2, 20 evaluations: covariance error of lag 1 over that of all together",
        lambda e: e("lag 1 (pyramid), UniPC-2", 20) / e("together, UniPC-2", 20),
        at_most=1.1,
    ),
    Claim(
        "image to video is exact in the limit: covariance error at 80 evaluations, all together, UniPC-2",
        lambda e: e("together, UniPC-2", 80, "image to video, covariance error"),
        at_most=0.001,
    ),
    Claim(
        "first frame of lag 1 against all together, in calls, ratio at 20 evaluations",
        lambda e: (
            e("lag 1 (pyramid), UniPC-2", 20, "calls to the first frame")
            / e("together, UniPC-2", 20, "calls to the first frame")
        ),
        at_most=1.0,
    ),
)


def finish(settings: Settings, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    e: Callable[..., Any] = lambda row, column, what="covariance error": cells[row, column].get(what)
    rows = [
        [name, *(str(e(f"{name}, UniPC-2", 20, what)) for what in ("network calls", "calls to the first frame"))]
        + [str(e(f"{name}, UniPC-2", 20, "frames a call, most"))]
        + [reproduce.number(e(f"{name}, UniPC-2", 20, what)) for what in ("neighbours' correlation",)]
        for name in SCHEDULES
    ]
    titles = ["schedule", "network calls", "calls to the first frame", "frames that move a call, most", "correlation"]
    return [
        f"Covariance error: Frobenius norm over that of the exact covariance ({settings.frames} frames, correlation "
        f"{settings.rho} of neighbours). Exact: no sampling error.",
        "",
        "## At 20 evaluations a frame, UniPC-2",
        "",
        *reproduce.grid(titles, rows),
        "",
        "## Claims",
        "",
        *(claim.line(e) for claim in CLAIMS),
    ]


TABLE = Table(
    name="video-schedules",
    summary="Schedules of frames on an exact AR(1) video: error of the covariance, latency, network calls.",
    needs="nothing: an exact model",
    rows=tuple(ROWS),
    columns=(2, 5, 10, 20, 40, 80),
    row_title="schedule, solver",
    column_title="evaluations a frame",
    metric="covariance error",
    settings=Settings,
    prepare=lambda settings: settings,
    cell=cell,
    finish=finish,
)
