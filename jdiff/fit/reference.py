"""Reference trajectories: noise and where the model's own probability flow takes it, computed once and kept.

A few-step solver is fitted to land where a fine one lands. Sample i of a seed depends on the seed and on i alone, so a
larger set of the same seed begins with the smaller one, and sets of two seeds have no noise in common.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

import jdiff
from jdiff.denoiser import Denoiser

Source = Denoiser | Callable[[Array], Denoiser]  # or a function of the samples' global indices (labels, guidance)


@dataclass(frozen=True)
class Reference:
    """x (n, ...): noise at t_max; target (n, ...): its image at sigma = 0; index (n,): which sample each is.

    seed        of the noise, None where the caller drew it
    error       the root mean square distance of the last two refinements, an estimate of the target's error
    """

    x: Any
    target: Any
    index: np.ndarray
    seed: int | None = None
    tolerance: float = 0.0
    error: float = 0.0
    steps: int = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | np.ndarray) -> "Reference":
        return replace(self, x=self.x[rows], target=self.target[rows], index=self.index[rows])


def model_at(source: Source, index: Any) -> Denoiser:
    """The denoiser of the samples `index`."""
    return source if isinstance(source, Denoiser) else source(index)


def as_argument(source: Source) -> Any:
    """A source as an argument of a compiled function: what a Denoiser or a Partial holds is then no constant of it."""
    return source if isinstance(source, (Denoiser, Partial)) else Partial(source)


def noise(source: Source, n: int, shape: tuple[int, ...], seed: int, dtype: Any = jnp.float32) -> Array:
    """The noise of samples 0 .. n - 1 of a seed, (n, *shape)."""
    p = model_at(source, jnp.zeros(1, jnp.int32)).process
    return p.prior(jax.random.key(seed), (n, *shape), dtype=dtype)


def reference(
    source: Source,
    n: int,
    shape: tuple[int, ...],
    seed: int,
    *,
    tolerance: float = 1e-3,
    batch: int = 1024,
    steps: int = 32,
    most: int = 1024,
    last: float | None = None,
    dtype: Any = jnp.float32,
    file: str | os.PathLike | None = None,
    key: str = "",
    progress: Callable[[float], None] | None = None,
) -> Reference:
    """n trajectories of samples of `shape`: UniPC-3 on a log-SNR grid, its steps doubled until the targets move by at
    most `tolerance` (root mean square over a batch's trajectories and elements).

    source   a Denoiser, or a function index -> Denoiser where each sample has a condition of its own
    batch    how many run at a time; each batch is refined by itself
    steps    to begin with; FloatingPointError where `most` steps do not reach the tolerance
    last     time of the last evaluation, whose prediction is the target; default process.t_min, the least that a
             network was trained on. It is no part of what is refined: a model that is right below it may go lower
    file     an .npz to keep them in: used again if it holds this key, seed, process, shape, dtype, number and tolerance
    key      names the model (a hash of its parameters: see `fingerprint`)
    progress called as progress(fraction done) after each batch
    """
    p = model_at(source, jnp.arange(min(n, batch))).process
    what = {"key": key, "seed": seed, "process": repr(p), "shape": list(shape), "n": n, "tolerance": tolerance}
    last = p.t_min if last is None else float(last)
    what |= {"dtype": jnp.dtype(dtype).name, "last": last}
    claim = json.dumps(what)
    if file is not None and Path(file).exists():
        with np.load(file) as kept:
            if str(kept["claim"]) == claim:
                x = noise(source, n, shape, seed, dtype)
                return Reference(
                    x, kept["target"], np.arange(n), seed, tolerance, float(kept["error"]), int(kept["steps"])
                )
    x = noise(source, n, shape, seed, dtype)
    targets, error, used = [], 0.0, 0
    for first in range(0, n, batch):
        rows = slice(first, min(first + batch, n))
        target, e, s = _refined(model_at(source, jnp.arange(n)[rows]), x[rows], tolerance, steps, most, last)
        targets.append(target)
        error, used = max(error, e), max(used, s)
        if progress is not None:
            progress(rows.stop / n)
    target = np.concatenate(targets)
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(f"{file}.{os.getpid()}.npz")
        np.savez(temporary, claim=claim, target=target, error=error, steps=used)
        temporary.replace(file)
    return Reference(x, target, np.arange(n), seed, tolerance, error, used)


def _refined(
    denoiser: Denoiser, x: Array, tolerance: float, steps: int, most: int, last: float
) -> tuple[np.ndarray, float, int]:
    p, solver, before, error = denoiser.process, jdiff.solvers.unipc(3), None, np.inf
    while steps <= most:
        times = np.append(jdiff.times.logsnr(p, steps - 1, end=last), 0.0)
        now = np.asarray(jdiff.sample(denoiser, solver(p, times), x), np.float64)
        if before is not None and (error := float(np.sqrt(np.mean((now - before) ** 2)))) <= tolerance:
            return now.astype(x.dtype), error, steps
        before, steps = now, 2 * steps
    raise FloatingPointError(
        f"reference trajectories still move by {error:.3g} (root mean square) at {steps // 2} steps; expected at most "
        f"{tolerance:g}: allow a larger tolerance or more steps, or use float64"
    )


def fingerprint(tree: Any) -> str:
    """A short hash of every array in a pytree (a model's parameters): names the model that a solver was fitted to."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        a = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{a.dtype}{a.shape}".encode())
        digest.update(a.tobytes())
    return digest.hexdigest()[:16]


def hashes(ref: Reference) -> frozenset[bytes]:
    """One short hash of each noise."""
    return frozenset(hashlib.sha256(np.ascontiguousarray(row).tobytes()).digest()[:12] for row in np.asarray(ref.x))


def disjoint(train: Reference, other: Reference, what: str) -> None:
    """ValueError where `other` holds noise that `train` holds too: a gain on it would be no gain."""
    refuse_leak(hashes(train), other, what, f"seed {train.seed}")


def refuse_leak(seen: frozenset[bytes], other: Reference, what: str, whose: str = "those of the fit") -> None:
    """ValueError where noises of `other` are among the hashes `seen`."""
    leaked = len(seen & hashes(other))
    if leaked:
        raise ValueError(
            f"{leaked} of the {len(other)} {what} noises (seed {other.seed}) were trained on ({whose}); expected none: "
            "draw them from another seed"
        )
