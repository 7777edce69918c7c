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

from jdiff import kernels
from jdiff.kernels import dispatch, gpu, grid, masks, mosaic_gpu, reference

PRIVATE = "jax._src.pallas.mosaic_gpu.interpret.params"  # JAX 0.10 has no public door
Params = (
    plgpu.InterpretGPUParams
    if hasattr(plgpu, "InterpretGPUParams")
    else importlib.import_module(PRIVATE).InterpretGPUParams
)

# name: (b, h, n, m, d), dtype, options. float32 is refused on a GPU, and shows here what bfloat16's rounding hides.
CASES = {
    "one": ((1, 1, 1, 1, 8), jnp.float32, {}),
    "rounds of the ring": ((1, 1, 130, 500, 64), jnp.float32, {"scale": 0.05}),
    "bfloat16": ((1, 2, 140, 200, 72), jnp.bfloat16, {"bias": (1, 1), "segments": True}),
    "float16": ((1, 1, 256, 256, 128), jnp.float16, {"mask": masks.window((16, 16), 4.0)}),
    "hollow": ((2, 1, 300, 200, 16), jnp.float32, {"mask": hollow(300, 200), "bias": (2, 1), "segments": True}),
    "block-causal": ((1, 1, 300, 300, 64), jnp.float32, {"mask": masks.block_causal(300, 90)}),
    "window 3-D, text": ((1, 1, 266, 266, 64), jnp.float32, {"mask": masks.window((4, 8, 8), 2.5, text=10)}),
    "logits of 1e4": ((1, 1, 130, 130, 16), jnp.float32, {"size": 70.0}),
}
QUICK = ("one", "bfloat16")


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
