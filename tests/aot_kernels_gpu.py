"""Compile the Hopper kernels for an H200 that is not there; a program of its own, which test_kernels_gpu.py runs once.

    pip install 'jax>=0.12' jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvrtc
    python tests/aot_kernels_gpu.py [CASE...]              Python 3.12 or newer; no GPU, CUDA driver or cuDNN

One JSON line a case: seconds to lower and compile, kernels in the program, collective-permutes between GPUs, and of
each kernel what ptxas says: its target, matrix instructions, bytes of shared memory, registers a thread, bytes of them
that it stores to memory; or the compiler's error.
"""

import functools
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from aot_kernels import WINDOW, on_mesh, program
from jax.experimental import topologies

from jdiff import kernels
from jdiff.kernels import masks

# name: n, m, d, dtype, mask, whether with a bias and segment ids
CASES = {
    "DiT-XL/2, 256 tokens": (256, 256, 72, jnp.bfloat16, None, False),
    "4096 tokens": (4096, 4096, 128, jnp.bfloat16, None, False),
    "window": (1024, 1024, 64, jnp.bfloat16, WINDOW, False),
    "block-causal": (1000, 1000, 64, jnp.bfloat16, masks.block_causal(1000, 90), False),
    "block-sparse": (512, 640, 72, jnp.bfloat16, masks.block_sparse(512, 640, 64, [(0, 1), (3, 9), (7, 0)]), False),
    "float16, odd, bias, segments": (200, 77, 64, jnp.float16, None, True),
    "everything at once": (1024, 1024, 128, jnp.bfloat16, masks.window((32, 32), 12.0), True),
    "float32, 256 tokens": (256, 256, 72, jnp.float32, None, False),
    "float32, odd, bias, segments": (200, 77, 64, jnp.float32, None, True),
    "float32, everything at once": (1024, 1024, 128, jnp.float32, masks.window((32, 32), 12.0), True),
}
# What the compiler has to know of the GPU; NVIDIA's numbers.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000
  device_memory_size: 151397597184
}
"""

attention = functools.partial(kernels.attention, implementation="mosaic_gpu")


def found(folder):
    """What was dumped of each kernel since the last call."""
    each = {}
    for file in sorted(folder.iterdir()):  # NAME_NUMBER.KIND; what lowering and what compiling dumps count on their own
        name, text = re.sub(r"_\d+$", "", file.name.split(".")[0]), file.read_text()
        kernel = each.setdefault(name, {})
        if file.suffix == ".ptx":
            kernel["target"] = re.search(r"\.target (\w+)", text)[1]
            kernel["wgmma"] = text.count("wgmma.mma_async")
        if file.suffix == ".ptxas":
            kernel["registers"] = int(re.search(r"Used (\d+) registers", text)[1])
            kernel["spilled"] = int(re.search(r"stack frame, (\d+) bytes spill stores", text)[1])
        if file.name.endswith(".resources.txt"):
            kernel["shared memory"] = int(re.search(r"smem_scratch_bytes=(\d+)", text)[1])
        file.unlink()
    return each


def main():
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    cases = {case: functools.partial(program, *what, attention=attention) for case, what in CASES.items()}
    cases["heads over a mesh"] = functools.partial(on_mesh, attention, "data=2,tensor=2")
    ring = functools.partial(kernels.ring, implementation="mosaic_gpu")
    cases["ring of four"] = functools.partial(on_mesh, ring, "sequence=4")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        target = {"topology_name": "h200", "target_config": H200, "topology": "1x1x4"}
        devices = topologies.get_topology_desc(platform="cuda", **target).devices
        for case in sys.argv[1:] or cases:
            start, line = time.process_time(), {"case": case}
            try:
                text = cases[case](devices).compile().as_text()
                line["kernels"] = text.count('custom_call_target="mosaic_gpu')
                line["permutes"] = len(re.findall(r" collective-permute(?:-start)?\(", text))
                line["each"] = found(Path(folder))
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}"[:2000]
            print(json.dumps(line | {"seconds": round(time.process_time() - start, 2)}), flush=True)


if __name__ == "__main__":
    main()
