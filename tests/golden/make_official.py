"""Lift the authors' own sampler codes to coefficient tables: writes lifted_official.npz. Not run in CI.

In a virtual environment with PyTorch (CPU), JAX 0.10, NumPy and SciPy, and a folder that holds, from the authors'
repositories,

    dpm_solver_pytorch.py   github.com/LuChengTHU/dpm-solver       dpm_solver_pytorch.py
    uni_pc.py               github.com/wl-zhao/UniPC               uni_pc.py
    pndm_method.py          github.com/luping-liu/PNDM             runner/method.py
    th_deis/                github.com/qsh-zh/deis                 th_deis/
    sa_solver.py            github.com/scxue/SA-Solver             sa_solver.py
    momentum_scheduler.py   github.com/sWizad/momentum-diffusion   stable_diffusion/diffusion/momentum_scheduler.py
    k_sampling.py           github.com/crowsonkb/k-diffusion 0.1.1 k_diffusion/sampling.py
    diff_solvers.py, solver_utils.py   github.com/zju-pi/diff-sampler   diff-solvers-main/solvers.py, solver_utils.py

run `python tests/golden/make_official.py FOLDER`, or `.. FOLDER PREFIX ..` to make or replace the cases whose names
begin so and keep the others. How a sampler becomes a table is told in make_golden.py. Nothing of
these codes is kept here, only the coefficients that come out. th_deis imports one private function of JAX that is gone
since 0.5; it only promotes dtypes, and the identity stands in for it.
"""

import contextlib
import io
import json
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import torch
from make_golden import lift, point_mass_error, replay_error
from official_cases import cases

OUT = Path(__file__).with_name("lifted_official.npz")


def main() -> None:
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore")
    import jax._src.numpy.lax_numpy as private

    if not hasattr(private, "_promote_dtypes_inexact"):
        private._promote_dtypes_inexact = lambda *arrays: arrays
    sys.modules.setdefault("solver_utils", types.ModuleType("solver_utils"))
    arrays, meta, prefixes = {}, {}, tuple(sys.argv[2:])
    if prefixes:
        with np.load(OUT, allow_pickle=False) as old:
            arrays = {key: old[key] for key in old.files if key != "meta"}
            meta = json.loads(str(old["meta"]))["cases"]
    for case in cases(Path(sys.argv[1])):
        if prefixes and not case.name.startswith(prefixes):
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                table = lift(case)
                error = max(replay_error(case, table, seed) for seed in range(2))
            if error > 1e-10:
                raise ValueError(f"not linear: replay differs by {error:.1e}")
        except (ValueError, AssertionError, RuntimeError, IndexError, TypeError) as problem:
            print(f"{case.name:44s} SKIPPED: {problem!r:.150s}")
            continue
        table.pop("used")
        calls = len(table["points"]) - 1
        print(f"{case.name:44s} K={calls:2d}  replay {error:.1e}  point mass {point_mass_error(table):.1e}")
        arrays |= {f"{case.name}/{key}": table[key] for key in ("points", "grid")}
        fields = ("library", "entry", "options", "process", "grid", "note")
        meta[case.name] = {key: getattr(case, key) for key in fields} | {"calls": calls}
    np.savez_compressed(OUT, meta=np.array(json.dumps({"cases": meta})), **arrays)
    print(f"{len(meta)} cases, {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
