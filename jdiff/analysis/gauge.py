"""Conservativity and gauge freedom: what of a field the samples can see (Horvat and Pfister 2024, arXiv 2402.03845).

A learned score s = grad phi + r. The flow's densities depend on s through div(p s) alone, so they are exact if and
only if grad phi = grad log p, whatever r with div(p r) = 0, that is div r + <r, grad log p> = 0: the gauge condition.
Such an r is not seen in samples or log-densities, but in what is read off the field itself (`intrinsic_dim`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .divergence import Field, along, divergence, inner, vectors


def asymmetry(f: Field, x: Array, key: Array | None = None, probes: int = 1) -> Float[Array, " batch"]:
    """|J - J^T|^2 (Frobenius) at each sample, (batch,): 0 if and only if f is a gradient near it.

    Exact without a key; with one Hutchinson's estimate, the mean of |J e - J^T e|^2 over `probes` Rademacher vectors.
    """
    e = vectors("asymmetry", x, key, probes)
    back = jax.vjp(f, x)[1]
    gap = along(f, x, e) - jax.vmap(lambda e: back(e)[0])(e)
    return jnp.sum(jax.vmap(inner)(gap, gap), 0)


def gauge_residual(
    remainder: Field, score: Field, x: Array, key: Array | None = None, probes: int = 1
) -> Float[Array, " batch"]:
    """div r + <r, s> at each sample, (batch,): 0 where r = `remainder` is invisible beside the `score` s of p.

    It is div(p r) / p. Exact without a key; with one unbiased, see `divergence`.
    """
    return divergence(remainder, x, key, probes) + inner(remainder(x), score(x))


def gauge_penalty(
    remainder: Field, score: Field, x: Array, key: Array | None = None, probes: int = 1
) -> Float[Array, ""]:
    """E[(div r + <r, s>)^2] over the batch, to be added to a loss.

    With a key the square is the product of two independent estimates: unbiased, and not always positive.
    """
    if key is None:
        return jnp.mean(gauge_residual(remainder, score, x) ** 2)
    one, two = (gauge_residual(remainder, score, x, k, probes) for k in jax.random.split(key))
    return jnp.mean(one * two)


class Decomposition(NamedTuple):
    """weights (K,) of the potential's features; the conservative part and the remainder on the batch, like x."""

    weights: Array
    conservative: Array
    remainder: Array


def gauge_decomposition(f: Field, features: Callable[[Array], Array], x: Array) -> Decomposition:
    """f = grad phi + r with r orthogonal in L2(p) to all gradients, from samples x of p, (batch, ...).

    features(x) -> (batch, K): functions whose sums phi may be. grad phi is the projection, a least-squares fit of f by
    their gradients over all samples and elements; r then satisfies the gauge condition against every feature,
    E<r, grad phi_k> = 0. ValueError where there are fewer numbers than features.
    """
    value = f(x)
    K = jax.eval_shape(features, x).shape[-1]
    if value.size < K:
        raise ValueError(f"gauge_decomposition: {K} features and {value.size} numbers; expected more samples")
    slopes = jax.vmap(jax.vjp(features, x)[1])(jnp.broadcast_to(jnp.eye(K, dtype=x.dtype)[:, None], (K, len(x), K)))[0]
    weights = jnp.linalg.lstsq(slopes.reshape(K, -1).T, value.reshape(-1))[0]
    part = jnp.tensordot(weights, slopes, 1)
    return Decomposition(weights, part, value - part)


def conservative(potential: Callable[..., Float[Array, " batch"]]) -> Callable[..., PyTree]:
    """The gradient in x of a scalar network potential(params, x, t, *cond) -> (batch,): a network of these arguments.

    `jdiff.denoiser(conservative(potential), process, "score", params=params)`: a score that is one, |J - J^T| = 0.
    """

    def field(params: PyTree, x: Array, t: Array, *cond: PyTree) -> Array:
        return jax.grad(lambda x: jnp.sum(potential(params, x, t, *cond)))(x)

    return field
