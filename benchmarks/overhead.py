"""What sampling costs beside the network: K evaluations through `jdiff.sample` against K calls of the jitted network.

    python benchmarks/overhead.py                    every solver; DiT-Ti/2, 32 x 32 x 4, batch 4, float32
    python benchmarks/overhead.py --net DiT-S/2 --solvers unipc "dpm_solver_pp(order=3)" --nfe 20 --repeats 9

Solvers whose tableaux have one shape (K, R, Z) run one and the same compiled program, so each shape is measured once
and its solvers are named together. "an element": a table with coefficients and constants an element of the sample,
dpm_solver_v3 with statistics of a Gaussian that differs from element to element.

For each shape the two programs alternate (network, sample, sample, network, ..) in one process after a warm-up, and
the ratio is taken pair by pair; printed are the median ratio with its quartiles, in wall-clock time and in processor
time (which other work on the machine disturbs less), and the median wall-clock seconds. "network" is K calls of the
jitted network at one time, dispatched one after the other and waited for at the end. "bare scan" (with --scan) is a
`lax.scan` of the network over K times, which is what XLA makes of a loop without any solver. Target: at most 1.05.
"alone" is the processor time of the same program around a network that only halves its input, as a part of the
network's: what the solver itself costs, undisturbed by the network's spread.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jdiff
from jdiff import nets, process, solvers, statistics, times


def seconds(fn):
    """(wall-clock, processor) seconds of fn, its arrays waited for."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(fn())
    return np.array([time.perf_counter() - wall, time.process_time() - cpu])


def compare(first, second, repeats):
    """Median seconds of both, (2, 2), and quartiles of second / first in each clock, (3, 2), measured in turn."""
    seconds(first), seconds(second)
    order = lambda i: [first, second] if i % 2 == 0 else [second, first]
    pairs = np.array([[seconds(fn) for fn in order(i)][:: 1 - 2 * (i % 2)] for i in range(repeats)])
    return np.median(pairs, axis=0), np.quantile(pairs[:, 1] / pairs[:, 0], [0.25, 0.5, 0.75], axis=0)


def each_element(shape):
    """dpm_solver_v3 with the statistics of a Gaussian, standard deviations 0.1 to 2 and means 0 to 1 by element."""
    lam = np.linspace(-6.0, 8.0, 57)
    ratio = np.exp(2.0 * lam)[:, None] * np.geomspace(0.1, 2.0, int(np.prod(shape))) ** 2
    l = 1.0 / (1.0 + ratio)
    mean = np.linspace(0.0, 1.0, l.shape[1])
    arrays = (v.reshape(len(lam), *shape) for v in (l, 0.0 * l, np.exp(-lam)[:, None] * mean))
    return solvers.dpm_solver_v3(statistics.Statistics(lam, *arrays))


def shapes(names, p, nfe, element):
    """{(K, R, Z, constants, coefficients' shape): (label, table)}, one for all solvers that share a program."""
    found = {}
    every = {name: solvers.parse(name) for name in names} | ({"an element": element} if element else {})
    for name, solver in every.items():
        table = solver(p, times.karras(p, solver.steps(nfe)))
        shape = (table.nfe, table.registers, table.noises, table.E is not None, table.A.shape[3:])
        label, table = found.get(shape, ("", table))
        found[shape] = (f"{label}, {name}" if label else name, table)
    return dict(sorted(found.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solvers", nargs="+", metavar="SOLVER", help="names, or name(option=value); default: all")
    parser.add_argument("--nfe", type=int, default=9, help="network evaluations, at most")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of measurements a shape")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=32, help="height and width of the 4-channel images")
    parser.add_argument("--net", default="DiT-Ti/2", help="a name that nets.build knows")
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

    def calls(k):
        for _ in range(k):
            out = jitted(params, x, t)
        return out

    @jax.jit
    def scan(params, x, ts):
        return jax.lax.scan(lambda x, t: (network(params, x, t), None), x, ts)[0]

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{args.net}, {count / 1e6:.1f} M parameters, x {x.shape} {x.dtype}, on {jax.default_backend()}")
    print(f"at most {args.nfe} evaluations, {args.repeats} pairs of measurements, network and sample in turn")
    nothing = jdiff.denoiser(lambda x, t: 0.5 * x, p, "x0")
    found = shapes(args.solvers or solvers.ALL, p, args.nfe, None if args.solvers else each_element(x.shape[1:]))
    print("   K  R  Z  ratio  quartiles      of CPU time  quartiles       network   sample (median s)  alone")
    for (K, R, Z, *_), (label, table) in found.items():
        program = lambda table=table: jdiff.sample(denoiser, table, x, key)
        alone = lambda table=table: jdiff.sample(nothing, table, x, key)
        base, row = report(lambda K=K: calls(K), program, args.repeats)
        seconds(alone)
        cost = np.median([seconds(alone)[1] for _ in range(5 * args.repeats)])
        print(f"{K:4d} {R:2d} {Z:2d}  {row}             {cost / base[1]:.2%}  {label}", flush=True)
    if args.scan:
        run = lambda: scan(params, x, jnp.linspace(80.0, 0.1, args.nfe))
        print(f"{args.nfe:4d}        {report(lambda: calls(args.nfe), run, args.repeats)[1]}  bare scan")


def report(calls, program, repeats):
    (base, ours), (low, mid, high) = compare(calls, program, repeats)
    ratios = [f"{mid[i]:.3f}  {low[i]:.3f} - {high[i]:.3f}" for i in (0, 1)]
    return base, f"{'        '.join(ratios)}  {base[0]:7.3f}  {ours[0]:7.3f}"


if __name__ == "__main__":
    main()
