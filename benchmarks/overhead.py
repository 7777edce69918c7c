"""What sampling costs beside the network: K evaluations through `jdiff.sample` against K calls of the jitted network.

    python benchmarks/overhead.py                    DiT-S/2, 32 x 32 x 4, batch 4, float32: a few minutes on a CPU
    python benchmarks/overhead.py --solvers unipc3 --nfe 20 --repeats 9

For each solver the two programs alternate (network, sample, network, sample, ..) in one process after a warm-up, and
the ratio is taken pair by pair; printed are the median ratio with its quartiles, in wall-clock time and in processor
time (which other work on the machine disturbs less), and the median wall-clock seconds. "network" is K calls of the
jitted network at one time, dispatched one after the other and waited for at the end. "bare scan" (with --scan) is a
`lax.scan` of the network over K times, which is what XLA makes of a loop without any solver.
Target: at most 1.03 for every solver. "alone" is the processor time of the same program around a network that only
halves its input, as a part of the network's: what the solver itself costs, undisturbed by the network's spread.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jdiff
from jdiff import nets, process, solvers, times

SOLVERS = {
    "ddim": solvers.ddim(),
    "dpm_solver_pp3": solvers.dpm_solver_pp(3),
    "unipc3": solvers.unipc(3),
    "heun": solvers.heun(),
    "ddpm": solvers.ddpm(),
}


def seconds(fn):
    """(wall-clock, processor) seconds of fn, its arrays waited for."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(fn())
    return np.array([time.perf_counter() - wall, time.process_time() - cpu])


def compare(first, second, repeats):
    """Median seconds of both, (2, 2), and quartiles of second / first in each clock, (3, 2), measured in turn."""
    seconds(first), seconds(second)
    pairs = np.array([(seconds(first), seconds(second)) for _ in range(repeats)])
    return np.median(pairs, axis=0), np.quantile(pairs[:, 1] / pairs[:, 0], [0.25, 0.5, 0.75], axis=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    parser.add_argument("--nfe", type=int, default=9, help="network evaluations K (odd for heun)")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of measurements a solver")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=32, help="height and width of the 4-channel images")
    parser.add_argument("--net", default="DiT-S/2", help="a name that nets.build knows")
    parser.add_argument("--scan", action="store_true", help="also measure a bare lax.scan of the network")
    args = parser.parse_args()

    p = process.edm()
    module = nets.build(args.net, args.size, 4, num_classes=0, rngs=nnx.Rngs(0))
    graph, params = nnx.split(module)

    def network(params, x, t):
        return nnx.merge(graph, params)(x, t)

    denoiser = jdiff.denoiser(network, p, "x0", params=params)
    jitted = jax.jit(network)
    x = p.prior(jax.random.key(0), (args.batch, args.size, args.size, 4))
    key, t = jax.random.key(1), jnp.float32(1.0)

    def calls():
        for _ in range(args.nfe):
            out = jitted(params, x, t)
        return out

    @jax.jit
    def scan(params, x, ts):
        return jax.lax.scan(lambda x, t: (network(params, x, t), None), x, ts)[0]

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{args.net}, {count / 1e6:.1f} M parameters, x {x.shape} {x.dtype}, on {jax.default_backend()}")
    print(f"K = {args.nfe} evaluations, {args.repeats} pairs of measurements, network and sample in turn")
    programs, alone = {}, {}
    nothing = jdiff.denoiser(lambda x, t: 0.5 * x, p, "x0")
    for name in args.solvers:
        solver = SOLVERS[name]
        table = solver(p, times.karras(p, solver.steps(args.nfe)))
        if table.nfe != args.nfe:
            parser.error(f"{name} makes {table.nfe} evaluations, not {args.nfe}: choose an odd --nfe")
        label = f"{name} (R = {table.registers})"
        programs[label] = lambda table=table: jdiff.sample(denoiser, table, x, key)
        alone[label] = lambda table=table: jdiff.sample(nothing, table, x, key)
    if args.scan:
        programs["bare scan"] = lambda: scan(params, x, jnp.linspace(80.0, 0.1, args.nfe))
    print(f"{'':22}{'ratio':>6}  quartiles      {'of CPU time':>11}  quartiles      network   sample (median s)  alone")
    for name, program in programs.items():
        (base, ours), (low, mid, high) = compare(calls, program, args.repeats)
        ratios = [f"{mid[i]:{width}.3f}  {low[i]:.3f} - {high[i]:.3f}" for i, width in ((0, 6), (1, 11))]
        tail = ""
        if name in alone:
            seconds(alone[name])
            cost = np.median([seconds(alone[name])[1] for _ in range(5 * args.repeats)])
            tail = f"             {cost / base[1]:.2%}"
        print(f"{name:22}{'  '.join(ratios)}  {base[0]:7.3f}  {ours[0]:7.3f}{tail}", flush=True)


if __name__ == "__main__":
    main()
