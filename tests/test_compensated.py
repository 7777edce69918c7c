"""DC-Solver and its ratios: UniPC at 1, the official class, exact interpolation, the search, the regression."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_trace import run_rows

import jdiff
from jdiff import exact, guidance, process, solvers, times
from jdiff.fit import compensation
from jdiff.solvers import compensated
from jdiff.trace import grid, trace

P = process.vp_linear()
LIFTED = np.load(Path(__file__).parent / "golden" / "lifted_v3.npz", allow_pickle=False)
META = {name: m for name, m in json.loads(str(LIFTED["meta"])).items() if name.startswith("dc_")}


@pytest.mark.parametrize("p", [P, process.flow()], ids=["vp", "flow"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_ratios_of_one_are_unipc(p, order):
    for variant in ("bh1", "bh2"):
        for t in (times.uniform(p, 7), times.logsnr(p, 6, end=0.01)):
            want = solvers.unipc(order, variant)(p, t)
            got = solvers.dc_solver([1.0] * (len(t) - 1), order, 2, variant)(p, t)
            np.testing.assert_array_equal(got.unrolled(), want.unrolled())
            moved = solvers.dc_solver([1.0] * (len(t) - 2) + [0.9], order, 2, variant)(p, t)
            assert np.abs(moved.unrolled() - want.unrolled()).max() > 1e-3


@pytest.mark.parametrize("name", META)
def test_agrees_with_the_official_class(name):
    m = META[name]
    options = {"order": m["order"], "dc_order": m["dc_order"], "variant": m["variant"]}
    options["lower_order_final"] = m.get("lower_order_final", True)
    table = lambda ratios, **changes: solvers.dc_solver(ratios, **options | changes)(P, LIFTED[f"{name}/grid"])
    want = LIFTED[f"{name}/points"]
    np.testing.assert_allclose(table(m["ratios"]).unrolled(), want, rtol=0, atol=1e-8 * np.abs(want).max())
    late = [1.0, 1.0, *m["ratios"][2:]]
    reverse = [2 - r for r in late]
    for wrong in (table(None), table(reverse), table(late, dc_order=3 - m["dc_order"])):
        assert np.abs(wrong.unrolled() - want).max() > 1e-3 * np.abs(want).max()


@pytest.mark.parametrize("dc_order", [1, 2])
def test_the_moved_output_is_exact_for_polynomials_in_time(dc_order):
    """Into sigma = 0 the sample is the moved output itself."""
    t = times.uniform(P, 6)
    f = np.polynomial.Polynomial([0.3, -1.0, 2.0][: dc_order + 1])
    end = lambda f, *last: run_rows(
        solvers.dc_solver([1.0] * (6 - len(last)) + [*last], 1, dc_order)(P, t),
        np.zeros(1), lambda x, t: f(t) * np.ones(1), None,
    )[0][0]  # fmt: skip
    at = lambda i, ratio: ratio * t[i] + (1 - ratio) * t[i - 1]
    np.testing.assert_allclose(end(f, 0.7), f(at(5, 0.7)), rtol=1e-12)
    assert (
        abs(end(f * np.polynomial.Polynomial([0, 1]), 0.7) - (f * np.polynomial.Polynomial([0, 1]))(at(5, 0.7))) > 1e-3
    )
    # a replaced output stays: the next interpolation goes through it, at its old place
    values = [f(t[5]), f(at(4, 0.6)), f(t[3])][: dc_order + 1]
    through = np.polyfit(t[5:2:-1][: dc_order + 1], values, dc_order)
    np.testing.assert_allclose(end(f, 0.6, 0.7), np.polyval(through, at(5, 0.7)), rtol=1e-10)
    assert abs(end(f, 0.6, 0.7) - f(at(5, 0.7))) > 1e-3


GMM = exact.mixture([0.5, 0.3, 0.2], [[-0.6, 0.2], [0.5, 0.5], [0.3, -0.7]], [0.02, 0.03, 0.01])
CLASS = exact.mixture([1.0], [[0.5, 0.5]], [0.03])


def guided(scale):
    return guidance.cfg(CLASS.denoiser(P), GMM.denoiser(P), scale)


def test_the_search_beats_ratio_1_on_its_own_set_and_on_others():
    t = times.uniform(P, 10)
    x, fresh = np.split(np.random.default_rng(0).normal(size=(110, 2)), [10])
    den = guided(7.5)
    path = compensation.reference_path(den, t, jnp.asarray(x), substeps=32)
    found = compensation.search_ratios(den, t, jnp.asarray(x), path)
    assert found.ratios[:2] == (1.0, 1.0) and any(r != 1 for r in found.ratios)
    assert found.error < 0.7 * found.error_without
    goal = compensation.reference_path(den, t, jnp.asarray(fresh), substeps=32)[-1]
    far = lambda s: float(np.sqrt(np.mean((jdiff.sample(den, s(P, t), jnp.asarray(fresh)) - goal) ** 2)))
    assert far(solvers.dc_solver(found.ratios)) < far(solvers.unipc(2))
    # the numbers are those of the finished solver
    end = jdiff.sample(den, solvers.dc_solver(found.ratios)(P, t), jnp.asarray(x))
    np.testing.assert_allclose(np.sqrt(np.mean((end - path[-1]) ** 2)), found.error, rtol=1e-9)
    # each ratio is a minimum of its own step's distance
    k = 3

    def loss(r):
        each = [*found.ratios[:k], r, *found.ratios[k + 1 :]]
        T = trace(lambda y, model, noise: compensated.run(grid(P, t), y, model, each, 2, 2, "bh2", True, stop=k), P)
        return float(jnp.mean((jdiff.sample(den, T.pad(6, 0), jnp.asarray(x)) - path[k + 1]) ** 2))

    assert loss(found.ratios[k]) <= min(loss(found.ratios[k] + 0.02), loss(found.ratios[k] - 0.02), loss(1.0))


def test_the_search_keeps_1_where_nothing_is_better():
    """The reference is UniPC's own path: every step's distance is 0 at ratio 1."""
    t, x, den = times.uniform(P, 4, end=0.1), jnp.asarray(np.random.default_rng(1).normal(size=(4, 2))), GMM.denoiser(P)
    T = lambda k: trace(
        lambda y, model, noise: compensated.run(grid(P, t), y, model, [1.0] * 4, 2, 2, "bh2", True, stop=k), P
    ).pad(6, 0)
    path = jnp.stack([x, x, x, *(jdiff.sample(den, T(k), x) for k in (2, 3))])
    assert compensation.search_ratios(den, t, x, path).ratios == (1.0,) * 4


def test_the_reference_path_is_on_the_flow():
    model, t = exact.gaussian([0.3, -0.2], [0.1, 0.5]), times.uniform(P, 4)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2)))
    path = compensation.reference_path(model.denoiser(P), t, x, substeps=200)
    for i in (1, 3, 4):
        np.testing.assert_allclose(path[i], model.flow(P, x, 1.0, t[i]), atol=0.01)


def test_regression_recovers_a_planted_cascade():
    c = np.random.default_rng(0).normal(size=(4, 3, 3))
    planted = compensation.Cascade(c)
    known = {(w, n): planted(w, n) for w in (1.5, 3.0, 5.0, 7.5) for n in (5, 8, 10, 20)}
    fitted = compensation.fit_cpr(known)
    np.testing.assert_allclose(fitted(6.0, 12), planted(6.0, 12), rtol=1e-6, atol=1e-6)
    assert fitted(6.0, 12)[:2] == (1.0, 1.0) and len(fitted(6.0, 12)) == 12
    small = compensation.fit_cpr(known, degrees=(3, 1, 2))
    assert np.abs(np.subtract(small(6.0, 12), planted(6.0, 12))).max() > 1e-2
    one = {(2.0, 6): (1.0, 1.0, 0.9, 0.8, 1.1, 1.2)}  # as many ratios as coefficients: reproduced
    np.testing.assert_allclose(compensation.fit_cpr(one)(2.0, 6), one[2.0, 6], atol=1e-9)


def test_mistakes_are_named():
    t, x, den = times.uniform(P, 4), jnp.ones((3, 2)), GMM.denoiser(P)
    with pytest.raises(ValueError, match="3 ratios for 4 steps"):
        solvers.dc_solver([1.0] * 3)(P, t)
    with pytest.raises(ValueError, match="the first 2 ratios must be 1"):
        solvers.dc_solver([1.0, 0.9, 1.0, 1.0])(P, t)
    with pytest.raises(ValueError, match="dc_order is 3; expected 1 or 2"):
        solvers.dc_solver(dc_order=3)
    with pytest.raises(ValueError, match="expected finite numbers"):
        solvers.dc_solver([1.0, 1.0, np.nan, 1.0])
    with pytest.raises(ValueError, match=r"reference has shape \(4, 3, 2\); expected \(5, 3, 2\)"):
        compensation.search_ratios(den, t, x, jnp.ones((4, 3, 2)))
    with pytest.raises(ValueError, match="bounds around 1"):
        compensation.search_ratios(den, t, x, jnp.ones((5, 3, 2)), bounds=(1.2, 2.0))
    with pytest.raises(ValueError, match="3 ratios for scale 2, NFE 4"):
        compensation.fit_cpr({(2, 4): [1.0] * 3})
    with pytest.raises(ValueError, match="no ratios"):
        compensation.fit_cpr({})
