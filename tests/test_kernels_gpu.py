"""The Hopper kernel, interpreted on a CPU, against the reference; who gets it; and what compiles for an H200."""

import functools
import importlib
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
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_kernels import arrays, gradients, hollow

from jdiff import kernels, mesh
from jdiff.kernels import dispatch, formulas, gpu, grid, masks, mosaic_gpu, reference, sequence, softmax

PRIVATE = "jax._src.pallas.mosaic_gpu.interpret.params"  # JAX 0.10 has no public door
Params = (
    plgpu.InterpretGPUParams
    if hasattr(plgpu, "InterpretGPUParams")
    else importlib.import_module(PRIVATE).InterpretGPUParams
)

# name: (b, h, n, m, d), dtype, options
CASES = {
    "one": ((1, 1, 1, 1, 8), jnp.float32, {}),
    "rounds of the ring": ((1, 1, 130, 500, 64), jnp.float32, {"scale": 0.05}),
    "bfloat16": ((2, 2, 100, 140, 72), jnp.bfloat16, {"bias": (1, 2), "segments": True}),
    "float16": ((1, 1, 256, 256, 128), jnp.float16, {"mask": masks.window((16, 16), 4.0)}),
    "hollow": ((1, 1, 140, 200, 16), jnp.float32, {"mask": hollow(140, 200), "bias": (1, 1), "segments": True}),
    "block-causal": ((1, 1, 300, 300, 64), jnp.float32, {"mask": masks.block_causal(300, 90)}),
    "window 3-D, text": ((1, 1, 266, 266, 64), jnp.float32, {"mask": masks.window((4, 8, 8), 2.5, text=10)}),
    "float32, 72": ((1, 1, 70, 20, 72), jnp.float32, {"segments": True}),
    "logits of 1e4": ((1, 1, 130, 130, 16), jnp.float32, {"size": 70.0}),
}
QUICK = ("one", "hollow", "float32, 72")


def case(name):
    shape, dtype, options = CASES[name]
    kept = {name: options[name] for name in ("mask", "scale") if name in options}
    rest = {name: value for name, value in options.items() if name not in kept}
    args, extras = arrays(*shape, dtype=dtype, **rest)
    return args, extras | kept


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in CASES])
def test_kernel_is_the_reference(name):
    args, extras = case(name)
    want = gradients(reference.attention, *(a.astype(jnp.float64) for a in args), **extras)
    got = gradients(functools.partial(gpu.attention, interpret=Params(detect_races=True)), *args, **extras)
    # float32's rounding of a logit of 1e4 is 5e-4, of a probability in bfloat16 2^-9 and in float16 2^-12
    relative = {"bfloat16": 2**-6, "float16": 2**-9, "logits of 1e4": 2e-3}.get(name, 5e-6)
    for a, c in zip(got, want, strict=True):
        assert a.dtype == (jnp.float32 if a.shape[-1] != args[0].shape[-1] else args[0].dtype)
        np.testing.assert_allclose(a.astype(jnp.float64), c, atol=relative * max(1.0, float(np.abs(c).max())))


@pytest.mark.parametrize("terms", [1, 2])
def test_fewer_terms_are_not_float32(monkeypatch, terms):
    """The bound above, of float32, is missed without the products of the smaller terms (2: BF16_BF16_F32_X3)."""
    monkeypatch.setattr(mosaic_gpu, "TERMS", terms)
    (q, k, v, _), _ = arrays(1, 1, 20, 30, 16)
    want = reference.attention(*(a.astype(jnp.float64) for a in (q, k, v)))
    error = float(jnp.abs(gpu.attention(q, k, v, interpret=Params()).astype(jnp.float64) - want).max())
    assert error > {1: 1e-3, 2: 8e-6}[terms]


def test_terms_sum_to_the_number():
    """To its last bit, compiled in one program; the largest number too, which rounded to bfloat16 is inf."""
    x = np.random.default_rng(0).normal(size=100).astype(np.float32) * np.float32(10.0) ** np.arange(-25, 25).repeat(2)
    x = np.append(x, np.float32([0, 1, np.finfo(np.float32).max])).astype(np.float32)
    terms = jax.jit(lambda x: list(mosaic_gpu.split(x, mosaic_gpu.TERMS, jnp.bfloat16)))(x)
    assert [a.dtype for a in terms] == [jnp.bfloat16] * 3
    np.testing.assert_array_equal(sum(np.asarray(a, np.float64) for a in terms), x)
    assert mosaic_gpu.products(3) == [(0, 2), (1, 1), (2, 0), (0, 1), (1, 0), (0, 0)]


@pytest.mark.parametrize("path", ["tpu", "mosaic_gpu"])
def test_parts_of_the_ring_are_the_whole(path):
    """Two parts of the keys, merged, and their gradients by the lse of all keys; some queries attend to nothing."""
    (q, k, v, dout), extras = arrays(1, 1, 30, 60, 16, segments=True)
    want = gradients(reference.attention, *(a.astype(jnp.float64) for a in (q, k, v, dout)), **extras)
    how = sequence.How(0.25, path, Params() if path == "mosaic_gpu" else True)
    mine, theirs = extras["segment_ids"]
    parts = [(k[:, i], v[:, i], (mine, theirs[:, i])) for i in (slice(0, 17), slice(17, 60))]
    lse, out = jnp.full((1, 1, 30), -jnp.inf, jnp.float32), jnp.zeros((1, 1, 30, 16), jnp.float32)
    for part in parts:
        more, more_lse = sequence._part(how, q, *part)
        lse, out = softmax.merge(lse, out, more_lse, more.swapaxes(1, 2))
    out = out.swapaxes(1, 2)
    delta = formulas.row_sums(out, dout)
    each = [sequence._part_gradients(how, q, *part, lse, delta, dout) for part in parts]
    got = out, sum(a for a, _, _ in each), *(jnp.concatenate(list(a), 1) for a in list(zip(*each, strict=True))[1:])
    for a, c in zip(got, want, strict=True):
        np.testing.assert_allclose(a, c, atol=5e-6 * max(1.0, float(np.abs(c).max())))


def test_the_ring_takes_it_by_name_only(monkeypatch):
    """The default is not it; by name it is, or the error says why not; cuDNN's gradient cannot serve a ring."""
    q = jnp.zeros((1, 32, 2, 64), jnp.bfloat16)

    def lowered(implementation, platform):
        ring = mesh.on(mesh.make("sequence=2,data=4"), functools.partial(kernels.ring, implementation=implementation))
        return jax.jit(ring).trace(q, q, q).lower(lowering_platforms=(platform,)).as_text()

    assert "custom_call" not in lowered(None, "cpu")
    with pytest.raises(ValueError, match="ring attention has no 'cudnn', whose gradient"):
        lowered("cudnn", "cuda")
    with pytest.raises(ValueError, match="unknown implementation 'mosaic'"):
        lowered("mosaic", "cuda")
    monkeypatch.setattr(dispatch, "_lacks_hopper", lambda: "no Hopper")
    with pytest.raises(ValueError, match="'mosaic_gpu' was asked for, but no Hopper"):
        lowered("mosaic_gpu", "cuda")
    monkeypatch.setattr(dispatch, "_lacks_hopper", lambda: None)
    # in the kernel's place, which JAX 0.10 does not trace
    monkeypatch.setattr(gpu, "forward", lambda options, q, *_: (jnp.cosh(q), jnp.zeros((1, 2, 16), jnp.float32)))
    assert "cosh" not in lowered(None, "cuda") and "cosh" in lowered("mosaic_gpu", "cuda")
    with pytest.raises(ValueError, match="it is for cuda and the program is for cpu"):
        lowered("mosaic_gpu", "cpu")
    with pytest.raises(ValueError, match="it is for tpu and the program is for cpu"):
        lowered("tpu", "cpu")


def test_vmap():
    q, k, v = (jax.random.normal(jax.random.key(i), (3, 1, 20, 1, 8), jnp.float32) for i in range(3))
    out = jax.vmap(functools.partial(gpu.attention, interpret=Params()))(q, k, v)
    np.testing.assert_allclose(out, jax.vmap(reference.attention)(q, k, v), atol=1e-5)


def test_rows_list_the_blocks_that_are_not_empty():
    kind = masks.blocks(hollow(300, 200), 128, 64).kind
    rows = grid.rows(kind)
    met = [rows.inner[a:c].tolist() for a, c in zip(rows.start[:-1], rows.start[1:], strict=True)]
    assert met == [np.flatnonzero(row != masks.EMPTY).tolist() for row in kind] and met[0] == []
    found = [rows.pattern[a:c].tolist() for a, c in zip(rows.start[:-1], rows.start[1:], strict=True)]
    assert found == [row[row != masks.EMPTY].tolist() for row in kind]


# ---------------------------------------------------------------------------------------------------------- dispatch
ask = functools.partial(kernels.choice, (2, 256, 16, 72), platform="cuda", implementation="mosaic_gpu")


def test_it_is_taken_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(dispatch, "MOSAIC_GPU_SINCE", (0, 10))
    monkeypatch.setattr(dispatch, "_has_cuda", lambda: True)
    assert ask() == ask(dtype=jnp.float32) == ("mosaic_gpu", "it was asked for")
    assert kernels.choice((2, 256, 16, 72), platform="cuda").path == "xla"  # not measured: not a default
    for change, match in (
        ({"platform": "cpu"}, r"'mosaic_gpu' was asked for, but it is for cuda and the program is for cpu"),
        ({"platform": "tpu"}, r"is for cuda and the program is for tpu; leave `implementation` out there"),
        ({"platform": "cuda", "implementation": "tpu"}, r"'tpu' was asked for, but it is for tpu and the program is"),
        ({"dtype": jnp.float64}, r"float64 has no kernel for Hopper \(float16, bfloat16 and float32 have\)"),
        ({"q_shape": (2, 256, 16, 256)}, r"head dimension 256 has no kernel for Hopper \(1 to 128 have\)"),
    ):
        options = {"q_shape": (2, 256, 16, 72), "platform": "cuda", "implementation": "mosaic_gpu"} | change
        with pytest.raises(ValueError, match=match):
            kernels.choice(**options)
    monkeypatch.setattr(dispatch, "_capabilities", lambda: {"8.0", "9.0"})
    with pytest.raises(ValueError, match=r"is for Hopper, compute capability 9.0, and a GPU here has 8.0"):
        ask()
    monkeypatch.setattr(dispatch, "_has_cuda", lambda: False)
    with pytest.raises(ValueError, match=r"JAX's CUDA plugin is not here: pip install 'jdiff\[cuda\]'"):
        ask()
    monkeypatch.setattr(dispatch, "MOSAIC_GPU_SINCE", (99, 0))
    with pytest.raises(ValueError, match=r"it needs JAX 99.0 or newer, and this is \d"):
        ask()


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f, lambda f: jax.grad(lambda q: f(q).sum()), jax.vmap])
def test_another_platform_is_told_so(wrap):
    """Traced anywhere; refused where it is lowered for a platform that is not its own, with the reason."""
    q = jnp.zeros((1, 1, 64, 1, 64), jnp.float32)
    q = q if wrap is jax.vmap else q[0]
    fn = wrap(lambda q: kernels.attention(q, q, q, implementation="tpu"))
    with pytest.raises(ValueError, match=r"'tpu' was asked for, but it is for tpu and the program is for cpu"):
        fn(q)
    text = jax.jit(fn).trace(q).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text and "another_platform" not in text


# ----------------------------------------------------------------------------------------------- ahead of time
WHEELS = ("jax_cuda13_plugin", "jax_plugins.xla_cuda13", "nvidia.cu13")


def has_compiler():
    try:
        return jax.__version_info__ >= dispatch.MOSAIC_GPU_SINCE and all(map(importlib.util.find_spec, WHEELS))
    except ModuleNotFoundError:
        return False


@pytest.mark.long
@pytest.mark.skipif(not has_compiler(), reason="the CUDA plugin and compiler are not installed: see docs/kernels.md")
def test_kernels_compile_for_an_h200():
    """By Mosaic GPU and NVIDIA's ptxas; nothing is run."""
    root = Path(__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "tests/aot_kernels_gpu.py"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 12
    assert {line["case"]: line["permutes"] for line in lines if line["permutes"]}.keys() == {"ring of four"}
    for line in lines:
        assert line.get("kernels") == 3 and len(line["each"]) == 3, line  # forward, dq, and dk with dv
        for name, kernel in line["each"].items():
            assert kernel["target"] == "sm_90a" and kernel["wgmma"] > 0, (line, name)
            assert kernel["wgmma"] % (6 if "float32" in line["case"] else 1) == 0, (line, name)
            assert kernel["shared memory"] <= 232448 and kernel["spilled"] <= 64, (line, name)
