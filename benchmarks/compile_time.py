"""Seconds to compile the training step and the sampler for a TPU topology, without a TPU; and again from the cache.

    python benchmarks/compile_time.py --net DiT-XL/2 --topology v5e:16x16 --mesh data=2,fsdp=128 --batch 2048

Each in a process of its own: lowering and compiling, in wall-clock and processor seconds (all threads), the second time
from JAX's compilation cache. Wants TPU's compiler: pip install 'jdiff[aot]'; cpu:8 does without.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def child(options: dict) -> dict:
    import jax

    from jdiff.plan import PlanConfig, chips, program
    from jdiff.plan.estimate import find_devices

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    config = PlanConfig(**options)
    devices = find_devices(chips.parse(config.topology))
    times = [(time.perf_counter(), time.process_time())]

    def lap() -> list[float]:
        times.append((time.perf_counter(), time.process_time()))
        return [b - a for a, b in zip(times[-2], times[-1], strict=True)]

    traced = program.build(config, devices).traced
    trace = lap()
    lowered = traced.lower()
    lower = lap()
    lowered.compile()
    return {"trace": trace, "lower": lower, "compile": lap()}


def main(options: argparse.Namespace) -> None:
    from jdiff.plan import chips
    from jdiff.plan.command import LIBTPU

    topology = chips.parse(options.topology)
    flags = f"--xla_force_host_platform_device_count={topology.shape[0]}"
    extra = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} if topology.kind == "cpu" else LIBTPU
    base = {k: getattr(options, k) for k in ("net", "topology", "mesh", "batch", "remat")}
    print("| program | start | trace, s | lower, s | compile, s | (processor seconds) |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        for what, more in (("training step", {}), (f"sampler, {options.nfe} evaluations", {"sample": options.nfe})):
            for start in ("first", "second"):
                env = {**os.environ, **extra, "JAX_COMPILATION_CACHE_DIR": cache}
                command = [sys.executable, __file__, "--child", json.dumps(base | more)]
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                if done.returncode:
                    print(f"| {what} | {start} | failed: {done.stderr.strip().splitlines()[-1][:200]} |")
                    break
                t = json.loads(done.stdout.strip().splitlines()[-1])
                wall = " | ".join(f"{t[k][0]:.1f}" for k in ("trace", "lower", "compile"))
                cpu = ", ".join(f"{t[k][1]:.1f}" for k in ("trace", "lower", "compile"))
                print(f"| {what} | {start} | {wall} | ({cpu}) |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="DiT-XL/2")
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--mesh", default="data=2,fsdp=128")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--nfe", type=int, default=50)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("\n" + json.dumps(child(json.loads(arguments.child))))
    else:
        main(arguments)
