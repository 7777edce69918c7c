"""A value that no program may hold: an error where the program is lowered, not where it is traced."""

import functools
from typing import Any

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def refuse(message: str, x: Array) -> Array:
    """Of x's shape and dtype, differentiated and mapped like any function. ValueError(message) when it is lowered: the
    branches of `lax.platform_dependent` for other platforms never are."""
    return _refused.bind(x, message=message)


@refuse.defjvp
def _(message: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return refuse(message, *primals), tangents[0]


def _fail(*_: Any, message: str) -> Any:
    raise ValueError(message)


_refused = Primitive("attention_of_another_platform")
_refused.def_abstract_eval(lambda x, message: x)
batching.defvectorized(_refused)
mlir.register_lowering(_refused, _fail)
_refused.def_impl(_fail)  # without jit, a branch runs as it is
