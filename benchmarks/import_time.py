"""Seconds and modules of `import jdiff`, beside `import jax` alone.

    python benchmarks/import_time.py
    python benchmarks/import_time.py --repeats 11

Each import runs in a fresh process; the two alternate, and the medians are printed, with what jdiff adds to jax.
Ends with an error if a heavy package (data sets, plotting, checkpoints, nets, command line) is among the modules.
"""

import argparse
import statistics
import subprocess
import sys

HEAVY = ("flax", "orbax", "grain", "tensorflow_datasets", "tensorflow", "matplotlib", "PIL", "tyro", "rich", "optax")

PROGRAM = """
import sys, time
start = time.perf_counter()
import {package}
seconds = time.perf_counter() - start
print(seconds, len(sys.modules), *(name for name in {heavy} if name in sys.modules))
"""


def fresh_import(package):
    """(seconds, number of modules, heavy packages) of `import package` in a new process."""
    program = PROGRAM.format(package=package, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, modules, *heavy = done.stdout.split()
    return float(seconds), int(modules), heavy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes a package, after one that warms the disk")
    args = parser.parse_args()
    seconds, modules, heavy = {}, {}, []
    for i in range(args.repeats + 1):
        for package in ("jax", "jdiff"):
            took, modules[package], heavy = fresh_import(package)
            if i > 0:
                seconds.setdefault(package, []).append(took)
    print(f"median of {args.repeats} fresh processes each, Python {sys.version.split()[0]}")
    for package, values in seconds.items():
        print(f"import {package:6} {statistics.median(values):.2f} s  {modules[package]} modules")
    ratio = statistics.median(b / a for a, b in zip(seconds["jax"], seconds["jdiff"], strict=True))
    print(f"jdiff / jax  {ratio:.2f} in time, {modules['jdiff'] - modules['jax']} more modules")
    print(f"heavy packages imported: {', '.join(heavy) or 'none'} (of {', '.join(HEAVY)})")
    if heavy:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
