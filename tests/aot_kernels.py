"""Compile the attention kernels for TPUs that are not there; a program of its own, which test_kernels.py runs once.

    python tests/aot_kernels.py v5e:2x2 v5p:2x2x1 v6e:2x2        needs libtpu: pip install 'jdiff[aot]'

One JSON line a topology and case: seconds to lower and compile, kernels in the program, or the compiler's error.
"""

import json
import os
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jdiff import kernels
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


def program(n, m, d, dtype, mask, extras, sharding):
    """The gradient of a sum of attention, lowered: the kernel is found by the platform, as users have it."""
    b, h = 2, 4
    shape = lambda *size, dtype=dtype: jax.ShapeDtypeStruct(size, dtype, sharding=sharding)
    args = [shape(b, n, h, d), shape(b, m, h, d), shape(b, m, h, d)]
    args += [shape(1, h, n, m, dtype=jnp.float32), shape(b, n, dtype=jnp.int32), shape(b, m, dtype=jnp.int32)] * extras

    def loss(q, k, v, bias=None, *ids):
        out = kernels.attention(q, k, v, mask=mask, bias=bias, segment_ids=ids or None)
        return out.astype(jnp.float32).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*args)


def main():
    os.environ |= LIBTPU  # read when the compiler is loaded
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    for name in sys.argv[1:]:
        device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        sharding = jax.sharding.SingleDeviceSharding(device)
        for case, what in CASES.items():
            start, line = time.process_time(), {"topology": name, "case": case}
            try:
                compiled = program(*what, sharding).compile()
                line["kernels"] = compiled.as_text().count('custom_call_target="tpu_custom_call"')
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}"[:2000]
            print(json.dumps(line | {"seconds": round(time.process_time() - start, 2)}), flush=True)


if __name__ == "__main__":
    main()
