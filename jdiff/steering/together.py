"""Several denoisers on one process, looked at from one point: x0 and eps of each, in one batch where they can be."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from jdiff.analysis.divergence import check_divergence, inner, probes
from jdiff.denoiser import Denoiser
from jdiff.guidance.branches import branches
from jdiff.predict import convert
from jdiff.process import Process

__all__ = ["Together", "check_divergence", "combine", "inner", "probes", "together"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Together:
    """m denoisers as one (init, apply) pair."""

    init: Partial
    evaluate: Partial
    process: Process = field(metadata={"static": True})
    kind: str = field(metadata={"static": True})
    m: int = field(metadata={"static": True})

    def __len__(self) -> int:
        return self.m

    def apply(self, x: Array, t: Array, carry: Any) -> tuple[Float[Array, "m ..."], Float[Array, "m ..."], Any]:
        """x0 predictions (m, batch, ...), eps predictions (m, batch, ...), carry."""
        outs, carry = self.evaluate((x,) * self.m, t, carry)
        to = lambda kind: jnp.stack([convert(self.process, x, t, out, self.kind, kind) for out in outs])
        return to("x0"), to("eps"), carry


def together(models: Sequence[Denoiser], what: str) -> Together:
    """Models that are one lifted function with the same parameters, but for `cond`, become one call of one batch.

    ValueError for no model, what is no Denoiser, or models on different processes.
    """
    models = tuple(models)
    kind = models[0].prediction if models and isinstance(models[0], Denoiser) else "x0"
    init, evaluate = branches(models, kind=kind, name=what)
    return Together(init, evaluate, models[0].process, kind, len(models))


def combine(weights: Array, parts: Array) -> Array:
    """sum_i weights[i] parts[i], as scalars times arrays. weights (m,), or (batch, m): one set a sample."""
    shape = lambda w: w if w.ndim == 0 else w.reshape(-1, *[1] * (parts.ndim - 2))
    terms = [shape(weights[..., i]) * part for i, part in enumerate(parts)]
    return functools.reduce(jnp.add, terms)
