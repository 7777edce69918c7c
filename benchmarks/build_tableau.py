"""How long it takes to build a tableau on the host: milliseconds for every solver in `solvers.ALL`.

    python benchmarks/build_tableau.py              50 evaluations, 7 repeats: seconds in all
    python benchmarks/build_tableau.py --nfe 100 --profile deis

Processor time, the best of the repeats (other work on the machine only ever adds to it), after one build to warm up.
Target: below 50 ms for 50 evaluations. --profile NAME prints where the time of one build goes.
"""

import argparse
import cProfile
import pstats
import time

from jdiff import process, solvers, times

MORE = ("dpm_solver_pp(order=3)", "deis(order=4)", "deis(order=4, variable='rho')", "deis(order=4, method='rk')",
        "unipc(order=6)", "sa_solver(3, 4)")  # fmt: skip


def best(build, repeats):
    """Milliseconds of processor time."""
    build()
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        build()
        spent.append(time.process_time() - start)
    return 1e3 * min(spent)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nfe", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", metavar="NAME", help="a solver: its name, or name(option=value, ...)")
    args = parser.parse_args()
    p = process.vp_linear()
    for text in (*solvers.ALL, *MORE) if args.profile is None else (args.profile,):
        solver = solvers.parse(text) if "(3, 4)" not in text else solvers.sa_solver(3, 4)
        t = times.uniform(p, solver.steps(args.nfe))
        build = lambda solver=solver, t=t: solver(p, t)
        print(f"{text:34s} {solver(p, t).nfe:3d} NFE {best(build, args.repeats):8.1f} ms")
        if args.profile:
            with cProfile.Profile() as profile:
                build()
            pstats.Stats(profile).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
