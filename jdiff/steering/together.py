"""Several denoisers on one process, evaluated at one point: in one batch where they are one function."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from jdiff import noise
from jdiff.denoiser import Denoiser, _call, cast_like
from jdiff.predict import convert
from jdiff.process import Process


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Together:
    """m denoisers. `calls` are made in order, call j answers for the models places[j]."""

    calls: tuple[Denoiser, ...]
    places: tuple[tuple[int, ...], ...] = field(metadata={"static": True})

    @property
    def process(self) -> Process:
        return self.calls[0].process

    def __len__(self) -> int:
        return sum(map(len, self.places))

    def init(self, x: Array) -> tuple[Any, ...]:
        return tuple(call.init(x) for call in self.calls)

    def apply(self, x: Array, t: Array, carry: Any) -> tuple[Float[Array, "m ..."], Float[Array, "m ..."], Any]:
        """x0 predictions (m, batch, ...), eps predictions (m, batch, ...), carry."""
        x0, eps, after = [x] * len(self), [x] * len(self), []
        for call, places, memory in zip(self.calls, self.places, carry, strict=True):
            points = x if len(places) == 1 else jnp.concatenate([x] * len(places))
            out, memory = call.apply(points, t, memory)
            to = lambda kind, call=call, points=points, out=out: convert(
                self.process, points, t, cast_like(out, points), call.prediction, kind
            )
            for parts, kind in ((x0, "x0"), (eps, "eps")):
                for i, part in zip(places, jnp.split(to(kind), len(places)), strict=True):
                    parts[i] = part
            after.append(memory)
        return jnp.stack(x0), jnp.stack(eps), tuple(after)


def together(models: Sequence[Denoiser], what: str) -> Together:
    """Models that are one lifted function with the same parameters, but for `cond`, become one call of one batch.

    TypeError for what is no Denoiser, ValueError for no model, or models on different processes.
    """
    models = tuple(models)
    if not models:
        raise ValueError(f"{what}: no models; expected one or more Denoisers on one process")
    for i, model in enumerate(models):
        if not isinstance(model, Denoiser):
            raise TypeError(f"{what}: models[{i}] is {type(model).__name__}; expected a jdiff.denoiser(..)")
        if model.process != models[0].process:
            raise ValueError(
                f"{what}: models[{i}] is on {model.process}, models[0] on {models[0].process}; their scores are of "
                "different noised laws: use models of one process"
            )
    groups: list[list[int]] = []
    for i, model in enumerate(models):
        home = next((g for g in groups if _same(models[g[0]], model)), None)
        if home is None:
            groups.append([i])
        else:
            home.append(i)
    return Together(tuple(_stack([models[i] for i in g]) for g in groups), tuple(map(tuple, groups)))


def _parts(model: Denoiser) -> tuple[Any, Any] | None:
    """(function and parameters, condition) of a lifted function with a condition."""
    apply = model.apply
    return apply.args if isinstance(apply, Partial) and apply.func is _call and apply.args[1] is not None else None


def _same(a: Denoiser, b: Denoiser) -> bool:
    if (p := _parts(a)) is None or (q := _parts(b)) is None or a.prediction != b.prediction:
        return False
    (leaves_a, tree_a), (leaves_b, tree_b) = jax.tree.flatten(p[0]), jax.tree.flatten(q[0])
    same = tree_a == tree_b and all(u is v for u, v in zip(leaves_a, leaves_b, strict=True))
    return same and jax.tree.structure(p[1]) == jax.tree.structure(q[1])


def _stack(models: list[Denoiser]) -> Denoiser:
    if len(models) == 1:
        return models[0]
    parts = [p for m in models if (p := _parts(m)) is not None]
    cond = jax.tree.map(lambda *c: jnp.concatenate(list(map(jnp.asarray, c))), *(p[1] for p in parts))
    return replace(models[0], apply=Partial(_call, parts[0][0], cond))


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
