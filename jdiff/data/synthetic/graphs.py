"""Random graphs as `jdiff.graphs` has them: {"x": (n, nodes, features), "adj": (n, nodes, nodes)}, float32, padded.

Two sets in the style of those of GDSS (Jo et al. 2022): communities (its community-small: two groups, 12 to 20 nodes)
and molecules (a few atoms with valencies; QM9 has 1 to 9). Each graph depends on the seed and on its own number alone.
"""

import numpy as np

ATOMS = ("C", "N", "O", "F")
VALENCIES = (4, 3, 2, 1)


def _empty(n: int, nodes: int, features: int) -> dict[str, np.ndarray]:
    return {
        "x": np.zeros((n, nodes, features), np.float32),
        "adj": np.zeros((n, nodes, nodes), np.float32),
    }


def communities(
    n: int, seed: int = 0, *, nodes: tuple[int, int] = (12, 16), inside: float = 0.7, across: float = 0.05
) -> dict[str, np.ndarray]:
    """n graphs of two equal communities: edges inside one with probability `inside`, and max(1, round(across v))
    edges between them, v the number of nodes: even, uniform in [nodes[0], nodes[1]].

    x is the degree, one-hot in nodes[1] classes (GDSS's "deg"). ValueError for odd or too few nodes.
    """
    low, high = nodes
    if not 4 <= low <= high or low % 2 or high % 2 or not 0 <= inside <= 1:
        raise ValueError(
            f"communities: expected even numbers of nodes >= 4 and 0 <= inside <= 1, got {nodes=}, {inside=}"
        )
    out = _empty(n, high, high)
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        v = 2 * int(rng.integers(low // 2, high // 2 + 1))
        half = v // 2
        adj = np.zeros((v, v), bool)
        for block in (slice(0, half), slice(half, v)):
            adj[block, block] = np.triu(rng.random((half, half)) < inside, 1)
        bridges = rng.choice(half * half, max(1, round(across * v)), replace=False)
        adj[bridges // half, half + bridges % half] = True
        adj = adj | adj.T
        out["adj"][i, :v, :v] = adj
        out["x"][i, np.arange(v), adj.sum(1)] = 1.0
    return out


def molecules(n: int, seed: int = 0, *, nodes: tuple[int, int] = (5, 9), ring: float = 0.5) -> dict[str, np.ndarray]:
    """n connected graphs of atoms C, N, O, F (one-hot x) with bond orders 1 to 3 in adj, none above its valency.

    A random tree of atoms with valencies left; with probability `ring` one ring of 4 to 6 atoms is closed; then a few
    bonds are raised where both atoms allow it. Hydrogens fill the rest, and are not shown.
    """
    low, high = nodes
    if not 2 <= low <= high:
        raise ValueError(f"molecules: expected 2 <= nodes[0] <= nodes[1], got {nodes=}")
    out = _empty(n, high, len(ATOMS))
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        v = int(rng.integers(low, high + 1))
        kind = rng.choice(4, v, p=(0.7, 0.12, 0.13, 0.05))
        kind[0] = 0
        free, adj = np.array(VALENCIES)[kind], np.zeros((v, v), np.float32)

        def bond(a: int, b: int, adj: np.ndarray = adj, free: np.ndarray = free) -> None:
            adj[a, b] += 1
            adj[b, a] += 1
            free[[a, b]] -= 1

        for b in range(1, v):
            if b < v - 1 and free[:b].sum() + free[b] == 2:  # the next atom would find no place
                kind[b], free[b] = 0, VALENCIES[0]
            bond(int(rng.choice(np.flatnonzero(free[:b] > 0))), b)
        if rng.random() < ring:
            apart, reach = np.zeros((v, v), int), np.eye(v, dtype=bool)
            for length in range(1, 6):
                new = (reach @ (adj > 0)) & ~reach
                apart[new], reach = length, reach | new
            pairs = np.argwhere(np.triu((apart >= 3) & (free[:, None] > 0) & (free > 0), 1))
            if len(pairs):
                a, b = pairs[rng.integers(len(pairs))]
                bond(int(a), int(b))
        for a, b in rng.permutation(np.argwhere(np.triu(adj, 1) > 0)):
            if free[a] > 0 and free[b] > 0 and adj[a, b] < 3 and rng.random() < 0.15:
                bond(int(a), int(b))
        out["adj"][i, :v, :v] = adj
        out["x"][i, np.arange(v), kind] = 1.0
    return out


def valid(graph: dict[str, np.ndarray]) -> np.ndarray:
    """Which molecules (n,) break no valency: bond orders of each atom sum to at most that of its largest feature."""
    x, adj = np.asarray(graph["x"]), np.asarray(graph["adj"])
    there = (x != 0).any(-1) | (adj != 0).any(-1)
    most = np.where(there, np.array(VALENCIES)[x.argmax(-1)], 0)
    return (adj.sum(-1) <= most).all(-1)


def connected(graph: dict[str, np.ndarray]) -> np.ndarray:
    """Which graphs (n,) hang together, padding aside."""
    adj = np.asarray(graph["adj"]) > 0
    there = (np.asarray(graph["x"]) != 0).any(-1) | adj.any(-1)
    first = there.argmax(1)
    seen = np.eye(adj.shape[1], dtype=bool)[first]
    for _ in range(adj.shape[1]):
        seen = seen | np.einsum("bi,bij->bj", seen, adj)
    return (seen | ~there).all(1)
