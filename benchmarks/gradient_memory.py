"""Memory of a gradient through sampling, by the way it is taken and the number of steps.

    python benchmarks/gradient_memory.py                 an MLP, batch 64: about a minute on a CPU
    python benchmarks/gradient_memory.py --width 1024 --steps 10 100 1000

Compiled, not run: the temporary bytes that XLA plans for one program, d loss / d (parameters, noise), from
`compile().memory_analysis()`. It does not depend on the machine's load. BDIA is the solver of the exact gradients, so
that all differentiate one table; AdjointDPM runs DDIM forward and Heun on the adjoint.
"""

import argparse

import jax
import jax.numpy as jnp

import jdiff
from jdiff import gradients, process, solvers, times

WAYS = ("direct", "checkpoint", "reversible", "adjoint")


def held(way, n, args):
    p = process.vp_linear()
    t = times.logsnr(p, n, end=0.01)
    table = (solvers.ddim() if way == "adjoint" else solvers.bdia())(p, t)
    shapes = [(args.dim, args.width), (args.width, args.width), (args.width, args.dim)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, shapes, strict=True)]

    def network(params, x, t):
        for w in params[:-1]:
            x = jnp.tanh(x @ w + t)
        return x @ params[-1]

    def loss(params, x):
        denoiser = jdiff.denoiser(network, p, "x0", params=params)
        if way == "adjoint":
            return jnp.sum(gradients.adjoint(denoiser, table, x, t) ** 2)
        return jnp.sum(gradients.sample(denoiser, table, x, gradient=way) ** 2)

    x = p.prior(jax.random.key(1), (args.batch, args.dim))
    program = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
    return program.memory_analysis().temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--width", type=int, default=256, help="of the MLP's two hidden layers")
    args = parser.parse_args()
    print(f"MLP {args.dim} - {args.width} - {args.width} - {args.dim}, batch {args.batch}, float32; MiB held")
    print(f"{'steps':12}" + "".join(f"{n:>10}" for n in args.steps))
    for way in WAYS:
        print(f"{way:12}" + "".join(f"{held(way, n, args) / 2**20:10.2f}" for n in args.steps), flush=True)


if __name__ == "__main__":
    main()
