"""The data and the measures of solver-frontier and solver-law, against numbers that were not computed here."""

import numpy as np
import pytest
from scipy.stats import norm

from jdiff import exact
from jdiff.experiments import _models, _peers, solver_law


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
