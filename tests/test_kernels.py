"""Attention: the reference against NumPy, the TPU kernel, interpreted, against the reference, and what compiles."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from jdiff import kernels, mesh, nets
from jdiff.kernels import dispatch, grid, masks, reference, tpu
from jdiff.kernels.masks import EMPTY, FULL


def numpy_attention(q, k, v, bias=None, mask=None, segment_ids=None, scale=None):
    """Query by query in float64, from the definition."""
    b, n, h, d = q.shape
    out = np.zeros(q.shape)
    allowed = np.ones((b, n, k.shape[1]), bool) if mask is None else np.broadcast_to(mask.dense(), (b, n, k.shape[1]))
    if segment_ids is not None:
        allowed = allowed & (np.asarray(segment_ids[0])[:, :, None] == np.asarray(segment_ids[1])[:, None, :])
    for i, j, t in np.ndindex(b, h, n):
        keys = np.flatnonzero(allowed[i, t])
        if len(keys):
            logits = k[i, keys, j] @ q[i, t, j] * (d**-0.5 if scale is None else scale)
            if bias is not None:
                logits = logits + np.broadcast_to(bias, (b, h, *bias.shape[2:]))[i, j, t, keys]
            p = np.exp(logits - logits.max())
            out[i, t, j] = p @ v[i, keys, j] / p.sum()
    return out


def arrays(b, h, n, m, d, *, dtype=jnp.float32, bias=None, segments=False, size=2.0, seed=0):
    """q, k of standard deviation `size`, so that logits are far from equal: about size^2; v and a cotangent, of 1."""
    r = np.random.default_rng(seed)
    normal = lambda *shape: r.normal(size=shape)
    q, k, v, dout = size * normal(b, n, h, d), size * normal(b, m, h, d), normal(b, m, h, d), normal(b, n, h, d)
    extras = {}
    if bias is not None:
        extras["bias"] = jnp.asarray(normal(*bias, n, m), jnp.float32)
    if segments:
        extras["segment_ids"] = (
            jnp.asarray(r.integers(0, 4, (b, n)), jnp.int32),
            jnp.asarray(r.integers(0, 3, (b, m)), jnp.int32),
        )
    return tuple(jnp.asarray(a, dtype) for a in (q, k, v, dout)), extras


def gradients(fn, q, k, v, dout, bias=None, segment_ids=None, **options):
    """(out, dq, dk, dv, and dbias if there is one)."""

    @jax.jit
    def run(q, k, v, dout, bias, segment_ids):
        call = lambda q, k, v, bias: fn(q, k, v, segment_ids=segment_ids, **options, **bias)
        out, vjp = jax.vjp(call, q, k, v, {} if bias is None else {"bias": bias})
        *grads, by_bias = vjp(dout)
        return out, *grads, *by_bias.values()

    return run(q, k, v, dout, bias, segment_ids)


def hollow(n, m):
    """Any pattern, in which some queries attend to nothing and some keys are attended to by none."""
    allowed = np.random.default_rng(1).random((n, m)) < 0.3
    allowed[::7] = False
    allowed[:, 5] = False
    allowed[: min(n, 130)] = False  # a whole block of queries
    return masks.dense(allowed)


# ------------------------------------------------------------------------------------------------------------- masks
def test_windows_are_circles():
    for shape, radius in (((9,), 2.5), ((8, 8), 3.0), ((4, 5, 6), 2.0)):
        mask = masks.window(shape, radius)
        at = np.stack(np.unravel_index(np.arange(mask.n), shape), -1)
        distance = np.sqrt(((at[:, None] - at[None]) ** 2).sum(-1))
        np.testing.assert_array_equal(mask.dense(), distance < radius)
        assert mask.pairs == (distance < radius).sum()
    # Gauss: 25 lattice points at a squared distance < 9 of the middle; at <= 9 they are 29
    assert masks.window((8, 8), 3.0).dense()[8 * 4 + 4].sum() == 25
    assert masks.window((8, 8), 100.0).dense().all()
    text = masks.window((4, 4), 1.5, text=3).dense()
    assert text[:3].all() and text[:, :3].all()
    np.testing.assert_array_equal(text[3:, 3:], masks.window((4, 4), 1.5).dense())


def test_masks_of_blocks():
    causal = masks.block_causal(7, 3).dense()
    np.testing.assert_array_equal(causal.sum(1), [3, 3, 3, 6, 6, 6, 7])
    sparse = masks.block_sparse(5, 7, 3, [(0, 2), (1, 0)]).dense()
    assert sparse.sum() == 3 * 1 + 2 * 3 and sparse[:3, 6:].all() and sparse[3:, :3].all()
    near, before = masks.window((8,), 3.0), masks.block_causal(8, 1)
    np.testing.assert_array_equal((near & before).dense(), near.dense() & before.dense())
    np.testing.assert_array_equal((near | before).dense(), near.dense() | before.dense())
    assert near == masks.window([8], 3) and hash(near) == hash(masks.window([8], 3)) and near != before


@pytest.mark.parametrize(
    "mask", [hollow(300, 200), masks.block_causal(300, 96), masks.full(200, 136)], ids=lambda m: m.key[0]
)
def test_blocks_say_what_the_mask_says(mask):
    cut = masks.blocks(mask, 128, 64)
    dense = np.zeros((384, -(-mask.m // 64) * 64), bool)
    dense[: mask.n, : mask.m] = mask.dense()
    for i, j in np.ndindex(*cut.kind.shape):
        block, kind = dense[i * 128 : (i + 1) * 128, j * 64 : (j + 1) * 64], cut.kind[i, j]
        inside = block[: mask.n - i * 128]
        assert (kind == EMPTY) == (not inside.any()) and (kind == FULL) == bool(inside.all())
        if kind >= 0:
            np.testing.assert_array_equal(cut.patterns[kind][: len(inside)], inside)
    order = grid.steps(cut.kind)
    visits = list(zip(order.outer[1:-1].tolist(), order.inner.tolist(), strict=True))
    empty_rows = [(i, 0) for i in np.flatnonzero((cut.kind == EMPTY).all(1)).tolist()]
    assert visits == sorted([*zip(*(a.tolist() for a in np.nonzero(cut.kind != EMPTY)), strict=True), *empty_rows])


def test_a_window_of_tiles_meets_fewer_blocks():
    """32 x 32 tokens, radius 8: by rows a block of 64 is 2 rows; as an 8 x 8 tile it is compact."""
    mask, order = masks.window((32, 32), 8.0), masks.tiles((32, 32), (8, 8))
    tiled = mask.reorder(order)
    np.testing.assert_array_equal(tiled.dense(), mask.dense()[order][:, order])
    by_rows, by_tiles, needed = masks.visited(mask, 64, 64), masks.visited(tiled, 64, 64), mask.pairs / mask.n**2
    assert by_rows == (16 * 9 - 20) / 16**2  # 4 blocks of 2 rows either way, cut at the edges by 4 + 3 + 2 + 1 a side
    assert by_tiles == (4 * 3 - 2) ** 2 / 16**2  # a tile and its 8 neighbours, cut at the edges
    assert needed < by_tiles < by_rows
    # one pattern an offset of -4..4, and rows 0 to 3 apart have the same: a reach of 7 tokens to each side
    assert len(masks.blocks(mask, 64, 64).patterns) == 9 - 2


# --------------------------------------------------------------------------------------------- the reference, NumPy
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 2, 9, 13, 8), {}),
        ((2, 2, 9, 13, 8), {"bias": (2, 1), "segments": True}),
        ((1, 2, 16, 16, 8), {"mask": masks.window((4, 4), 2.0), "scale": 0.7}),
        ((1, 1, 140, 20, 4), {"mask": hollow(140, 20)}),
    ],
)
def test_reference_is_softmax(shape, options):
    (q, k, v, dout), extras = case(shape, options | {"dtype": jnp.float64})
    oracle = lambda q, k, v: numpy_attention(q, k, v, **extras)
    out, *grads = gradients(reference.attention, q, k, v, dout, **extras)
    q, k, v, dout = (np.asarray(a) for a in (q, k, v, dout))
    np.testing.assert_allclose(out, oracle(q, k, v), atol=1e-12)
    r = np.random.default_rng(2)
    for i in range(3):  # a directional derivative of the oracle by central differences
        step = [r.normal(size=a.shape) * (j == i) for j, a in enumerate((q, k, v))]
        ends = [
            np.vdot(dout, oracle(*(a + s * 1e-5 * e for a, e in zip((q, k, v), step, strict=True)))) for s in (1, -1)
        ]
        np.testing.assert_allclose(np.vdot(grads[i], step[i]), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-6)


def test_a_query_that_attends_to_nothing_gives_zero_and_no_gradient():
    mask = hollow(140, 20)
    (q, k, v, dout), _ = arrays(1, 1, 140, 20, 4)
    out, dq, dk, dv = gradients(reference.attention, q, k, v, dout, mask=mask)
    nothing = ~mask.dense().any(1)
    assert nothing.sum() > 130 and not out[:, nothing].any() and not dq[:, nothing].any()
    assert not dk[:, 5].any() and not dv[:, 5].any()
    assert all(np.isfinite(a).all() for a in (out, dq, dk, dv)) and dq.any() and dk.any()
    by_bias = jnp.where(mask.dense(), 0.0, -jnp.inf)[None, None].astype(jnp.float32)
    for a, c in zip(gradients(reference.attention, q, k, v, dout, bias=by_bias), (out, dq, dk, dv), strict=False):
        np.testing.assert_allclose(a, c, atol=1e-6)


# ----------------------------------------------------------------------------------- the kernel, in interpretation
CASES = {
    "one": ((1, 1, 1, 1, 8), {}),
    "odd": ((2, 2, 63, 63, 72), {"bias": (1, 2), "segments": True}),
    "more queries than keys": ((1, 2, 200, 136, 128), {"bias": (1, 1), "scale": 0.05}),
    "block-causal": ((1, 1, 300, 300, 64), {"mask": masks.block_causal(300, 90)}),
    "hollow": ((2, 1, 300, 200, 16), {"mask": hollow(300, 200), "bias": (2, 1), "segments": True}),
    "bfloat16": ((1, 1, 200, 200, 72), {"dtype": jnp.bfloat16, "mask": masks.window((10, 20), 5.0)}),
    "logits of 1e4": ((1, 1, 130, 130, 16), {"size": 70.0}),
}


def case(shape, options):
    kept = {name: options[name] for name in ("mask", "scale") if name in options}
    args, extras = arrays(*shape, **{name: value for name, value in options.items() if name not in kept})
    return args, extras | kept


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_the_reference(name):
    args, extras = case(*CASES[name])
    want = gradients(reference.attention, *(a.astype(jnp.float64) for a in args), **extras)
    got = gradients(functools.partial(tpu.attention, block=(128, 128), interpret=True), *args, **extras)
    # float32's rounding of a logit of 1e4 is 5e-4, of a bfloat16 probability 2^-9
    relative = {"bfloat16": 2**-6, "logits of 1e4": 2e-3}.get(name, 5e-6)
    for a, c in zip(got, want, strict=True):
        assert a.dtype == (jnp.float32 if a.shape[-1] != args[0].shape[-1] else args[0].dtype)
        np.testing.assert_allclose(a.astype(jnp.float64), c, atol=relative * max(1.0, float(np.abs(c).max())))


@pytest.mark.parametrize(
    "mask",
    [
        masks.window((256,), 30.0),
        masks.window((4, 8, 8), 2.5, text=10),
        masks.block_sparse(256, 266, 64, [(0, 1), (1, 4), (3, 0)]),
    ],
    ids=["window 1-D", "window 3-D, text", "block-sparse"],
)
def test_kernel_takes_every_mask(mask):
    (q, k, v, _), _ = arrays(1, 1, mask.n, mask.m, 16)
    out = tpu.attention(q, k, v, mask=mask, block=(128, 128), interpret=True)
    np.testing.assert_allclose(out, reference.attention(q, k, v, mask=mask), atol=1e-5)


@pytest.mark.skipif(not hasattr(pltpu, "InterpretParams"), reason="this JAX has no TPU interpreter with race detection")
def test_kernel_has_no_race_and_reads_nothing_unwritten():
    """The interpreter that simulates the TPU's memories and copies, all of them NaN before they are written."""
    finding = "jax._src.pallas.mosaic.interpret.interpret_pallas_call"  # no public door
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    args, extras = arrays(1, 1, 384, 200, 16, segments=True)
    extras["mask"] = masks.block_sparse(384, 200, 100, [(0, 1), (2, 0), (2, 1)])
    want = gradients(reference.attention, *args, **extras)
    got = gradients(functools.partial(tpu.attention, block=(128, 128), interpret=params), *args, **extras)
    for a, c in zip(got, want, strict=True):
        np.testing.assert_allclose(a, c, atol=1e-4)

    assert not importlib.import_module(finding).races.races_found


# ---------------------------------------------------------------------------------------------------------- dispatch
def test_choice_says_which_path_and_why():
    ask = functools.partial(kernels.choice, (2, 256, 16, 72))
    assert ask(platform="tpu").path == "tpu" and ask(platform="cpu").path == "reference"
    assert ask(platform="cuda").path == "xla" and "cuDNN is not in this process" in ask(platform="cuda").reason
    odd = kernels.choice((2, 256, 16, 20), platform="tpu")
    assert odd == ("xla", "head dimension 20 has no kernel (multiples of 8 up to 256 have): XLA's attention is taken")
    assert "cuDNN has no flash attention in float32" in ask(dtype=jnp.float32, platform="cuda").reason
    assert kernels.choice((1, 2**17, 1, 64), platform="tpu") == (
        "xla",
        "131072 x 131072 tokens are 65536 pairs of blocks, and the kernel's list holds 32768: XLA's attention is taken",
    )
    assert ask(dtype=jnp.float64, platform="tpu") == ("reference", "float64 has no kernel")
    assert ask(platform="cpu", implementation="xla") == ("xla", "it was asked for")
    with pytest.raises(ValueError, match=r"'cudnn' was asked for, but cuDNN is not in this process"):
        ask(platform="cuda", implementation="cudnn")
    with pytest.raises(ValueError, match=r"unknown implementation 'triton'; one of reference, xla, cudnn, tpu"):
        ask(platform="cuda", implementation="triton")


def lowered(fn, *args, platform):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_of_lowering_decides():
    (q, k, v, _), _ = arrays(1, 2, 64, 64, 16)
    assert lowered(kernels.attention, q, k, v, platform="tpu").count("tpu_custom_call") == 1
    assert "tpu_custom_call" not in lowered(kernels.attention, q, k, v, platform="cpu")
    q, k, v = (a[..., :12] for a in (q, k, v))
    assert "tpu_custom_call" not in lowered(kernels.attention, q, k, v, platform="tpu")  # XLA's for 12
    with pytest.raises(ValueError, match=r"'tpu' was asked for, but head dimension 12 has no kernel"):
        kernels.attention(q, k, v, implementation="tpu")


def test_xla_path_is_the_reference():
    args, extras = arrays(2, 2, 140, 20, 16, bias=(1, 2), segments=True)
    extras["mask"] = hollow(140, 20)
    want = gradients(kernels.attention, *args, **extras)
    got = gradients(functools.partial(kernels.attention, implementation="xla"), *args, **extras)
    for a, c in zip(got, want, strict=True):
        np.testing.assert_allclose(a, c, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": (2, 8, 3, 4)}, r"q \(2, 8, 2, 4\), k \(2, 8, 3, 4\)"),
        ({"mask": masks.full(8, 9)}, r"the mask is of 8 x 9 tokens, q and k have 8 x 8"),
        ({"bias": jnp.zeros((2, 3, 8, 8))}, r"bias \(2, 3, 8, 8\); expected \(2 or 1, 2 or 1, 8, 8\)"),
        ({"segment_ids": (jnp.zeros((2, 8), int), jnp.zeros((2, 9), int))}, r"expected \[\(2, 8\), \(2, 8\)\]"),
    ],
)
def test_bad_shapes(change, match):
    q, k = jnp.zeros((2, 8, 2, 4)), jnp.zeros(change.pop("k", (2, 8, 2, 4)))
    with pytest.raises(ValueError, match=match):
        kernels.attention(q, k, k, **change)


def test_bad_masks():
    with pytest.raises(ValueError, match=r"pairs \[\(0, 3\)\] lie outside of 3 x 3 blocks"):
        masks.block_sparse(9, 9, 3, [(0, 0), (0, 3)])
    with pytest.raises(ValueError, match="radius 0; expected a positive"):
        masks.window((4, 4), 0)
    with pytest.raises(ValueError, match="do not combine"):
        _ = masks.full(4) & masks.full(5)
    with pytest.raises(ValueError, match=r"tile \(3, 2\) does not divide the grid \(8, 8\)"):
        masks.tiles((8, 8), (3, 2))


# ------------------------------------------------------------------------------------------------ in nets, on a mesh
@pytest.mark.long
def test_in_a_scanned_net_on_a_mesh(monkeypatch):
    """The kernel, interpreted, where a CPU would take the reference: scanned, rematerialised, split over devices."""
    path = functools.partial(tpu.attention, block=(128, 32), interpret=True)
    monkeypatch.setitem(dispatch._PATHS, "reference", path)
    mask = masks.window((4, 4), 2.5)

    def net(attention):
        build = functools.partial(nets.build, "DiT", 8, 1, patch=2, width=32, depth=2, heads=4, remat="dots")
        model = build(attention=attention, rngs=nnx.Rngs(0))
        wave = lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape)
        return jax.tree.map(wave, model)  # adaLN-Zero is the identity when built

    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1), jnp.float32)
    loss = lambda net, x: jnp.square(net(x, 0.3)).mean()
    plain = functools.partial(reference.attention, mask=mask)
    want = jax.jit(jax.value_and_grad(loss))(net(plain), x)
    m = mesh.make("data=2,fsdp=2,tensor=2")
    model = net(functools.partial(kernels.attention, mask=mask))
    args = jax.device_put(model, mesh.shardings(m, model, model)), jax.device_put(x, mesh.batch(m))
    got = jax.jit(mesh.on(m, jax.value_and_grad(loss)))(*args)
    for a, c in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, c, atol=1e-5)


@pytest.mark.parametrize("axes", ["sequence=8", "data=2,tensor=2,sequence=2"])
@pytest.mark.parametrize("way", ["ring", "ulysses"])
def test_tokens_over_the_mesh(axes, way):
    """Values and gradients equal the reference's on 8 simulated devices."""
    args, extras = arrays(2, 8, 16, 24, 8, segments=True, bias=(1, 8) if way == "ulysses" else None)
    options = {"mask": masks.block_sparse(16, 24, 4, [(0, 1), (1, 0), (1, 5), (3, 3)])} if way == "ulysses" else {}
    m = mesh.make(axes)
    placed = [jax.device_put(a, mesh.batch(m)) for a in args]
    fn = mesh.on(m, functools.partial(gradients, getattr(kernels, way), **options))
    got = jax.jit(fn)(*placed, **jax.device_put(extras, mesh.everywhere(m)))
    for a, c in zip(got, gradients(reference.attention, *args, **extras, **options), strict=True):
        np.testing.assert_allclose(a, c, atol=1e-5)


def test_tokens_that_do_not_divide():
    q = jnp.zeros((1, 20, 3, 8))
    for way, match in (
        (kernels.ring, r"tokens 20 is not divisible by sequence = 8; nearest: 16"),
        (
            lambda q, k, v: kernels.ulysses(q[:, :16], k[:, :16], v[:, :16]),
            r"heads 3 .* tensor x sequence = 8; nearest: 8",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            mesh.on(mesh.make("sequence=8"), way)(q, q, q)


def test_vmap():
    args, extras = arrays(3, 1, 20, 20, 8, segments=True)
    each = lambda q, k, v, s: tpu.attention(
        q[None], k[None], v[None], segment_ids=(s[0][None], s[1][None]), interpret=True
    )[0]
    out = jax.vmap(each)(*args[:3], extras["segment_ids"])
    np.testing.assert_allclose(out, reference.attention(*args[:3], **extras), atol=1e-5)


def test_flops_are_those_of_pairs_that_attend():
    assert kernels.flops((2, 16, 3, 8), (2, 10, 3, 8)) == 2 * 2 * 3 * 16 * 10 * 8 * 2
    assert kernels.flops((1, 64, 1, 8), mask=masks.window((8, 8), 1.0)) == 4 * 8 * 64


# ----------------------------------------------------------------------------------------------- ahead of time
@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jdiff[aot]'"
)
def test_kernels_compile_for_tpus():
    """v5e, v5p and v6e, by Mosaic itself; nothing is run."""
    root = Path(__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "tests/aot_kernels.py", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 3 * 6
    for line in lines:
        assert line.get("kernels") == 3, line  # forward, dq, and dk with dv
