"""Compile the attention kernels for TPUs that are not there; a program of its own, which test_kernels.py runs once.

    python tests/aot_kernels.py v5e:2x2 v5p:2x2x1 v6e:2x2        needs libtpu: pip install 'jdiff[aot]'

One JSON line a topology and case: seconds to lower and compile, kernels in the program, or the compiler's error.
"""

import functools
import json
import os
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jdiff import kernels, mesh
from jdiff.kernels import masks
from jdiff.plan.command import LIBTPU

WINDOW = masks.window((32, 32), 6.0)
# name: n, m, d, dtype, mask, whether with a bias and segment ids
CASES = {
    "DiT-XL/2, 256 tokens": (256, 256, 72, jnp.bfloat16, None, False),
    "4096 tokens": (4096, 4096, 128, jnp.bfloat16, None, False),
    "window": (1024, 1024, 64, jnp.bfloat16, WINDOW, False),
    "float32, odd, bias, segments": (200, 77, 64, jnp.float32, None, True),
}


def program(n, m, d, dtype, mask, extras, devices, attention=kernels.attention):
    """The gradient of a sum of attention, lowered: the kernel is found by the platform, as users have it."""
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    shape = lambda *size, dtype=dtype: jax.ShapeDtypeStruct(size, dtype, sharding=sharding)
    args = [shape(2, n, 4, d), shape(2, m, 4, d), shape(2, m, 4, d)]
    args += [shape(1, 4, n, m, dtype=jnp.float32), shape(2, n, dtype=jnp.int32), shape(2, m, dtype=jnp.int32)] * extras
    return gradient(
        lambda q, k, v, bias=None, *ids: attention(q, k, v, mask=mask, bias=bias, segment_ids=ids or None), args
    )


def on_mesh(fn, axes, devices):
    """The same of 256 tokens over four chips."""
    m = mesh.make(axes, devices[:4])
    args = [jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16, sharding=mesh.batch(m))] * 3
    return gradient(mesh.on(m, fn), args)


def gradient(fn, args):
    loss = lambda *args: fn(*args).astype(jnp.float32).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*args)


def main():
    os.environ |= LIBTPU  # read when the compiler is loaded
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    for name in sys.argv[1:]:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        cases = {case: functools.partial(program, *what) for case, what in CASES.items()}
        cases["heads over a mesh"] = functools.partial(on_mesh, kernels.attention, "data=2,tensor=2")
        cases["ring"] = functools.partial(on_mesh, kernels.ring, "sequence=4")
        for case, lower in cases.items():
            start, line = time.process_time(), {"topology": name, "case": case}
            try:
                line["kernels"] = lower(devices).compile().as_text().count('custom_call_target="tpu_custom_call"')
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}"[:2000]
            print(json.dumps(line | {"seconds": round(time.process_time() - start, 2)}), flush=True)


if __name__ == "__main__":
    main()
