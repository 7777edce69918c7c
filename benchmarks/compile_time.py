"""Seconds to compile the training step and the sampler for a TPU topology, without a TPU; and again from the cache.

    python benchmarks/compile_time.py --net DiT-XL/2 --topology v5e:16x16 --mesh data=16,fsdp=16 --batch 2048
    python benchmarks/compile_time.py --net DiT-S/2 --topology cpu:8 --mesh data=2,fsdp=4 --batch 64

Each in a process of its own: lowering and compiling, in wall-clock and processor seconds (user and system, of all
threads), the second time from the cache: JAX's own for cpu:8, and for TPU topologies, which that one does not take,
that of `jdiff plan`. "whole": the process from its start, imports and all. Wants TPU's compiler: pip install
'jdiff[aot]'; cpu:8 does without.
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

    from jdiff.plan import PlanConfig, chips, kept, program
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
    kept.compiled(lowered, config.topology) if devices[0].platform == "tpu" else lowered.compile()
    return {"trace": trace, "lower": lower, "compile": lap()}


def main(options: argparse.Namespace) -> None:
    from jdiff.plan import chips
    from jdiff.plan.command import LIBTPU

    topology = chips.parse(options.topology)
    flags = f"--xla_force_host_platform_device_count={topology.shape[0]}"
    extra = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} if topology.kind == "cpu" else LIBTPU
    base = {k: getattr(options, k) for k in ("net", "topology", "mesh", "batch", "remat")}
    print("| program | start | trace, s | lower, s | compile, s | whole, s | (processor seconds) | load |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        for what, more in (("training step", {}), (f"sampler, {options.nfe} evaluations", {"sample": options.nfe})):
            for start in ("first", "second"):
                env = {**os.environ, **extra, "JAX_COMPILATION_CACHE_DIR": cache}
                command = [sys.executable, __file__, "--child", json.dumps(base | more)]
                load, began, before = os.getloadavg()[0], time.perf_counter(), os.times()
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                whole, after = time.perf_counter() - began, os.times()
                if done.returncode:
                    print(f"| {what} | {start} | failed: {done.stderr.strip().splitlines()[-1][:200]} |")
                    break
                t = json.loads(done.stdout.strip().splitlines()[-1])
                wall = " | ".join(f"{t[k][0]:.1f}" for k in ("trace", "lower", "compile"))
                used = sum(after[2:4]) - sum(before[2:4])  # of children
                cpu = ", ".join(f"{s:.1f}" for s in (*(t[k][1] for k in ("trace", "lower", "compile")), used))
                print(f"| {what} | {start} | {wall} | {whole:.1f} | ({cpu}) | {load:.1f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="DiT-XL/2")
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--mesh", default="data=16,fsdp=16")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--nfe", type=int, default=50)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("\n" + json.dumps(child(json.loads(arguments.child))))
    else:
        main(arguments)
