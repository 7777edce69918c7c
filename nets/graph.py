"""GDSS's score networks (Jo et al. 2022, arXiv 2202.02514, section 3.3): graph convolutions and attention on graphs.

They know no process: `net(graph, t)` returns {"x": .., "adj": ..} like the graph, in the sense of eps for instance.
Renumbering the nodes renumbers the outputs; "adj" comes out symmetric with zero diagonal; padding stays 0.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .layers import Linear, xavier


class MLP(nnx.Module):
    """Linear layers with ELU between them."""

    def __init__(self, widths: Sequence[int], rngs: nnx.Rngs):
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List([Linear(a, b, kernel_init=xavier, rngs=rngs) for a, b in pairs])

    def __call__(self, x: Float[Array, "*lead a"]) -> Float[Array, "*lead b"]:
        *inner, last = self.layers
        for layer in inner:
            x = jax.nn.elu(layer(x))
        return last(x)


class GraphConv(nnx.Module):
    """A graph convolution a channel: (D^-1/2 (A_c + I) D^-1/2) (x W_c) + b_c, degrees no less than 1 (DenseGCNConv).

    x (b, n, f), adj (b, c, n, n) of any real entries -> (b, c, n, width).
    """

    def __init__(self, channels: int, features: int, width: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(xavier(rngs.params(), (channels, features, width), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels, 1, width), jnp.float32))

    def __call__(self, x: Float[Array, "b n f"], adj: Float[Array, "b c n n"]) -> Float[Array, "b c n w"]:
        with_loops = adj * (1 - jnp.eye(adj.shape[-1], dtype=adj.dtype)) + jnp.eye(adj.shape[-1], dtype=adj.dtype)
        scale = jax.lax.rsqrt(jnp.maximum(with_loops.sum(-1), 1.0))
        weighted = jnp.einsum("bnf,cfw->bcnw", x, self.kernel[...].astype(x.dtype)) * scale[..., None]
        return scale[..., None] * (with_loops @ weighted) + self.bias[...].astype(x.dtype)


class GraphAttention(nnx.Module):
    """One layer on node features and a stack of adjacency channels: attention maps of graph convolutions on each
    channel, averaged over heads and made symmetric, are mixed with the channels themselves."""

    def __init__(self, inputs: tuple[int, int], outputs: tuple[int, int], width: int, heads: int, rngs: nnx.Rngs):
        (features, channels), (new_features, new_channels) = inputs, outputs
        self.heads, self.width = heads, new_features
        self.query, self.key = (GraphConv(channels, features, width, rngs) for _ in range(2))
        self.value = GraphConv(channels, features, new_features, rngs)
        hidden = 2 * max(channels, new_channels)
        self.edges = MLP((2 * channels, hidden, new_channels), rngs)
        self.nodes = MLP((channels * new_features, hidden, new_features), rngs)

    def __call__(self, x: Array, adj: Array, there: Array) -> tuple[Array, Array]:
        split = lambda v: v.reshape(*v.shape[:-1], self.heads, -1)
        q, k = split(self.query(x, adj)), split(self.key(x, adj))
        maps = jnp.tanh(jnp.einsum("bcnhw,bcmhw->bchnm", q, k) / self.width**0.5).mean(2)
        maps = 0.5 * (maps + jnp.swapaxes(maps, -1, -2))
        mixed = jnp.moveaxis(self.edges(jnp.moveaxis(jnp.concatenate([maps, adj], 1), 1, -1)), -1, 1)
        value = jnp.moveaxis(self.value(x, adj), 1, 2).reshape(*x.shape[:2], -1)
        both = there[:, None, :, None] * there[:, None, None]
        return jnp.tanh(self.nodes(value) * there[..., None]), (mixed + jnp.swapaxes(mixed, -1, -2)) * both


class GraphNet(nnx.Module):
    """Two networks on one noised graph: convolutions for the features, attention on powers of A for the adjacency.

    Args:
        features: of a node.
        width, depth: of the feature network (their nhid and depth).
        layers, channels, last: attention layers, their channels, those of the last (num_layers, c_hid, c_final).
        powers: A, A^2, .., A^powers are the first channels (c_init). heads: of attention.
        time: whether the networks see t, as one more feature and channel. The published ones do not.
        rngs: source of the initial parameters.
    """

    def __init__(
        self, features: int, *, width: int = 32, depth: int = 3, layers: int = 3, channels: int = 8, last: int = 4,
        powers: int = 2, heads: int = 4, time: bool = True, rngs: nnx.Rngs,
    ):  # fmt: skip
        if width % heads or min(layers, depth, powers) < 1:
            raise ValueError(f"GraphNet: {heads=} must divide {width=}; got {layers=}, {depth=}, {powers=}, all >= 1")
        self.features, self.powers, self.time = features, powers, time
        into = features + time
        widths = [into] + [width] * depth
        self.convs = nnx.List([GraphConv(1, a, b, rngs) for a, b in itertools.pairwise(widths)])
        total = sum(widths)
        self.node_head = MLP((total, 2 * total, 2 * total, features), rngs)
        ends = [(into, powers)] + [(width, channels)] * (layers - 1) + [(width, last)]
        pairs = itertools.pairwise(ends)
        self.attention = nnx.List([GraphAttention(a, b, width, heads, rngs) for a, b in pairs])
        total = sum(c for _, c in ends) + time
        self.edge_head = MLP((total, 2 * total, 2 * total, 1), rngs)

    def __call__(self, graph: Mapping[str, Any], t: Any, y: None = None) -> dict[str, Array]:
        """graph {"x": (b, n, features), "adj": (b, n, n)}; t a scalar or (b, 1, 1). Padding: nodes that are all 0."""
        x, adj = graph["x"], graph["adj"]
        if x.shape[-1] != self.features:
            raise ValueError(f"GraphNet has features={self.features}, and x has shape {x.shape}")
        there = (jnp.any(x != 0, -1) | jnp.any(adj != 0, -1)).astype(x.dtype)
        both = there[:, :, None] * there[:, None]
        when = jnp.broadcast_to(jnp.asarray(t, x.dtype).reshape(-1, 1, 1), (len(x), 1, 1))
        if self.time:
            x = jnp.concatenate([x, when * there[..., None]], -1)
        return {"x": self._nodes(x, adj) * there[..., None], "adj": self._edges(x, adj, when, there) * both}

    def _nodes(self, x: Array, adj: Array) -> Array:
        seen = [x]
        for conv in self.convs:
            seen.append(jnp.tanh(conv(seen[-1], adj[:, None])[:, 0]))
        return self.node_head(jnp.concatenate(seen, -1))

    def _edges(self, x: Array, adj: Array, when: Array, there: Array) -> Array:
        stack = [adj]
        for _ in range(self.powers - 1):
            stack.append(stack[-1] @ adj)
        channels = jnp.stack(stack, 1)
        seen = [channels]
        for layer in self.attention:
            x, channels = layer(x, channels, there)
            seen.append(channels)
        if self.time:
            seen.append(jnp.broadcast_to(when[:, None], (len(x), 1, *adj.shape[1:])))
        out = self.edge_head(jnp.moveaxis(jnp.concatenate(seen, 1), 1, -1))[..., 0]
        return out * (1 - jnp.eye(adj.shape[-1], dtype=out.dtype))
