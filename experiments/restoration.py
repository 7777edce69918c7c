"""ResShift, RDDM, Resfusion, a Brownian bridge and MRS against conditional DDIM from noise, at equal evaluations.

jdiff reproduce restoration

Held-out digits from a 2 x 2 averaged, noisy view (or 8 x 8 patches of your own images, grey or in colour), by the
exact posterior model, and by small networks trained alike for each process, three seeds.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import anchored, data, metrics, process, reproduce, solvers, times
from jdiff.anchored import Anchored
from jdiff.data.synthetic import restoration as pairs_of
from jdiff.experiments import _restoration as model
from jdiff.experiments._claims import Claim
from jdiff.experiments.fast_sampling import score
from jdiff.reproduce import Table


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/restoration"  # folder of the finished cells and the report
    images: str = "digits"  # or a path of images for `jdiff.data.load`, of which 8 x 8 patches are cut
    colour: bool = False  # keep the patches' channels
    n: int = 500  # held-out images
    steps: int = 800  # of training, batches of 256
    seed: int = 0  # of the views and the noise


@functools.cache
def resfusion_of(levels: int) -> Anchored:
    """Resfusion with that many levels up to its acceleration point."""
    found = (Anchored(process.resfusion(T), anchored.halfway) for T in range(2, 40 * levels))
    return next(A for A in found if len(A.process.base.betas) == levels)  # pyright: ignore[reportAttributeAccessIssue]


def plain(p: process.Process) -> Anchored:
    """No anchor in the process: y is only seen by the network (DiffuseVAE's first form); sampling starts from noise."""
    return Anchored(p, nothing, guess=0.0)


def nothing(p: process.Process, t: Any) -> Any:
    return 0.0 * p.alpha(t)


def resshift_of(n: int) -> Anchored:
    return Anchored(process.resshift(n, min_noise=0.2 if n <= 5 else 0.04))


VP = plain(process.vp_linear())
IR = Anchored(process.mean_reverting("cosine", 0.5))
RDDM, BRIDGE = anchored.ALL["rddm"](), Anchored(process.brownian_bridge(0.5, t_max=1.0))
LATE = Anchored(process.brownian_bridge(0.5))
Row = Callable[[int], tuple[Anchored, solvers.Solver, str]]
ROWS: dict[str, Row] = {
    "DDIM from noise": lambda n: (VP, solvers.ddim(), "logsnr"),
    "DPM-Solver++(2M) from noise": lambda n: (VP, solvers.dpm_solver_pp(2), "logsnr"),
    "ResShift": lambda n: (resshift_of(n), solvers.ddpm(), "uniform"),
    "RDDM": lambda n: (RDDM, solvers.ddim(), "uniform"),
    "Resfusion": lambda n: (resfusion_of(n), solvers.ddpm(), "uniform"),
    "Brownian bridge": lambda n: (BRIDGE, solvers.ddpm(), "uniform"),
    "IR-SDE, its own steps": lambda n: (IR, solvers.ddpm(), "uniform"),
    "IR-SDE, MRS-2": lambda n: (IR, solvers.mrs(2, lower_order_final=True), "logsnr"),
    "ResShift's process, MRS-2": lambda n: (resshift_of(15), solvers.mrs(2, lower_order_final=True), "logsnr"),
    "bridge, MRS-2 from t = 0.999": lambda n: (LATE, solvers.mrs(2, lower_order_final=True), "logsnr"),
}
TRAINED = {  # and at which numbers of evaluations: a process of its own, as ResShift's, is a network of its own
    "DDIM from noise": (4, 5, 10, 15),
    "ResShift": (4, 5, 15),
    "RDDM": (4, 5, 10),
    "Resfusion": (4, 5, 50),
    "Brownian bridge": (4, 5, 10),
    "IR-SDE, MRS-2": (4, 5, 10),
}
COLUMNS = (4, 5, 10, 15, 50)


def batch(images: Any, key: Any) -> tuple[jax.Array, jax.Array]:
    """256 training pairs: images at random, each with a fresh view."""
    choose, noise = jax.random.split(key)
    x0 = images[jax.random.randint(choose, (256,), 0, len(images))]
    pool = jnp.asarray(pooled(x0.shape[1]), x0.dtype)
    return x0, (x0 @ pool.T + model.NOISE * jax.random.normal(noise, (256, len(pool)), x0.dtype)) @ (4.0 * pool)


def pooled(size: int) -> np.ndarray:
    """The blocks' averages of flat 8 x 8 images (rows, columns, channels), of `size` numbers."""
    return np.kron(model.POOL, np.eye(size // 64))


@dataclass(frozen=True, eq=False)
class Context:
    settings: Settings
    train: np.ndarray  # (m, 64)
    arrays: Mapping[str, jax.Array]  # of the exact posterior
    x0: np.ndarray  # (n, 64)
    y: jax.Array
    features: Callable[[np.ndarray], np.ndarray]
    networks: dict[Anchored, Any]


def prepare(settings: Settings) -> Context:
    """Images, views, the exact posterior and the features."""
    if settings.images == "digits":
        (train, labels), x0 = model.digits("train"), model.digits("test")[0][: settings.n]
        features = lambda v: metrics.embed(
            metrics.digit_features(), np.clip(v, -1, 1).reshape(-1, 8, 8, 1).astype(np.float32), batch_size=settings.n
        )
    else:
        images = data.load(settings.images).images
        half = len(images) // 2
        train = pairs_of.patches(images[:half], 8, 5000, settings.seed, colour=settings.colour).reshape(5000, -1)
        x0 = pairs_of.patches(images[half:], 8, settings.n, settings.seed + 1, colour=settings.colour)
        x0 = x0.reshape(settings.n, -1)
        labels = np.digitize(train.std(1), np.quantile(train.std(1), [0.25, 0.5, 0.75]))  # flat, .., busy
        features = lambda v: np.clip(v, -1, 1).astype(np.float32)
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in model.posterior(train, labels, pooled(x0.shape[1])).items()}
    y = pairs_of.degraded(x0.reshape(len(x0), 8, 8, -1), 2, model.NOISE, settings.seed).reshape(x0.shape)
    return Context(settings, train, arrays, x0, jnp.asarray(y, jnp.float32), features, {})


def cell(context: Context, row: str, n: int) -> dict[str, Any]:
    """PSNR and Fréchet distance of one method at n evaluations; with the trained networks, means over three seeds."""
    c = context
    name = row.removesuffix(", trained")
    A, solver, grid = ROWS[name](n)
    if row != name and n not in TRAINED[name]:
        return {"PSNR": None}
    table = solver(A.process, times.ALL[grid](A.process, n))
    if row == name:
        network = partial(model.network, A)
        samples = [np.asarray(model.restored(A, network, c.arrays, table, c.y, jax.random.key(c.settings.seed)))]
    else:
        if A not in c.networks:
            images = jnp.asarray(c.train, jnp.float32)
            c.networks[A] = model.trained(A, batch, images, c.settings.steps)
        network, samples = partial(model.mlp, A.process), []
        for i in range(model.SEEDS):
            params = jax.tree.map(lambda v, i=i: v[i], c.networks[A])
            key = jax.random.key(c.settings.seed + i)
            samples.append(np.asarray(model.restored(A, network, params, table, c.y, key)))
    reference = c.features(c.x0)
    psnr = [20 * np.log10(2 / np.sqrt(np.mean((np.clip(s, -1, 1) - c.x0) ** 2))) for s in samples]
    far = [score(c.features(s), reference)["Fréchet distance"] for s in samples]
    error = float(np.std(psnr, ddof=1) / np.sqrt(len(psnr))) if len(psnr) > 1 else None
    mean = {"PSNR": float(np.mean(psnr)), "Fréchet distance": float(np.mean(far))}
    return {**mean, "PSNR se": error, "evaluations": table.nfe}


FAR = "Fréchet distance"


def above(text: str, a: tuple[str, int], b: tuple[str, int], **bounds: float) -> Claim:
    """PSNR of a less that of b, in dB."""
    return Claim(text, lambda e: e(*a) - e(*b), **bounds)


def nearer(text: str, a: tuple[str, int], b: tuple[str, int]) -> Claim:
    """a's Fréchet distance over b's."""
    return Claim(text, lambda e: e(*a, FAR) / e(*b, FAR), at_most=1.0)


def claims(kind: str) -> list[Claim]:
    ddim = "DDIM from noise" + kind
    shift, fusion, mrs = (name + kind for name in ("ResShift", "Resfusion", "IR-SDE, MRS-2"))
    pairs = ((shift, 4, 0.5), ("RDDM" + kind, 5, 0.5), (fusion, 5, 1.5))
    return [
        *(above(f"{a} at {n}, PSNR above {ddim} at {n}, in dB", (a, n), (ddim, n), at_least=d) for a, n, d in pairs),
        nearer(f"{shift} at 4, Fréchet distance over {ddim}'s", (shift, 4), (ddim, 4)),
        above(f"{shift} at 15, PSNR above its 4 steps, in dB", (shift, 15), (shift, 4), at_most=0.2),
        above(f"{fusion} at 50, PSNR above its 5 steps, in dB", (fusion, 50), (fusion, 5), at_most=0.3),
        nearer(f"{mrs} at 5, Fréchet distance over {ddim}'s at 5", (mrs, 5), (ddim, 5)),
    ]


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    e: Callable[..., Any] = lambda row, n, what="PSNR": cells[row, n].get(what)
    number = lambda v: "not computed" if v is None else f"{v:.3g}"
    far = [
        " | ".join(["| " + row, *(number(e(row, n, "Fréchet distance")) for n in COLUMNS)]) + " |" for row in TABLE.rows
    ]
    y = float(20 * np.log10(2 / np.sqrt(np.mean((np.asarray(context.y) - context.x0) ** 2))))
    return [
        f"The view itself has {y:.2f} dB. {context.settings.images}, n = {context.settings.n}; exact rows: one seed of "
        f"noise; trained rows: means over {model.SEEDS} seeds of an MLP (2 x 192), {context.settings.steps} steps. "
        "PSNR favours a sampler that stops short of a draw of the posterior, towards its mean: read it beside the "
        "Fréchet distance to the originals, below. Published, by the abstracts: ResShift in 15 or 4 steps, Resfusion "
        "in 5, MRS 10 to 20 times as fast, instead of hundreds; on other data, so no number stands beside ours.",
        "",
        "Fréchet distance by NFE:",
        "",
        "| method | " + " | ".join(map(str, COLUMNS)) + " |",
        "| --- |" + " ---: |" * len(COLUMNS),
        *far,
        "",
        "## Claims",
        "",
        *(claim.line(e) for kind in (", trained", "") for claim in claims(kind)),
    ]


TABLE = Table(
    name="restoration",
    summary="Anchored processes on a 2 x 2 averaged, noisy view: PSNR in dB (range 2) of restored images.",
    needs="nothing: digits and networks that it trains (about two minutes); --images for patches of your own",
    rows=(*ROWS, *(f"{name}, trained" for name in TRAINED)),
    columns=COLUMNS,
    row_title="method",
    column_title="NFE",
    metric="PSNR",
    highest=True,
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
)
