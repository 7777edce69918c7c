"""Jacobians of a field on a batch whose samples do not interact, and traces of them: exact, or Hutchinson's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jdiff import noise

Field = Callable[[Array], Array]


def check_divergence(what: str, divergence: str, number: int) -> None:
    """ValueError for an unknown way, or no probes."""
    if divergence not in ("exact", "hutchinson") or number < 1:
        raise ValueError(
            f"{what}: divergence is {divergence!r}, probes {number}; expected 'exact', or 'hutchinson' with 1 or more"
        )


def probes(key: Array | None, x: Array, divergence: str, number: int) -> Float[Array, "probes ..."]:
    """Vectors e, (probes, batch, ...), for traces as sums of <e, J e>: the basis, or Rademacher ones, scaled."""
    if divergence == "exact" or key is None:
        d = x[0].size
        basis = jnp.eye(d, dtype=x.dtype).reshape(d, 1, *x.shape[1:])
        return jnp.broadcast_to(basis, (d, *x.shape))
    draws = jnp.stack([noise.normal(jax.random.fold_in(key, j), x) for j in range(number)])
    return jnp.where(draws < 0, -1.0, 1.0).astype(x.dtype) / jnp.sqrt(jnp.asarray(number, x.dtype))


def inner(a: Array, b: Array) -> Float[Array, " batch"]:
    """<a, b> of each sample."""
    return jnp.sum((a * b).reshape(a.shape[0], -1), 1)


def vectors(what: str, x: Array, key: Array | None, number: int) -> Float[Array, "probes ..."]:
    """`probes` of a public function: the basis where there is no key."""
    divergence = "exact" if key is None else "hutchinson"
    check_divergence(what, divergence, number)
    return probes(key, x, divergence, number)


def along(f: Field, x: Array, e: Float[Array, "probes ..."]) -> Float[Array, "probes ..."]:
    """J e for each probe: one Jacobian-vector product each."""
    return jax.vmap(lambda e: jax.jvp(f, (x,), (e,))[1])(e)


def divergence(f: Field, x: Array, key: Array | None = None, probes: int = 1) -> Float[Array, " batch"]:
    """div f at each sample, (batch,). x (batch, ...).

    Without a key exact, by d Jacobian-vector products; with one Hutchinson's estimate from `probes` Rademacher vectors
    a sample, whose variance is that of the off-diagonal part alone. Sample i's vectors depend on the key and on i.
    """
    e = vectors("divergence", x, key, probes)
    return jnp.sum(jax.vmap(inner)(e, along(f, x, e)), 0)


def jacobian(f: Field, x: Array) -> Float[Array, "batch d d"]:
    """df_i / dx_j of each sample, (batch, d, d); samples are flattened."""
    columns = along(f, x, vectors("jacobian", x, None, 1))
    return jnp.moveaxis(columns.reshape(len(columns), len(x), -1), 0, 2)


def norm(f: Field, x: Array) -> Float[Array, " batch"]:
    """|f| of each sample, for scale beside the other numbers."""
    return jnp.sqrt(inner(value := f(x), value))
