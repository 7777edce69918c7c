"""Lift the samplers of diffusers and k-diffusion to coefficient tables: writes lifted.npz. Not run in CI.

In a virtual environment of its own (PyTorch on the CPU will do; the second line avoids the heavy dependencies):

    pip install torch==2.13.0 numpy scipy packaging requests regex safetensors huggingface_hub tqdm pillow \\
        importlib_metadata
    pip install --no-deps diffusers==0.42.1 k-diffusion==0.1.1.post1 torchdiffeq torchsde trampoline
    python tests/golden/make_golden.py

A sampler that is linear in (state, model outputs, noise) treats every coordinate alike. Run it on x_T = e_0, let
model call k return e_{1+k} as the denoised sample and noise draw j a basis vector of its own: what arrives at
the model calls, and what is returned, are the coefficients of its table. Nothing of jdiff is imported here.

The libraries run as installed, but for three things done at run time: every "float32" in the text of a diffusers
scheduler is read as "float64" (they compute in float32 inside, whatever one passes); their source of noise is
replaced by the basis vectors (`randn_tensor`, `torch.randn_like`, the `noise_sampler` argument); and of
`k_diffusion` only `sampling.py` is loaded, with the one helper that it uses (`utils.append_dims`), for the
package's own `__init__` imports a training stack.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from cases import Case, cases

OUT = Path(__file__).with_name("lifted.npz")
WIDTH = 80  # basis vectors at hand: 1 + calls + noises of the largest case fit


@dataclass
class Run:
    """One run of a sampler: what came in at each call, at which level, and when noise was drawn."""

    points: list = field(default_factory=list)
    levels: list = field(default_factory=list)
    noise_after: list = field(default_factory=list)


def record(case: Case, x: np.ndarray, denoise: Callable, noise: Callable) -> Run:
    run = Run()

    def model(x, alpha, sigma):
        run.points.append(x.numpy()[0].copy())
        run.levels.append((alpha, sigma))
        return torch.tensor(denoise(len(run.points) - 1, run.points[-1]))[None]

    def draw():
        run.noise_after.append(len(run.points))
        return torch.tensor(noise(len(run.noise_after) - 1))[None]

    run.points.append(case.sampler(torch.tensor(x)[None], model, draw).numpy()[0])
    run.levels.append(tuple(case.levels[-1]))
    return run


def lift(case: Case) -> dict:
    """points (K + 1, 1 + K + Z), levels (K + 1, 2), noise_after (Z,): draws that are never used are left out."""
    basis = np.eye(WIDTH)
    half = WIDTH // 2
    run = record(case, basis[0], lambda k, _: basis[1 + k], lambda j: basis[half + j])
    calls, table = len(run.points) - 1, np.array(run.points)
    assert calls < half and len(run.noise_after) <= half, case.name
    if not np.isfinite(table).all():
        raise ValueError("NaN or infinite coefficients")
    used = [j for j in range(len(run.noise_after)) if np.any(table[:, half + j])]
    points = np.concatenate([table[:, : 1 + calls], table[:, [half + j for j in used]]], axis=1)
    for k in range(calls):  # nothing may depend on an output that is not there yet
        assert not points[k, 1 + k : 1 + calls].any(), case.name
    return {
        "points": points,
        "levels": np.array(run.levels),
        "grid": case.levels,
        "noise_after": np.array([run.noise_after[j] for j in used], dtype=np.int64),
        "used": used,
    }


def replay_error(case: Case, lifted: dict, seed: int) -> float:
    """Run the library again, on a random state, random affine outputs and random noise, against the table."""
    rng = np.random.default_rng(seed)
    points, n = lifted["points"], 16
    calls, draws = len(points) - 1, rng.standard_normal((WIDTH, n))
    slope, shift = rng.uniform(-1, 1, (2, calls, n))
    x, outputs = 3.0 * rng.standard_normal(n), []

    def denoise(k, point):
        outputs.append(slope[k] * point + shift[k])
        return outputs[-1]

    run = record(case, x, denoise, lambda j: draws[j])
    symbols = np.concatenate([x[None], np.array(outputs), draws[lifted["used"]]])
    wanted = np.array(run.points)
    return float(np.max(np.abs(points @ symbols - wanted)) / np.max(np.abs(wanted)))


def point_mass_error(lifted: dict) -> float:
    """How far x_T = alpha mu + sigma eps with D = mu is from mean alpha' mu and variance sigma'^2, at every point."""
    points, levels = lifted["points"], lifted["levels"]
    calls, (alpha, sigma) = len(points) - 1, levels[0]
    mean = points[:, 0] * alpha + points[:, 1 : 1 + calls].sum(axis=1) - levels[:, 0]
    std = np.hypot(points[:, 0] * sigma, np.linalg.norm(points[:, 1 + calls :], axis=1)) - levels[:, 1]
    return float(max(np.max(np.abs(mean)), np.max(np.abs(std) / np.maximum(levels[:, 1], 1.0))))


def check_closed_forms(lifted: dict[str, dict]) -> None:
    """Two samplers written out by hand: Euler in sigma (alpha = 1), and DDIM as x' = a' D + s' (x - a D) / s."""
    for name in ("k_euler_karras8", "ddim_eta0_trailing10"):
        levels, points = lifted[name]["levels"], lifted[name]["points"]
        x, output = np.eye(points.shape[1])[0], np.eye(points.shape[1])[1:]
        for k, ((a, s), (a_next, s_next)) in enumerate(pairwise(levels)):
            if name.startswith("k_"):
                x = x + (s_next - s) * (x - output[k]) / s
            else:
                x = a_next * output[k] + s_next * (x - a * output[k]) / s
            np.testing.assert_allclose(points[k + 1], x, rtol=0, atol=1e-13)
        print(f"{name}: agrees with the formula written out by hand")


def check_agreements(lifted: dict[str, dict]) -> None:
    """Set-ups that are one method on one grid, most of them from two libraries, brought to x0 + sigma eps."""
    for one, other in (
        ("euler_karras8", "k_euler_karras8"),
        ("ddim_eta0_trailing10", "k_euler_vp10"),
        ("ddim_eta0_trailing10", "dpmpp1_zero_trailing10"),
        ("ddim_eta1_trailing10", "k_euler_ancestral_vp10"),
        ("ddim_eta1_trailing10", "ddpm_small_trailing10"),
        ("heun_trailing10", "k_heun_vp10"),
        ("dpmpp2m_midpoint_zero_trailing10", "k_dpmpp2m_vp10"),
        ("dpmpp3m_heun_zero_trailing10_nolof", "k_dpmpp3m_sde_eta0_vp10"),
        ("sde_dpmpp2m_midpoint_zero_trailing10", "k_dpmpp2m_sde_midpoint_eta1_vp10"),
        ("dpm1_low_trailing10_nolof", "dpmpp1_low_trailing10"),
        ("dpm2m_heun_low_trailing10_nolof", "deis2_trailing10_nolof"),
        ("unip2_bh2_low_trailing10", "dpmpp2m_midpoint_low_trailing10"),
    ):
        left, right = (scaled(lifted[name]) for name in (one, other))
        columns = min(left.shape[1], right.shape[1])  # DDPM's last noise, of 1e-10, has no partner
        error = np.max(np.abs(left[:, :columns] - right[:, :columns]))
        print(f"{one} = {other}: {error:.1e}")
        assert error < 1e-11, (one, other)


def scaled(table: dict) -> np.ndarray:
    """points for the state x / alpha, whose start is x_T / alpha_T."""
    alpha = table["levels"][:, :1]
    points = table["points"] / alpha
    points[:, 0] *= alpha[0]
    return points


def main() -> None:
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore")
    lifted, cases_meta, skipped = {}, {}, {}
    for case in cases():
        try:
            table = lift(case)
            error = max(replay_error(case, table, seed) for seed in range(3))
            if error > 1e-12:
                raise ValueError(f"not linear: replay differs by {error:.1e}")
        except ValueError as problem:
            skipped[case.name] = str(problem)
            print(f"{case.name:44s} SKIPPED: {problem}")
            continue
        assert case.name not in lifted, case.name
        mass, used = point_mass_error(table), table.pop("used")
        calls = len(table["points"]) - 1
        print(f"{case.name:44s} K={calls:2d} Z={len(used):2d}  replay {error:.1e}  point mass {mass:.1e}")
        lifted[case.name] = table
        fields = ("library", "entry", "options", "process", "grid", "timesteps", "note")
        cases_meta[case.name] = {key: getattr(case, key) for key in fields} | {"calls": calls, "noises": len(used)}
    check_closed_forms(lifted)
    check_agreements(lifted)
    versions = {library: version(library) for library in ("diffusers", "k-diffusion", "torch", "numpy")}
    meta = {"versions": versions, "cases": cases_meta, "skipped": skipped}
    arrays = {f"{name}/{key}": array for name, table in lifted.items() for key, array in table.items()}
    np.savez_compressed(OUT, meta=np.array(json.dumps(meta)), **arrays)
    print(f"{len(lifted)} cases, {len(skipped)} skipped, {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
