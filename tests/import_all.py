"""Import every module of an installed jdiff and check that it came from there: `python tests/import_all.py FOLDER`."""

import importlib
import pkgutil
import sys
from pathlib import Path

import jdiff

folder = Path(sys.argv[1]).resolve()
names = ["jdiff"] + [m.name for m in pkgutil.walk_packages(jdiff.__path__, "jdiff.")]
for name in names:
    module = importlib.import_module(name)
    assert Path(module.__file__).resolve().is_relative_to(folder), f"{name} came from {module.__file__}"
for wanted in ("jdiff.solvers.exponential", "jdiff.nets.dit", "jdiff.experiments.fast_sampling", "jdiff.cli"):
    assert wanted in names, f"{wanted} is not in the wheel"
assert jdiff.data.load("digits").shape == (8, 8, 1)
print(f"{len(names)} modules imported from the wheel")
