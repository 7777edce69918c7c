"""Multiply-accumulates of a net, counted from its trace: nothing is run, and no formula has to be kept up to date."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .autoencoder import Autoencoder
from .conditioning import Text
from .net import Net


def macs(net: Net, blocks: Sequence[Any] | np.ndarray | None = None, *, text: int = 77) -> int:
    """Multiply-accumulates of matrix products and convolutions for one sample, at one time. Of an autoencoder: for one
    image, there and back.

    text: embeddings of a text, of nets that are told one and have no positions for a number of them.
    blocks: the mask that the net is given, None for all. A skipped block costs its shortcut, if that has a product.
    ValueError for a mask of another length.
    """
    if isinstance(net, Autoencoder):
        image = jax.ShapeDtypeStruct((1, *net.shape), jnp.float32)
        both = lambda net, x: net.decode(jnp.split(m := net.moments(x), m.shape[-1] // net.latent_channels, axis=-1)[0])
        return count(jax.make_jaxpr(both)(net, image).jaxpr)[0]
    keep = np.ones(net.num_blocks) if blocks is None else np.asarray(blocks)
    image = jax.ShapeDtypeStruct((1, *net.shape), jnp.float32)
    label: Any = jax.ShapeDtypeStruct((1,), jnp.int32) if net.num_classes else None
    if context := getattr(net, "context", None):
        given: Any = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        label = Text(given(getattr(net, "context_length", text), context), given(getattr(net, "pooled", 1)))
    call = lambda net, x, y, mask: net(x, jnp.zeros((), jnp.float32), y, blocks=mask)
    traced = jax.make_jaxpr(call)(net, image, label, jax.ShapeDtypeStruct(keep.shape, jnp.float32))
    always, branches = count(traced.jaxpr)
    return int(always + sum(run if k else skip for (skip, run), k in zip(branches, keep, strict=True)))


def count(jaxpr: Any) -> tuple[int, list[tuple[int, int]]]:
    """Products outside of conditionals; and of each conditional in turn the counts of its two branches."""
    total, branches = 0, []
    for eqn in jaxpr.eqns:
        name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape if eqn.outvars else ()
        if name == "cond":
            branches.append(tuple(count(branch.jaxpr)[0] for branch in eqn.params["branches"]))
        elif name == "dot_general":
            (left, _), _ = eqn.params["dimension_numbers"]
            total += math.prod(shape) * math.prod(eqn.invars[0].aval.shape[i] for i in left)
        elif name == "conv_general_dilated":
            kernel, (out, *_) = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            total += math.prod(shape) * math.prod(kernel) // kernel[out]
        else:
            inside = [getattr(v, "jaxpr", v) for v in jax.tree.leaves(list(eqn.params.values()))]
            for inner in (v for v in inside if hasattr(v, "eqns")):
                once, conds = count(inner)
                repeats = eqn.params.get("length", 1)  # of a scan
                if name == "shard_map":  # written for one device
                    repeats = math.prod(eqn.params["mesh"].shape[a] for a in eqn.params["newly_manual_axes"])
                total, branches = total + repeats * once, branches + repeats * conds
    return total, branches
