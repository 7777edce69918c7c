"""Statistics of graphs, and how far two sets of graphs are apart by them (You et al. 2018; as GDSS evaluates).

Adjacency (n, nodes, nodes), 0 or 1; nodes without edges are left out, as published. NumPy, float64, exact counts.
"""

import itertools
from collections.abc import Callable

import numpy as np

from .result import Result

PAIRS = tuple(itertools.combinations(range(4), 2))


def _binary(adj: np.ndarray) -> np.ndarray:
    adj = np.asarray(adj)
    if adj.ndim != 3 or adj.shape[1] != adj.shape[2] or not np.isin(adj, (0, 1)).all():
        raise ValueError(f"expected adjacency (n, nodes, nodes) of 0 and 1, got shape {adj.shape}; quantise it first")
    if (bad := np.argwhere(adj != adj.swapaxes(1, 2))).size:
        raise ValueError(f"adjacency is not symmetric at {[int(i) for i in bad[0]]}")
    return adj.astype(np.int64)


def degrees(adj: np.ndarray) -> np.ndarray:
    """The share of a graph's nodes with degree 0, 1, ..: (n, nodes). A graph without edges is one node of degree 0."""
    adj = _binary(adj)
    degree = adj.sum(-1)
    counts = (degree[..., None] == np.arange(adj.shape[1])).sum(1)
    counts[:, 0] = counts[:, 1:].sum(1) == 0
    return counts / counts.sum(1, keepdims=True)


def clustering(adj: np.ndarray, bins: int = 100) -> np.ndarray:
    """The share of a graph's nodes whose local clustering coefficient (closed of all pairs of neighbours; 0 for
    fewer than two) is in each of `bins` bins of [0, 1]: (n, bins)."""
    adj = _binary(adj)
    degree = adj.sum(-1)
    triangles = np.einsum("nij,njk,nki->ni", adj, adj, adj)
    value = triangles / np.maximum(degree * (degree - 1), 1)
    bin_ = np.minimum((value * bins).astype(int), bins - 1)
    counts = ((bin_[..., None] == np.arange(bins)) & (degree > 0)[..., None]).sum(1)
    counts[:, 0] += counts.sum(1) == 0
    return counts / counts.sum(1, keepdims=True)


def _orbit_table() -> np.ndarray:
    """Orbit of each of four nodes for each of the 64 graphs on them, -1 where the graph is not connected."""
    table = np.full((64, 4), -1)
    by_edges = {3: {}, 4: {}, 5: {2: 12, 3: 13}, 6: {3: 14}}
    for code in range(64):
        adj = np.zeros((4, 4), int)
        for bit, (i, j) in enumerate(PAIRS):
            adj[i, j] = adj[j, i] = code >> bit & 1
        degree, edges = adj.sum(0), int(adj.sum()) // 2
        if edges < 3 or degree.min() == 0:
            continue
        names = by_edges[edges]
        if edges == 3:
            names = {1: 6, 3: 7} if degree.max() == 3 else {1: 4, 2: 5}
        if edges == 4:
            names = {1: 9, 2: 10, 3: 11} if degree.max() == 3 else {2: 8}
        table[code] = [names[int(d)] for d in degree]
    return table


_ORBITS = _orbit_table()


def orbits(adj: np.ndarray) -> np.ndarray:
    """How often each node is in each of the 15 orbits of connected induced graphs of 2 to 4 nodes: (n, nodes, 15).

    Pržulj's numbering: 0 edge; 1, 2 path of three (end, middle); 3 triangle; 4, 5 path of four; 6, 7 star (leaf,
    centre); 8 cycle; 9, 10, 11 triangle with a tail (tail, far, joint); 12, 13 cycle with a chord; 14 all joined.
    All sets of four are looked at: for some 20 nodes and a few hundred graphs.
    """
    adj = _binary(adj)
    n, v = adj.shape[:2]
    degree = adj.sum(-1)
    triangles = np.einsum("nij,njk,nki->ni", adj, adj, adj) // 2
    paths = np.einsum("nij,nj->ni", adj, degree - 1) - 2 * triangles
    counts = np.zeros((n, v, 15), np.int64)
    counts[..., 0], counts[..., 1] = degree, paths
    counts[..., 2], counts[..., 3] = degree * (degree - 1) // 2 - triangles, triangles
    fours = np.array(list(itertools.combinations(range(v), 4)), int).reshape(-1, 4)
    codes = sum(adj[:, fours[:, i], fours[:, j]] << bit for bit, (i, j) in enumerate(PAIRS))
    found = _ORBITS[codes]  # (n, sets, 4)
    for orbit in range(4, 15):
        for place in range(4):
            which, sets = np.nonzero(found[..., place] == orbit)
            np.add.at(counts[..., orbit], (which, fours[sets, place]), 1)
    return counts


def emd_kernel(sigma: float, width: float = 1.0) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """exp(-W^2 / (2 sigma^2)), W the earth mover's distance of histograms whose bins are `width` apart."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        distance = width * np.abs(a.cumsum(1)[:, None] - b.cumsum(1)[None]).sum(-1)
        return np.exp(-(distance**2) / (2 * sigma**2))

    return kernel


def gaussian_kernel(sigma: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """exp(-|a - b|^2 / (2 sigma^2))."""
    return lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * sigma**2))


def graph_mmd(samples: np.ndarray, reference: np.ndarray, reference_name: str = "unnamed") -> dict[str, Result]:
    """Squared MMD of "degree", "clustering" and "orbit" statistics between two sets of adjacency matrices.

    Kernels and widths of GDSS's evaluation: earth mover's distance with sigma 1 (degrees) and 0.1 (100 bins of
    clustering), and sigma 30 on a graph's mean orbit counts a node. As published the V-statistic, which counts each
    graph with itself: two sets of n graphs of ONE law are about 2 (1 - E k) / n apart. ValueError for bad adjacency.
    """

    def mean_orbits(adj: np.ndarray) -> np.ndarray:
        there = np.maximum((np.asarray(adj).sum(-1) > 0).sum(-1), 1)
        return orbits(adj).sum(1) / there[:, None]

    statistics = {
        "degree": (degrees, emd_kernel(1.0)),
        "clustering": (clustering, emd_kernel(0.1, 0.01)),
        "orbit": (mean_orbits, gaussian_kernel(30.0)),
    }
    out = {}
    for name, (of, kernel) in statistics.items():
        a, b = of(samples), of(reference)
        value = kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean()
        out[name] = Result(f"MMD^2, {name}", float(value), len(a), len(b), name, reference_name)
    return out
