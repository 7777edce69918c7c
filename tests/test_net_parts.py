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
