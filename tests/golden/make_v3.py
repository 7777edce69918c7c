"""Lift the official DPM-Solver-v3 and DC-Solver to coefficient tables: writes lifted_v3.npz. Not run in CI.

In a virtual environment with PyTorch (CPU) and NumPy, and a folder that holds, from the authors' repositories,

    dpm_solver_v3.py   github.com/thu-ml/DPM-Solver-v3 (ba16871)
    dc_solver.py       github.com/wl-zhao/DC-Solver (f82d060)  stable-diffusion/ldm/models/diffusion/dc_solver/

run `python tests/golden/make_v3.py FOLDER`.

DPM_Solver_v3 reads its statistics from two files and is then linear in (x, outputs) but for constants: run on one-hot
vectors as in make_golden.py, with one number a level for all elements; the constants show in an element that no basis
vector touches. The text is read with two changes, so that it computes in float64 on the CPU: `.cuda()` is dropped, and
FloatTensor is DoubleTensor. The statistics are smooth made-up functions: parity is of arithmetic, not of quality.
DCSolver is lifted in the same way, with made-up ratios.
"""

import contextlib
import io
import json
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch

OUT = Path(__file__).with_name("lifted_v3.npz")
WIDTH = 24
LEVELS = 200
RUN = {"order": 3, "p_pseudo": False, "use_corrector": True, "c_pseudo": True, "lower_order_final": True}
CASES = {
    "vp_uniform8_default": ("vp", 8, "time_uniform", RUN),
    "vp_logsnr6_order2": ("vp", 6, "logSNR", RUN | {"order": 2}),
    "edm_logsnr6_default": ("edm", 6, "logSNR", RUN),
    "edm_logsnr5_pseudo": ("edm", 5, "logSNR", RUN | {"p_pseudo": True, "c_pseudo": False}),
    "edm_logsnr8_predictor": ("edm", 8, "logSNR", RUN | {"use_corrector": False, "lower_order_final": False}),
    "vp_uniform8_half": ("vp", 8, "time_uniform", RUN | {"half": True}),
}
RATIOS = [1.0, 1.0, 0.8, 1.15, 0.6, 1.3, 0.9, 1.1]
DC_CASES = {
    "dc_bh2_order3": {"variant": "bh2", "order": 3, "dc_order": 2, "ratios": RATIOS},
    "dc_bh1_order3_linear": {"variant": "bh1", "order": 3, "dc_order": 1, "ratios": [1.0, 0.9, *RATIOS[2:]]},
    "dc_bh2_order2_linear": {"variant": "bh2", "order": 2, "dc_order": 1, "ratios": RATIOS},
    "dc_bh2_order3_nolof": {"variant": "bh2", "order": 3, "dc_order": 2, "ratios": RATIOS, "lower_order_final": False},
}


def load(folder: Path, name: str) -> types.ModuleType:
    text = (folder / name).read_text().replace(".cuda()", "").replace("FloatTensor", "DoubleTensor")
    module = types.ModuleType("official")
    exec(compile(text, name, "exec"), module.__dict__)
    return module


def compensated(module: types.ModuleType, options: dict) -> dict[str, np.ndarray]:
    """points and grid of DCSolver on the continuous VP schedule, t from 1 to 1e-3."""
    schedule, basis, points = module.NoiseScheduleVP("linear"), np.eye(WIDTH), []
    steps = len(options["ratios"])

    def network(x, t):
        a, s = schedule.marginal_alpha(t[:1]), schedule.marginal_std(t[:1])
        points.append(x.numpy().ravel().copy())
        return (x - a * torch.tensor(basis[len(points)]).reshape(x.shape)) / s

    solver = module.DCSolver(network, schedule, variant=options["variant"], dc_order=options["dc_order"])
    run = {"lower_order_final": options.get("lower_order_final", True), "dc_ratios": list(options["ratios"])}
    x = torch.tensor(basis[0]).reshape(1, 1, 1, WIDTH)
    x = solver.sample(x, steps, t_end=1e-3, order=options["order"], method="multistep", **run)
    points.append(x.numpy().ravel())
    grid = solver.get_time_steps("time_uniform", 1.0, 1e-3, steps, "cpu").numpy()
    return {"points": np.array(points)[:, : steps + 1], "grid": grid}


def statistics(lam: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smooth functions of half log-SNR that look like measured ones."""
    return 1 / (1 + 0.25 * np.exp(2 * lam)), 0.3 * np.sin(0.4 * lam), 0.2 * np.cos(0.3 * lam)


def main() -> None:
    torch.set_default_dtype(torch.float64)
    module, arrays, meta = load(Path(sys.argv[1]), "dpm_solver_v3.py"), {}, {}
    for name, (process, steps, skip, run) in CASES.items():
        if process == "vp":
            schedule, start, end = module.NoiseScheduleVP("linear"), 1.0, 1e-3
        else:
            schedule, start, end = module.NoiseScheduleEDM(), 80.0, 0.002
        ends = [float(schedule.marginal_lambda(torch.tensor(t))) for t in (start, end)]
        lam = np.linspace(*ends, LEVELS + 1)
        tables = dict(zip("lsb", statistics(lam), strict=True))
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            np.savez(f"{folder}/l.npz", l=tables["l"].reshape(-1, 1, 1, 1))
            np.savez(f"{folder}/sb.npz", **{k: tables[k].reshape(-1, 1, 1, 1) for k in "sb"})
            solver = module.DPM_Solver_v3(folder, schedule, steps, start, end, skip, device="cpu")
            grid = solver.get_time_steps(skip, t_T=start, t_0=end, N=steps, device="cpu").numpy()
        basis, points, times = np.eye(WIDTH), [], []

        def network(x, t, basis=basis, points=points, times=times, schedule=schedule):
            a, s = schedule.marginal_alpha(t[:1]), schedule.marginal_std(t[:1])
            points.append(x.numpy().ravel().copy())
            times.append(float(t[0]))
            return (x - a * torch.tensor(basis[len(points)]).reshape(x.shape)) / s

        x = torch.tensor(basis[0]).reshape(1, 1, 1, WIDTH)
        points.append(solver.sample(x, network, **run).numpy().ravel())
        table = np.array(points)
        one = table[:, -1]
        table = np.concatenate([table[:, : steps + 1] - one[:, None], one[:, None]], 1)
        arrays |= {f"{name}/{key}": value for key, value in tables.items()}
        arrays |= {f"{name}/points": table, f"{name}/lam": lam, f"{name}/grid": grid, f"{name}/times": np.array(times)}
        meta[name] = {"process": process, "steps": steps, "skip_type": skip, **run}
        print(f"{name:28s} K = {len(times)}, constants up to {np.abs(one).max():.3g}")
    module = load(Path(sys.argv[1]), "dc_solver.py")
    for name, options in DC_CASES.items():
        arrays |= {f"{name}/{key}": value for key, value in compensated(module, options).items()}
        meta[name] = options
        print(f"{name:28s} lifted")
    np.savez_compressed(OUT, meta=np.array(json.dumps(meta)), **arrays)
    print(f"{len(meta)} cases, {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
