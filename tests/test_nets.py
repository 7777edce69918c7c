"""nets: published parameter counts, float64 NumPy forwards written from the papers, and the rules that a net keeps."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.signal import correlate2d
from scipy.special import softmax

from jdiff import nets
from jdiff.nets import dit, patches, unet

TINY = {
    "DiT": {"patch": 2, "width": 32, "depth": 3, "heads": 4},
    "UNet": {"width": 16, "multipliers": (1, 2), "blocks": 1, "attention_at": (4,), "head_width": 8},
}


def abstract(name, size, channels, **options):
    return nnx.eval_shape(lambda: nets.build(name, size, channels, rngs=nnx.Rngs(0), **options))


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(module))


def filled(module, seed=1, scale=0.2):
    """An abstract module with every parameter drawn, since a zero initialisation hides most mistakes.

    NumPy draws them: nothing is compiled, and a net in bfloat16 gets the rounded parameters of one in float32.
    """
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, scale, p.shape), p.dtype), module)


@functools.cache
def make(name, **options):
    return filled(abstract(name, 8, 3, **{"num_classes": 5, **TINY[name], **options}))


def unstacked(net):
    return [jax.tree.map(lambda p, i=i: p[i], net.blocks) for i in range(net.depth)]


# What XLA's CPU backend makes fast is not under test; without it a compilation takes half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@jit
def forward(net, *args):
    return net(*args)


def images(batch=2, size=8, channels=3, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(7), (batch, size, size, channels), dtype)


T = jnp.asarray([0.1, 0.7], jnp.float32)
Y = jnp.asarray([3, 0], jnp.int32)


# --- against what is published
# The released DiT-XL/2 and SiT-XL/2 print 675,129,632 parameters: with their fixed positions (256 x 1152), which are
# not trained, and the 16 outputs a token that predict a variance.
@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "millions"),  # 2212.09748, tables 1 and 4
    [
        ("DiT-S/2", 12, 384, 6, 33),
        ("DiT-B/2", 12, 768, 12, 130),
        ("DiT-L/2", 24, 1024, 16, 458),
        ("DiT-XL/2", 28, 1152, 16, 675),
    ],
)
def test_dit_sizes_are_the_published_ones(name, layers, width, heads, millions):
    net = abstract(name, 32, 4, num_classes=1000)
    assert round(count(net) / 1e6) == millions
    assert (net.depth, net.width, net.blocks.attention.heads) == (layers, width, heads)
    if name == "DiT-XL/2":
        assert count(net) == 675_129_632 - 256 * 1152 - 16 * (1152 + 1)
        assert count(abstract("SiT-XL/2", 32, 4, num_classes=1000)) == 675_129_632 - 256 * 1152


def test_unet_sizes():
    adm = count(abstract("UNet-ADM-64", 64, 3, num_classes=1000, null_class=False))
    assert round(adm / 1e5) == 2959  # 2105.05233 says 296M; 2206.00364 counts the same net at 295.9M
    # Ours: DDPM's widths (35.7M) with ADM's resampling in residual blocks and its scale beside the shift.
    assert round(count(abstract("UNet-CIFAR", 32, 3)) / 1e5) == 429


# --- against independent NumPy in float64
def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_dit_block(p, x, c, heads):
    """2212.09748, section 3.2, adaLN-Zero, head by head; p: name -> float64 array."""

    def linear(name, v):
        return v @ p[f"{name}.kernel"] + p[f"{name}.bias"]

    def ln(v):
        return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)

    d = x.shape[-1]
    m = linear("modulation", c * sigmoid(c))
    s1, k1, g1, s2, k2, g2 = (m[..., i * d : (i + 1) * d] for i in range(6))
    qkv = linear("attention.qkv", ln(x) * (1 + k1) + s1)
    out = np.zeros_like(x)
    logits = []
    for h in range(heads):
        q, k, v = (qkv[..., i * d + h * (d // heads) : i * d + (h + 1) * (d // heads)] for i in range(3))
        logits.append(q @ np.swapaxes(k, 1, 2) / np.sqrt(d // heads))
        out[..., h * (d // heads) : (h + 1) * (d // heads)] = softmax(logits[-1], axis=-1) @ v
    x = x + g1 * linear("attention.out", out)
    u = linear("mlp_in", ln(x) * (1 + k2) + s2)
    gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    return x + g2 * linear("mlp_out", gelu), np.std(logits)


def float64_parameters(module):
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in flat}


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 3e-6), (jnp.float64, 1e-13)])
@pytest.mark.parametrize("tokens", [1, 6])
def test_dit_block_matches_numpy(dtype, limit, tokens):
    block = filled(
        nnx.eval_shape(lambda: dit.Block(16, 4, 4.0, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))), scale=0.5
    )
    x = jax.random.normal(jax.random.key(2), (3, 6, 16), dtype)
    c = jax.random.normal(jax.random.key(3), (3, tokens, 16), dtype)
    with jax.numpy_dtype_promotion("standard"):
        want, spread = numpy_dit_block(float64_parameters(block), np.float64(x), np.float64(c), 4)
    assert spread > 3  # attention is far from uniform, so q and k matter
    got = np.asarray(forward(block, x, c), np.float64)
    assert np.abs(got - want).max() < limit * np.abs(want).max()


def test_dit_matches_numpy():
    """Patches, positions, time and label embedding, the order of the blocks and the last layer, written out."""
    net = make("DiT")
    x = images()
    p = float64_parameters(net)
    patch, side, width = 2, 4, 32
    c = []
    for t, y in zip(np.float64(T), np.asarray(Y), strict=True):
        f = 1000 * t * np.exp(-np.log(10000) * np.arange(128) / 128)
        u = np.concatenate([np.cos(f), np.sin(f)]) @ p["conditioning.time_in.kernel"] + p["conditioning.time_in.bias"]
        u = u * sigmoid(u) @ p["conditioning.time_out.kernel"] + p["conditioning.time_out.bias"]
        c.append(u + p["conditioning.labels"][y])
    c = np.stack(c)[:, None]
    h = np.zeros((2, side * side, width))
    for i in range(side):
        for j in range(side):
            pixels = np.float64(x)[:, patch * i : patch * (i + 1), patch * j : patch * (j + 1)].reshape(2, -1)
            w = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
            position = np.concatenate([np.sin(j * w), np.cos(j * w), np.sin(i * w), np.cos(i * w)])
            h[:, i * side + j] = pixels @ p["patches.kernel"] + p["patches.bias"] + position
    for k in range(3):
        block = {n.removeprefix("blocks."): v[k] for n, v in p.items() if n.startswith("blocks.")}
        h, _ = numpy_dit_block(block, h, c, 4)
    shift, scale = np.split(c * sigmoid(c) @ p["modulation.kernel"] + p["modulation.bias"], 2, axis=-1)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6) * (1 + scale) + shift
    h = h @ p["out.kernel"] + p["out.bias"]
    want = np.zeros((2, 8, 8, 3))
    for i in range(side):
        for j in range(side):
            token = h[:, i * side + j].reshape(2, patch, patch, 3)
            want[:, patch * i : patch * (i + 1), patch * j : patch * (j + 1)] = token
    assert (
        np.abs(np.asarray(forward(net, x, T, Y)) - want).max() < 1e-4 * np.abs(want).max()
    )  # angles to 700 in float32


def test_attention_can_be_replaced():
    want = forward(make("DiT"), images(), T, Y)
    got = forward(make("DiT", attention=jax.nn.dot_product_attention), images(), T, Y)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert not np.allclose(forward(make("DiT", attention=lambda q, k, v: v), images(), T, Y), want, atol=0.1)


@pytest.mark.parametrize("to", ["same", "down", "up"])
def test_unet_block_matches_numpy(to):
    f64 = jnp.float64
    kind = {"level": 0, "to": to, "heads": 2, "dtype": f64, "param_dtype": f64}
    block = filled(nnx.eval_shape(lambda: unet.Block(12, 20, 6, **kind, rngs=nnx.Rngs(0))), scale=0.5)
    x = jax.random.normal(jax.random.key(2), (2, 6, 6, 12), f64)
    c = jax.random.normal(jax.random.key(3), (2, 1, 1, 6), f64)
    p = float64_parameters(block)

    def gn(name, v, groups):
        g = v.reshape(2, -1, groups, v.shape[-1] // groups)
        g = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(g.var((1, 3), keepdims=True) + 1e-5)
        return g.reshape(v.shape) * p[f"{name}.scale"] + p[f"{name}.bias"]

    def conv(name, v):
        kernel = p[f"{name}.kernel"]
        out = np.zeros((*v.shape[:3], kernel.shape[-1])) + p[f"{name}.bias"]
        for b, i, o in np.ndindex(2, *kernel.shape[2:]):
            out[b, :, :, o] += correlate2d(v[b, :, :, i], kernel[:, :, i, o], mode="same")
        return out

    def resample(v):
        if to == "down":
            return (v[:, ::2, ::2] + v[:, 1::2, ::2] + v[:, ::2, 1::2] + v[:, 1::2, 1::2]) / 4
        return v.repeat(2, axis=1).repeat(2, axis=2) if to == "up" else v

    x64, c64 = np.asarray(x), np.asarray(c)
    h = gn("norm_in", x64, 3)
    h = conv("conv_in", resample(h * sigmoid(h)))
    scale, shift = np.split(c64 * sigmoid(c64) @ p["modulation.kernel"] + p["modulation.bias"], 2, axis=-1)
    h = gn("norm_out", h, 5) * (1 + scale) + shift
    h = resample(x64) @ p["skip.kernel"] + p["skip.bias"] + conv("conv_out", h * sigmoid(h))
    tokens = gn("norm_attention", h, 5).reshape(2, -1, 20)
    q, k, v = np.split(tokens @ p["attention.qkv.kernel"] + p["attention.qkv.bias"], 3, axis=-1)
    heads = [
        softmax(q[..., s] @ np.swapaxes(k[..., s], 1, 2) / np.sqrt(10), axis=-1) @ v[..., s]
        for s in (slice(0, 10), slice(10, 20))
    ]
    out = np.concatenate(heads, -1) @ p["attention.out.kernel"] + p["attention.out.bias"]
    want = h + out.reshape(h.shape)
    assert np.abs(np.asarray(forward(block, x, c)) - want).max() < 1e-12 * np.abs(want).max()


# --- initial values
@pytest.mark.parametrize("name", TINY)
def test_output_is_zero_at_init(name):
    net = jit(lambda: nets.build(name, 8, 3, num_classes=5, **TINY[name], rngs=nnx.Rngs(0)))()
    assert not np.any(forward(net, images(), T, Y))


def test_blocks_are_the_identity_at_init():
    net = jit(lambda: nets.build("DiT", 8, 3, **TINY["DiT"], rngs=nnx.Rngs(0)))()
    h, c = jit(lambda net: net.embed(images(), T))(net)
    for block in unstacked(net):
        np.testing.assert_array_equal(forward(block, h, c), h)
    kernels = net.blocks.mlp_in.kernel[...]
    assert not np.allclose(kernels[0], kernels[1])  # each block was drawn for itself


# --- scan and remat
def test_scan_equals_a_loop_and_traces_once():
    net = make("DiT")
    graphdef, params = nnx.split(net)
    traces = []

    @jit
    def scanned(params, x, t, y):
        traces.append(None)
        return nnx.merge(graphdef, params)(x, t, y)

    @jit
    def looped(net, x, t, y):
        h, c = net.embed(x, t, y)
        for block in unstacked(net):
            h = block(h, c)
        return net.project(h, c)

    np.testing.assert_allclose(scanned(params, images(), T, Y), looped(net, images(), T, Y), rtol=1e-4, atol=1e-4)
    scanned(jax.tree.map(lambda p: 2 * p, params), images() + 1, T / 2, Y + 1)
    assert len(traces) == 1


@pytest.mark.parametrize("name", TINY)
def test_remat_changes_nothing(name):
    small = {} if name == "DiT" else {"width": 8, "multipliers": (1,), "attention_at": (), "num_classes": 2}

    def value_and_grads(remat):
        loss = jax.value_and_grad(lambda net: jnp.square(net(images(), T, Y % 2)).mean())
        return jit(loss)(make(name, remat=remat, **small))

    value, grads = value_and_grads("none")
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 0  # every parameter is used
    for remat in ("full", "dots"):
        other, other_grads = value_and_grads(remat)
        np.testing.assert_allclose(other, value, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("name", TINY)
def test_remat_keeps_less(name):
    def kept(remat):
        net = abstract(name, 8, 3, remat=remat, **TINY[name])
        saved = jax.eval_shape(lambda net: jax.vjp(lambda net: net(images(), T), net)[1], net)
        return count(saved)

    none, dots, full = kept("none"), kept("dots"), kept("full")
    assert full < dots < none if name == "DiT" else full <= dots < none


# --- skipped blocks
def without(net, mask):
    """The same net with the skipped blocks taken out (DiT), or with branches that end in zeros (UNet)."""
    if net.name == "DiT":
        kept = np.flatnonzero(mask)
        smaller = make("DiT", depth=len(kept))
        return nnx.merge(
            nnx.graphdef(smaller),
            nnx.state(net) | {"blocks": jax.tree.map(lambda p: p[kept], nnx.state(net)["blocks"])},
        )
    net = jax.tree.map(lambda p: p, net)  # a copy
    for keep, block in zip(mask, [*net.down, *net.middle, *net.up], strict=True):
        ends = [block.conv_out] + ([block.attention.out] if block.attention else [])
        for end in ends if not keep else []:
            end.kernel[...], end.bias[...] = 0 * end.kernel[...], 0 * end.bias[...]
    return net


@pytest.mark.parametrize("name", TINY)
def test_a_mask_skips_blocks(name):
    net = make(name)
    traces = []

    @jit
    def masked(net, x, t, y, mask):
        traces.append(None)
        return net(x, t, y, blocks=mask)

    n = net.num_blocks
    ones = np.ones(n, np.float32)
    np.testing.assert_array_equal(masked(net, images(), T, Y, ones), forward(net, images(), T, Y))  # bitwise
    mask = (np.arange(n) % 3 != 1).astype(np.float32)
    got, want = masked(net, images(), T, Y, mask), forward(without(net, mask), images(), T, Y)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(got - forward(net, images(), T, Y)).max() > 1e-2 and len(traces) == 1


def test_macs():
    """2212.09748, table 4, whose "Gflops" are multiply-accumulates; the released net has 16 more outputs a token."""
    for name, published in {"DiT-S/2": 6.06, "DiT-XL/2": 118.64}.items():
        net = abstract(name, 32, 4, num_classes=1000)
        extra = 256 * 16 * net.width
        assert abs((nets.macs(net) + extra) / 1e9 / published - 1) < 1e-3
        half = nets.macs(net, np.arange(net.depth) % 2)
        assert 0 < 2 * half - nets.macs(net) < 0.01 * nets.macs(net)  # what is not in blocks is little


def test_macs_of_masks_add_up():
    net = abstract("UNet", 8, 3, **TINY["UNet"])
    first = np.eye(net.num_blocks)[0]
    total, nothing, one, others = (nets.macs(net, mask) for mask in (None, 0 * first, first, 1 - first))
    assert one + others == total + nothing and nothing > 0
    assert one - nothing == 64 * (2 * 9 * 16 * 16) + 64 * 32  # two 3 x 3 convolutions at 8 x 8; (scale, shift)


# --- time
@pytest.mark.parametrize("name", TINY)
def test_times_of_every_shape_agree(name):
    net = make(name)
    want = forward(net, images(), jnp.full(2, 0.3, jnp.float32))
    for shape in [(), (2, 1, 1, 1), (2, 8, 8, 1)]:
        got = forward(net, images(), jnp.full(shape, 0.3, jnp.float32))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    each = forward(net, images(), T)
    np.testing.assert_allclose(each, forward(net, images(), T.reshape(2, 1, 1, 1)), rtol=1e-4, atol=1e-4)
    assert np.abs(each - want).max(axis=(1, 2, 3)).min() > 0.01


def test_times_are_pooled():
    t = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
    for shape in [(), (1,), (2,), (1, 1), (8, 1, 1), (2, 1, 1, 1), (1, 8, 1, 1), (2, 8, 8, 1), (2, 8, 8, 3)]:
        part = t[tuple(slice(n) for n in (1,) * (4 - len(shape)) + shape)].reshape(shape)
        full = np.broadcast_to(part[:, None, None, None] if len(shape) == 1 else part, t.shape)
        want = [[full[:, i : i + 4, j : j + 4].astype(np.float64).mean((1, 2, 3)) for j in (0, 4)] for i in (0, 4)]
        got = patches.pool_time(part, t.shape, 4)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(np.broadcast_to(got, (2, 2, 2)), np.moveaxis(want, 2, 0), rtol=1e-6)
    assert patches.pool_time(0.5, t.shape, 4).shape == (1, 1, 1)  # one time is embedded once
    with pytest.raises(ValueError, match="the time is int32"):
        patches.pool_time(jnp.int32(1), t.shape, 4)


def test_a_time_a_pixel_reaches_its_token_only():
    net = make("DiT", attention=lambda q, k, v: v)
    t = jnp.full((2, 8, 8, 1), 0.3, jnp.float32)
    before, after = forward(net, images(), t, Y), forward(net, images(), t.at[0, 2:4, 4, 0].set(0.9), Y)
    changed = np.any(np.asarray(before != after), axis=-1)
    want = np.zeros((2, 8, 8), bool)
    want[0, 2:4, 4:6] = True  # the patch that holds the two pixels
    np.testing.assert_array_equal(changed, want)


def test_a_time_a_pixel_reaches_the_unet():
    net = make("UNet")
    t = jnp.full((2, 8, 8, 1), 0.3, jnp.float32)
    changed = forward(net, images(), t) != forward(net, images(), t.at[0, 0, 0, 0].set(0.9))
    assert changed[0].any() and not changed[1].any()


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_nets_tell_neighbouring_times_apart(name):
    times = jnp.asarray([988.49, 987.17], jnp.float32)
    assert len(set(np.asarray(times.astype(jnp.bfloat16)))) == 1  # bfloat16 cannot
    net = make(name, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    image = jnp.concatenate([images(1)] * 2)
    out = forward(net, image, times / 1000, Y[:1].repeat(2))
    assert float(jnp.abs(out[0] - out[1]).max()) > 0.02 * float(jnp.abs(out).max())
    c = jit(lambda net: net.conditioning(times / 1000, None))(net)
    exact = float64_parameters(net.conditioning)
    f = np.float64(times)[:, None] * 10_000.0 ** (
        -np.arange(net.conditioning.frequencies // 2) * 2 / net.conditioning.frequencies
    )
    u = np.concatenate([np.cos(f), np.sin(f)], -1) @ exact["time_in.kernel"] + exact["time_in.bias"]
    u = u * sigmoid(u) @ exact["time_out.kernel"] + exact["time_out.bias"]
    assert c.dtype == jnp.float32
    np.testing.assert_allclose(c, u, atol=1e-3 * np.abs(u).max())  # angles near 1000: an ulp is 6e-5


# --- dtypes, pytrees, batches
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(name, dtype, param_dtype):
    net = abstract(name, 8, 3, dtype=dtype, param_dtype=param_dtype, num_classes=5, **TINY[name])
    assert {leaf.dtype for leaf in jax.tree.leaves(net)} == {jnp.dtype(param_dtype)}
    for given, got in [("float32", "float32"), ("float64", "float64"), ("bfloat16", "float32")]:
        out = jax.eval_shape(forward, net, jax.ShapeDtypeStruct((2, 8, 8, 3), given), T.astype(jnp.float64), Y)
        assert (out.shape, out.dtype) == ((2, 8, 8, 3), got)

    def loss(net, x):
        return net(x, T, Y).sum()

    text = jax.jit(jax.grad(loss)).lower(net, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)).as_text()
    assert "f64" not in text  # no silent double precision, though x64 is on
    dots = [s for s in text.splitlines() if "dot_general" in s or "stablehlo.convolution" in s]
    assert (dtype == jnp.bfloat16) == any("bf16" in s for s in dots)


def test_bfloat16_is_near_float32():
    for name in TINY:
        a, b = (forward(make(name, dtype=d), images(), T, Y) for d in (jnp.float32, jnp.bfloat16))
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) < 0.1


@pytest.mark.parametrize("name", TINY)
def test_a_net_is_one_state_of_parameters(name):
    net = make(name)
    graphdef, params = nnx.split(net)
    variables = jax.tree.leaves(params, is_leaf=lambda v: isinstance(v, nnx.Variable))
    assert variables and {type(v) for v in variables} == {nnx.Param}
    hash(graphdef)
    hash(jax.tree.structure(net))
    merged = nnx.merge(graphdef, params)
    assert jax.tree.structure(merged) == jax.tree.structure(net)
    jax.tree.map(np.testing.assert_array_equal, merged, net)


@pytest.mark.parametrize("name", TINY)
def test_a_sample_does_not_know_its_batch(name):
    net, x = make(name), images(4)
    t, y = jnp.linspace(0.1, 0.9, 4, dtype=jnp.float32), jnp.arange(4)
    whole = forward(net, x, t, y)
    back = forward(net, x[::-1], t[::-1], y[::-1])
    np.testing.assert_allclose(back[::-1], whole, rtol=1e-4, atol=1e-4)
    alone = forward(net, x[2:3], t[2:3], y[2:3])
    np.testing.assert_allclose(alone[0], whole[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "channels", "options"),
    [
        (9, 1, {"width": 10, "multipliers": (3,), "blocks": 2, "attention_at": (9,), "head_width": None}),
        (12, 2, {"width": 8, "multipliers": (1, 1, 3), "blocks": 1, "attention_at": [3, 12], "head_width": 4}),
        (4, 5, {"width": 6, "multipliers": [2, 1, 2], "blocks": 3}),
    ],
)
def test_unet_of_odd_sizes(size, channels, options):
    options = {"head_width": 6, **options}
    net = abstract("UNet", size, channels, **options)
    x = jax.ShapeDtypeStruct((3, size, size, channels), jnp.float32)
    for t in [T[0], jax.ShapeDtypeStruct((3, size, size, 1), jnp.float32)]:
        assert jax.eval_shape(forward, net, x, t).shape == x.shape


# --- labels, configuration, errors
def test_labels():
    net = make("DiT")
    assert net.null_label == 5
    null = forward(net, images(), T, jnp.full(2, 5))
    np.testing.assert_allclose(forward(net, images(), T), null, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(forward(net, images(), T, net.null_label), null, rtol=1e-5, atol=1e-5)
    assert not np.allclose(forward(net, images(), T, Y), null)
    assert np.isnan(forward(net, images(), T, jnp.asarray([6, -1]))).all()  # no class: not a neighbour's row
    for options in ({"num_classes": 0}, {"null_class": False}):
        with pytest.raises(ValueError, match=r"guidance needs a null class, and DiT has .*null_class=True"):
            _ = make("DiT", **options).null_label
    with pytest.raises(ValueError, match="num_classes=0 and takes no labels"):
        forward(make("DiT", num_classes=0), images(), T, Y)
    with pytest.raises(ValueError, match="needs labels y"):
        forward(make("DiT", null_class=False), images(), T)


@pytest.mark.parametrize("name", ["DiT-Ti/2", "UNet-Ti"])
def test_config_rebuilds_the_net(name):
    net = abstract(name, 8, 1, num_classes=10, dtype=jnp.bfloat16, remat="full")
    config = json.loads(json.dumps(net.config))
    assert config == net.config and config["name"] == name and config["dtype"] == "bfloat16"
    again = nnx.eval_shape(lambda: nets.build(**config, rngs=nnx.Rngs(0)))
    assert jax.tree.structure(again) == jax.tree.structure(net)
    direct = nnx.eval_shape(lambda: nets.DiT(8, 1, **TINY["DiT"], rngs=nnx.Rngs(0)))
    assert nnx.eval_shape(lambda: nets.build(**direct.config, rngs=nnx.Rngs(0))).config == direct.config


def test_every_preset_has_one_line_and_builds():
    counted = {"UNet-CIFAR", "UNet-ADM-64"}  # above, and in test_net_families; slow to build
    counted |= {
        "MMDiT-SD3",
        "MMDiT-SD3.5-medium",
        "UNet-DDPM++",
        "UNet-NCSN++",
        "UNet-NCSN++-256",
        "UNet-LDM",
        "AutoencoderKL",
        "VQAutoencoder",
    }
    assert counted < {*nets.PRESETS}
    for name, preset in nets.PRESETS.items():
        assert "\n" not in preset.doc and len(preset.doc) < 100
        if preset.options and name not in counted:
            assert abstract(name, 64, 3).name == name


def build(name="DiT", **options):
    return lambda: abstract(name, 8, 3, **{**TINY[name], **options})


def call(x=(2, 8, 8, 3), t=(), y=None):
    net = abstract("DiT", 8, 3, num_classes=5, **TINY["DiT"])
    return lambda: jax.eval_shape(forward, net, jnp.zeros(x, jnp.float32), jnp.zeros(t, jnp.float32), y)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: abstract("Dit-S2", 32, 4), "unknown net 'Dit-S2'; did you mean 'DiT-S/2'"),
        (build(patch=3), "patch 3 does not divide image_size 8"),
        (build(heads=5), "width 32 must be divisible by heads 5"),
        (build(width=6, heads=3), "width 6 .* by 4"),
        (build(depth=0), "depth is 0; expected a positive"),
        (build(num_classes=-1), "num_classes is -1"),
        (build(remat="all"), "unknown remat 'all'; expected one of none, full, dots"),
        (build("UNet", remat="all"), "unknown remat 'all'"),
        (build("UNet", multipliers=(1,) * 5), "16 does not divide image_size 8"),
        (build("UNet", attention_at=(16,)), r"attention_at \[16\] is no resolution of this net; it has \[8, 4\]"),
        (build("UNet", head_width=12), "head_width 12 does not divide the 32 channels at size 4"),
        (build("UNet", blocks=0), "blocks=0"),
        (call(x=(2, 8, 8, 1)), r"channels=3, so it takes x of shape \(batch, 8, 8, 3\); it was given \(2, 8, 8, 1\)"),
        (call(x=(2, 16, 16, 3)), r"image_size=8.*given \(2, 16, 16, 3\)"),
        (call(t=(3,)), r"time of shape \(3,\) fits no sample of shape \(2, 8, 8, 3\)"),
        (call(t=(2, 4, 4, 1)), r"time of shape \(2, 4, 4, 1\)"),
        (call(y=jnp.zeros(3, jnp.int32)), r"labels y are int32 of shape \(3,\); expected integers of shape \(2,\)"),
        (call(y=jnp.zeros(2, jnp.float32)), "labels y are float32"),
        (lambda: forward(make("DiT"), images(), T, Y, jnp.ones(2)), r"blocks has shape \(2,\); expected \(3,\)"),
        (lambda: nets.macs(abstract("DiT", 8, 3, **TINY["DiT"]), [1]), r"blocks has shape \(1,\); expected \(3,\)"),
    ],
)
def test_bad_input_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
