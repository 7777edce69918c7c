"""PFGM++: what the number D of augmented dimensions does to quality, and to robustness, with trained networks.

    jdiff reproduce pfgmpp

A small MLP on the 8 x 8 digits (N = 64), the same for every D, EDM's preconditioning, loss and Heun sampler (18 steps,
NFE 35). Then noise is injected at every step, x <- x + a sigma xi, or weights are rounded to 6 or 4 bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import process, reproduce, times
from jdiff.experiments import _mlp
from jdiff.experiments._claims import Claim
from jdiff.reproduce import Published, Table

SEEDS = (0, 1, 2)
DIMENSIONS = {"D = 16": 16.0, "D = 64": 64.0, "D = 128": 128.0, "D = inf": np.inf}
BITS = (6, 4)
ROWS = (*DIMENSIONS, *(f"{name}, {bits} bits" for bits in BITS for name in DIMENSIONS))
NOISES = (0.0, 0.1, 0.2, 0.3, 0.6, 1.0)


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/pfgmpp"  # folder of the finished cells and the report
    n: int = 1000  # samples a model
    steps: int = 2000  # of training, batches of 128
    width: int = 128


def rounded(params: Any, bits: int) -> Any:
    """Weights on 2^bits - 1 even levels, symmetric, one scale a matrix."""
    top = 2 ** (bits - 1) - 1
    return jax.tree.map(lambda w: jnp.round(w / (jnp.abs(w).max() / top)) * (jnp.abs(w).max() / top), params)


def injected(strength: float) -> jdiff.Solver:
    """EDM's deterministic Heun with x <- x + strength sigma xi before every step, xi standard normal."""

    def sampler(g: Any, x: Any, model: Any, noise: Any) -> Any:
        for i in range(g.n):
            s, h = g.s[i], g.s[i + 1] - g.s[i]
            x = x + (strength * s) * noise()
            d = (1.0 / s) * (x - model(x, g.t[i]))
            y = x + h * d
            if i < g.n - 1:
                d = 0.5 * d + (0.5 / g.s[i + 1]) * (y - model(y, g.t[i + 1]))
            x = x + h * d
        return x

    return jdiff.Solver("heun_injected", sampler, 2)


@dataclass(frozen=True, eq=False)
class Context:
    settings: Settings
    digits: jax.Array
    reference: np.ndarray
    models: dict[tuple[str, int], Any]


def prepare(settings: Settings) -> Context:
    return Context(settings, _mlp.digits()[0], _mlp.reference(), {})


def cell(context: Context, row: str, strength: float) -> dict[str, Any]:
    from jdiff.experiments.fast_sampling import score

    name, *rest = row.split(", ")
    bits = int(rest[0].split()[0]) if rest else None
    if bits and strength:
        return {"Fréchet distance": None}
    settings, p, found = context.settings, process.pfgmpp(DIMENSIONS[name]), []
    table = injected(strength)(p, times.karras(p, 18))
    for seed in SEEDS:
        key = jax.random.key(seed)
        if (name, seed) not in context.models:
            start = _mlp.init(jax.random.fold_in(key, 1), settings.width)
            context.models[name, seed] = _mlp.trained(p, context.digits, start, settings.steps, key)
        params = rounded(context.models[name, seed], bits) if bits else context.models[name, seed]
        den = _mlp.denoiser(p, params)
        x = jdiff.sample(den, table, p.prior(jax.random.fold_in(key, 2), (settings.n, 64)), jax.random.fold_in(key, 3))
        features = _mlp.features(np.asarray(x))
        found.append(score(features, context.reference)["Fréchet distance"])
    error = float(np.std(found, ddof=1) / np.sqrt(len(SEEDS)))
    each = {f"seed {s}": v for s, v in zip(SEEDS, found, strict=True)}
    return {"Fréchet distance": float(np.mean(found)), "Fréchet distance se": error, **each}


Growth = tuple[str, str, float]  # its name, the row that it is looked for in, the strength
GROWTHS: tuple[Growth, ...] = (
    *((f"a = {a:g}", "{}", a) for a in NOISES[1:]),
    *((f"{bits} bits", f"{{}}, {bits} bits", 0.0) for bits in BITS),
)


def ratios(e: Any, name: str, growth: Growth) -> np.ndarray:
    """How many times the Fréchet distance grows, seed by seed."""
    _, row, strength = growth
    return np.array([e(row.format(name), strength, f"seed {s}") / e(name, 0.0, f"seed {s}") for s in SEEDS])


def claims() -> list[Claim]:
    against = lambda name, growth: lambda e: float(ratios(e, name, growth).mean() / ratios(e, "D = inf", growth).mean())

    def better(e: Any, name: str) -> float:
        """By how many standard errors of the difference."""
        error = np.hypot(*(e(row, 0.0, "Fréchet distance se") for row in (name, "D = inf")))
        return float((e("D = inf", 0.0) - e(name, 0.0)) / error)

    return [
        *(
            Claim(
                f"quality: {name} better than D = inf, in standard errors", lambda e, n=name: better(e, n), at_least=2.0
            )
            for name in ("D = 64", "D = 128")
        ),
        *(
            Claim(f"robustness: growth at {growth[0]}, {name} over D = inf", against(name, growth), at_most=0.9)
            for growth in (GROWTHS[2], GROWTHS[5])
            for name in ("D = 64", "D = 128")
        ),
    ]


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    e: Any = lambda row, column, what="Fréchet distance": cells[row, column].get(what)
    lines = ["Growth of the Fréchet distance, mean over three seeds and its standard error:", ""]
    lines += ["| | " + " | ".join(name for name, *_ in GROWTHS) + " |", "|---" * (len(GROWTHS) + 1) + "|"]
    for name in DIMENSIONS:
        grown = [ratios(e, name, growth) for growth in GROWTHS]
        shown = [f"{r.mean():.2f} ± {r.std(ddof=1) / np.sqrt(len(r)):.2f}" for r in grown]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    s = context.settings
    note = (
        f"{s.n:,} samples a model; {s.steps:,} steps of 128; an MLP of width {s.width} a seed and D; features "
        "of the 32-dimensional digits classifier against the held-out digits."
    )
    return [*lines, "", note, "", "## Claims", "", *(claim.line(e) for claim in claims())]


TABLE = Table(
    name="pfgmpp",
    summary="PFGM++ on digits: D, and noise injected at every step or coarse weights; Fréchet distance, three seeds.",
    needs="nothing: it trains 12 small MLPs on the embedded digits",
    rows=ROWS,
    columns=NOISES,
    row_title="augmented dimensions",
    column_title="a, noise injected at every step",
    metric="Fréchet distance",
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
    published=(Published.load("pfgmpp_table1.toml"),),
)
