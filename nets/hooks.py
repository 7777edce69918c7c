"""Reaching into a net without a copy of its code: every linear layer, token mixer or block can be taken over.

    watched = nets.intercept(net, lambda path, layer, x: layer.product(seen(path, x)))     # a function of the call
    adapted = nets.replace(net, lambda path, layer: LoRA(layer, rank=8))                    # a module of one's own
    routed  = nets.replace(net, lambda path, block: Routed(block), kind=nets.dit.Block)

Both return a new net and leave the old one as it is; nothing is global. Blocks that a net scans over are stacked: their
layers appear once, under a path such as "blocks/mlp_in", with arrays that have the depth in front, and so must those
of a module that takes their place. Inside the loop a function sees the layer of the one block.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from flax import nnx

from .layers import Conv, Linear

N = TypeVar("N", bound=nnx.Module)
Kind = type[nnx.Module] | tuple[type[nnx.Module], ...]
LINEAR: Kind = (Linear, Conv)


def replace(net: N, make: Callable[[str, Any], nnx.Module | None], kind: Kind = LINEAR) -> N:
    """A copy of net in which each submodule m of `kind` at path p is make(p, m), or m itself where that is None.

    p is the path of the module's parameters without their own names ("blocks/attention/qkv"), as `RULES` of the net
    and weights files have it. What make returns is called as m was; inside it nothing more is replaced.
    """

    def put(parent: Any, key: Any, new: nnx.Module) -> None:
        if isinstance(key, int):
            parent[key] = new
        else:
            setattr(parent, key, new)

    def visit(parent: Any, path: str) -> None:
        for key, child in children(parent):
            where = f"{path}{key}"
            if isinstance(child, kind) and (new := make(where, child)) is not None:
                put(parent, key, new)
            else:
                visit(child, f"{where}/")

    new = jax.tree.map(lambda a: a, net)
    visit(new, "")
    return new


def intercept(net: N, fn: Callable[[str, Any, Any], Any], kind: Kind = LINEAR) -> N:
    """A copy of net whose linear layers and convolutions run as fn(path, layer, x).

    layer.product(x) is the plain product, layer.kernel and layer.bias its parameters. The net's parameters, their
    paths, and with them weights files and mesh rules, stay what they were.
    """

    def hooked(path: str, layer: Any) -> nnx.Module:
        layer.hook = (path, fn)  # of the copy
        return layer

    return replace(net, hooked, kind)


def children(module: nnx.Module) -> Iterator[tuple[Any, nnx.Module]]:
    """(name or index, submodule) of a module's own attributes."""
    pairs = enumerate(module) if isinstance(module, nnx.List) else vars(module).items()
    yield from [(key, value) for key, value in pairs if isinstance(value, nnx.Module)]


def modules(module: nnx.Module, kind: Kind, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, submodule) of every submodule of `kind`, in the order in which they were built."""
    for key, child in children(module):
        if isinstance(child, kind):
            yield f"{path}{key}", child
        else:
            yield from modules(child, kind, f"{path}{key}/")
