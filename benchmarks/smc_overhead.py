"""What steering costs beside plain sampling: `steering.sample` against `jdiff.sample`, same net, solver and particles.

    python benchmarks/smc_overhead.py                     DiT-S/2, 64 particles of 16 x 16 x 4, 4 DDPM steps, CPU
    python benchmarks/smc_overhead.py --net DiT-Ti/2 --size 32 --particles 32 --devices 8

A reward of one multiply-add an element is computed and every group is resampled at EVERY step (threshold 1), which is
the dearest case. The two programs alternate in one process after a warm-up; the ratio is taken pair by pair. Target: at
most 1.10. With --devices the particles lie over that many (simulated) devices, and the bytes that resampling moved
between them are printed: only the surplus copies travel.
"""

import argparse
import os
import time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="DiT-S/2", help="a name that nets.build knows")
    parser.add_argument("--size", type=int, default=16, help="height and width of the 4-channel images")
    parser.add_argument("--particles", type=int, default=64, help="in one group")
    parser.add_argument("--steps", type=int, default=4, help="network evaluations")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of measurements")
    parser.add_argument("--devices", type=int, default=1, help="simulated devices that the particles lie over")
    args = parser.parse_args()
    if args.devices > 1:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    import jdiff
    from jdiff import nets, process, solvers, steering, times

    p = process.flow()
    graph, params = nnx.split(nets.build(args.net, args.size, 4, num_classes=0, rngs=nnx.Rngs(0)))
    denoiser = jdiff.denoiser(lambda params, x, t: nnx.merge(graph, params)(x, t), p, "velocity", params=params)
    table = solvers.ddpm()(p, times.uniform(p, args.steps))
    x, key = p.prior(jax.random.key(0), (args.particles, args.size, args.size, 4)), jax.random.key(1)
    potential = steering.fk(lambda x: jnp.mean(x, (1, 2, 3)), 50.0)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",)) if args.devices > 1 else None
    plain = lambda: jdiff.sample(denoiser, table, x, key)
    steered = lambda: steering.sample(denoiser, table, x, key, potential, threshold=1.0, mesh=mesh)

    def seconds(run):
        wall, cpu = time.perf_counter(), time.process_time()
        out = jax.block_until_ready(run())
        return np.array([time.perf_counter() - wall, time.process_time() - cpu]), out

    seconds(plain)
    out = seconds(steered)[1]
    pairs = []
    for i in range(args.repeats):
        first, second = (plain, steered) if i % 2 == 0 else (steered, plain)
        pair = [seconds(first)[0], seconds(second)[0]]
        pairs.append(pair if i % 2 == 0 else pair[::-1])
    pairs = np.array(pairs)
    quartiles = np.quantile(pairs[:, 1] / pairs[:, 0], [0.25, 0.5, 0.75], axis=0)
    print(f"{args.net}, {args.particles} particles {x.shape[1:]}, {args.steps} steps, {args.repeats} pairs, "
          f"{args.devices} device(s); resampled {int(out.info.resampled.sum())} times, "
          f"survivors {np.round(np.asarray(out.info.acceptance[:, 0]), 2).tolist()}")  # fmt: skip
    for name, column in (("wall clock", 0), ("CPU time", 1)):
        low, mid, high = quartiles[:, column]
        base, ours = np.median(pairs[:, :, column], 0)
        print(f"{name:10s}  steered / plain {mid:.3f} ({low:.3f} - {high:.3f})   {ours:.2f} s against {base:.2f} s")
    if mesh is not None:
        crossed, size = steering.traffic(out.info.ancestors, args.devices, (out.state.inner, out.state.memory))
        everything = args.particles * size * (args.devices - 1)
        moved = int(crossed.sum())
        print(f"moved between devices: {moved} particles of {size} bytes = {moved * size} bytes in {args.steps} steps; "
              f"gathering all on all would move {everything} bytes a step")  # fmt: skip


if __name__ == "__main__":
    main()
