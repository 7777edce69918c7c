"""A short look at the whole path, for other Pythons and JAX versions: solve, train, sample, save a picture."""

import sys
import tempfile
import warnings
from pathlib import Path

warnings.simplefilter("error")  # what is deprecated in a newer JAX shows here first

import jax
import numpy as np

import jdiff
from jdiff import cli, exact, process, solvers, times

p = process.vp_linear()
model = exact.gaussian([0.5, -0.5], [0.2, 1.0])
x = p.prior(jax.random.key(0), (8, 2))
for name, make in solvers.ALL.items():
    out = jdiff.sample(model.denoiser(p), make()(p, times.logsnr(p, 20)), x, jax.random.key(1), check=True)
    if not make().stochastic and name != "edict":  # far off at 20 steps
        error = float(np.abs(out - model.flow(p, x, 1.0, 0.0)).max())
        assert error < 0.5, (name, error)

warnings.simplefilter("default")  # other libraries' deprecations are theirs
with tempfile.TemporaryDirectory() as folder:
    run = f"{folder}/run"
    options = "--batch 16 --steps 2 --warmup 1 --log-every 1 --checkpoint-every 1 --net DiT".split()
    net = "--net-options patch 2 width 16 depth 1 heads 2".split()
    assert cli.main(["train", "--out", run, *options, *net]) == 0
    assert cli.main(["sample", run, "--nfe", "3", "--n", "4", "--guidance", "1.5", "--out", f"{folder}/grid"]) == 0
    assert Path(f"{folder}/grid.png").stat().st_size > 0
print(f"smoke test passed: Python {sys.version.split()[0]}, JAX {jax.__version__}")
