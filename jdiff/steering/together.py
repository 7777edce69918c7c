"""Several denoisers on one process, looked at from one point: x0 and eps of each, in one batch where they can be."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from jdiff import noise
from jdiff.denoiser import Denoiser
from jdiff.guidance.branches import branches
from jdiff.predict import convert
from jdiff.process import Process


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


def inner(a: Array, b: Array) -> Float[Array, " batch"]:
    """<a, b> of each sample."""
    return jnp.sum((a * b).reshape(a.shape[0], -1), 1)


def probes(key: Array, x: Array, divergence: str, number: int) -> Float[Array, "probes ..."]:
    """Vectors e, (probes, batch, ...), for traces as sums of <e, J e>: the basis, or Rademacher ones, scaled."""
    if divergence == "exact":
        d = x[0].size
        basis = jnp.eye(d, dtype=x.dtype).reshape(d, 1, *x.shape[1:])
        return jnp.broadcast_to(basis, (d, *x.shape))
    draws = jnp.stack([noise.normal(jax.random.fold_in(key, j), x) for j in range(number)])
    return jnp.where(draws < 0, -1.0, 1.0).astype(x.dtype) / jnp.sqrt(jnp.asarray(number, x.dtype))


def check_divergence(what: str, divergence: str, number: int) -> None:
    if divergence not in ("exact", "hutchinson") or number < 1:
        raise ValueError(
            f"{what}: divergence is {divergence!r}, probes {number}; expected 'exact', or 'hutchinson' with 1 or more"
        )
