"""What nets are made of: blocks run in parts, layers taken over, rotary positions, patches of any number of axes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdiff import nets
from jdiff.nets import dit, layers, patches, rope

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TINY = {
    "DiT": {"patch": 2, "width": 16, "depth": 3, "heads": 2},
    "UNet": {"width": 4, "multipliers": (1, 2), "blocks": 1, "head_width": 4},
}
T = jnp.asarray([0.1, 0.7], jnp.float32)


def filled(module, seed=1, scale=0.2):
    """An abstract module with every parameter drawn: a zero initialisation hides most mistakes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, scale, p.shape), p.dtype), module)


@functools.cache
def make(name, size=4, channels=3, **options):
    options = {**TINY.get(name, {}), **options}
    return filled(nnx.eval_shape(lambda: nets.build(name, size, channels, rngs=nnx.Rngs(0), **options)))


def sample(*shape):
    return jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)


def close(a, b, limit=1e-5):
    np.testing.assert_allclose(a, b, rtol=limit, atol=limit * float(np.abs(b).max()))


# --- blocks run in parts
@pytest.mark.parametrize("name", TINY)
def test_blocks_run_in_parts(name):
    net, x = make(name, 8), sample(2, 8, 8, 3)
    cut = [0, 1, net.num_blocks - 1, net.num_blocks]

    @jit
    def both(net, x):
        state, c = net.embed(x, T)
        states = [state]
        for start, stop in itertools.pairwise(cut):
            states.append(net.run(states[-1], c, start, stop))
        assert jax.tree.structure(net.run(state, c, 1, 1)) == jax.tree.structure(state)
        for wrong in ({"start": 2, "stop": 1}, {"stop": net.num_blocks + 1}, {"start": -1}):
            with pytest.raises(ValueError, match=f"no blocks .* it has {net.num_blocks}"):
                net.run(state, c, **wrong)
        return net(x, T), net.project(states[-1], c), net.features(x, T, after=(0, net.num_blocks - 2)), states

    whole, parts, (output, found), states = both(net, x)
    close(parts, whole)
    close(output, whole)
    jax.tree.map(close, found, (states[1], states[2]))
    assert np.abs(np.asarray(states[1][0]) - np.asarray(states[2][0])).max() > 0.01
    with pytest.raises(ValueError, match="expected ascending blocks"):
        net.features(x, T, after=(1, 0))


def test_masks_and_perturbations_count_from_the_first_block():
    net, x = make("DiT"), sample(2, 4, 4, 3)
    mask, u = np.asarray([1.0, 0.0, 1.0]), np.linspace(0, 0.9, 6, dtype=np.float32).reshape(3, 2)

    @jit
    def both(net, x):
        state, c = net.embed(x, T)
        half = net.run(state, c, 0, 2, blocks=mask, perturb=u)
        return net(x, T, blocks=mask, perturb=u), net.project(net.run(half, c, 2, blocks=mask, perturb=u), c)

    whole, parts = both(net, x)
    close(parts, whole)


# --- layers taken over
PATHS = {
    "DiT": {
        "conditioning/time_in", "conditioning/time_out", "patches", "blocks/modulation", "blocks/attention/qkv",
        "blocks/attention/out", "blocks/mlp_in", "blocks/mlp_out", "modulation", "out",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_interception_sees_every_linear_layer(name):
    """Every kernel belongs to a layer that is seen; doubling each product is doubling each kernel and bias."""
    net, x, seen = make(name, **({"multipliers": (1,)} if name == "UNet" else {})), sample(2, 4, 4, 3), []

    def fn(path, layer, x):
        seen.append((path, layer.kernel.shape))
        return 2 * layer.product(x)

    watched = nets.intercept(net, fn)
    kernels = {p[:-1] for p, _ in nnx.to_flat_state(nnx.state(net)) if p[-1] == "kernel"}
    double = nnx.from_flat_state(
        [
            (p, 2 * v if p[-1] in ("kernel", "bias") and p[:-1] in kernels else v)
            for p, v in nnx.to_flat_state(nnx.state(net))
        ]
    )
    got, want, plain = jit(lambda a, b, c: (a(x, T), b(x, T), c(x, T)))(
        watched, nnx.merge(nnx.graphdef(net), double), net
    )
    close(got, want)
    assert np.abs(got - plain).max() > 0.05 * np.abs(plain).max()
    assert (net.out if name == "DiT" else net.conv_out).hook is None  # the old one is as it was
    assert {path for path, _ in seen} == {"/".join(map(str, p)) for p in kernels} >= PATHS.get(name, set())
    assert {p for p, _ in nnx.to_flat_state(nnx.state(watched))} == {p for p, _ in nnx.to_flat_state(nnx.state(net))}
    if name == "DiT":
        assert dict(seen)["blocks/mlp_in"] == (16, 64)  # inside the scan: the layer of one block


class LowRank(nnx.Module):
    """kernel + a b, beside a stacked layer: what an adapter does."""

    def __init__(self, layer, a, b):
        self.layer, self.a, self.b = layer, nnx.Param(a), nnx.Param(b)

    def __call__(self, x):
        return self.layer(x) + x @ self.a[...] @ self.b[...]


def test_a_module_in_place_of_a_layer():
    net, x = make("DiT"), sample(2, 4, 4, 3)
    a, b = sample(3, 16, 2) / 4, sample(3, 2, 64) / 4
    adapted = nets.replace(net, lambda path, layer: LowRank(layer, a, b) if path == "blocks/mlp_in" else None)
    merged = jax.tree.map(lambda p: p, net)
    merged.blocks.mlp_in.kernel[...] = merged.blocks.mlp_in.kernel[...] + a @ b
    got, want, plain = jit(lambda *each: [n(x, T) for n in each])(adapted, merged, net)
    close(got, want)
    assert np.abs(got - plain).max() > 1e-2
    assert isinstance(net.blocks.mlp_in, layers.Linear)  # the old one is as it was


class Half(nnx.Module):
    """Half of a block's step: what routing does to a block."""

    def __init__(self, block):
        self.block = block

    def __call__(self, x, c, *args, **options):
        return 0.5 * x + 0.5 * self.block(x, c, *args, **options)


def test_a_module_in_place_of_a_block_and_of_a_token_mixer():
    net, x = make("DiT"), sample(2, 4, 4, 3)
    routed = nets.replace(net, lambda path, block: Half(block), kind=dit.Block)
    blind = nets.replace(net, lambda path, mixer: layers.Linear(16, 16, rngs=nnx.Rngs(0)), kind=layers.SelfAttention)
    assert [p for p, _ in nnx.to_flat_state(nnx.state(blind)) if p[1] == "attention"] == [
        ("blocks", "attention", "bias"), ("blocks", "attention", "kernel")
    ]  # fmt: skip

    @jit
    def run(routed, net):
        state, c = net.embed(x, T)
        for i in range(3):
            state = 0.5 * state + 0.5 * net.run(state, c, i, i + 1)
        return routed(x, T), net.project(state, c)

    close(*run(routed, net))


# --- variants of DiT
def test_sit_is_dit_with_half_of_the_channels_dropped():
    net = make("SiT", patch=2, width=16, depth=2, heads=2, num_classes=5)
    same = {"patch": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 5, "time_scale": 1.0}
    twin = make("DiT", learn_sigma=True, **same)
    x, y = sample(2, 4, 4, 3), jnp.asarray([1, 5])
    got, want, both = jit(lambda a, b: (a(x, T, y), b(x, T, y), b.project(*b.embed(x, T, y))))(net, twin)
    np.testing.assert_array_equal(got, want)
    assert (got.shape, both.shape) == ((2, 4, 4, 3), (2, 4, 4, 6))
    assert net.config["name"] == "SiT" and nnx.eval_shape(lambda: nets.build(**net.config, rngs=nnx.Rngs(0))).grid == (
        2,
        2,
    )


@pytest.mark.parametrize("size", [(6,), (4, 6), (2, 4, 6)])
def test_dit_of_any_number_of_axes(size):
    """Shifting the sample by whole patches around the axes shifts the output where positions are left out of it."""
    options = {"patch": (2,) * len(size), "width": 24, "depth": 1, "heads": 2, "norm": "rms", "qk_norm": True}
    net = make("DiT", size, sandwich=True, positions="rope", **options)
    x = sample(2, *size, 3)
    assert net.grid == tuple(n // 2 for n in size) and net.shape == (*size, 3)
    none = rope.Rotations(*(jnp.full((int(np.prod(net.grid)), 6), v, jnp.float32) for v in (1.0, 0.0)))

    @jit
    def run(x, turn):
        state, c = net.embed(x, T)
        return net.project(net.run(state, c, rotations=turn), c)

    close(run(jnp.roll(x, 2, axis=-2), none), jnp.roll(run(x, none), 2, axis=-2), 1e-4)
    turned = run(x, net.rotations())
    assert np.abs(turned - run(x, none)).max() > 1e-4
    frames = T.reshape(2, *(1,) * (len(size) + 1)) * jnp.ones((1, size[0], *(1,) * len(size)), jnp.float32)
    assert jax.eval_shape(net, x, frames).shape == x.shape  # a time a frame


def test_variants_add_what_they_say():
    count = lambda **o: sum(p.size for p in jax.tree.leaves(make("DiT", **o)))
    assert count(qk_norm=True) - count() == 3 * 2 * 8  # two scales of a head's width a block
    assert count(sandwich=True) - count() == 3 * 2 * 16
    assert count(learn_sigma=True) - count() == 12 * 17
    assert count(positions="rope", norm="rms") == count()


# --- rotary positions
def test_logits_depend_on_differences_of_positions():
    grid, d = (3, 4, 5), 22  # 11 pairs: 3, 4 and 4 of them an axis
    q, k = sample(1, 1, 2, d), sample(1, 1, 2, d)[..., ::-1]

    turn = jit(lambda v, table: rope.rotate(jnp.broadcast_to(v, (1, 60, 2, d)), table))

    def logits(offsets):
        a, b = (np.asarray(turn(v, rope.rotations(grid, d, offsets=offsets))) for v in (q, k))
        np.testing.assert_allclose(np.square(a).sum(-1), np.square(q).sum(-1).repeat(60, 1), rtol=1e-5)
        return np.einsum("bnhd,bmhd->bhnm", a, b)[0, 0].reshape(*grid, *grid)

    at = logits(None)
    close(at[1:, 2:, 1:, 1:, 2:, 1:], at[:-1, :-2, :-1, :-1, :-2, :-1], 1e-4)
    close(logits((7.0, 0.5, 100.0)), at, 1e-3)
    differences = np.unique(np.round(np.asarray(at), 4)).size
    assert differences > 300  # of 5 x 7 x 9 that there are


def test_rotations_are_roformers():
    """2104.09864, equation 34: two channels as a complex number, times e^(i place theta); offsets are places."""
    x, d = sample(1, 12, 2, 8), 8
    turned = jit(rope.rotate)(x, rope.rotations((12,), d))
    numbers = np.asarray(x, np.float64)[..., 0::2] + 1j * np.asarray(x, np.float64)[..., 1::2]
    angle = np.arange(12)[:, None] * 10_000.0 ** -(2 * np.arange(4) / d)
    want = numbers * np.exp(1j * angle)[:, None]
    close(turned[..., 0::2], want.real)
    close(turned[..., 1::2], want.imag)
    part, whole = rope.rotations((3, 4), d, offsets=(2, 5)), rope.rotations((5, 9), d)
    jax.tree.map(lambda a, b: close(a, b.reshape(5, 9, 4)[2:, 5:].reshape(12, 4)), part, whole)


def test_frequencies_of_longer_sequences():
    d = np.arange(0, 64, 2)
    plain = rope.frequencies(64)
    np.testing.assert_allclose(plain, 10_000.0 ** -(d / 64))
    np.testing.assert_array_equal(rope.frequencies(64, scale=1.0, target=20), plain)
    np.testing.assert_allclose(rope.frequencies(64, scale=4.0), plain / 4, rtol=1e-6)  # interpolation
    ntk = rope.frequencies(64, scale=4.0, target=62)
    np.testing.assert_allclose(ntk, (10_000.0 * 4 ** (64 / 62)) ** -(d / 64), rtol=1e-6)  # NTK: another base
    np.testing.assert_allclose(ntk[-1], plain[-1] / 4, rtol=1e-6)
    aware = np.asarray(rope.frequencies(64, scale=4.0, target=20))
    np.testing.assert_allclose(aware[10], plain[10] / 4, rtol=1e-6)  # d = 20 is the first that is interpolated
    np.testing.assert_allclose(aware[10:], plain[10:] / 4, rtol=1e-6)
    assert np.all(aware[1:10] > plain[1:10] / 4) and aware[0] == 1
    near_noise = rope.frequencies(64, scale=jnp.float32(4.0), target=jnp.float32(63 * 1e-6))  # time-aware, at noise
    np.testing.assert_allclose(near_noise[1:], plain[1:] / 4, rtol=1e-5)
    with pytest.raises(ValueError, match="4 channels a head serve no 3 axes"):
        rope.rotations((2, 2, 2), 4)


# --- patches
@pytest.mark.parametrize("size", [(6,), (4, 6), (2, 4, 6)])
def test_patches_of_any_number_of_axes(size):
    patch = (2, 4, 3)[-len(size) :] if len(size) < 3 else (1, 2, 3)
    x = sample(2, *size, 3)
    tokens = patches.patchify(x, patch)
    grid = tuple(n // p for n, p in zip(size, patch, strict=True))
    np.testing.assert_array_equal(patches.unpatchify(tokens, patch, grid), x)
    for n, place in enumerate(np.ndindex(*grid)):
        cut = tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, patch, strict=True))
        np.testing.assert_array_equal(tokens[:, n], x[(slice(None), *cut)].reshape(2, -1))


def test_positions_tell_every_place_apart():
    table = patches.positions((2, 3, 4), 24)
    assert table.shape == (24, 24)
    distance = np.abs(table[:, None] - table[None]).max(-1) + np.eye(24)
    assert distance.min() > 0.05
    np.testing.assert_array_equal(table[:4, 8:], np.broadcast_to(table[0, 8:], (4, 16)))  # the last axis comes first


def test_positions_between_those_of_training():
    table = patches.positions((2, 3), 8)
    np.testing.assert_allclose(patches.positions((4, 6), 8, scale=2).reshape(4, 6, 8)[::2, ::2].reshape(6, 8), table)
    moved = patches.positions((4, 6), 8, offsets=(-1, -2.0))
    np.testing.assert_allclose(moved.reshape(4, 6, 8)[1:3, 2:5].reshape(6, 8), table, atol=1e-15)
    each = patches.positions((4, 3), 8, scale=(2.0, 1.0)).reshape(4, 3, 8)[::2].reshape(6, 8)
    np.testing.assert_allclose(each, table)
    x = sample(2, 8, 8, 3)
    plain, scaled = (make("DiT", 8, rope_scale=s) for s in (1.0, 2.0))
    a, b = (jit(lambda net, x: net.embed(x, T)[0])(net, x) for net in (plain, scaled))
    close(
        b - a, jnp.broadcast_to(patches.positions((4, 4), 16, scale=2) - patches.positions((4, 4), 16), a.shape), 1e-4
    )


def cubic(n, m):
    """Weights (m, n) of bicubic interpolation (Keys, a = -1/2), stretched where the axis shrinks; rows sum to one."""
    scale, weights = max(n / m, 1.0), np.zeros((m, n))
    for i, j in np.ndindex(m, n):
        d = abs((i + 0.5) * n / m - 0.5 - j) / scale
        weights[i, j] = 1.5 * d**3 - 2.5 * d**2 + 1 if d <= 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("grid", [(6, 6), (3, 7), (2, 2)])
def test_learned_positions_of_another_grid(grid):
    table = np.random.default_rng(0).normal(size=(2 + 16, 5)).astype(np.float32)
    got = patches.resize_positions(table, grid, 2)
    want = np.einsum("ia,jb,abd->ijd", cubic(4, grid[0]), cubic(4, grid[1]), table[2:].reshape(4, 4, 5).astype(float))
    np.testing.assert_array_equal(got[:2], table[:2])
    np.testing.assert_allclose(got[2:], want.reshape(-1, 5), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(patches.resize_positions(table, (4, 4), 2), table, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="18 positions are not 1 and those of a square"):
        patches.resize_positions(table, grid, 1)


# --- points
def test_voxels_of_points_and_back():
    """Means by a loop; trilinear interpolation by a loop over corners, exact for an affine function of the place."""
    rng = np.random.default_rng(0)
    places, features = rng.uniform(0, 3, (2, 40, 3)), rng.normal(size=(2, 40, 5))
    places[0, :3] = [[0, 0, 0], [3, 3, 3], [3, 0, 1.25]]
    want, back = np.zeros((2, 4, 4, 4, 5)), np.zeros((2, 40, 5))
    grid = rng.normal(size=(2, 4, 4, 4, 5))
    for b in range(2):
        inside = {}
        for place, feature in zip(places[b], features[b], strict=True):
            inside.setdefault(tuple(np.round(place).astype(int)), []).append(feature)
        for at, found in inside.items():
            want[(b, *at)] = np.mean(found, axis=0)
        for n, place in enumerate(places[b]):
            for corner in itertools.product(range(4), repeat=3):
                weight = np.prod(np.maximum(1 - np.abs(place - corner), 0))
                back[b, n] += weight * grid[(b, *corner)]
    assert max(map(len, inside.values())) > 1 and not want.all()
    np.testing.assert_allclose(patches.voxelise(jnp.asarray(places), jnp.asarray(features), 4), want, atol=1e-12)
    np.testing.assert_allclose(patches.devoxelise(jnp.asarray(grid), jnp.asarray(places)), back, atol=1e-12)
    centres = np.stack(np.meshgrid(*[np.arange(4.0)] * 3, indexing="ij"), -1).reshape(1, 64, 3)
    values = rng.normal(size=(1, 64, 5))
    volume = patches.voxelise(jnp.asarray(centres), jnp.asarray(values), 4)
    np.testing.assert_allclose(patches.devoxelise(volume, jnp.asarray(centres)), values, atol=1e-12)
    cloud = rng.normal(size=(2, 30, 3)) * 7 + 5
    found = np.asarray(patches.voxel_places(jnp.asarray(cloud), 8))
    assert found.min() >= 0 and found.max() <= 7
    np.testing.assert_allclose(found.mean(1), 4, atol=0.5)
    moved = patches.voxel_places(jnp.asarray(3 * cloud - 2), 8)  # neither the place of the cloud nor its size matters
    np.testing.assert_allclose(moved, found, atol=1e-9)
    farthest = np.linalg.norm(cloud - cloud.mean(1, keepdims=True), axis=-1).max(1)
    middle = np.asarray([np.linalg.norm(found[b] - 4, axis=-1) for b in range(2)])
    ratio = np.linalg.norm(cloud - cloud.mean(1, keepdims=True), axis=-1) / farthest[:, None] * 4
    inner = ratio < 3  # those that are not clipped
    np.testing.assert_allclose(middle[inner], ratio[inner], rtol=1e-9)
    assert np.isfinite(patches.voxel_places(jnp.zeros((1, 3, 3)), 4)).all()


def test_dit_of_points():
    """DiT of the volume between the two maps; the order of the points does not matter; parts are the whole."""
    options = {"points": 20, "patch": 2, "width": 24, "depth": 2, "heads": 2, "num_classes": 3}
    net, x, y = make("PointDiT", 4, 4, **options), sample(2, 20, 4), jnp.asarray([0, 2])
    order = np.random.default_rng(0).permutation(20)

    @jit
    def run(net, x, y):
        state, c = net.embed(x, T, y)
        return net(x, T, y), net.project(net.run(net.run(state, c, 0, 1), c, 1), c)

    volumes = {k: v for k, v in options.items() if k != "points"}
    twin = nnx.merge(nnx.graphdef(make("DiT", (4, 4, 4), 4, **volumes)), nnx.state(net))

    @jit
    def between(twin, x, y):
        places = patches.voxel_places(x[..., :3], 4)
        return patches.devoxelise(twin(patches.voxelise(places, x, 4), T, y), places)

    whole, parts = run(net, x, y)
    close(parts, whole)
    close(between(twin, x, y), whole)
    close(run(net, x[:, order], y)[0], whole[:, order], 1e-4)
    assert whole.shape == x.shape and np.abs(run(net, x, y[::-1])[0] - whole).max() > 1e-3
    again = nnx.eval_shape(lambda: nets.build(**net.config, rngs=nnx.Rngs(0)))
    assert again.config == net.config and net.grid == (2, 2, 2) and net.shape == (20, 4)
    for wrong, message in (
        ({"channels": 2}, "3 channels or more"),
        ({"size": (4, 4, 2)}, "expected a cube of voxels"),
        ({"points": 0}, "1 point or more"),
    ):
        with pytest.raises(ValueError, match=message):
            make("PointDiT", **{"size": 4, "channels": 4, **options, **wrong})
    with pytest.raises(ValueError, match="takes a time a sample"):
        net(x, jnp.ones((2, 20, 1), jnp.float32), y)
