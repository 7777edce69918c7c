"""The data and the measures of solver-frontier and solver-law, against numbers that were not computed here."""

import numpy as np
import pytest
from scipy.stats import norm

from jdiff import exact, solvers, times
from jdiff.experiments import _models, _peers, solver_frontier, solver_law


def test_the_survey_has_a_number_for_every_cell():
    for what in ("rms", "median"):
        for name in _models.NAMES:
            for start in _models.STARTS:
                for nfe in _peers.SURVEY["nfe"]:
                    value, setup = _peers.published(what, name, start, nfe)
                    assert 0 < value < 1 and setup
    for name in _models.NAMES:
        assert 0 < _peers.published("sw2", name, "ode", 5)[0] < 1 and _peers.SURVEY["sw2"][name]["floor"] > 0


@pytest.mark.parametrize(
    ("start", "setup", "nfe", "published"),
    [  # rms on gauss8, as the survey printed it
        ("edm", "kd sample_dpmpp_2m_sde[eta=0,heun]{exp}", 5, 0.031),
        ("edm", "df DEISMultistep[o3,end=0.002]{karras}", 10, 0.0090),
        ("vp", "UniPC* vary_coeff,o3,logSNR", 10, 0.049),
        ("vp", "dpm-solver* multistep[dpmsolver,o3,time_quadratic]", 10, 0.028),
        ("flow", "df UniPCMultistep[bh2,o3,flow]", 5, 0.050),
    ],
)
def test_our_forms_of_published_set_ups_give_the_published_numbers(start, setup, nfe, published):
    model, p = _models.survey("gauss8"), _models.STARTS[start]
    x = _models.noise(model, p, _peers.SEED, _models.TRAJECTORIES["gauss8"])
    at, build = _peers.SETUPS[setup]
    rms = _models.errors(model.denoiser(p), build(p, nfe), x, _models.flow(model, p, x))["rms"]
    assert at == start and f"{rms:.2g}" == f"{published:.2g}"


def test_projected_quantiles_and_the_distance_to_them():
    n, u = 400, np.array([[1.0, 0.6], [0.0, 0.8]])
    model = exact.gaussian([1.0, -2.0], [4.0, 0.25])
    q = solver_law.quantiles(model, u, n)
    std = np.sqrt(u.T**2 @ [4.0, 0.25])
    wanted = (u.T @ [1.0, -2.0]) + std * norm.ppf((np.arange(n) + 0.5) / n)[:, None]
    np.testing.assert_allclose(q, wanted, rtol=1e-9, atol=1e-9)
    both = exact.mixture([0.25, 0.75], [[-5.0, 0.0], [5.0, 0.0]], [1e-4, 1e-4])  # a quarter of them at -5
    q = solver_law.quantiles(both, u[:, :1], n)
    assert (q[:100] < -4.9).all() and (q[100:] > 4.9).all()
    shifted = np.stack([q[:, 0] + 0.3, np.zeros(n)], 1)[np.random.default_rng(0).permutation(n)]
    assert solver_law.distance(shifted, u[:, :1], q) == pytest.approx(0.3)


def test_targets_say_where_they_hold():
    cell = {"peer rms": 0.1, "peer median": 0.02, "standard rms": 0.1, "standard median": 0.01, "fit rms": None}
    cell |= {"auto rms": 0.12, "auto median": 0.022, "same rms on more": 0.2, "same median on more": 0.02}
    cell |= {"default rms": 0.11, "default median": 0.023}
    cell |= {f"{kind} {w} on more": 0.02 for kind in ("standard", "auto", "default") for w in solver_frontier.WHICH}
    found = solver_frontier._targets({("gmm2 vp", 5): cell}, "peer", "", lambda value: 0.0)
    assert len(found) == 6 and "DOES NOT HOLD in 1 of them: gmm2 vp 5 (1.20)" in found[1]
    assert "by default" in found[5] and "DOES NOT HOLD in 1 of them: gmm2 vp 5 (1.15)" in found[5]
    assert all(line.endswith("holds.") for line in (found[0], *found[2:5]))
    found = solver_frontier._targets({("gmm2 vp", 5): cell}, "peer", "", lambda value: 0.01)  # half a unit of 0.1
    assert found[1].endswith("holds.")
    fitted = cell | {"fit rms": 0.01, "fit rms on more": 0.11, "fit median on more": 0.004}
    found = solver_frontier._targets({("gmm2 vp", 5): fitted}, "same", " on more", lambda value: 0.0)
    assert len(found) == 8 and "(0.55)" in found[3]
    assert all(found[i].endswith("holds.") for i in (0, 1, 2, 4, 5, 6, 7))


def test_more_trajectories_are_scored_by_kind():
    model, p = _models.survey("gauss8"), _models.STARTS["edm"]
    x = _models.noise(model, p, 11, 64)
    case = solver_frontier.Case(model, model.denoiser(p), x, _models.flow(model, p, x))
    made = {(s, "karras"): solvers.parse(s)(p, times.karras(p, 8)) for s in ("euler", "unipc(order=2)")}
    peers = {"a peer": solvers.ddim()(p, times.karras(p, 8))}
    found = solver_frontier._on_more(
        case, {"same": peers, "standard": made, "auto": {"chosen": made["euler", "karras"]}}
    )
    assert found["standard rms on more by"] == "unipc(order=2) on karras" and found["auto rms on more by"] == "chosen"
    errors = _models.errors(case.denoiser, made["unipc(order=2)", "karras"], x, case.target)
    assert found["standard rms on more"] == pytest.approx(errors["rms"], rel=1e-5)
    assert found["standard median on more"] == pytest.approx(errors["median"], rel=1e-5)
    assert found["same rms on more"] == pytest.approx(found["auto rms on more"], rel=1e-5)  # DDIM is Euler in sigma
    swapped = {"a peer": made["unipc(order=2)", "karras"]}  # a peer's set-up is one of our standard ones too
    found = solver_frontier._on_more(case, {"same": swapped, "standard": {("ddim", "karras"): peers["a peer"]}})
    assert found["standard rms on more by"] == found["same rms on more by"] == "a peer"
    with pytest.raises(ValueError, match=r"--more is -1; expected 0 or more"):
        solver_frontier.prepare(solver_frontier.Settings(more=-1))
