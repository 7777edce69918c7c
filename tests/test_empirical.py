"""DPM-Solver-v3 and its statistics: exact Gaussian steps, limits, slopes, the official code, estimates, files."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from test_official import FILE as OFFICIAL
from test_official import PROCESS
from test_solvers import slope, zigzag
from test_trace import run_directly, run_rows

import jdiff
import jdiff.fit
import jdiff.inversion
from jdiff import exact, process, solvers, statistics, times
from jdiff.statistics import Statistics, constant
from jdiff.trace import constant as trace_constant
from jdiff.trace import grid

v3 = solvers.dpm_solver_v3
PROCESSES = {"vp": process.vp_linear(), "edm": process.edm(), "flow": process.flow()}


def gaussian_statistics(p, mean, variance, n=1200):
    """l* = sigma^2 / (alpha^2 S + sigma^2) an element makes f the same for all x: s = 0 and b its slope."""
    lam = statistics.levels(p, n)
    k = variance / (variance + np.exp(-2 * lam)[:, None])
    return Statistics(lam, 1 - k, 0 * k, 2 * k * (1 - k) * mean)


# 1. One step is exact on a diagonal Gaussian ---------------------------------------------------------------------

MEAN, VARIANCE = np.linspace(-0.5, 0.7, 8), np.geomspace(0.05, 2.0, 8) ** 2


def gaussian_denoiser(p, mean, variance):
    gain = lambda t: p.alpha(t) * variance / (p.alpha(t) ** 2 * variance + p.sigma(t) ** 2)
    return lambda x, t: mean + gain(t) * (x - p.alpha(t) * mean)


def one_step_error(p, table, **options):
    model = exact.gaussian(MEAN, VARIANCE)
    t = np.array([p.t_of_lam(table.lam[0]), p.t_min])
    x = p.sigma(t[0]) * np.random.default_rng(0).normal(size=(50, 8))
    got, _ = run_rows(v3(table, **options)(p, t), x, gaussian_denoiser(p, MEAN, VARIANCE), None)
    return float(np.abs(got - np.asarray(model.flow(p, jnp.asarray(x), t[0], t[1]))).max())


@pytest.mark.parametrize("p", PROCESSES.values(), ids=PROCESSES)
def test_one_step_is_exact_on_a_gaussian(p):
    table = gaussian_statistics(p, MEAN, VARIANCE)
    assert one_step_error(p, table) < 1e-9
    assert one_step_error(p, table, as_published=True) < 1e-4
    wrong = {
        "no b": Statistics(table.lam, table.l, table.s, 0 * table.b),
        "b of another sign": Statistics(table.lam, table.l, table.s, -table.b),
        "an s": Statistics(table.lam, table.l, table.s + 0.05, table.b),
        "l of another variance": gaussian_statistics(p, MEAN, 1.1 * VARIANCE),
    }
    for name, mutant in wrong.items():
        assert one_step_error(p, mutant) > 1e-3, name


def test_rows_hold_constants_of_the_samples_shape():
    p = PROCESSES["vp"]
    table = gaussian_statistics(p, MEAN, VARIANCE, 60)
    solver = v3(Statistics(table.lam, table.l, table.s + 0.2, table.b))
    t = times.quadratic(p, 5)
    x = np.random.default_rng(1).normal(size=(3, 8))
    f = lambda x, t: np.tanh(3 * x + t) - 0.2 * x
    T = solver(p, t)
    want, at = run_directly(solver, grid(p, t), x, f, None)
    got, points = run_rows(T, x, f, None)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(points, at, rtol=1e-10, atol=1e-10)
    den = jdiff.denoiser(lambda x, t: jnp.tanh(3 * x + t) - 0.2 * x, p, "x0")
    wide = T.pad(T.registers + 1, 1)
    np.testing.assert_allclose(jdiff.sample(den, wide, jnp.asarray(x), jax.random.key(0)), want, rtol=1e-9, atol=1e-9)


def test_the_law_of_a_gaussian_knows_constants():
    """Exact.law, a third way to run a tableau, ends where the flow does: scalar statistics, one step."""
    p = PROCESSES["edm"]
    model = exact.gaussian([0.4, 0.4], 0.3)
    lam = statistics.levels(p, 800)
    k = 0.3 / (0.3 + np.exp(-2 * lam))
    mean, cov = model.law(v3(Statistics(lam, 1 - k, 0 * k, 2 * k * (1 - k) * 0.4))(p, [80.0, 0.5]))
    np.testing.assert_allclose(mean, [0.4, 0.4], atol=1e-9)
    np.testing.assert_allclose(cov, (0.3 + 0.25) * np.eye(2), atol=1e-9)


# 2. Limits, and the official code --------------------------------------------------------------------------------


@pytest.mark.parametrize("p", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_without_statistics_it_is_dpm_solver_pp(p, order):
    for t in (times.karras(p, 7), zigzag(p, 6, 0.9 * p.t_max, 0.05), times.uniform(p, 5)):
        for lower in (False, True):
            want = solvers.dpm_solver_pp(order, form="heun", lower_order_final=lower)(p, t).unrolled()
            got = v3(order=order, corrector=None, lower_order_final=lower)(p, t).unrolled()
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lower", [0, 1])
def test_0_minus1_0_is_dpm_solver_on_eps(lower):
    """Against the official DPM-Solver's own table; l = s = b = 0 is another method."""
    name = f"dpm_multi2_taylor_lof{lower}_logsnr8"
    a, s = OFFICIAL[f"{name}/grid"].T
    t = np.minimum(PROCESS["vp"].t_of_lam(np.log(a) - np.log(s)), 1.0)
    want = OFFICIAL[f"{name}/points"]
    table = lambda c: v3(c, 2, None, lower_order_final=bool(lower))(PROCESS["vp"], t).unrolled()
    np.testing.assert_allclose(table(constant(0, -1, 0)), want, rtol=0, atol=1e-8 * np.abs(want).max())
    assert np.abs(table(constant(0, 0, 0)) - want).max() > 0.1 * np.abs(want).max()
    assert np.abs(table(constant(1, 0, 0)) - want).max() > 1e-3 * np.abs(want).max()


LIFTED = np.load(Path(__file__).parent / "golden" / "lifted_v3.npz", allow_pickle=False)
META = {name: m for name, m in json.loads(str(LIFTED["meta"])).items() if not name.startswith("dc_")}


def lifted(name, **changes):
    m = META[name]
    table = Statistics(**{key: LIFTED[f"{name}/{key}"] for key in ("lam", "l", "s", "b")})
    options = {
        "order": m["order"],
        "corrector": None if not m["use_corrector"] else "pseudo" if m["c_pseudo"] else "same",
        "pseudo": m["p_pseudo"],
        "lower_order_final": m["lower_order_final"],
        "correct_in": (0.5, 1.0) if m.get("half") else (0.0, 1.0),
        "as_published": True,
    }
    return v3(table, **options | changes)(PROCESSES[m["process"]], LIFTED[f"{name}/grid"])


@pytest.mark.parametrize("name", META)
def test_agrees_with_the_official_class(name):
    want, T = LIFTED[f"{name}/points"], lifted(name)
    np.testing.assert_allclose(T.t, LIFTED[f"{name}/times"], rtol=1e-12)  # rounded to the table's levels
    np.testing.assert_allclose(T.unrolled(), want, rtol=0, atol=1e-8 * np.abs(want).max())
    pseudo = {"pseudo": not META[name]["p_pseudo"]} if META[name]["order"] > 2 else {}
    for wrong in ({"as_published": False}, {"corrector": "full"}, pseudo or {"order": 1}):
        assert np.abs(lifted(name, **wrong).unrolled() - want).max() > 1e-4 * np.abs(want).max(), wrong


# 3. Slopes: any smooth statistics keep the order -------------------------------------------------------------------

LAM = np.linspace(-5.0, 7.0, 481)
SMOOTH = Statistics(LAM, 1 / (1 + 0.4 * np.exp(2 * LAM)), 0.3 * np.sin(0.4 * LAM), 0.2 * np.cos(0.3 * LAM))


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"order": 2, "corrector": None}, 2),
        ({"order": 3, "corrector": None}, 3),
        ({"order": 3, "corrector": "same"}, 3),
        ({"order": 2, "corrector": "full"}, 3),
        ({"order": 3, "corrector": "full"}, 4),
        ({"order": 3}, 2),
        ({"order": 3, "corrector": None, "pseudo": True}, 2),
    ],
)
@pytest.mark.parametrize("p", [PROCESSES["vp"], PROCESSES["flow"]], ids=["vp", "flow"])
def test_order_with_smooth_statistics(p, options, order):
    solver = v3(SMOOTH if p == PROCESSES["vp"] else None, lower_order_final=False, **options)
    assert (
        solver.order == order
        and slope(solver, p, (32, 64, 128, 256) if order > 3 else (16, 32, 64, 128)) >= order - 0.1
    )


def test_slopes_see_what_is_wrong():
    p = PROCESSES["vp"]
    rough = Statistics(LAM, SMOOTH.l, np.where(LAM > -0.4, 1.0, -1.0), SMOOTH.b)
    for order, wrong in (
        (3, v3(SMOOTH, 3, lower_order_final=False)),  # divided differences
        (3, v3(SMOOTH, 3, None, pseudo=True, lower_order_final=False)),
        (3, v3(rough, 3, None, lower_order_final=False)),
    ):
        assert not slope(wrong, p, (16, 32, 64, 128)) >= order - 0.1


# 4. Estimates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "probes"), [(True, None), (False, 1)])
def test_estimate_recovers_a_gaussian(own, probes):
    p, mean, variance = process.edm(), np.array([0.5, -0.2, 0.0]), np.array([0.01, 0.3, 2.0])
    model = exact.gaussian(mean, variance)
    data = None if own else np.asarray(model.sample(jax.random.key(1), 256))
    with jax.enable_x64(False):
        found = statistics.estimate(
            model.denoiser(p), (3,), jax.random.key(0), data=data, n=256, n_lam=60, batch=128, probes=probes
        )
    want = gaussian_statistics(p, mean, variance, 60)
    np.testing.assert_allclose(found.l, want.l, atol=1e-5)
    inner = slice(3, -3)  # dk/dlam of a spline of 60 intervals
    np.testing.assert_allclose(found.s[inner], 0.0, atol=2e-3)
    np.testing.assert_allclose(found.b[inner], want.b[inner], atol=5e-3)
    x = 80.0 * np.random.default_rng(0).normal(size=(20, 3))
    got, _ = run_rows(v3(found)(p, [80.0, p.t_min]), x, gaussian_denoiser(p, mean, variance), None)
    assert np.abs(got - np.asarray(model.flow(p, jnp.asarray(x), 80.0, p.t_min))).max() < 0.02


def test_estimate_is_the_regression_along_the_flow():
    """On two modes: l by differences in x; (s, b) by np.polyfit of df/dlam, by differences along DOP853's flow."""
    p, model = process.flow(), exact.mixture([0.3, 0.7], [[-1.0], [0.8]], [0.02, 0.05])
    data = np.asarray(model.sample(jax.random.key(3), 64, jnp.float64))
    eps = np.asarray(
        jax.random.normal(jax.random.split(jax.random.fold_in(jax.random.key(5), 0), 3)[0], (64, 1), jnp.float32)
    )
    found = statistics.estimate(
        model.denoiser(p), (1,), jax.random.key(5), data=data, n=64, n_lam=400, batch=64, start=0.9, end=0.1
    )
    predict = jax.jit(lambda x, t: model.denoiser(p)(x, t))
    D = lambda y, lam: np.asarray(predict(p.alpha(p.t_of_lam(lam)) * y, p.t_of_lam(lam)))
    k_of = lambda lam: np.interp(lam, found.lam, 1 - found.l[:, 0])
    for i in (80, 200, 320):
        lam = found.lam[i]
        y = np.float32(data) + np.exp(-lam) * eps
        d = 1e-4
        np.testing.assert_allclose(
            1 - found.l[i, 0], np.mean((D(y + d, lam) - D(y - d, lam)) / (2 * d)), rtol=2e-4, atol=1e-5
        )
        step = found.lam[i + 1] - lam
        flow = lambda u, v: D(v[:, None], u)[:, 0] - v
        there, back = (
            scipy.integrate.solve_ivp(flow, (lam, to), y[:, 0], "DOP853", rtol=1e-9, atol=1e-9).y[:, -1]
            for to in (lam + step, lam - step)
        )
        f = lambda v, u: k_of(u) * v - D(v[:, None], u)[:, 0]
        df = (f(there, lam + step) - f(back, lam - step)) / (2 * step)
        slope_, shift = np.polyfit(f(y[:, 0], lam), df, 1)
        np.testing.assert_allclose([found.s[i, 0], found.b[i, 0]], [slope_, shift], rtol=5e-3, atol=2e-3)


# 5. Files and mistakes -------------------------------------------------------------------------------------------


def test_statistics_are_saved_and_read(tmp_path):
    table = gaussian_statistics(PROCESSES["vp"], MEAN, VARIANCE, 20)
    path = table.save(tmp_path / "a" / "s.safetensors")
    again = Statistics.load(path)
    for name in ("lam", "l", "s", "b"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    t = times.logsnr(PROCESSES["vp"], 5, end=0.01)
    a, b = (
        solvers.parse(f"dpm_solver_v3(statistics={str(path)!r})")(PROCESSES["vp"], t),
        v3(table)(PROCESSES["vp"], t),
    )
    np.testing.assert_array_equal(a.E, b.E)
    jdiff.fit.save(tmp_path / "solver.safetensors", a)
    kept = solvers.load(tmp_path / "solver.safetensors")
    for name in ("A", "B", "E"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(a, name))
    (tmp_path / "bad").write_text("no")
    with pytest.raises(ValueError, match="not a file of statistics"):
        Statistics.load(tmp_path / "bad")


def test_what_cannot_hold_constants_says_so():
    p, lam = PROCESSES["vp"], np.linspace(-6.0, 8.0, 40)
    T = v3(Statistics(lam, np.ones(40), np.zeros(40), np.ones(40)))(p, times.logsnr(p, 4))
    assert T.E is not None
    with pytest.raises(ValueError, match="cannot be read backwards: it has coefficients an element, or constants"):
        jdiff.inversion.reverse(T)
    with pytest.raises(ValueError, match="no constants"):
        jdiff.fit.from_tableau(T)


def test_mistakes_are_named():
    p, den = PROCESSES["vp"], exact.gaussian([0.0], 1.0).denoiser(PROCESSES["vp"])
    with pytest.raises(ValueError, match="order is 4; expected 1 to 3"):
        v3(order=4)
    with pytest.raises(ValueError, match="corrector is 'yes'; expected one of 'pseudo', 'full', 'same', None"):
        v3(corrector="yes")
    with pytest.raises(ValueError, match="correct_in"):
        v3(correct_in=(0.5, 2.0))
    narrow = Statistics(np.linspace(-1, 1, 9), np.ones(9), np.ones(9), np.ones(9))
    with pytest.raises(ValueError, match=r"times\[0\] = 1 has half log-SNR -5.*outside the statistics'"):
        v3(narrow)(p, [1.0, 0.5])
    with pytest.raises(ValueError, match="repeat one; use as_published=False"):
        v3(narrow, as_published=True)(p, p.t_of_lam(np.linspace(-1, 1, 14)))
    with pytest.raises(ValueError, match="at least 4 values, rising"):
        Statistics(np.linspace(1, -1, 9), np.ones(9), np.ones(9), np.ones(9))
    with pytest.raises(ValueError, match="b has shape"):
        Statistics(np.linspace(-1, 1, 9), np.ones(9), np.ones(9), np.ones(8))
    with pytest.raises(ValueError, match="s holds values that are not finite"):
        Statistics(np.linspace(-1, 1, 9), np.ones(9), np.full(9, np.nan), np.ones(9))
    with pytest.raises(ValueError, match="data has shape"):
        statistics.estimate(den, (1,), jax.random.key(0), data=np.ones((4, 2)))
    with pytest.raises(ValueError, match="n_lam=2"):
        statistics.estimate(den, (1,), jax.random.key(0), n_lam=2)
    with pytest.raises(ValueError, match="0 < end < start"):
        statistics.estimate(den, (1,), jax.random.key(0), end=0.0)
    with pytest.raises(TypeError, match="constant before the first network evaluation"):
        jdiff.trace(lambda x, model, noise: model(x + trace_constant(x, 1.0), 0.5), p)
