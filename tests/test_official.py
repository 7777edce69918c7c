"""Our tables against those lifted from the authors' own codes (tests/golden/make_official.py), at 1e-8 in float64."""

import json
from pathlib import Path

import numpy as np
import pytest

from jdiff import process, solvers

FILE = np.load(Path(__file__).parent / "golden" / "lifted_official.npz", allow_pickle=False)
META = json.loads(str(FILE["meta"]))["cases"]

PROCESS = {
    "vp": process.vp_discrete(np.linspace(1e-4, 2e-2, 1000)),
    "vp_linear": process.vp_linear(),
    "ve": process.edm(),
}

pp, uni = solvers.dpm_solver_pp, solvers.unipc
SAME = {"dpmpp_multi1_dpmsolver_lof1_logsnr8": pp(1)}
for lower in (0, 1):
    last = {"lower_order_final": bool(lower)}
    for form, ours in (("dpmsolver", "midpoint"), ("taylor", "heun")):
        SAME[f"dpmpp_multi2_{form}_lof{lower}_logsnr8"] = pp(2, form=ours, **last)
        SAME[f"dpmpp_multi3_{form}_lof{lower}_logsnr8"] = pp(3, form=ours, as_published=True, **last)
    for order in (2, 3):
        for variant in ("bh1", "bh2"):
            SAME[f"unipc_x0_{variant}_{order}_lof{lower}_logsnr8"] = uni(order, variant, **last)
for order in range(4):
    SAME[f"deis_rhoab{order}"] = solvers.deis(order + 1, "rho")
    SAME[f"deis_tab{order}"] = solvers.deis(order + 1, "t")
for order in range(1, 6):
    SAME[f"ghvb_{order}_beta0.5"] = solvers.ghvb(order, 0.5)
    SAME[f"hb_{order}_beta0.5"] = solvers.heavy_ball(order, 0.5)
    SAME[f"nesterov_{order}_beta0.5"] = solvers.heavy_ball(order, 0.5, nesterov=True)
SAME |= {f"{name}_3_beta1": solvers.ghvb(3, 1.0) for name in ("ghvb", "hb", "nesterov")}
SAME["deis_rk_1euler"] = solvers.ddim()
SAME |= {f"pndm_ddim_{n}": solvers.ddim() for n in (8, 10)}


def ours(name, solver):
    p = PROCESS[META[name]["process"]]
    a, s = FILE[f"{name}/grid"].T
    with np.errstate(divide="ignore"):
        t = p.t_of_lam(np.log(a) - np.log(s))
    return solver(p, np.minimum(t, p.t_max)).unrolled()


@pytest.mark.parametrize("name", SAME)
def test_agrees_with_the_official_code(name):
    want, got = FILE[f"{name}/points"], ours(name, SAME[name])
    rectangles = name.startswith(("deis_tab", "deis_rhoab"))  # official weights are sums of 10,000 rectangles
    close = 2e-3 if rectangles else 1e-8
    np.testing.assert_allclose(got, want, rtol=0, atol=close * np.abs(want).max())


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dpmpp_multi3_dpmsolver_lof0_logsnr8", pp(3)),  # the factor 2
        ("dpmpp_multi2_taylor_lof0_logsnr8", pp(2)),
        ("unipc_x0_bh1_2_lof1_logsnr8", uni(2, "bh2")),
        ("unipc_x0_vary_coeff_2_lof1_logsnr8", uni(2, "bh2")),
        ("deis_tab2", solvers.deis(3, "rho")),
        ("deis_rhoab2", solvers.deis(2, "rho")),
        ("ghvb_3_beta0.5", solvers.heavy_ball(3, 0.5)),
        ("nesterov_3_beta0.5", solvers.heavy_ball(3, 0.5)),
    ],
)
def test_named_differences_are_differences(name, wrong):
    want, got = FILE[f"{name}/points"], ours(name, wrong)
    assert got.shape != want.shape or np.abs(got - want).max() > 1e-3 * np.abs(want).max()
