"""What the flash kernels of all back ends share: their options, padding, and the gradient around them."""

import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from . import formulas, masks
from .masks import Mask


class Options(NamedTuple):
    """What is known when the program is built. block: queries and keys of a block. interpret: the interpreter's
    parameters, or False."""

    mask: Mask
    scale: float
    block: tuple[int, int]
    interpret: Any


def full_mask(q: Array, k: Array, mask: Mask | None) -> Mask:
    return masks.full(q.shape[1], k.shape[1]) if mask is None else mask


def default_scale(q: Array, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def pad(a: Array, sizes: dict[int, int]) -> Array:
    """a with each axis i, of those given, filled with zeros at the end to sizes[i]."""
    return jnp.pad(a, [(0, sizes.get(i, n) - n) for i, n in enumerate(a.shape)])


def whole_blocks(n: int, block: int) -> int:
    """The least multiple of `block` that holds n."""
    return -(-n // block) * block


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(
    backend: ModuleType, options: Options, q: Array, k: Array, v: Array, bias: Array | None, segment_ids: Any
) -> Array:
    """Attention by the `forward` and the `backward` of a back end's module; a bias's gradient is XLA's."""
    return backend.forward(options, q, k, v, bias, segment_ids)[0]


def _forward(backend: ModuleType, options: Options, *args: Any) -> tuple[Array, tuple[Any, ...]]:
    out, lse = backend.forward(options, *args)
    return out, (*args, out, lse)


def _backward(backend: ModuleType, options: Options, saved: tuple[Any, ...], dout: Array) -> tuple[Any, ...]:
    q, k, v, bias, segment_ids, out, lse = saved
    delta = formulas.row_sums(out, dout)
    gradients = backend.backward(options, q, k, v, bias, segment_ids, lse, delta, dout)
    if bias is None:
        return *gradients, None, None
    dbias = formulas.bias_gradient(q, k, v, bias, segment_ids, lse, delta, dout, options.mask, options.scale)
    return *gradients, dbias, None


attention.defvjp(_forward, _backward)
