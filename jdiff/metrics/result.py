"""What every metric returns, and what every metric does with the arrays it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Num


@dataclass(frozen=True)
class Result:
    """A number that says what it was measured on. A Fréchet distance without its n means nothing: between
    two halves of the same data it is far from 0, and falls as n grows.

    metric: what `value` is. n, n_reference: how many samples and how many of the reference were compared.
    features, reference: their names. error: standard error of `value`, where the estimate has one.
    """

    metric: str
    value: float
    n: int
    n_reference: int
    features: str
    reference: str
    error: float | None = None

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.2g}"
        where = f"n={self.n} vs {self.n_reference}, features {self.features}, reference {self.reference}"
        return f"{self.metric} {self.value:.4g}{error} ({where})"


def checked(a: Num[Array | np.ndarray, "n d"], b: Num[Array | np.ndarray, "m d"], least: int) -> tuple[Array, Array]:
    """Both feature sets as floating-point arrays (float32 at least); ValueError says what is wrong."""
    a, b = (x if x.dtype == jnp.float64 else x.astype(jnp.float32) for x in (jnp.asarray(a), jnp.asarray(b)))
    if min(len(a), len(b)) < least:
        raise ValueError(f"at least {least} samples are needed on either side, got {len(a)} and {len(b)}")
    for name, x in (("samples", a), ("the reference", b)):
        if not jnp.isfinite(x).all():
            raise ValueError(f"the features of {name} are not finite: look for NaN in images or network")
    return a, b


def any_mesh(function: Callable) -> Callable:
    """Lets a function of arrays run on arrays that lie on a mesh with explicit axes, as it does on any other:
    inside, the compiler places the work; the (small) outputs are replicated."""

    @wraps(function)
    def call(*args):
        meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args)]
        explicit = next((mesh for mesh in meshes if mesh.explicit_axes), None)
        if explicit is None:
            return function(*args)
        replicated = NamedSharding(explicit, PartitionSpec())
        return jax.sharding.auto_axes(function, axes=explicit.explicit_axes, out_sharding=replicated)(*args)

    return call
