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
FORM = {"dpmsolver": "midpoint", "taylor": "heun"}


def ours_of(name, entry, options):
    """The solver of ours that a case should equal, from its options alone; None where there is none."""
    if entry == "DPM_Solver":
        make = solvers.dpm_solver if options["algorithm_type"] == "dpmsolver" else solvers.dpm_solver_pp
        known = {"order": options["order"], "form": FORM[options["solver_type"]]}
        if options["method"] == "multistep":
            last = {"lower_order_final": options["lower_order_final"]}
            return make(method="multistep", as_published=options["order"] == 3, **last, **known)
        fast = options["method"] == "singlestep" and options["order"] == 3
        return make(method="fast" if fast else "singlestep", **known)
    if entry == "UniPC":
        kind = "eps" if options["algorithm_type"] == "noise_prediction" else "x0"
        varying = options["variant"] == "vary_coeff"
        last = {"lower_order_final": options["lower_order_final"], "as_published": varying}
        return solvers.unipc(options["order"], options["variant"], prediction=kind, **last)
    if entry.startswith("gen_order"):
        return solvers.ddim() if entry.endswith("1") else solvers.pndm(int(entry[-1]))
    if name.startswith("deis_rk"):
        return solvers.ddim() if "1euler" in name else solvers.deis(int(name[8]), "rho", method="rk")
    if name == "deis_ipndm":
        return solvers.deis(4, "t", method="ipndm")
    if entry == "get_sampler":
        return solvers.deis(options["ab_order"] + 1, "rho" if options["method"] == "rho_ab" else "t")
    if name.startswith("diff_ipndm"):
        method = "ab" if "_v" in name else "ipndm"
        return solvers.deis(options["max_order"], "rho", method=method)
    if entry == "SASolver":
        few, kind = options["mode"] == "few_steps", {"noise": "eps"}.get(options.get("kind", ""), "x0")
        more = {"prediction": kind, "mode": options.get("pc_mode", "PEC"), "few_steps": few and kind == "x0"}
        orders = options["predictor_order"], options["corrector_order"]
        return solvers.sa_solver(*orders, tau=options["tau"], interval=None, **more)
    if entry == "sample_dpmpp_2s_ancestral":
        return solvers.dpm_solver_pp(2, options["eta"], method="ancestral")
    if name.startswith("hbunipc"):
        return solvers.heavy_ball(options["order"], options["beta"], base="unipc", as_published=True)
    if name.startswith("ghvb"):
        return solvers.ghvb(int(name[5]), float(name.split("beta")[1]))
    if name.startswith(("hb", "nesterov")):
        order, beta = int(name.split("_")[1]), float(name.split("beta")[1])
        return solvers.heavy_ball(order, beta, nesterov=name.startswith("nesterov"))
    return None


def times_of(name):
    """The case's grid as times; single-step codes have further points inside each step, as the code places them."""
    p, options = PROCESS[META[name]["process"]], META[name]["options"]
    a, s = FILE[f"{name}/grid"].T
    with np.errstate(divide="ignore"):
        lam = np.log(a) - np.log(s)
    if options.get("method", "").startswith("singlestep"):
        steps, order, n = options["steps"], options["order"], len(lam) - 1
        sizes = [order] * n
        if options["method"] == "singlestep" and sum(sizes) != steps:
            sizes[-1] = steps - sum(sizes[:-1])
        if options["method"] == "singlestep" and order == 3 and steps % 3 == 0:
            sizes[-2:] = [2, 1]
        uniform = options["skip_type"] == "time_uniform"
        ends = p.t_of_lam(lam) if uniform else lam
        inner = [np.linspace(ends[i], ends[i + 1], k + 1)[:-1] for i, k in enumerate(sizes)]
        inner = np.append(np.concatenate(inner), ends[-1])
        return np.minimum(inner if uniform else p.t_of_lam(inner), p.t_max)
    return np.minimum(p.t_of_lam(lam), p.t_max)


def compact(points, calls):
    """Without noises that nothing uses."""
    used = np.abs(points[:, 1 + calls :]).max(0, initial=0.0) > 1e-9
    return np.concatenate([points[:, : 1 + calls], points[:, 1 + calls :][:, used]], axis=1)


def pair(name, solver):
    """(ours, theirs), as far as the two are to be the same."""
    case, t, theirs = META[name], times_of(name), FILE[f"{name}/points"]
    if case["options"].get("mode") == "more_steps":  # the official mode looks twice at its last level: all before that
        got, n = solver(PROCESS[case["process"]], t[:-1]).unrolled(), case["options"]["steps"]
        return compact(got[:n], n), compact(np.delete(theirs[:n], (n + 1, n + 2), 1), n)
    return compact(solver(PROCESS[case["process"]], t).unrolled(), case["calls"]), compact(theirs, case["calls"])


DIFFERENT = {
    "diff_ipndm_v3": "a misplaced parenthesis in its weights: not the Adams-Bashforth method of uneven steps",
    "diff_ipndm_v4": "the same, and its weights do not sum to one (a point mass is moved by 8.5e-4)",
    "pndm_f_8": "its half steps are cut to whole indices (125 / 2)",
    "diff_dpm2": "the midpoint rule at the geometric mean of two sigmas",
}


@pytest.mark.parametrize("name", [name for name in META if name not in DIFFERENT])
def test_agrees_with_the_official_code(name):
    got, want = pair(name, ours_of(name, META[name]["entry"], META[name]["options"]))
    rectangles = name.startswith(("deis_tab", "deis_rhoab"))  # official weights are sums of 10,000 rectangles
    close = 2e-3 if rectangles else 1e-8
    np.testing.assert_allclose(got, want, rtol=0, atol=close * np.abs(want).max())


@pytest.mark.parametrize("name", ["diff_ipndm_v3", "diff_ipndm_v4", "pndm_f_8"])
def test_named_differences_are_differences(name):
    got, want = pair(name, ours_of(name, META[name]["entry"], META[name]["options"]))
    assert np.abs(got - want).max() > 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dpmpp_multi3_dpmsolver_lof0_logsnr8", solvers.dpm_solver_pp(3)),  # the factor 2
        ("dpmpp_multi2_taylor_lof0_logsnr8", solvers.dpm_solver_pp(2)),
        ("unipc_x0_bh1_2_lof1_logsnr8", solvers.unipc(2, "bh2")),
        ("unipc_x0_vary_coeff_2_lof1_logsnr8", solvers.unipc(2, "vary_coeff")),  # the left-over loop index
        ("deis_tab2", solvers.deis(3, "rho")),
        ("ghvb_3_beta0.5", solvers.heavy_ball(3, 0.5)),
        ("nesterov_3_beta0.5", solvers.heavy_ball(3, 0.5)),
        ("sa_data_pece_tau0.4_34", solvers.sa_solver(3, 4, 0.4, None, True)),  # PEC, one evaluation a step fewer
        ("sa_noise_pec_tau1_23", solvers.sa_solver(2, 3, 1.0, None)),  # a polynomial through D
        ("k_2s_ancestral_eta0.5", solvers.dpm_solver_pp(2, 1.0, method="ancestral")),
        ("k_2s_ancestral_eta0", solvers.dpm_solver_pp(2, method="singlestep")),  # inner points of the grid
        ("hbunipc_3_beta0.8", solvers.heavy_ball(3, 0.8, "unipc")),  # no velocity of D / sigma
        ("sa_few_steps_tau1_34", solvers.sa_solver(3, 4, interval=None)),  # the rescaled weights of appendix D
    ],
)
def test_mutants_disagree(name, wrong):
    got, want = pair(name, wrong)
    assert got.shape != want.shape or np.abs(got - want).max() > 1e-3 * np.abs(want).max()
