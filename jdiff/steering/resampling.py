"""Resampling: from log-weights to ancestors. Pure functions of a key and of weights (groups, n), float32.

All four schemes are unbiased: particle i has n w_i children on average (w normalised). Residual and stratified
resampling have no more variance than multinomial (Douc, Cappé and Moulines 2005); for systematic, the default, that
is a rule of thumb and no theorem.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer


def ess(log_w: Float[Array, "*groups n"]) -> Float[Array, "*groups"]:
    """Effective sample size (sum w)^2 / sum w^2, between 1 and n."""
    w = jax.nn.softmax(log_w, -1)
    return 1.0 / jnp.sum(w * w, -1)


def log_mean(log_w: Float[Array, "*groups n"]) -> Float[Array, "*groups"]:
    """log of the mean weight."""
    return jax.nn.logsumexp(log_w, -1) - jnp.log(jnp.asarray(log_w.shape[-1], log_w.dtype))


def _invert(w: Array, u: Array) -> Array:
    """The particle whose piece of the cumulated weights each point u in [0, 1) falls into; u (n,) rises."""
    edges = jnp.cumsum(w)
    edges = edges / edges[-1]
    return jnp.minimum(jnp.searchsorted(edges, u, side="right"), len(w) - 1).astype(jnp.int32)


def multinomial(key: Array, w: Float[Array, " n"]) -> Integer[Array, " n"]:
    """n independent draws."""
    return _invert(w, jnp.sort(jax.random.uniform(key, w.shape, w.dtype)))


def stratified(key: Array, w: Float[Array, " n"]) -> Integer[Array, " n"]:
    """One uniform draw in each interval [i/n, (i+1)/n)."""
    n = len(w)
    return _invert(w, (jnp.arange(n, dtype=w.dtype) + jax.random.uniform(key, (n,), w.dtype)) / n)


def systematic(key: Array, w: Float[Array, " n"]) -> Integer[Array, " n"]:
    """One uniform draw for all intervals (Kitagawa 1996): particle i has floor or ceil of n w_i children."""
    n = len(w)
    return _invert(w, (jnp.arange(n, dtype=w.dtype) + jax.random.uniform(key, (), w.dtype)) / n)


def residual(key: Array, w: Float[Array, " n"]) -> Integer[Array, " n"]:
    """floor(n w_i) children for certain, the rest multinomially from what remains (Liu and Chen 1998)."""
    n = len(w)
    certain = jnp.floor(n * w + 1e-6)
    rest = jnp.maximum(n * w - certain, 0.0)
    starts = jnp.cumsum(certain)
    place = jnp.arange(n, dtype=w.dtype)
    sure = jnp.minimum(jnp.searchsorted(starts, place, side="right"), n - 1).astype(jnp.int32)
    shuffle, draw = jax.random.split(key)
    drawn = multinomial(draw, jnp.where(jnp.sum(rest) > 0, rest, w))
    return jnp.where(place < starts[-1], sure, drawn[jnp.argsort(jax.random.uniform(shuffle, (n,)))])


SCHEMES = {"systematic": systematic, "stratified": stratified, "residual": residual, "multinomial": multinomial}


def resample(
    key: Array, log_w: Float[Array, "groups n"], scheme: str = "systematic", share: float = 1.0, shards: int = 1
) -> tuple[Integer[Array, "groups n"], Float[Array, "groups n"]]:
    """(ancestors within each group, log-weights after): slot i gets a copy of particle ancestors[i].

    share    of each group that is resampled, in (0, 1]. Below 1, half of that share is taken among the heaviest and
             half among the lightest; they draw ancestors among themselves and share their total weight evenly, the
             others stay (partial resampling, Bolić et al. 2003): as unbiased, with fewer copies
    shards   devices that a group is spread over. A survivor keeps its slot; its further copies fill the slots of the
             dead, first on its own device, so that only surplus copies travel
    """
    n = log_w.shape[-1]
    m = max(2, min(n, round(share * n)))

    def one(key: Array, log_w: Array) -> tuple[Array, Array]:
        order = jnp.argsort(log_w)
        chosen = jnp.arange(n) if m == n else jnp.concatenate([order[: m // 2], order[n - (m - m // 2) :]])
        sub = log_w[chosen]
        parents = chosen[SCHEMES[scheme](key, jax.nn.softmax(sub))].astype(jnp.int32)
        ancestors = jnp.arange(n, dtype=jnp.int32).at[chosen].set(parents)
        return in_place(ancestors, shards), log_w.at[chosen].set(log_mean(sub))

    keys = jax.random.split(key, log_w.shape[0])
    return jax.vmap(one)(keys, log_w)


def in_place(ancestors: Integer[Array, " n"], shards: int = 1) -> Integer[Array, " n"]:
    """The same ancestors in an order in which survivors keep their slots and copies fill those of the dead.

    Copies are matched with dead slots of their own shard (n / shards neighbours) first, then in order of index.
    """
    n = len(ancestors)
    slot = jnp.arange(n, dtype=jnp.int32)
    parent = jnp.sort(ancestors)
    copy = jnp.concatenate([jnp.zeros(1, bool), parent[1:] == parent[:-1]])  # all but the first of each parent
    marked = jnp.stack([copy, jnp.ones(n, bool).at[ancestors].set(False)])  # copies to place, and the dead
    shard = jnp.stack([parent, slot]) // (n // shards)
    total = jax.vmap(lambda s, m: jnp.zeros(shards, jnp.int32).at[s].add(m))(shard, marked.astype(jnp.int32))
    stay = total.min(0)  # how many copies each shard keeps
    rank = _before(marked) - jnp.take_along_axis(jnp.cumsum(total, 1, dtype=jnp.int32) - total, shard, 1)
    local = marked & (rank < stay[shard])
    first, second = _before(jnp.stack([local, marked & ~local]))
    place = jnp.where(
        marked, jnp.where(local, first, jnp.sum(stay, dtype=jnp.int32) + second), n
    )  # the i-th copy fills the i-th slot
    waiting = jnp.zeros(n + 1, jnp.int32).at[place[0]].set(parent)
    return jnp.where(marked[1], waiting[place[1]], slot)


def _before(marked: Bool[Array, "*more n"]) -> Integer[Array, "*more n"]:
    """How many marked entries stand before each, along the last axis."""
    return jnp.cumsum(marked.astype(jnp.int32), -1, dtype=jnp.int32) - marked.astype(jnp.int32)
