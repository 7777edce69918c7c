"""Graphs as samples: {"x": (batch, n, features) of the nodes, "adj": (batch, n, n)}, symmetric, zero diagonal.

    system = graphs.system(process.vp_linear(0.1, 1.0), process.ve(0.1, 1.0))
    start = graphs.masked(system.prior(key, graphs.shapes(16, 9, 4)), flags)
    graph = graphs.quantised(jdiff.sample(denoiser, table, start, key))

Graphs of fewer than n nodes are padded: a node whose features and edges are all exactly 0 is not there. No process and
no solver of such a system moves it from 0, since the noise keeps away from it; a network must, by `masked`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Shaped

from jdiff import process
from jdiff.process import Process, System

Graph = Mapping[str, Any]  # "x" (batch, n, features), "adj" (batch, n, n)


class Symmetric:
    """The structure of a graph's noise: each edge drawn once and mirrored, no diagonal, nothing on padding."""

    def __call__(self, noise: Graph, like: Graph) -> dict[str, Array]:
        upper = jnp.triu(noise["adj"], 1)
        return masked({"x": noise["x"], "adj": upper + jnp.swapaxes(upper, -1, -2)}, flags(like))

    def check(self, graph: Graph) -> None:
        check(graph)

    def __eq__(self, other: object) -> bool:
        return type(other) is Symmetric

    def __hash__(self) -> int:
        return hash(Symmetric)


def system(x: Process, adj: Process) -> System:
    """Features by the process `x`, adjacency by `adj`, noise as in `Symmetric` (GDSS, arXiv 2202.02514)."""
    return process.system({"x": x, "adj": adj}, Symmetric())


def shapes(batch: int, n: int, features: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a batch of graphs of n nodes, as `system.prior` takes them."""
    return {"x": (batch, n, features), "adj": (batch, n, n)}


def flags(graph: Graph) -> Bool[Array, "batch n"]:
    """Which nodes are there: those with a feature or an edge that is not exactly 0."""
    return jnp.any(graph["x"] != 0, -1) | jnp.any(graph["adj"] != 0, -1)


def masked(graph: Graph, flags: Shaped[Array | np.ndarray, "batch n"]) -> Any:
    """The graph with zeros on the nodes whose flag is 0. ValueError for flags of another shape or other values."""
    shape = graph["adj"].shape[:2]
    if flags.shape != shape:
        raise ValueError(f"node flags have shape {flags.shape} for adjacency {graph['adj'].shape}; expected {shape}")
    if not isinstance(flags, Tracer) and not np.isin(np.asarray(flags), (0, 1)).all():
        raise ValueError(f"node flags are 1 for a node and 0 for padding; got {np.unique(np.asarray(flags))[:6]}")
    f = jnp.asarray(flags).astype(graph["x"].dtype)
    return {"x": graph["x"] * f[..., None], "adj": graph["adj"] * f[..., None] * f[:, None]}


def check(graph: Graph, flags: Shaped[Array | np.ndarray, "batch n"] | None = None) -> None:
    """ValueError for shapes that do not fit, and for an adjacency that is not symmetric or has loops, by its entry.

    With `flags`, for anything on padding too. Values that are being traced are not looked at.
    """
    x, adj = graph["x"], graph["adj"]
    if x.ndim != 3 or adj.shape != (*x.shape[:2], x.shape[1]):
        raise ValueError(
            f"graph: x has shape {x.shape} and adj {adj.shape}; expected (batch, n, features) and (batch, n, n)"
        )
    if any(isinstance(v, Tracer | jax.ShapeDtypeStruct) for v in (x, adj)):
        return
    x, adj = np.asarray(x), np.asarray(adj)
    bad = np.argwhere(adj != np.swapaxes(adj, -1, -2))
    if len(bad):
        b, i, j = map(int, bad[0])
        raise ValueError(
            f"graph: adj is not symmetric: adj[{b}, {i}, {j}] = {adj[b, i, j]:g} but adj[{b}, {j}, {i}] = "
            f"{adj[b, j, i]:g}; mirror one half, graphs.Symmetric() does it to noise"
        )
    loops = np.argwhere(np.diagonal(adj, axis1=-2, axis2=-1) != 0)
    if len(loops):
        b, i = map(int, loops[0])
        raise ValueError(f"graph: adj[{b}, {i}, {i}] = {adj[b, i, i]:g}; a graph here has no loops, its diagonal is 0")
    if flags is not None:
        kept = jax.tree.map(np.asarray, masked(graph, flags))
        for name in ("x", "adj"):
            if (beyond := np.argwhere(kept[name] != np.asarray(graph[name]))).size:
                at = [int(i) for i in beyond[0]]
                raise ValueError(f"graph: {name}{at} is not 0, but the flags say that its node is padding")


def quantised(graph: Graph, levels: int = 1) -> dict[str, Array]:
    """Adjacency rounded to 0, .., levels: an edge above 1/2 for levels = 1; bond orders for levels = 3."""
    adj = jnp.clip(jnp.floor(graph["adj"] + 0.5), 0.0, float(levels))
    return {"x": graph["x"], "adj": adj.astype(graph["adj"].dtype)}


def permuted(graph: Graph, order: Any) -> dict[str, Array]:
    """The graph with its nodes renumbered: node i of the result is node order[i]."""
    return {"x": graph["x"][:, order], "adj": graph["adj"][:, order][:, :, order]}
