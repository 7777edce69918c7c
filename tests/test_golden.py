"""Our tables against those lifted from diffusers and k-diffusion (tests/golden/README.md), at 1e-8 in float64."""

import json
from pathlib import Path

import numpy as np
import pytest

from jdiff import process, solvers

FILE = np.load(Path(__file__).parent / "golden" / "lifted.npz", allow_pickle=False)
META = json.loads(str(FILE["meta"]))["cases"]

PROCESS = {
    "vp": process.vp_discrete(np.linspace(1e-4, 2e-2, 1000)),
    "ve": process.edm(sigma_max=200.0),
    "flow": process.flow(),
}

pp, uni, final = solvers.dpm_solver_pp, solvers.unipc, {"lower_order_final": True}
SAME = {
    "ddim_eta0_trailing10": solvers.ddim(),
    "ddim_eta1_trailing10": solvers.ddim(1.0),
    "ddim_eta0.5_trailing8": solvers.ddim(0.5),
    "ddim_eta0_trailing8_alpha0": solvers.ddim(),
    "ddpm_small_trailing10": solvers.ddpm(),
    "ddpm_small_linspace8": solvers.ddpm(),
    "ddpm_large_trailing8": solvers.ddpm("beta"),
    "dpmpp1_zero_trailing10": pp(1),
    "dpmpp2m_midpoint_zero_trailing10": pp(2),
    "dpmpp2m_heun_zero_trailing10": pp(2, form="heun"),
    "dpmpp3m_zero_trailing10": pp(3, as_published=True, **final),
    "dpmpp3m_zero_trailing10_nolof": pp(3, as_published=True),
    "dpmpp3m_heun_zero_trailing10_nolof": pp(3, form="heun", as_published=True),
    "dpmpp1_low_trailing10": pp(1),
    "dpmpp2m_midpoint_low_trailing10": pp(2, **final),
    "dpmpp2m_midpoint_low_trailing10_nolof": pp(2),
    "dpmpp2m_heun_low_trailing10_nolof": pp(2, form="heun"),
    "dpmpp2m_midpoint_low_linspace8_nolof": pp(2),
    "dpmpp3m_low_trailing10": pp(3, as_published=True, **final),
    "dpmpp3m_low_trailing10_nolof": pp(3, as_published=True),
    "dpmpp2m_midpoint_low_trailing16": pp(2),
    "dpmpp3m_low_trailing16": pp(3, as_published=True),
    "dpmpp3m_zero_trailing16": pp(3, as_published=True),
    "sde_dpmpp1_low_trailing10": pp(1, eta=1.0),
    "sde_dpmpp2m_midpoint_zero_trailing10": pp(2, eta=1.0),
    "sde_dpmpp2m_midpoint_low_trailing10_nolof": pp(2, eta=1.0),
    "sde_dpmpp2m_heun_low_trailing10_nolof": pp(2, eta=1.0, form="heun"),
    "dpmpp2m_flow10": pp(2),
    "dpmpp2m_flow10_shift3": pp(2),
    "deis1_trailing10": solvers.deis(1, "lam"),
    "deis2_trailing10": solvers.deis(2, "lam", **final),
    "deis3_trailing10": solvers.deis(3, "lam", **final),
    "deis2_trailing10_nolof": solvers.deis(2, "lam"),
    "deis3_trailing10_nolof": solvers.deis(3, "lam"),
    "deis3_linspace8_nolof": solvers.deis(3, "lam"),
    "deis3_trailing16": solvers.deis(3, "lam"),
    **{f"unipc{o}_{b}_low_trailing10": uni(o, b, **final) for o in (1, 2, 3) for b in ("bh1", "bh2")},
    **{f"unip{o}_{b}_low_trailing10": uni(o, b, corrector=False, **final) for o in (1, 2, 3) for b in ("bh1", "bh2")},
    **{f"unipc{o}_bh2_zero_trailing10": uni(o, **final) for o in (1, 2, 3)},
    "unipc2_bh2_low_linspace8": uni(2, **final),
    "unipc3_bh2_low_trailing10_nolof": uni(3, lower_order_final=False),
    "unipc3_bh1_low_trailing10_nolof": uni(3, "bh1", lower_order_final=False),
    "unipc2_bh2_flow10": uni(2, **final),
    "unipc3_bh2_flow10": uni(3, **final),
    "euler_trailing10": solvers.euler(),
    "euler_karras8": solvers.euler(),
    "heun_trailing10": solvers.heun(),
    "heun_linspace8": solvers.heun(),
    "flow_euler10": solvers.euler("t"),
    "flow_euler10_shift3": solvers.euler("t"),
    "k_heun_churn_karras8": solvers.heun(churn=4.0, s_min=0.05, s_max=50.0, s_noise=1.003),
    "k_dpmpp2m_sde_midpoint_eta0_karras8": pp(2),
    "k_dpmpp2m_sde_heun_eta0_karras8": pp(2, form="heun"),
    "k_dpmpp3m_sde_eta1_karras8": pp(3, eta=1.0, form="heun", as_published=True),
}
for grid in ("karras8", "vp10"):
    SAME |= {
        f"k_euler_{grid}": solvers.euler(),
        f"k_heun_{grid}": solvers.heun(),
        f"k_dpmpp2m_{grid}": pp(2),
        f"k_dpmpp2m_sde_midpoint_eta1_{grid}": pp(2, eta=1.0),
        f"k_dpmpp2m_sde_heun_eta1_{grid}": pp(2, eta=1.0, form="heun"),
        f"k_dpmpp3m_sde_eta0_{grid}": pp(3, form="heun", as_published=True),
        f"k_euler_ancestral_{grid}": solvers.ddpm(),
    }


def ours(name, solver):
    """Our table on the case's grid, without noises that nothing uses."""
    p = PROCESS[META[name]["process"]]
    a, s = FILE[f"{name}/grid"].T
    with np.errstate(divide="ignore"):
        t = p.t_of_lam(np.log(a) - np.log(s))
    points = solver(p, t).unrolled()
    K = META[name]["calls"]
    used = np.abs(points[:, 1 + K :]).max(0) > 1e-9
    return np.concatenate([points[:, : 1 + K], points[:, 1 + K :][:, used]], axis=1)


def theirs(name):
    points, K = FILE[f"{name}/points"], META[name]["calls"]
    used = np.abs(points[:, 1 + K :]).max(0) > 1e-9  # DDPM's clamp leaves a column of 1e-10
    return np.concatenate([points[:, : 1 + K], points[:, 1 + K :][:, used]], axis=1)


@pytest.mark.parametrize("name", SAME)
def test_agrees_with_the_independent_implementation(name):
    want, got = theirs(name), ours(name, SAME[name])
    if name == "ddpm_large_trailing8":  # diffusers adds noise into sigma = 0 too: that one column is not ours
        want = want[:, :-1]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-8 * np.abs(want).max())


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dpmpp3m_low_trailing10_nolof", pp(3)),  # the factor 2
        ("dpmpp2m_midpoint_low_trailing10", pp(2)),  # the last step's order
        ("dpmpp2m_heun_low_trailing10_nolof", pp(2)),
        ("unipc2_bh1_low_trailing10", uni(2, "bh2", **final)),
        ("unipc3_bh2_low_trailing10", uni(3, corrector=False, **final)),
        ("deis3_trailing10_nolof", solvers.deis(3, "rho")),
        ("heun_linspace8", solvers.euler()),
    ],
)
def test_named_differences_are_differences(name, wrong):
    want, got = theirs(name), ours(name, wrong)
    assert got.shape != want.shape or np.abs(got - want).max() > 1e-4
