"""Compile time of a DiT against its depth, layers scanned or unrolled.

    python benchmarks/compile_depth.py                      DiT-S/2 on 32 x 32 x 4, batch 4, depth 12 and 28
    python benchmarks/compile_depth.py --depths 2 4 --width 64 --repeats 1

One line a program: seconds from Python to an executable (tracing, lowering, XLA), the least of the repeats, and the
ratio of the deepest to the shallowest. Scanned blocks should stay near 1; the unrolled loop is the baseline, compiled
in the same process. Parameters are never allocated.
"""

import argparse
import time

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff import nets


def unrolled(net, x, t, y):
    """`net(x, t, y)` with a Python loop over its blocks in place of the scan."""
    h, c = net.embed(x, t, y)
    for i in range(net.depth):
        h = jax.tree.map(lambda p, i=i: p[i], net.blocks)(h, c)
    return net.project(h, c).astype(jnp.float32)


def compile_seconds(fn, arguments, repeats):
    """The least wall-clock time to trace, lower and compile fn, caches cleared before each."""
    seconds = []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        jax.jit(fn).lower(*arguments).compile()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 28], help="numbers of blocks")
    parser.add_argument("--width", type=int, default=384, help="width of a token; 64 channels a head")
    parser.add_argument("--remat", default="none", choices=nets.REMAT, help="rematerialisation of a block")
    parser.add_argument("--repeats", type=int, default=3, help="the least of so many compilations is printed")
    args = parser.parse_args()

    x = jax.ShapeDtypeStruct((4, 32, 32, 4), jnp.float32)
    t = jax.ShapeDtypeStruct((4,), jnp.float32)
    y = jax.ShapeDtypeStruct((4,), jnp.int32)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.jit(jnp.sin).lower(t).compile()  # XLA's own start-up is not the net's
    print(f"compile seconds on {jax.default_backend()}, width {args.width}, remat {args.remat}")
    print(f"{'':22}" + "".join(f"depth {d:<6}" for d in args.depths) + "ratio")
    for layers, apply in {"scanned": lambda net, *a: net(*a), "unrolled": unrolled}.items():
        for what in ("forward", "gradient"):
            fn = apply
            if what == "gradient":

                def fn(net, x, t, y, apply=apply):
                    return jax.grad(lambda net: jnp.square(apply(net, x, t, y)).mean())(net)

            seconds = []
            for depth in args.depths:
                size = {"width": args.width, "heads": args.width // 64, "depth": depth, "remat": args.remat}
                net = nnx.eval_shape(
                    lambda size=size: nets.build("DiT-S/2", 32, 4, num_classes=1000, rngs=nnx.Rngs(0), **size)
                )
                seconds.append(compile_seconds(fn, (net, x, t, y), args.repeats))
            numbers = "".join(f"{s:<12.2f}" for s in seconds)
            print(f"{layers + ' ' + what:22}{numbers}{seconds[-1] / seconds[0]:.2f}", flush=True)


if __name__ == "__main__":
    main()
