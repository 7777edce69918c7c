"""Graph data, statistics and network, point sets: counts by brute force, SciPy's distances, renumbered nodes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from jdiff import graphs, metrics, nets
from jdiff.data.synthetic import graphs as data
from jdiff.data.synthetic import pictures, points
from jdiff.metrics import graphs as statistics

# the nine graphlets of three and four nodes: edges, and each node's orbit in Przulj's numbering
GRAPHLETS = [
    ("01 12", (1, 2, 1)), ("01 12 02", (3, 3, 3)), ("01 12 23", (4, 5, 5, 4)), ("01 02 03", (7, 6, 6, 6)),
    ("01 12 23 03", (8, 8, 8, 8)), ("01 12 23 13", (9, 11, 10, 10)), ("01 12 23 03 02", (13, 12, 13, 12)),
    ("01 12 23 03 02 13", (14, 14, 14, 14)),
]  # fmt: skip


def by_hand(adj):
    """Orbit counts of one graph: every subset, every renumbering, against the graphlets themselves."""
    v = len(adj)
    counts = np.zeros((v, 15), int)
    counts[:, 0] = adj.sum(0)
    for edges, names in GRAPHLETS:
        size = len(names)
        goal = np.zeros((size, size), int)
        for a, b in edges.split():
            goal[int(a), int(b)] = goal[int(b), int(a)] = 1
        for subset in itertools.combinations(range(v), size):
            for order in itertools.permutations(subset):
                if (adj[np.ix_(order, order)] == goal).all():
                    for node, name in zip(order, names, strict=True):
                        counts[node, name] += 1
                    break
    return counts


def test_orbit_counts_against_brute_force():
    rng = np.random.default_rng(0)
    adj = np.stack([np.triu(rng.random((7, 7)) < p, 1) for p in (0.2, 0.4, 0.6, 0.9)]).astype(int)
    adj = adj + adj.swapaxes(1, 2)
    found = statistics.orbits(adj)
    np.testing.assert_array_equal(found, [by_hand(a) for a in adj])
    assert (found.sum((0, 1)) > 0).all()  # each orbit is met


def test_degrees_and_clustering():
    tail = np.zeros((1, 5, 5))  # a triangle with a tail, and a node alone
    for a, b in ((0, 1), (1, 2), (0, 2), (2, 3)):
        tail[0, a, b] = tail[0, b, a] = 1
    np.testing.assert_allclose(statistics.degrees(tail)[0], [0, 0.25, 0.5, 0.25, 0])
    histogram = statistics.clustering(tail, 12)[0]  # coefficients 1, 1, 1/3, 0
    np.testing.assert_allclose(histogram[[0, 4, 11]], [0.25, 0.25, 0.5])
    empty = np.zeros((1, 5, 5))
    assert statistics.degrees(empty)[0, 0] == 1 and statistics.clustering(empty)[0, 0] == 1


def test_mmd_by_hand():
    a, b = (data.communities(6, seed, nodes=(8, 10))["adj"] for seed in (0, 1))
    found = metrics.graph_mmd(a, b)
    pa, pb = statistics.degrees(a), statistics.degrees(b)
    support = np.arange(pa.shape[1])
    kernel = lambda p, q: np.exp(-(scipy.stats.wasserstein_distance(support, support, p, q) ** 2) / 2)
    mean = lambda P, Q: np.mean([kernel(p, q) for p in P for q in Q])
    assert found["degree"].value == pytest.approx(mean(pa, pa) + mean(pb, pb) - 2 * mean(pa, pb), rel=1e-10)
    bins = np.arange(100) / 100
    pa, pb = statistics.clustering(a), statistics.clustering(b)
    kernel = lambda p, q: np.exp(-(scipy.stats.wasserstein_distance(bins, bins, p, q) ** 2) / 0.02)
    assert found["clustering"].value == pytest.approx(mean(pa, pa) + mean(pb, pb) - 2 * mean(pa, pb), rel=1e-9)
    assert all(v.value == pytest.approx(0, abs=1e-12) for v in metrics.graph_mmd(a, a).values())
    assert "n=6 vs 6" in str(found["orbit"])


def test_synthetic_graphs():
    molecules, pairs = data.molecules(300, 3), data.communities(100, 3)
    for g in (molecules, pairs):
        graphs.check(g, np.asarray(graphs.flags(g)))
        assert data.connected(g).mean() > 0.95 and g["adj"].dtype == np.float32
    assert data.connected(molecules).all() and data.valid(molecules).all()
    sizes, bonds = (molecules["x"] != 0).any(-1).sum(1), (molecules["adj"] > 0).sum((1, 2)) / 2
    assert set(sizes) == {5, 6, 7, 8, 9} and set(bonds - sizes) == {-1, 0}  # trees, and one ring
    assert molecules["adj"].max() >= 2 and (molecules["x"].sum((0, 1)) > 0).all()
    v = (pairs["x"] != 0).any(-1).sum(1)
    across = [a[: n // 2, n // 2 : n].sum() for a, n in zip(pairs["adj"], v, strict=True)]
    np.testing.assert_array_equal(across, np.maximum(1, np.round(0.05 * v)))
    inside = (pairs["adj"].sum((1, 2)) / 2 - across).sum() / (v / 2 * (v / 2 - 1)).sum()
    assert abs(inside - 0.7) < 0.03
    np.testing.assert_array_equal(pairs["x"].argmax(-1), pairs["adj"].sum(-1))
    np.testing.assert_array_equal(data.molecules(5, 3)["adj"], molecules["adj"][:5])
    broken = {"x": molecules["x"], "adj": molecules["adj"] + 4}
    assert not data.valid(broken).any()


@pytest.mark.parametrize("time", [True, False])
def test_network_is_equivariant_symmetric_and_zero_on_padding(time):
    net = nets.GraphNet(3, width=8, layers=2, heads=2, powers=3, time=time, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0), 3)
    flags = np.array([[1] * 6, [1, 1, 1, 1, 0, 0]])
    z = {"x": jax.random.normal(keys[0], (2, 6, 3)), "adj": jax.random.normal(keys[1], (2, 6, 6))}
    g = graphs.masked(graphs.Symmetric()(z, z), flags)
    g = jax.tree.map(lambda v: v.astype(jnp.float32), g)
    order = np.array([4, 2, 0, 5, 3, 1])
    call = nnx.jit(lambda net, g: net(g, jnp.float32(0.3)))
    out, moved = call(net, g), call(net, graphs.permuted(g, order))
    expected = graphs.permuted(out, order)
    for name in ("x", "adj"):
        assert np.abs(out[name]).max() > 0.1
        np.testing.assert_allclose(moved[name], expected[name], atol=1e-5)
    graphs.check(jax.tree.map(lambda v: np.round(v, 5), out), flags)
    smaller = call(net, jax.tree.map(lambda v: v[1:, :4], {**g, "adj": g["adj"][:, :, :4]}))
    np.testing.assert_allclose(out["x"][1, :4], smaller["x"][0], atol=1e-5)  # padding changes nothing
    np.testing.assert_allclose(out["adj"][1, :4, :4], smaller["adj"][0], atol=1e-5)
    other = call(net, {**g, "adj": 2 * g["adj"]})
    assert np.abs(other["x"] - out["x"]).max() > 1e-3  # the features see the edges
    other = call(net, {**g, "x": 2 * g["x"]})
    assert np.abs(other["adj"] - out["adj"]).max() > 1e-3  # and the edges the features


def test_bad_input():
    lopsided = np.zeros((1, 4, 4))
    lopsided[0, 1, 2] = 1
    with pytest.raises(ValueError, match=r"not symmetric at \[0, 1, 2\]"):
        metrics.graph_mmd(lopsided, lopsided)
    with pytest.raises(ValueError, match="quantise it first"):
        statistics.orbits(np.full((1, 4, 4), 0.3))
    with pytest.raises(ValueError, match="even numbers of nodes"):
        data.communities(3, nodes=(5, 8))
    with pytest.raises(ValueError, match="heads=4 must divide width=6"):
        nets.GraphNet(3, width=6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"features=3, and x has shape \(1, 4, 2\)"):
        nets.GraphNet(3, rngs=nnx.Rngs(0))({"x": jnp.zeros((1, 4, 2)), "adj": jnp.zeros((1, 4, 4))}, 0.5)


# ---------------------------------------------------------------------------------------------------------- points
@pytest.mark.parametrize("name", points.ALL)
def test_points_lie_on_their_manifold_with_its_normals(name):
    found = points.ALL[name](2000, seed=3)
    x, normals = found.x, found.normals
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, rtol=1e-12)
    if name == "swiss_roll":
        r = np.hypot(x[:, 0], x[:, 2])
        np.testing.assert_allclose(x[:, 0], r * np.cos(r), atol=1e-9)
        assert 1.5 * np.pi <= r.min() and r.max() <= 4.5 * np.pi
    else:
        f = {
            "sphere": lambda x: (x**2).sum(1) - 1,
            "torus": lambda x: (np.hypot(x[:, 0], x[:, 1]) - 2) ** 2 + x[:, 2] ** 2 - 0.49,
            "two_moons": lambda x: np.minimum(*(np.abs(((x - c) ** 2).sum(1) - 1) for c in ([0, 0], [1, 0.5]))),
        }[name]
        np.testing.assert_allclose(f(x), 0, atol=1e-9)
        if name != "two_moons":  # the gradient of the equation points along the normal
            step = 1e-6 * np.eye(3)
            slope = np.stack([f(x + e) - f(x - e) for e in step], 1)
            np.testing.assert_allclose(slope / np.linalg.norm(slope, axis=1, keepdims=True), normals, atol=1e-6)
    # the nearest neighbours lie in the tangent plane, and the plane has the stated dimension
    near = np.argsort(((x[:50, None] - x[None]) ** 2).sum(-1), 1)[:, 1:9]
    along = x[near] - x[:50, None]
    angles = np.abs(np.einsum("nkd,nd->nk", along, normals[:50])) / np.linalg.norm(along, axis=-1)
    assert np.median(angles) < 0.15
    values = np.linalg.svd(along - along.mean(1, keepdims=True), compute_uv=False)
    assert np.median((values > 0.25 * values[:, :1]).sum(1)) == found.dimension
    np.testing.assert_array_equal(points.ALL[name](2000, seed=3).x, x)
    spread = points.ALL[name](2000, seed=3, noise=0.1).x - x
    assert abs(spread.std() - 0.1) < 0.005


def test_points_are_uniform():
    torus = points.torus(20_000, seed=1)
    inside = (np.hypot(torus.x[:, 0], torus.x[:, 1]) < 2).mean()  # share of the area: 1/2 - tube / (pi radius)
    assert abs(inside - (0.5 - 0.7 / (2 * np.pi))) < 4 * 0.5 / np.sqrt(20_000)
    roll = points.swiss_roll(20_000, seed=1).x
    r = np.hypot(roll[:, 0], roll[:, 2])
    length = lambda r: 0.5 * (r * np.sqrt(1 + r * r) + np.arcsinh(r))
    low, high = length(1.5 * np.pi), length(4.5 * np.pi)
    assert scipy.stats.kstest((length(r) - low) / (high - low), "uniform").pvalue > 1e-3
    with pytest.raises(ValueError, match="tube < radius"):
        points.torus(3, tube=3.0)


def test_contact_sheets(tmp_path):
    found = pictures.show(folder=tmp_path)
    assert [f.stem for f in found] == ["molecules", "communities", "points", "video", "audio"]
    assert all(f.stat().st_size > 10_000 for f in found[:3]) and found[4].stat().st_size > 10_000
    import matplotlib.pyplot as plt

    drawn = plt.imread(found[3])[..., 0]
    assert (drawn < 0.02).mean() > 0.5 and (drawn > 0.98).mean() > 0.05 and len(np.unique(drawn)) > 10  # soft shapes
    with pytest.raises(ValueError, match="unknown kind 'vidoe'; expected some of graphs, points, video, audio"):
        pictures.show(["vidoe"], tmp_path)
    two = np.zeros((4, 4))
    two[0, 1] = two[1, 0] = two[2, 3] = two[3, 2] = 1
    at = pictures.layout(two)
    assert np.linalg.norm(at[0] - at[1]) < np.linalg.norm(at[0] - at[2])
