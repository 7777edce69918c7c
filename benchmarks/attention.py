"""Attention on the accelerator that is here: TFLOP/s, forward and forward with backward, of every path that runs.

    python benchmarks/attention.py                          DiT shapes; minutes
    python benchmarks/attention.py --tokens 1024 --dims 72 --repeats 5
    python benchmarks/attention.py --dtype float32          our kernels and XLA's attention
    python benchmarks/attention.py --aot v5e:2x2            nothing runs: what the compiled programs are to compute
    python benchmarks/attention.py --work                   nothing compiles: the share of blocks that windows visit

bfloat16 (or `--dtype`), 16 heads, 16,384 tokens in a batch. The milliseconds of one call are the least of `--repeats`
means over ten. FLOPs are those of pairs that attend (`kernels.flops`), times 3.5 with the backward pass, for all paths
alike: a path that computes masked pairs as well is slow by this count, as is one that makes a float32 product of six.
A path that refuses a row says why. Aims: full attention at 0.8 of cuDNN's, windows at the share of work saved. Without
an accelerator it says that none was measured, and times the reference and XLA's attention here.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp

from jdiff import kernels
from jdiff.kernels import grid, masks
from jdiff.plan.command import LIBTPU

HEADS = 16


def windows(side, radius):
    """A CLEAR window on a square grid: in rows, and with the tokens taken in tiles of 16 x 16 (or the whole grid)."""
    mask, tile = masks.window((side, side), radius), (min(side, 16),) * 2
    return {"rows": mask, "tiles": mask.reorder(masks.tiles((side, side), tile))}


def print_work():
    print("share of block pairs that a window visits; needed: of token pairs")
    columns = [f"{order} {size}" for order in ("rows", "tiles") for size in (128, 256)]
    print(f"{'tokens':>7} {'radius':>6} {'needed':>7} " + " ".join(f"{column:>10}" for column in columns))
    for side, radius in ((32, 8.0), (64, 8.0), (64, 16.0), (128, 16.0)):
        found = windows(side, radius)
        shares = [masks.visited(mask, size, size) for mask in found.values() for size in (128, 256)]
        needed = found["rows"].pairs / side**4
        print(f"{side**2:7d} {radius:6.0f} {needed:7.3f} " + " ".join(f"{share:10.3f}" for share in shares), flush=True)


def programs(mask, implementation):
    """(forward, forward with backward), functions of q, k, v."""
    forward = lambda q, k, v: kernels.attention(q, k, v, mask=mask, implementation=implementation)
    loss = lambda q, k, v: forward(q, k, v).astype(jnp.float32).sum()
    return jax.jit(forward), jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def seconds(fn, args, repeats):
    """Of one call: the least of the means over ten."""
    jax.block_until_ready(fn(*args))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(10):
            out = fn(*args)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / 10)
    return best


def measure(tokens, dims, repeats, paths, dtype, batch_tokens=16384):
    print(
        f"{'tokens':>7} {'d':>4} {'mask':>14} {'path':>10} {'fwd ms':>9} {'TFLOP/s':>8} {'both ms':>9} {'TFLOP/s':>8}"
    )
    for n in tokens:
        side = round(n**0.5)
        kinds = {"full": None}
        if side**2 == n and n >= 1024:
            kinds |= {f"window 8 {order}": mask for order, mask in windows(side, 8.0).items()}
        for d in dims:
            shape = (max(batch_tokens // n, 1), n, HEADS, d)
            args = [jax.random.normal(jax.random.key(i), shape, dtype) for i in range(3)]
            for kind, mask in kinds.items():
                for path in paths:
                    flops = kernels.flops(shape, mask=mask)
                    row = f"{n:7d} {d:4d} {kind:>14} {path:>10}"
                    try:
                        forward, both = (seconds(fn, args, repeats) for fn in programs(mask, path))
                    except Exception as error:  # out of memory, a shape that a library refuses
                        print(f"{row}   {type(error).__name__}: {str(error)[:160]}", flush=True)
                        continue
                    rates = (flops / forward / 1e12, 3.5 * flops / both / 1e12)
                    print(f"{row} {1e3 * forward:9.3f} {rates[0]:8.2f} {1e3 * both:9.3f} {rates[1]:8.2f}", flush=True)


def ahead(topology):
    """Full and windowed attention compiled for a TPU: steps of the kernel's grid, FLOPs as the program states them."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    print(f"compiled for {topology}, not run: forward, 1 x 4096 tokens x 16 heads x 72, bfloat16")
    shape = jax.ShapeDtypeStruct((1, 4096, HEADS, 72), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
    for kind, mask in {"full": masks.full(4096), **{f"window 8, {o}": m for o, m in windows(64, 8.0).items()}}.items():
        compiled = programs(mask, "tpu")[0].lower(shape, shape, shape).compile()
        block = grid.block_sizes(mask)
        steps = len(grid.steps(masks.blocks(mask, *block).kind).inner)
        share = steps * block[0] * block[1] / 4096**2
        flops = compiled.cost_analysis()["flops"]
        print(f"{kind:16} blocks {block}, {steps} steps: {share:.3f} of all; {flops:.3g} FLOPs", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 72, 128], help="head dimensions")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--work", action="store_true")
    parser.add_argument("--aot", metavar="TOPOLOGY")
    args = parser.parse_args()
    if args.work:
        return print_work()
    if args.aot:
        os.environ |= LIBTPU  # read when the TPU's compiler is loaded
        jax.config.update("jax_platforms", "cpu")
        return ahead(args.aot)
    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}")
    if device.platform == "cpu":
        print("no accelerator here: nothing was measured for TPU or GPU. On this CPU, one sample of 256 tokens:")
        return measure([256], args.dims, args.repeats, ["reference", "xla"], args.dtype, batch_tokens=256)
    paths = ["xla", "tpu"] if device.platform == "tpu" else ["xla", "cudnn", "mosaic_gpu"]
    for d in args.dims:
        platform = "tpu" if device.platform == "tpu" else "cuda"
        print(f"d {d}: by default {kernels.choice((1, 256, HEADS, d), dtype=args.dtype, platform=platform)}")
    measure(args.tokens, args.dims, args.repeats, paths, args.dtype)


if __name__ == "__main__":
    main()
