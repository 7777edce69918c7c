"""What the flash kernels of all back ends share: options, padding, and the gradient around a forward and a backward."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from . import formulas
from .masks import Mask


class Options(NamedTuple):
    """What is known when the program is built. block: queries and keys of a block."""

    mask: Mask
    scale: float
    block: tuple[int, int]
    interpret: Any


def pad(a: Array, sizes: dict[int, int]) -> Array:
    """a with each axis i, of those given, filled with zeros at the end to sizes[i]."""
    return jnp.pad(a, [(0, sizes.get(i, n) - n) for i, n in enumerate(a.shape)])


def whole(n: int, block: int) -> int:
    """The least multiple of `block` that holds n."""
    return -(-n // block) * block


def cost(
    kernel: Callable[..., Any], pairs: int, d: int, inputs: dict[str, Array], products: int = 1
) -> pl.CostEstimate:
    """pairs: (query, key) pairs in the blocks that are visited, of all samples and heads. products: that one is made
    of."""
    return pl.CostEstimate(
        flops=2 * products * PRODUCTS[kernel.__name__] * pairs * d,
        transcendentals=pairs,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in inputs.values()),
    )


PRODUCTS = {"forward_kernel": 2, "dq_kernel": 3, "dkv_kernel": 4}  # matrix products a block


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attention(
    forward: Callable[..., tuple[Array, Array]],
    backward: Callable[..., tuple[Array, Array, Array]],
    options: Options,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    segment_ids: Any,
) -> Array:
    """Attention by forward(options, q, k, v, bias, segment_ids) -> (out, lse), and its gradient by
    backward(..., lse, delta, dout) -> (dq, dk, dv); that of a bias is XLA's."""
    return forward(options, q, k, v, bias, segment_ids)[0]


def _attention_fwd(forward: Any, backward: Any, options: Options, *args: Any) -> tuple[Array, tuple[Any, ...]]:
    out, lse = forward(options, *args)
    return out, (*args, out, lse)


def _attention_bwd(
    forward: Any, backward: Any, options: Options, saved: tuple[Any, ...], dout: Array
) -> tuple[Any, ...]:
    q, k, v, bias, segment_ids, out, lse = saved
    delta = formulas.row_sums(out, dout)
    gradients = backward(options, q, k, v, bias, segment_ids, lse, delta, dout)
    if bias is None:
        return *gradients, None, None
    dbias = formulas.bias_gradient(q, k, v, bias, segment_ids, lse, delta, dout, options.mask, options.scale)
    return *gradients, dbias, None


attention.defvjp(_attention_fwd, _attention_bwd)
