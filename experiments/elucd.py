"""EluCD: an ordinary classifier of clean digits as guidance of an unconditional model, and what each calibration adds.

    jdiff reproduce elucd

The classifier is a small ReLU network trained here on the clean training half; accuracy is told by another one. Claim
of Ma et al. 2023: calibrated (it sees the predicted clean image, its ReLUs are smoothed, its marginal is tempered), it
guides well without having seen noise; naive, on the noised sample, it does not.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jdiff import data, guidance
from jdiff.experiments import _guided
from jdiff.experiments._claims import Claim
from jdiff.experiments._guided import Model, Row, sampled, table
from jdiff.reproduce import Published, grid, number

SCALES = (0.03, 0.1, 0.3, 1.0)


def logits(activation: Any, params: Any, x: jax.Array) -> jax.Array:
    """(n, 8, 8, 1) -> (n, 10)."""
    h = x.reshape(len(x), -1)
    for w, b in params[:-1]:
        h = activation(h @ w + b)
    return h @ params[-1][0] + params[-1][1]


@functools.cache
def classifier(seed: int) -> Any:
    """A ReLU network 64-256-256-10 on the clean training half, moved by up to a pixel; about 96 % on the other half."""
    import optax

    half = data.load("digits", split="train")
    half = {k: jnp.asarray(v) for k, v in half.take(np.arange(len(half))).items()}
    rng, sizes = np.random.default_rng(seed), (64, 256, 256, 10)
    params = [
        (jnp.asarray(rng.normal(size=(a, b)) * np.sqrt(2 / a), jnp.float32), jnp.zeros(b, jnp.float32))
        for a, b in itertools.pairwise(sizes)
    ]
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, 600), weight_decay=0.05)

    @jax.jit
    def update(params: Any, state: Any, key: jax.Array) -> Any:
        move, pick = jax.random.split(key)
        shift = jax.random.randint(move, (2,), -1, 2)
        padded = jnp.pad(half["image"], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1.0)
        rows = jax.random.permutation(pick, len(padded))[:256]
        x = jax.lax.dynamic_slice_in_dim(padded, 1 + shift[0], 8, 1)
        x = jax.lax.dynamic_slice_in_dim(x, 1 + shift[1], 8, 2)[rows]
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(
            logits(jax.nn.relu, p, x), half["label"][rows]
        ).mean()
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(seed), 600):
        params, state = update(params, state, key)
    return params


SMOOTH = guidance.softplus(5.0)
relu = lambda params, x: logits(jax.nn.relu, params, x)
smooth = lambda params, x: logits(SMOOTH, params, x)
noised = lambda params, x, t: logits(jax.nn.relu, params, x)  # blind to t: it never saw noise
smooth_noised = lambda params, x, t: logits(SMOOTH, params, x)


def guided(fn: Any, on: Any = "x0", tau2: float = 0.5, bump: float = 1.0) -> Row:
    def row(m: Model, scale: float) -> tuple[Any, float]:
        weight = guidance.sine(m.null.process, scale, bump)
        fn_, y = Partial(fn, classifier(m.seed)), m.labels
        return sampled(m, guidance.classifier(m.null, fn_, y, weight, on=on, tau2=tau2)), 1.0

    return row


def calibration(m: Model, on_x0: bool, levels: int = 12, bins: int = 10) -> float:
    """Integral calibration error over t: the classifier's expected calibration error on noised test digits."""
    test = data.load("digits", split="test").take(np.arange(500))
    x0, y = jnp.asarray(test["image"]), np.asarray(test["label"])
    p, params, errors = m.null.process, classifier(m.seed), []
    for i, t in enumerate((np.arange(levels) + 0.5) / levels):
        x = p.diffuse(jax.random.key(i), x0, t)
        seen = m.null.with_cond(jnp.full(len(x), _guided.NULL, jnp.int32))(x, t) if on_x0 else x
        probability = np.asarray(jax.nn.softmax((smooth if on_x0 else relu)(params, jnp.asarray(seen, jnp.float32))))
        sure, right = probability.max(1), probability.argmax(1) == y
        where = np.minimum((sure * bins).astype(int), bins - 1)
        errors.append(sum(abs(np.sum((sure - right)[where == b])) for b in range(bins)) / len(y))
    return float(np.mean(errors))


def constant(wrap: Any, cost: float) -> Row:
    """A row without a classifier's scale: sampled once a model."""
    kept: dict[int, Any] = {}

    def row(m: Model, scale: float) -> tuple[Any, float]:
        if m.seed not in kept:
            kept[m.seed] = sampled(m, wrap(m))
        return kept[m.seed], cost

    return row


ROWS: dict[str, Row] = {
    "no guidance": constant(lambda m: m.null, 1.0),
    "naive: x_t, ReLU, tau2 = 1": guided(noised, "x", 1.0, 0.0),
    "EluCD: x0, softplus, tau2 = 0.5": guided(smooth),
    "EluCD on x_t": guided(smooth_noised, "x"),
    "EluCD with ReLU": guided(relu),
    "EluCD with tau2 = 1": guided(smooth, tau2=1.0),
    "EluCD without the sine": guided(smooth, bump=0.0),
    "conditional model": constant(lambda m: m.cond, 1.0),
    "classifier-free, scale 1.5": constant(lambda m: guidance.cfg(m.cond, m.null, 1.5), 2.0),
}
FULL, NAIVE = "EluCD: x0, softplus, tau2 = 0.5", "naive: x_t, ReLU, tau2 = 1"


def frontier(e: Any, row: str, other: str) -> float:
    """Distance of `row` over that of `other`, at equal accuracy (interpolated), mean over the accuracies of both."""
    curves = []
    for name in (row, other):
        accuracy = np.array([e(name, c, "accuracy") for c in SCALES])
        order = np.argsort(accuracy)
        curves.append((accuracy[order], np.array([e(name, c) for c in SCALES])[order]))
    low, high = (max(c[0][0] for c in curves), min(c[0][-1] for c in curves))
    points = np.linspace(low, high, 9) if high > low else np.array([low])
    return float(np.mean([np.interp(a, *curves[0]) / np.interp(a, *curves[1]) for a in points]))


best = lambda e, row: max(e(row, c, "accuracy") for c in SCALES)
BASE = table(
    "elucd",
    "Classifier guidance with an ordinary classifier: EluCD's calibrations one by one, by guidance scale.",
    rows=ROWS,
    columns=SCALES,
    column_title="guidance scale",
    shown=("accuracy", "precision", "recall"),
    claims=(
        Claim("EluCD: accuracy at its best scale", lambda e: best(e, FULL), at_least=0.9),
        Claim("EluCD: accuracy over naive guidance, each at its best scale",
              lambda e: best(e, FULL) - best(e, NAIVE), at_least=0.15),
        Claim("EluCD: its best distance over no guidance's",
              lambda e: min(e(FULL, c) for c in SCALES) / e("no guidance", 1.0), at_most=1.0),
        *(Claim(f"EluCD's distance at equal accuracy, over that of '{row}'",
                lambda e, row=row: frontier(e, FULL, row), at_most=0.95)
          for row in ("EluCD on x_t", "EluCD with ReLU", "EluCD with tau2 = 1", "EluCD without the sine")),
        Claim("EluCD's best distance over classifier-free guidance's",
              lambda e: min(e(FULL, c) for c in SCALES) / e("classifier-free, scale 1.5", 1.0), at_most=1.0),
    ),
    notes=(
        "Three models with their null label, each with a classifier of its own; 250 samples a model, DDIM on a uniform "
        "grid. The scale is that of the score, with EluCD's sine factor 1 + sin(pi t) in its rows but where said.",
    ),
    published=(Published.load("elucd_readme.toml"),),
)  # fmt: skip


def finish(settings: Any, cells: Any, out: Any) -> list[str]:
    each = [
        [calibration(m, on) for m in _guided.models("vp_linear", settings.n, settings.steps)] for on in (False, True)
    ]
    body = [
        [name, f"{number(float(np.mean(v)))} ± {np.std(v, ddof=1) / np.sqrt(len(v)):.1g}"]
        for name, v in zip(("ReLU on x_t", "softplus on the predicted x0"), each, strict=True)
    ]
    ratio = float(np.mean(each[1]) / np.mean(each[0]))
    holds = "holds" if ratio < 1 else "DOES NOT HOLD"
    lines = list(BASE.finish(settings, cells, out))
    table = ["", *grid(["integral calibration error over t", "held-out digits"], body)]
    return [
        *lines,
        f"- integral calibration error on x0 over that on x_t: {ratio:.3g}, expected below 1: {holds}.",
        *table,
    ]


TABLE = dataclasses.replace(BASE, finish=finish)
