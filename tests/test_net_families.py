"""U-ViT, MM-DiT, the U-Nets' styles and the autoencoders: published sizes, parts, masks, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from jdiff import mesh, nets
from jdiff.nets import mmdit, unet_blocks, uvit
from jdiff.nets.macs import macs
from jdiff.plan.program import products

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
T = jnp.asarray([0.1, 0.7], jnp.float32)
SMALL = {
    "UViT": {"patch": 2, "width": 16, "depth": 4, "heads": 2, "num_classes": 5},
    "MMDiT": {"patch": 2, "width": 16, "depth": 3, "heads": 2, "context": 6, "pooled": 4, "qk_norm": True},
    "ncsn++": {"width": 4, "multipliers": (1, 2), "blocks": 1, "attention_at": (4,), "head_width": None},
    "ncsn++-skip": {"width": 4, "multipliers": (1, 2, 2), "blocks": 1, "attention_at": (4,), "head_width": None},
    "ldm": {"width": 4, "multipliers": (1, 2), "blocks": 1, "attention_at": (8,), "heads": 2, "context": 6},
}


DUAL = (("depth", 4), ("dual", 2))


def abstract(name, size, channels, **options):
    return nnx.eval_shape(lambda: nets.build(name, size, channels, rngs=nnx.Rngs(0), **options))


def filled(module, seed=1, scale=0.2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, scale, p.shape), p.dtype), module)


@functools.cache
def make(name, **options):
    style = {} if name in nets.PRESETS else {"style": name}
    return filled(abstract(name if not style else "UNet", 8, 3, **{**SMALL.get(name, {}), **style, **options}))


def sample(*shape, seed=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def told(net):
    """What this net is told beside the time."""
    if getattr(net, "context", None):
        return nets.Text(sample(2, 7, 6), sample(2, 4, seed=4))
    return jnp.asarray([1, 4]) if net.num_classes else None


def close(a, b, limit=1e-5):
    np.testing.assert_allclose(a, b, rtol=limit, atol=limit * float(np.abs(b).max()))


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(module))


@pytest.mark.parametrize(
    ("name", "size", "channels", "classes", "parameters"),
    [
        ("UViT-S/2", 32, 3, 0, 44e6),  # 2209.12152, table 1
        ("UViT-M/4", 64, 3, 1000, 131e6),
        ("UViT-L/2", 32, 4, 1000, 287e6),
        ("UViT-H/2", 32, 4, 1000, 501e6),
        # the rest: parameters of the public PyTorch modules, and what is a buffer there: positions, frequencies
        ("MMDiT-SD3", 128, 16, None, 2_028_328_000 + 192 * 192 * 1536),
        ("MMDiT-SD3.5-medium", 128, 16, None, 2_243_171_520 + 384 * 384 * 1536),
        ("UNet-DDPM++", 32, 3, None, 55_732_739),
        ("UNet-NCSN++", 32, 3, None, 56_395_523 + 128),
        pytest.param("UNet-NCSN++-256", 256, 3, None, 65_574_549, marks=pytest.mark.long),
        pytest.param("UNet-LDM", 64, 4, None, 859_520_964, marks=pytest.mark.long),
        ("AutoencoderKL", 256, 3, None, 83_653_863),
        ("VQAutoencoder", 256, 3, None, 55_322_782),
    ],
)
def test_sizes_are_the_published_ones(name, size, channels, classes, parameters):
    found = count(abstract(name, size, channels, **({} if classes is None else {"num_classes": classes})))
    assert found == parameters if parameters % 1e6 else round(found / 1e6) == parameters / 1e6


@pytest.mark.parametrize(("name", "options"), [*((name, ()) for name in SMALL), ("MMDiT", DUAL)])
def test_parts_masks_and_meshes(name, options):
    """Blocks in parts are the whole; ones skip nothing; a mask skips; every large parameter has a rule."""
    net, x = make(name, **dict(options)), sample(2, 8, 8, 3)
    y, n = told(net), net.num_blocks

    @jit
    def run(net, x, mask):
        state, c = net.embed(x, T, y)
        first = net.run(state, c, 0, 2)
        parts = net.project(net.run(net.run(first, c, 2, n - 1), c, n - 1), c)
        return net(x, T, y), parts, net(x, T, y, blocks=mask)

    whole, parts, masked = run(net, x, np.ones(n, np.float32))
    close(parts, whole)
    close(masked, whole)
    assert np.isfinite(whole).all() and whole.shape == x.shape and np.abs(whole).max() > 0.05
    assert np.abs(run(net, x, (np.arange(n) != 0).astype(np.float32))[2] - whole).max() > 1e-3
    devices = mesh.make("fsdp=2", jax.devices()[:2])
    placed = mesh.shardings(devices, net, nnx.to_pure_dict(nnx.state(net)))
    for (path, place), leaf in zip(
        jax.tree_util.tree_leaves_with_path(placed), jax.tree.leaves(nnx.state(net)), strict=True
    ):
        small = "kernel" not in str(path) or leaf.size <= 128 or ("conv_in" in str(path) and leaf.shape[-1] < 8)
        assert small or any(axis is not None for axis in place.spec), (path, leaf.shape)


# --- against independent NumPy in float64, head by head
def block_of(make):
    block = filled(
        nnx.eval_shape(lambda: make(dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))), scale=0.5
    )
    return block, {"/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(block))}


def standard(v, epsilon):
    return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + epsilon)


def attended(streams, heads):
    """One attention over the tokens of all streams; a stream: (q, k, v), each (b, n, d). Back stream by stream."""
    q, k, v = (np.concatenate(parts, 1) for parts in zip(*streams, strict=True))
    out, d = np.zeros_like(q), q.shape[-1] // heads
    for h in range(heads):
        one = slice(h * d, (h + 1) * d)
        logits = q[..., one] @ np.swapaxes(k[..., one], 1, 2) / np.sqrt(d)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        out[..., one] = p / p.sum(-1, keepdims=True) @ v[..., one]
    return np.split(out, np.cumsum([len(s[0][0]) for s in streams])[:-1], 1)


def test_uvit_block_matches_numpy():
    """2209.12152, figure 1: the skip joins before the block, exact GELU, no bias of queries, keys and values."""
    block, p = block_of(functools.partial(uvit.Block, 8, 2, 4.0, skip=True))
    x, skip = (np.random.default_rng(i).normal(size=(2, 5, 8)) for i in (0, 1))
    linear = lambda name, v: v @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0.0)
    norm = lambda name, v: standard(v, 1e-5) * p[f"{name}/scale"] + p[f"{name}/bias"]
    h = linear("skip", np.concatenate([x, skip], -1))
    (out,) = attended([np.split(linear("attention/qkv", norm("norm_attention", h)), 3, -1)], 2)
    h = h + linear("attention/out", out)
    u = linear("mlp_in", norm("norm_mlp", h))
    want = h + linear("mlp_out", 0.5 * u * (1 + scipy.special.erf(u / np.sqrt(2))))
    assert "attention/qkv/bias" not in p
    np.testing.assert_allclose(jit(lambda b, x, s: b(x, s))(block, x, skip), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["", "last", "dual", "dual, perturbed"])
def test_mmdit_block_matches_numpy(kind):
    """2403.03206, figure 2b: weights a stream, one attention; in the last block the text gives keys, values. Stable
    Diffusion 3.5 medium: in its first blocks the image has an attention of its own, told by three more parts of c."""
    last, dual = kind == "last", "dual" in kind
    block, p = block_of(functools.partial(mmdit.Block, 8, 2, 4.0, attention=None, last=last, dual=dual, qk_norm=True))
    rng = np.random.default_rng(0)
    x, y, c = rng.normal(size=(2, 4, 8)), rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 1, 8))
    linear = lambda name, v: v @ p[f"{name}/kernel"] + p[f"{name}/bias"]
    rows, streams, told = {"image": x, "text": y}, [], {}

    def heads(name, v, shift, scale):
        q, k, v = np.split(linear(f"{name}/qkv", standard(v, 1e-6) * (1 + scale) + shift), 3, -1)
        for which, a in (("norm_q", q), ("norm_k", k)):
            each = a.reshape(2, -1, 2, 4)
            each = each / np.sqrt(np.square(each).mean(-1, keepdims=True) + 1e-6)
            a[:] = (each * p[f"{name}/{which}/scale"]).reshape(a.shape)
        return q, k, v

    for name, v in rows.items():
        parts = 2 if last and name == "text" else 9 if dual and name == "image" else 6
        told[name] = np.split(linear(f"{name}/modulation", c / (1 + np.exp(-c))), parts, -1)
        streams.append(heads(f"{name}/attention", v, *told[name][:2]))
    want = []
    for (name, v), out in zip(rows.items(), attended(streams, 2), strict=True):
        if not (last and name == "text"):
            _, _, gate1, shift, scale, gate2, *own = told[name]
            joint = gate1 * linear(f"{name}/attention/out", out)
            if own:
                qkv = heads("image/attention2", v, *own[:2])
                (out,) = (qkv[2],) if "perturbed" in kind else attended([qkv], 2)
                v = v + own[2] * linear("image/attention2/out", out)
            v = v + joint
            u = linear(f"{name}/mlp_in", standard(v, 1e-6) * (1 + scale) + shift)
            gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
            v = v + gate2 * linear(f"{name}/mlp_out", gelu)
        want.append(v)
    assert dual == ("image/attention2/qkv/kernel" in p) and "text/attention2/qkv/kernel" not in p
    perturb = jnp.repeat(jnp.arange(2.0), 2).reshape(2, 1, 2) if "perturbed" in kind else None  # own: the identity
    got = jit(lambda b, x, y, c: b(mmdit.State(x, y), c, perturb))(block, x, y, c)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_perturbations_of_two_attentions():
    """A row for the shared attention and one for the own, block by block; the blocks run by hand."""
    net, x = make("MMDiT", **dict(DUAL)), sample(2, 8, 8, 3)
    u = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (6, 2)), jnp.float32)
    assert len(net.attention_heads) == 6

    @jit
    def run(net, x, y, u):
        state, c = net.embed(x, T, y)
        pick = lambda stack, i: jax.tree.map(lambda a: a[i], stack)
        stack = [*(pick(net.dual_blocks, i) for i in (0, 1)), pick(net.blocks, 0), net.last]
        for block, rows in zip(stack, (u[0:2, None], u[2:4, None], u[4:5], u[5:6]), strict=True):
            state = block(state, c, rows)
        return net.project(state, c), net(x, T, y, perturb=u)

    close(*run(net, x, told(net), u))


@pytest.mark.parametrize("name", ["UViT", "MMDiT"])
def test_macs_of_a_scanned_net(name):
    """Products counted by hand: n tokens of width d, 12 n d^2 + 2 n^2 d a block and stream, and what is around them."""
    net, n, d = make(name), 16, 16
    m = 2 if name == "UViT" else 77
    own = lambda k: 12 * k * d * d  # attention's four and the MLP's eight products of d x d
    if name == "UViT":
        tokens = n + m
        blocks = 5 * (own(tokens) + 2 * tokens**2 * d) + 2 * tokens * 2 * d * d
        around = n * 12 * d * 2 + 64 * 9 * 3 * 3
    else:
        tokens = n + m
        blocks = 2 * (own(n) + own(m) + 12 * d * d) + own(n) + 3 * m * d * d + (6 + 2) * d * d + 3 * 2 * tokens**2 * d
        around = n * 12 * d * 2 + 6 * m * d + 256 * d + d * d + 4 * d + d * d + 2 * d * d
    assert macs(net) == blocks + around


FAMILIES = {  # wide enough for products to be nearly all; no loop of more than one turn, whose body XLA counts once
    "DiT": {"patch": 2, "width": 256, "depth": 2, "heads": 2, "unroll": 2},
    "SiT": {"patch": 2, "width": 256, "depth": 2, "heads": 2, "unroll": 2, "num_classes": 5},
    "PointDiT": {"patch": 2, "width": 264, "depth": 2, "heads": 2, "unroll": 2, "points": 64},
    "UViT": {"patch": 2, "width": 256, "depth": 2, "heads": 2, "num_classes": 5},
    "MMDiT": {"patch": 2, "width": 256, "depth": 3, "heads": 2, "context": 48, "pooled": 16, "dual": 1},
    "AutoencoderKL": {"width": 64, "multipliers": (1, 2), "blocks": 1},
    "VQAutoencoder": {"width": 64, "multipliers": (1, 2), "blocks": 1},
    **{
        style: {"width": 64, "multipliers": (1, 2), "blocks": 1, "attention_at": (32,), "head_width": 64}
        for style in ("adm", "ddpm++", "ncsn++", "ncsn++-skip")
    },
    "ldm": {"width": 64, "multipliers": (1, 2), "blocks": 1, "attention_at": (32,), "heads": 2, "context": 48},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_macs_are_xlas_count(name):
    """XLA counts what is not a product as well, and leaves a convolution's borders out: a few percent each way."""
    style = {} if name in nets.PRESETS else {"style": name}
    size = 16 if "patch" in FAMILIES[name] else 64
    net = abstract(name if not style else "UNet", size, 3, **FAMILIES[name], **style)
    struct = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    y = jax.ShapeDtypeStruct((1,), jnp.int32) if net.num_classes else None
    if context := getattr(net, "context", None):
        y = nets.Text(struct(77, context), struct(16))

    def call(net, x, y):
        if name == "VQAutoencoder":
            return net.decode(net.encode(x))
        return net.decode(net.encode(x).mean) if name == "AutoencoderKL" else net(x, jnp.zeros((), jnp.float32), y)

    traced = jax.jit(call).trace(net, struct(*net.shape), y)
    assert products(traced.jaxpr.jaxpr) == macs(net)  # `jdiff plan`'s count
    ratio = traced.lower().cost_analysis()["flops"] / (2 * macs(net))
    assert 1 < ratio < 1.05 if size == 16 else 0.97 < ratio < 1.01


def test_table_of_positions():
    """2403.03206, section 5.3.2: place (p - (table - s) / 2) 256 / S of an image of S = 16 s pixels; the middle."""
    options = {**SMALL["MMDiT"], "positions_table": 10}
    net = nets.build("MMDiT", (8, 12), 3, **options, rngs=nnx.Rngs(0))
    p = np.arange(10)
    row, column = ((p - (10 - s) / 2) * 256 / (16 * s) for s in (4, 6))
    f = 10_000.0 ** -(np.arange(4) / 4)
    part = lambda v: np.concatenate([np.sin(v[:, None] * f), np.cos(v[:, None] * f)], -1)
    want = np.concatenate([np.broadcast_to(part(column), (10, 10, 8)), np.repeat(part(row)[:, None], 10, 1)], -1)
    np.testing.assert_allclose(net.table[...].reshape(10, 10, 16), want, atol=1e-5)
    np.testing.assert_allclose(net.positions().reshape(4, 6, 16), want[3:7, 2:8], atol=1e-5)
    x, y = sample(1, 8, 12, 3), nets.Text(sample(1, 7, 6), sample(1, 4))
    moved = jit(jax.grad(lambda net: net(x, 0.5, y).sum()))(filled(net))
    assert not np.any(moved.table[...]) and np.any(moved.patches.kernel[...])
    with pytest.raises(ValueError, match=r"a table of 5 x 5 holds no grid \(4, 6\)"):
        abstract("MMDiT", (8, 12), 3, **{**options, "positions_table": 5})


def test_text_reaches_every_net_that_takes_one():
    for name in ("MMDiT", "ldm"):
        net, x, y = make(name), sample(2, 8, 8, 3), told(make(name))
        other = y._replace(tokens=y.tokens.at[1, 6].add(1.0))
        a, b = jit(lambda net, x, y, z: (net(x, T, y), net(x, T, z)))(net, x, y, other)
        assert np.abs(a[1] - b[1]).max() > 1e-4
        np.testing.assert_allclose(a[0], b[0], rtol=1e-5, atol=1e-5)
        for wrong, message in (
            (None, r"is told a text: y is NoneType; expected Text\(tokens \(2, any, 6\)"),
            (nets.Text(y.tokens[..., :5], y.pooled), r"tokens \(2, 7, 5\)"),
        ):
            with pytest.raises(ValueError, match=message):
                net(x, T, wrong)
    with pytest.raises(ValueError, match=r"pooled None; expected .* pooled \(2, 4\)"):
        make("MMDiT")(sample(2, 8, 8, 3), T, nets.Text(sample(2, 7, 6)))


def test_fir_resampling():
    """A constant stays one inside; down is the filter's correlation; up then down is a symmetric smoothing."""
    x = sample(1, 8, 8, 2)
    line = np.asarray([1, 3, 3, 1]) / 8
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    want = np.zeros((1, 4, 4, 2))
    for i, j in np.ndindex(4, 4):
        want[:, i, j] = np.einsum("a,b,nabc->nc", line, line, padded[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4])
    close(unet_blocks.resample(x, "down", True), want)
    up = np.asarray(unet_blocks.resample(jnp.ones((1, 4, 4, 1), jnp.float32), "up", True))
    np.testing.assert_allclose(up[0, 1:-1, 1:-1, 0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(up[0, 0, 1:-1, 0], 0.75, rtol=1e-6)  # zeros stand outside


# --- autoencoders
@functools.cache
def coder(name, **options):
    small = {"width": 4, "multipliers": (1, 2), "blocks": 1, "attention_at": (4,)}
    return filled(abstract(name, 8, 3, latent_channels=2, **small, **options))


def test_kl_autoencoder():
    net, x = coder("AutoencoderKL"), sample(2, 8, 12, 3)
    q, back, z = jit(lambda net, x: (q := net.encode(x), net.decode(q.mean), q.sample(jax.random.key(0))))(net, x)
    assert q.mean.shape == z.shape == (2, 4, 6, 2) and back.shape == x.shape
    one = type(q)(jnp.full((1, 1, 1, 1), 2.0, jnp.float32), jnp.full((1, 1, 1, 1), np.log(0.25), jnp.float32))
    np.testing.assert_allclose(one.kl(), 0.5 * (0.25 + 4 - 1 - np.log(0.25)), rtol=1e-6)
    drawn = type(q)(*(jnp.broadcast_to(v, (1, 400, 400, 1)) for v in one)).sample(jax.random.key(1))
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [2.0, 0.5], atol=4 * 0.5 / 400)
    with pytest.raises(ValueError, match=r"height and width 2 divides; it was given \(2, 7, 8, 3\)"):
        net.encode(x[:, :7, :8])
    with pytest.raises(ValueError, match=r"attention_at \[5\] is no resolution"):
        abstract("AutoencoderKL", 8, 3, attention_at=(5,), multipliers=(1, 2))
    assert nnx.eval_shape(lambda: nets.build(**net.config, rngs=nnx.Rngs(0))).config == net.config


def test_vector_quantisation():
    """The nearest code by brute force; the encoder's gradient passes through, the codes' comes from the loss."""
    net, z = coder("VQAutoencoder", codes=7), sample(2, 3, 3, 2)

    def value(net, z):
        q = net.quantise(z)
        return (jnp.arange(36, dtype=jnp.float32).reshape(q.z.shape) * q.z).sum(), (q, q.loss)

    (_, (q, loss)), (by_net, by_z) = jit(jax.value_and_grad(value, (0, 1), has_aux=True))(net, z)
    book = np.asarray(net.codebook[...])
    nearest = np.square(np.asarray(z)[..., None, :] - book).sum(-1).argmin(-1)
    np.testing.assert_array_equal(q.codes, nearest)
    close(q.z, book[nearest])
    np.testing.assert_allclose(by_z.ravel(), np.arange(36.0), rtol=1e-6)
    assert not np.any(by_net.codebook[...])
    np.testing.assert_allclose(loss, 1.25 * np.square(np.asarray(z) - book[nearest]).mean(), rtol=1e-5)
    moved, pulled = jit(jax.grad(lambda net, z: net.quantise(z).loss, (0, 1)))(net, z)
    close(pulled, 0.25 * 2 * (np.asarray(z) - book[nearest]) / z.size)
    want = np.zeros_like(book)
    np.add.at(want, nearest, 2 * (book[nearest] - np.asarray(z)) / z.size)
    close(moved.codebook[...], want)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: abstract("UViT", 8, 3, **{**SMALL["UViT"], "depth": 3}), "depth is 3; expected an even number"),
        (lambda: abstract("UViT", 8, 3, **{**SMALL["UViT"], "patch": 3}), "patch 3 does not divide image_size 8"),
        (lambda: abstract("UViT", 8, 3, **SMALL["UViT"], context=4), "a text or labels, not both"),
        (lambda: abstract("MMDiT", 8, 3, **{**SMALL["MMDiT"], "depth": 1}), "a depth of 2 or more"),
        (lambda: abstract("MMDiT", 8, 3, **SMALL["MMDiT"], dual=2), r"dual=2 of depth=3 blocks; expected 0 to 1 of"),
        (lambda: abstract("MMDiT", 8, 3, **{**SMALL["MMDiT"], "heads": 3}), "divisible by heads 3"),
        (lambda: abstract("UNet", 8, 3, **SMALL["ldm"], style="song"), "styles: adm, ddpm"),
        (lambda: make("UViT")(sample(2, 8, 8, 3), jnp.ones((2, 8, 8, 1), jnp.float32)), "a time a sample"),
    ],
)
def test_what_is_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()
