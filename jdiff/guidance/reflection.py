"""Weak-to-strong reflection: before a step, a step ahead with the strong model and back with the weak one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import PyTree

from jdiff.denoiser import Denoiser

from .branches import check_number, present
from .gradient import predict


def reflection(
    strong: Denoiser, weak: Denoiser, times: Any, *, steps: Sequence[int] | None = None, lam: float = 1.0
) -> Denoiser:
    """W2SD (Bai et al. 2025, arXiv 2502.00473): reflect, then step with the strong model, from (a0, s0) to (a1, s1).

        z  = DDIM_strong(x, t0 -> t1)
        x' = DDIM_weak(z, t1 -> t0), the inversion        moves x by about (strong - weak): the difference that the
        x  = x + lam (x' - x)                             weak-to-strong pair stands for
        then DDIM_strong(x, t0 -> t1)

    times   the grid, with `solvers.ddim` (flow Euler): the move of x is written into the output, as `step_gain` says
    steps   which steps of the grid reflect, counted from 0; None: all but the last. One that ends at sigma = 0 cannot
            come back, and where noise is low reflection narrows modes: leave late steps out
    lam     share of the move

    Pairs: a fine-tuned model and its base, high and low guidance, a good and a bad prompt. Equal models give back x
    but for the error of DDIM's inversion. 3 evaluations a reflected step (2 strong, 1 weak), 1 otherwise. Predicts x0.
    """
    present((strong, weak), "reflection")
    p = strong.process
    t = p.check_times(times)
    n = len(t) - 1
    chosen = range(n - 1) if steps is None else steps
    if any(not 0 <= k < n for k in chosen) or (p.sigma(t[-1]) == 0 and n - 1 in chosen):
        raise ValueError(
            f"reflection: steps is {list(chosen)} of a grid of {n} steps; expected numbers from 0 to {n - 1}, without "
            "the last where the grid ends at sigma = 0"
        )
    check_number(lam, "reflection: lam", -10.0, 10.0)
    a, s = p.alpha(t), p.sigma(t)
    with np.errstate(divide="ignore", invalid="ignore"):
        table = {
            "t0": t[:-1],
            "t1": t[1:],
            "keep": s[1:] / s[:-1],  # x1 = keep x + k D
            "k": a[1:] - a[:-1] * s[1:] / s[:-1],
            "back": np.where(s[1:] > 0, s[:-1] / s[1:], 0.0),  # x = back z + k_back D
            "k_back": np.where(s[1:] > 0, a[:-1] - a[1:] * s[:-1] / s[1:], 0.0),
            "on": np.isin(np.arange(n), list(chosen)).astype(float),
        }
    rows = {name: jnp.asarray(v, jnp.float32) for name, v in table.items()}
    share = jnp.asarray(lam, jnp.float32)
    init = Partial(_both, strong.init, weak.init)
    return Denoiser(init, Partial(_Reflect(), strong, weak, rows, share), p, "x0")


def _both(one: Partial, two: Partial, x: PyTree) -> PyTree:
    return one(x), two(x)


@dataclass(frozen=True)
class _Reflect:
    def __call__(self, strong: Denoiser, weak: Denoiser, rows: Any, lam: Any, x: PyTree, t: Any, carry: Any) -> Any:
        if t.size > 1:
            raise ValueError("reflection takes one time for the whole batch: each step needs the grid's next time")
        row = jax.tree.map(lambda v: v[jnp.argmin(jnp.abs(rows["t0"].astype(t.dtype) - t.reshape(())))], rows)
        mix = lambda p, x, q, D: jax.tree.map(lambda x, D: p.astype(x.dtype) * x + q.astype(x.dtype) * D, x, D)

        def plain(carry: Any) -> Any:
            D, first = predict(strong, x, t, carry[0])
            return D, (first, carry[1])

        def reflect(carry: Any) -> Any:
            D, first = predict(strong, x, t, carry[0])
            z = mix(row["keep"], x, row["k"], D)
            back, second = predict(weak, z, row["t1"].astype(t.dtype), carry[1])
            one = jnp.ones((), lam.dtype)
            moved = mix(one - lam, x, lam, mix(row["back"], z, row["k_back"], back))
            D, first = predict(strong, moved, t, first)
            # keep x + k D' = keep moved + k D
            gain = row["keep"] / row["k"]
            return jax.tree.map(lambda D, m, x: D + gain.astype(x.dtype) * (m - x), D, moved, x), (first, second)

        return jax.lax.cond(row["on"] > 0, reflect, plain, carry)
