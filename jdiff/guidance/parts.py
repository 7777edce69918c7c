"""Guidance for free from parts at their own times: a network that knows a part as noise knows it not (UniDiffuser)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import PyTree

from jdiff.denoiser import Denoiser
from jdiff.process import System


def alone(denoiser: Denoiser, noise: Mapping[str, PyTree]) -> Denoiser:
    """Each part as if the others were not there: they are noise, and the network is told t_max of them.

    For a network of a `process.system` that was trained with independent times of its parts (UniDiffuser, Bao et al.
    2023, arXiv 2303.06555). `cfg(denoiser, alone(denoiser, noise), 1 + s)` is its guidance: of the joint law where all
    parts are sampled together, and of p(x | y) where y is given (`schedules.given`), s = 0 being none. An exact network
    gives the marginals here where alpha(t_max) is 0.

    noise: {part: its prior's noise}, batch axis first, or of batch 1. One evaluation a part.
    ValueError for a denoiser that is not of a system, or noise of other parts.
    """
    if not isinstance(p := denoiser.process, System):
        raise ValueError(f"alone: the denoiser is on {p}; expected a process.system, whose parts have their own times")
    names = [name for name, _ in p.parts]
    if sorted(noise) != names:
        raise ValueError(f"alone: noise is given for {sorted(noise)}, and the parts are {names}")
    return Denoiser(
        Partial(_init, denoiser.init), Partial(_Alone(p), denoiser.apply, dict(noise)), p, denoiser.prediction
    )


def _init(init: Partial, x: Mapping[str, PyTree]) -> dict[str, PyTree]:
    return {name: init(x) for name in x}


@dataclass(frozen=True)
class _Alone:
    system: System

    def __call__(self, apply: Partial, noise: Mapping[str, PyTree], x: Mapping[str, PyTree], t: Any, carry: Any) -> Any:
        t = self.system.at(t, x)
        late = jax.tree.map(lambda v: jnp.full_like(v, self.system.t_max), t)
        wide = jax.tree.map(lambda z, v: jnp.broadcast_to(z.astype(v.dtype), v.shape), noise, dict(x))
        out, carries = {}, {}
        for name in x:
            seen, carries[name] = apply({**wide, name: x[name]}, {**late, name: t[name]}, carry[name])
            out[name] = seen[name]
        return out, carries
