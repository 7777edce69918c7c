"""`import jdiff` is light: what is heavy is imported when it is used."""

import subprocess
import sys

HEAVY = (
    "flax",
    "orbax",
    "grain",
    "tensorflow_datasets",
    "matplotlib",
    "PIL",
    "tyro",
    "rich",
    "optax",
    "tensorboardX",
    "diffrax",
    "equinox",
)


def imported_by(program):
    show = f"; import sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program + show], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_heavy_packages_wait_until_they_are_used():
    sampler = "import jdiff; jdiff.solvers.unipc(); jdiff.guidance.cfg; jdiff.exact.gaussian([0.0], 1.0)"
    assert imported_by("import jdiff") == []
    assert imported_by(sampler) == []
    assert "flax" in imported_by("import jdiff; jdiff.nets")  # the probe sees what is there
