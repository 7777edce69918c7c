"""Standard normal noise in which a sample depends on its key and its own global index alone.

So the same sample comes out whatever the batch it is drawn in and however the batch lies on a mesh:
`normal(key, x)[i]` is drawn from `fold_in(key, index[i])` and from nothing else. (The random bits are the same; the
last digit of the normal made of them may be rounded otherwise where XLA compiles for another shape.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, PyTree


def normal(key: Array, like: PyTree, index: Integer[Array, " batch"] | None = None) -> PyTree:
    """Standard normal noise shaped like `like`, a pytree of arrays (or ShapeDtypeStructs), batch axis first.

    `index` (batch,) holds each sample's global index; the default is its place, 0, 1, ..., in this batch.
    Leaf j of the tree uses `fold_in(key, j)`, so that the leaves are independent of one another.
    """
    leaves, structure = jax.tree.flatten(like)
    return structure.unflatten([_rows(jax.random.fold_in(key, j), leaf, index) for j, leaf in enumerate(leaves)])


def each(key: Array, n: int, index: Integer[Array, " batch"] | None, draw: Callable[[Array], Array]) -> Array:
    """draw(fold_in(key, index[i])) for each of n samples, stacked; `index` as in `normal`."""
    index = jnp.arange(n, dtype=jnp.uint32) if index is None else index.astype(jnp.uint32)
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(index)


def fraction(bits: Array, dtype: Any = jnp.float32) -> Array:
    """uint32 bits -> a number in the open interval (0, 1) made of 23 of them, so that float32 reaches neither end."""
    return ((bits >> 9).astype(dtype) + 0.5) * 2.0**-23


def _rows(key: Array, leaf, index) -> Array:
    return each(key, leaf.shape[0], index, lambda k: jax.random.normal(k, leaf.shape[1:], leaf.dtype))
