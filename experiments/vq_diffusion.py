"""VQ-Diffusion (Gu et al. 2022, arXiv 2111.14822): mask-and-replace against masks alone and replacement alone; strides.

    jdiff reproduce vq-diffusion

Digits of 16 tokens (16 codes of 2 x 2 patches), T = 100 steps in training, fewer in sampling. Each row's network is
trained here by the paper's loss. M2DM's schedule by importance (Kong et al. 2023) runs on a time-free masked network,
whose best posterior does not depend on the schedule.
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
from jdiff.discrete import MaskReplace
from jdiff.experiments import _tokens
from jdiff.experiments._claims import Claim
from jdiff.reproduce import Published, Table

SHARES = {"mask and replace": 0.9, "masks alone": 1.0, "replacement alone": 0.0}
STRIDE = "mask and replace, stride as published"
M2DM = {"M2DM, varied tokens early": 1.0, "M2DM, all tokens alike": 0.0, "M2DM, varied tokens late": -1.0}
ROWS = (*SHARES, STRIDE, *M2DM)
SKIP = {6: 19, 26: 3, 100: 0}  # evaluations -> the official code's skip_step, T = 100
T = 100


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/vq-diffusion"  # folder of the finished cells and the report
    n: int = 450  # samples a cell and seed
    steps: int = 800  # of training, batches of 64
    seeds: int = 1  # of training and noise


@dataclass(frozen=True, eq=False)
class Context:
    settings: Settings
    models: dict[tuple[str, int], _tokens.Network]

    def network(self, name: str, seed: int) -> _tokens.Network:
        if (name, seed) not in self.models:
            make = (
                _tokens.time_free
                if name == "time-free"
                else (lambda apply: discrete.vlb_loss(apply, MaskReplace(_tokens.CODES, SHARES[name]), steps=T))
            )
            self.models[name, seed] = _tokens.trained(
                make, self.settings.steps, seed, Path(self.settings.out) / f"{name}-{seed}.npz"
            )
        return self.models[name, seed]


def importance() -> np.ndarray:
    """F (16,): 0.3 for the place of least entropy in the train half, -0.3 for that of most, linear in between."""
    tokens = _tokens.encode(_tokens.images("train"))
    p = np.stack([np.bincount(column, minlength=_tokens.CODES) / len(tokens) for column in tokens.T])
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(1)
    return 0.3 - 0.6 * (entropy - entropy.min()) / np.ptp(entropy)


def published_rows(evaluations: int) -> np.ndarray:
    """(n, 3): the network's time, and the t and s of the one-step posterior that the official `sample_fast` uses."""
    skip = SKIP[evaluations]
    levels = [*range(T - 1, -1, -1 - skip)]
    levels += [0] if levels[-1] else []
    used = [level - skip if level > skip else level for level in levels]
    return np.array([[level + 1, k + 1, k] for level, k in zip(levels, used, strict=True)], np.float32) / T


def as_published(network: _tokens.Network, process: MaskReplace) -> jdiff.Stepper:
    """Rows of `published_rows`: x_t is taken for the state at a later row's t, and moved by one of the T steps."""
    at = lambda t: discrete.ancestral(lambda x, _: network(x, t), process)
    return jdiff.Stepper(at(None).init, lambda key, state, row: at(row[0]).step(key, state, row[1:]))


def sampler(context: Context, row: str, evaluations: int, seed: int) -> tuple[jdiff.Stepper, Any, MaskReplace]:
    grid = discrete.rows(np.linspace(1, 0, evaluations + 1))
    if row in M2DM:
        process = discrete.spindle(_tokens.CODES, M2DM[row] * importance(), share=1.0)
        free = context.network("time-free", seed)
        return discrete.ancestral(lambda x, t: free(x, 0 * t), process), grid, process
    name = "mask and replace" if row == STRIDE else row
    network, process = context.network(name, seed), MaskReplace(_tokens.CODES, SHARES[name])
    if row == STRIDE:
        return as_published(network, process), jnp.asarray(published_rows(evaluations)), process
    return discrete.ancestral(network, process), grid, process


def cell(context: Context, row: str, evaluations: int) -> dict[str, Any]:
    found, late, used = [], [], 0
    for seed in range(context.settings.seeds):
        stepper, grid, process = sampler(context, row, evaluations, seed)
        key = jax.random.key(100 + seed)
        start = process.prior(jax.random.fold_in(key, 1), (context.settings.n, _tokens.LENGTH))
        state, info = jax.jit(lambda x, key, stepper=stepper, grid=grid: jdiff.run(stepper, grid, x, key))(start, key)
        process.check(state.x)
        used = len(grid)
        found.append(_tokens.score(state.x))
        late.append(float((np.asarray(info.x[-1]) == process.mask).mean()))
    return {
        **_tokens.summary(found),
        "masks before the last step": float(np.mean(late)),
        "evaluations": used,
    }


def _ratio(a: str, b: str, n: int, m: int | None = None) -> Callable[[Any], float]:
    return lambda e: e(a, n) / e(b, n if m is None else m)


CLAIMS = (
    *(
        Claim(f"{n} steps: mask-and-replace over {other}", _ratio("mask and replace", other, n), at_most=1.0)
        for n in (26, 100)
        for other in ("masks alone", "replacement alone")
    ),
    Claim("26 steps over 100, mask-and-replace", _ratio("mask and replace", "mask and replace", 26, 100), at_most=1.1),
    *(
        Claim(f"{n} steps: the exact stride over the published one", _ratio("mask and replace", STRIDE, n), at_most=1.0)
        for n in (6, 26)
    ),
    *(
        Claim(
            f"{n} steps: M2DM, {order} over all alike", _ratio(f"M2DM, {order}", "M2DM, all tokens alike", n), **bound
        )
        for n in (6, 26)
        for order, bound in (("varied tokens early", {"at_most": 1.0}), ("varied tokens late", {"at_least": 1.0}))
    ),
)


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    e: Callable[..., Any] = lambda row, column, what="Fréchet distance": cells[row, column].get(what)
    shares = [
        [row, *(reproduce.number(e(row, n, "masks before the last step")) for n in SKIP)]
        for row in ("mask and replace", STRIDE)
    ]
    return [
        f"Means over {context.settings.seeds} seed(s) of training and noise; of more than one, with a standard error. "
        "Features of the 32-dimensional digits classifier; reference: the held-out half, coded and decoded by the "
        "same 16 codes; `floor` is that of the train half. M2DM's F: 0.3 by entropy of a place in the train half, high "
        "entropy first (early) or last (late) in sampling; its own importance, from text and motion, was not at hand.",
        "", "Share of masks that the last step has to fill:", "",
        *reproduce.grid(["stride", *map(str, SKIP)], shares),
        "", "## Claims", "", *(claim.line(e) for claim in CLAIMS),
    ]  # fmt: skip


TABLE = Table(
    name="vq-diffusion",
    summary="Fréchet distance of decoded digits from held-out ones, by sampling steps.",
    needs="nothing: trains small transformers (four a seed)",
    rows=ROWS,
    columns=tuple(SKIP),
    row_title="process",
    column_title="NFE",
    metric="Fréchet distance",
    settings=Settings,
    prepare=lambda settings: Context(settings, {}),
    cell=cell,
    finish=finish,
    published=(Published.load("vq_diffusion.toml"),),
)
