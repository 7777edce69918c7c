"""DRDM: digits deformed by random fields, and brought back to something plausible by a network that undoes deformation.

    jdiff reproduce drdm

Digits are enlarged to 16 x 16. Columns are the step at which the deformation stops, of 16; the recovery takes all 16
steps, as published. Fréchet distances are of the digits classifier's features (8 x 8 means) to held-out digits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jdiff
from jdiff import data, fields, metrics, reproduce
from jdiff.experiments._claims import Claim
from jdiff.experiments._kept import kept
from jdiff.experiments.fast_sampling import score
from jdiff.nets.conditioning import sinusoids
from jdiff.reproduce import Published, Table

SIZE = 16
PROCESS = fields.deformation(std=0.045, sides=(4, 8), steps=16)
RANDOM, RECOVERED, MATCHED, BLURRED = ROWS = (
    "random deformation",
    "DRDM",
    "random, as far as DRDM",
    "DRDM, each step's image interpolated again",
)


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/drdm"  # folder of the finished cells and the report
    n: int = 300  # held-out digits a cell
    steps: int = 500  # of training, batches of 64
    seed: int = 0


class Undo(nnx.Module):
    """A field from an image and its step: convolutions at half the size, enlarged bilinearly, so that it is smooth."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        conv = lambda a, b, **options: nnx.Conv(a, b, (3, 3), rngs=rngs, **options)
        self.stem = nnx.Conv(1, width, (4, 4), strides=(2, 2), rngs=rngs)
        self.time = nnx.Linear(16, width, rngs=rngs)
        self.inner = nnx.List([conv(width, width, kernel_dilation=d) for d in (1, 2, 1, 2)])
        self.out = conv(width, 2, kernel_init=nnx.initializers.zeros)

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        h = self.stem(x) + self.time(sinusoids(t.astype(x.dtype), 16, 100.0))[:, None, None]
        for layer in self.inner:
            h = h + layer(jax.nn.silu(h))
        return jax.image.resize(self.out(jax.nn.silu(h)), (*x.shape[:3], 2), "linear")


class Context(NamedTuple):
    settings: Settings
    images: jax.Array  # held out
    reference: np.ndarray  # features of them
    network: Any


def digits(split: str) -> jax.Array:
    """In [-1, 1], (n, 16, 16, 1)."""
    found = data.load("digits", split=split)
    images = data.from_uint8(found.images, found.max_value)
    return jax.image.resize(jnp.asarray(images), (len(images), SIZE, SIZE, 1), "linear")


def features(images: jax.Array) -> np.ndarray:
    small = np.asarray(images).reshape(-1, 8, 2, 8, 2, 1).mean((2, 4))
    return metrics.embed(metrics.digit_features(), np.clip(small, -1, 1), batch_size=200)


def prepare(settings: Settings) -> Context:
    train, test = digits("train"), digits("test")
    images = test[: settings.n]
    graph, params = nnx.split(Undo(32, nnx.Rngs(settings.seed)))
    network = lambda params, x, t: nnx.merge(graph, params)(x, t)
    loss = fields.recovery_loss(network, PROCESS)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, settings.steps))
    )

    @jax.jit
    def run(params: Any, key: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            batch = train[jax.random.choice(key, len(train), (64,), replace=False)]
            slope = jax.grad(lambda p: loss(p, key, batch).mean())(params)
            change, state = optimiser.update(slope, state)
            return (optax.apply_updates(params, change), state), None

        return jax.lax.scan(step, (params, optimiser.init(params)), jax.random.split(key, settings.steps))[0][0]

    key = jax.random.key(settings.seed)
    params = kept(Path(settings.out) / "undo.npz", params, lambda: run(params, key))
    return Context(settings, images, features(images), lambda x, t: network(params, x, t))


def cell(context: Context, row: str, start: int) -> dict[str, Any]:
    images = context.images
    key = jax.random.key(context.settings.seed + 1)
    phi, _ = PROCESS.draw(key, images.shape, jnp.full(len(images), start, jnp.int32))
    field, x = phi, fields.warp(images, phi)
    if row != RANDOM:
        chain = jax.jit(lambda s: jdiff.run(PROCESS.recovery(context.network), PROCESS.rows(), s))
        state, steps = chain({"image": images, "field": phi})
        field, x = state.field, state.x
        if row == MATCHED:
            rms = lambda u: jnp.sqrt(jnp.mean(u * u))
            field = phi * (rms(field) / rms(phi))
            x = fields.warp(images, field)
        if row == BLURRED:
            x = fields.warp(images, phi)
            for u in steps:
                x = fields.warp(x, u)
    far = jnp.max(jnp.linalg.norm(field, axis=-1), (1, 2)) / SIZE
    return {
        "Fréchet distance": score(features(x), context.reference)["Fréchet distance"],
        "folded": float(fields.folded(field).mean()),
        "largest displacement": float(far.mean()),
        "rms displacement": float(jnp.sqrt(jnp.mean(jnp.sum(field**2, -1)))),
        "total variation": float(fields.roughness(jnp.concatenate([x, x], -1)).mean()),
    }


CLAIMS = tuple(
    claim
    for t in (10, 13, 16)
    for claim in (
        Claim(
            f"deformed to step {t}: Fréchet distance of DRDM over that of random fields as far",
            lambda e, t=t: e(RECOVERED, t) / e(MATCHED, t),
            at_most=0.5,
        ),
        Claim(f"to step {t}: share of negative Jacobians", lambda e, t=t: e(RECOVERED, t, "folded"), at_most=0.01),
        Claim(
            f"to step {t}: largest displacement over the size, mean over images",
            lambda e, t=t: e(RECOVERED, t, "largest displacement"),
            at_least=0.1,
        ),
    )
)


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    e = lambda row, column, what="Fréchet distance": cells[row, column][what]
    kinds = ("folded", "largest displacement", "rms displacement", "total variation")
    rows = [[row, *(reproduce.number(e(row, 16, kind)) for kind in kinds)] for row in ROWS]
    return [
        "Deformed to step 16; displacements: the largest as a share of the size, rms in pixels; total variation of the "
        f"images (the digits themselves: {float(fields.roughness(jnp.tile(context.images, 2)).mean()):.3g}):", "",
        *reproduce.grid(["field", *kinds], rows), "", "## Claims", "", *(claim.line(e) for claim in CLAIMS),
    ]  # fmt: skip


TABLE = Table(
    name="drdm",
    summary="Held-out digits, deformed and recovered.",
    needs="nothing: trains a small network (about a minute)",
    rows=ROWS,
    columns=(10, 13, 16),
    row_title="images",
    column_title="step of the deformation",
    metric="Fréchet distance",
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
    published=(Published.load("drdm.toml"),),
)
