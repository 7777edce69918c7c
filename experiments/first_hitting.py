"""First-hitting sampling and inaccurate categorical draws (Zheng et al. 2024, arXiv 2409.02908).

    jdiff reproduce first-hitting

Digits of 16 tokens and a time-free masked network trained here: grid sampler, first-hitting sampler, SDAR's blocks, by
evaluations. Then the entropy that the Gumbel trick loses in float32, in closed form and by running it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import discrete, reproduce
from jdiff.experiments import _tokens
from jdiff.experiments._claims import Claim
from jdiff.reproduce import Published, Table

L = _tokens.LENGTH
GRID, FIRST, LEFT = "grid", "first hitting", "SDAR, one block a token, left to right"
STATIC, DYNAMIC = "SDAR, blocks of 4, static", "SDAR, blocks of 4, dynamic 0.85"
CHANGED = "evaluations after a change"
ROWS, NFE = (GRID, FIRST, LEFT, STATIC, DYNAMIC), (4, 8, 16, 64, 128)


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/first-hitting"  # folder of the finished cells and the report
    n: int = 450  # samples a cell and seed
    steps: int = 800  # of training, batches of 64
    seeds: int = 1  # of training and noise
    draws: int = 200  # tokens drawn by each run of the Gumbel table


@dataclass(frozen=True, eq=False)
class Context:
    settings: Settings
    models: list[_tokens.Network]


def prepare(settings: Settings) -> Context:
    networks = [
        _tokens.trained(_tokens.time_free, settings.steps, seed, Path(settings.out) / f"{seed}.npz")
        for seed in range(settings.seeds)
    ]
    return Context(settings, [lambda x, t, f=f: f(x, jnp.zeros((1, 1), jnp.float32)) for f in networks])


def sampler(row: str, network: _tokens.Network, nfe: int) -> tuple[jdiff.Stepper, Any] | None:
    """The Stepper and its rows; None where a sampler has no form with so many evaluations."""
    mask = _tokens.CODES
    if row == GRID:
        return discrete.masked(network, mask), discrete.rows(np.linspace(1, 0, nfe + 1))
    if nfe > L or (row == LEFT and nfe < L):
        return None
    if row == FIRST:
        return discrete.first_hitting(network, mask, L // nfe), jnp.arange(nfe)
    size, threshold = (1 if row == LEFT else 4), (0.85 if row == DYNAMIC else None)
    return discrete.confident(network, mask, size, L // nfe, threshold), jnp.arange(nfe)


def cell(context: Context, row: str, nfe: int) -> dict[str, Any]:
    found, used, changed = [], [], []
    for seed, network in enumerate(context.models):
        made = sampler(row, network, nfe)
        if made is None:
            return {"Fréchet distance": None}
        stepper, rows = made
        start = jnp.full((context.settings.n, L), _tokens.CODES, jnp.int32)
        go = jax.jit(lambda x, key, stepper=stepper, rows=rows: jdiff.run(stepper, rows, x, key))
        state, info = go(start, jax.random.key(200 + seed))
        path = np.concatenate([np.asarray(info.x), np.asarray(state.x)[None]])
        assert (path[-1] != _tokens.CODES).all()
        found.append(_tokens.score(path[-1]))
        used.append(float(np.asarray(info.evaluated).sum(0).mean()))
        changed.append(float((path[1:] != path[:-1]).any(-1).sum(0).mean()))
    return {
        **_tokens.summary(found),
        "evaluations": float(np.mean(used)),
        CHANGED: float(np.mean(changed)),
    }


# ------------------------------------------------------------------------------------------- the Gumbel trick's law
ZIPF = (1.0 / np.arange(1, 1001)) / (1.0 / np.arange(1, 1001)).sum()


def truncated_law(p: np.ndarray, steps: int, delta: float) -> np.ndarray:
    """The law of one token after `steps` steps, [MASK] among the classes, where clocks are multiples of `delta`.

    With i steps left class k has rate p_k / i and [MASK] 1 - 1 / i. The clock -log(U), U a multiple of delta below 1,
    rounds up to the next multiple of delta. Class k wins with probability sum_m P(clock = m delta) P(all others later)
    = expm1(delta) / expm1(delta i / p_k), which is p_k / i for small delta and far less where p_k / i < delta.
    """
    law, left = np.zeros_like(p), 1.0
    for i in range(steps, 1, -1):
        win = np.expm1(delta) / np.expm1(np.minimum(delta * i / p, 700.0))
        law += left * win
        left *= 1.0 - win.sum()
    return law + left * p


def entropy(p: np.ndarray) -> float:
    return float(-(p * np.log(np.where(p > 0, p, 1.0))).sum())


def gumbel_run(p: np.ndarray, steps: int, n: int, exact: bool) -> float:
    """Mean of -log p(token) of n tokens drawn over `steps` steps by jax.random.categorical, or by ours; [MASK] among
    the classes, float32. It is the entropy of p where the draws are exact."""
    process = discrete.absorbing(len(p))
    log_p = jnp.log(jnp.asarray(p, jnp.float32))
    network = lambda x, t: jnp.broadcast_to(log_p, (*x.shape, len(p)))
    stepper = discrete.ancestral(network, process)

    def gumbel(key: Any, state: Any, row: Any) -> tuple[Any, None]:
        posterior = process.posterior(state.x, jnp.exp(network(state.x, row[0])), row[1], row[0])
        return state._replace(x=jax.random.categorical(key, jnp.log(posterior)).astype(jnp.int32)), None

    step = (lambda key, state, row: (stepper.step(key, state, row)[0], None)) if exact else gumbel
    rows, start = discrete.rows(np.linspace(1, 0, steps + 1)), jnp.full((n, 1), len(p), jnp.int32)
    state, _ = jax.jit(lambda key: jdiff.run(jdiff.Stepper(stepper.init, step), rows, start, key))(jax.random.key(0))
    return float(-np.log(p[np.asarray(state.x)]).mean())


CLAIMS = (
    Claim("first hitting at 16 evaluations over the grid at 128", lambda e: e(FIRST, 16) / e(GRID, 128), at_most=1.05),
    Claim("first hitting at 16 evaluations over the grid at 16", lambda e: e(FIRST, 16) / e(GRID, 16), at_most=1.0),
    Claim(
        "the grid's evaluations at 128 over first hitting's",
        lambda e: e(GRID, 128, "evaluations") / e(FIRST, 16, "evaluations"), at_least=6.0,
    ),
    Claim("evaluations after a change, the grid at 128", lambda e: e(GRID, 128, CHANGED), at_most=float(L)),
    Claim("static blocks at 8 evaluations over first hitting at 8", lambda e: e(STATIC, 8) / e(FIRST, 8), at_most=1.0),
    Claim("evaluations of dynamic blocks, of 16", lambda e: e(DYNAMIC, 16, "evaluations"), at_most=12.0),
)  # fmt: skip


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    e: Callable[..., Any] = lambda row, column, what="Fréchet distance": cells[row, column].get(what)
    counts = lambda row, n: " / ".join(reproduce.number(e(row, n, what)) for what in ("evaluations", CHANGED))
    used = [[row, *(counts(row, n) for n in NFE)] for row in ROWS]
    steps = (1, 256, 1024, 4096, 16384)
    law = {bits: [truncated_law(ZIPF, n, 2.0**-bits) for n in steps] for bits in (24, 23)}
    bound = [ZIPF * np.exp(-(2.0**-24) * (n if n > 1 else 0) / ZIPF) for n in steps]
    number = lambda v: f"{v:.2f}"
    gumbel = [
        ["exact", *[number(entropy(ZIPF))] * len(steps)],
        ["PyTorch float32 (clocks of 2^-24)", *(number(entropy(q)) for q in law[24])],
        ["JAX float32 (clocks of 2^-23)", *(number(entropy(q)) for q in law[23])],
        ["no clock below 2^-24, every step 1 / N", *(number(entropy(q / q.sum())) for q in bound)],
    ]
    n = context.settings.draws
    ran = (1, 4096, 16384)
    runs = [
        ["closed form of JAX's", *(number(-(law[23][steps.index(k)] * np.log(ZIPF)).sum()) for k in ran)],
        ["jax.random.categorical", *(number(gumbel_run(ZIPF, k, n, False)) for k in ran)],
        ["ours", *(number(gumbel_run(ZIPF, k, n, True)) for k in ran)],
    ]
    error = float(np.sqrt(((np.log(ZIPF) + entropy(ZIPF)) ** 2 * ZIPF).sum() / n))
    return [
        f"Means over {context.settings.seeds} seed(s) of training and noise; of more than one, with a standard error. "
        "Scores as in vq-diffusion. Evaluations / evaluations that follow a change of tokens (a time-free network need "
        "not repeat the others), a sample:", "", *reproduce.grid(["sampler", *map(str, NFE)], used),
        "", "## Claims", "", *(claim.line(e) for claim in CLAIMS),
        "", "## Categorical draws", "",
        "One token of 1000 classes, p_k ~ 1 / k, sampled in N steps by the Gumbel trick with [MASK] among the classes: "
        "entropy of the law, nats, closed form (`truncated_law`). The last row, a cruder bound, gives 5.19, 4.64 and "
        "3.86 nats.", "", *reproduce.grid(["draws", *map(str, steps)], gumbel),
        "", f"Run in float32, {n} tokens a cell: mean -log p of the tokens, exact {entropy(ZIPF):.2f}, standard error "
        f"{error:.2f}.", "", *reproduce.grid(["draws", *map(str, ran)], runs),
    ]  # fmt: skip


TABLE = Table(
    name="first-hitting",
    summary="Fréchet distance of decoded digits from held-out ones, by network evaluations.",
    needs="nothing: trains a small transformer a seed",
    rows=ROWS,
    columns=NFE,
    row_title="sampler",
    column_title="NFE",
    metric="Fréchet distance",
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
    published=(Published.load("first_hitting.toml"),),
)
