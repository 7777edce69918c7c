"""SiT's sampler: the official loop in NumPy, the law for every form of noise, what it reduces to."""

import numpy as np
import pytest
from test_trace import run_rows

from jdiff import exact, order, predict, process, solvers, times
from jdiff.solvers.sit import FORMS, LAST

PATHS = {"Linear": process.flow(), "GVP": process.trigonometric(), "VP": process.vp_linear()}
each_path = pytest.mark.parametrize("path", PATHS)
DATA = exact.gaussian([1.0, -0.5, 2.0], [0.2, 0.6, 2.0])


def official(path, form, last, x, f, z, norm=0.8, n=12, last_size=0.1, start=0.02):
    """The official path plans and loop, in their time s = 1 - t, for a velocity f(x, s) of theirs."""

    def plan(s):  # alpha, alpha', sigma, sigma', drift coefficient r of r x, and the diffusion of SBDM
        if path == "Linear":
            a, da, sg, ds, ratio = s, 1.0, 1 - s, -1.0, 1 / s
        elif path == "GVP":
            a, da = np.sin(s * np.pi / 2), np.pi / 2 * np.cos(s * np.pi / 2)
            sg, ds, ratio = (
                np.cos(s * np.pi / 2),
                -np.pi / 2 * np.sin(s * np.pi / 2),
                np.pi / (2 * np.tan(s * np.pi / 2)),
            )
        else:
            log_a, ratio = -0.25 * (1 - s) ** 2 * 19.9 - 0.5 * (1 - s) * 0.1, 0.5 * (1 - s) * 19.9 + 0.05
            a, sg = np.exp(log_a), np.sqrt(1 - np.exp(2 * log_a))
            da, ds = a * ratio, -np.exp(2 * log_a) * ratio / sg
        return a, da, sg, ds, ratio * sg**2 - sg * ds

    def score(x, s):
        a, da, sg, ds, _ = plan(s)
        return ((a / da) * f(x, s) - x) / (sg**2 - (a / da) * ds * sg)

    def w(s):
        return {
            "constant": norm,
            "sbdm": norm * plan(s)[4],
            "sigma": norm * plan(s)[2],
            "linear": norm * (1 - s),
            "decreasing": 0.25 * (norm * np.cos(np.pi * s) + 1) ** 2,
            "increasing_decreasing": norm * np.sin(np.pi * s) ** 2,
        }[form]

    drift = lambda x, s: f(x, s) + w(s) * score(x, s)
    stop = 1 - last_size
    grid = np.linspace(start, stop, n)
    dt = grid[1] - grid[0]
    for s in grid[:-1]:
        x = x + drift(x, s) * dt + np.sqrt(2 * w(s)) * np.sqrt(dt) * next(z)
    a, _, sg, _, _ = plan(stop)
    return {
        "mean": lambda: x + drift(x, stop) * last_size,
        "tweedie": lambda: x / a + sg**2 / a * score(x, stop),
        "euler": lambda: x + f(x, stop) * last_size,
        "none": lambda: x + drift(x, stop) * last_size + np.sqrt(2 * w(stop) * last_size) * next(z),
    }[last]()


@each_path
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_official_loop(path, form):
    p, x = PATHS[path], np.random.default_rng(0).normal(size=4)
    D = lambda x, t: np.tanh(x) + 0.3 * t  # an x0 prediction
    velocity = lambda x, s: -predict.convert(p, x, 1 - s, D(x, 1 - s), "x0", "velocity")
    for last in LAST:
        draws = np.random.default_rng(1).normal(size=(12, 4))
        want = official(path, form, last, x, velocity, iter(draws))
        T = solvers.sit(form, 0.8, last)(p, solvers.sit_times(p, 12, last=0.1, start=0.98))
        assert T.nfe == 12
        got, _ = run_rows(T, x, D, np.random.default_rng(1))
        np.testing.assert_allclose(got, want, rtol=1e-8)


@pytest.mark.parametrize(("form", "path"), [*((form, "Linear") for form in FORMS), ("sigma", "GVP"), ("sbdm", "VP")])
def test_the_law_does_not_depend_on_the_noise(form, path):
    """With the exact score, mean and covariance at t = 0.1 are the exact ones, to weak order 1, for any w and norm."""
    p = PATHS[path]
    for method, norm in (("euler", 0.7), ("heun", 1.2)):
        errors = []
        for n in (60, 120):
            t = times.uniform(p, n, start=0.95, end=0.1)
            mean, cov = DATA.law(solvers.sit(form, norm, method=method)(p, t))
            a, s = p.alpha(0.1), p.sigma(0.1)
            true = np.append(a * DATA.means[0], a**2 * DATA.eigenvalues[0] + s**2)
            errors.append(np.linalg.norm(np.append(mean, np.diag(cov)) - true))
        assert errors[1] < 0.06 and errors[1] < 0.75 * errors[0], (method, errors)


@each_path
def test_reductions(path):
    p, t = PATHS[path], np.linspace(0.9, 0.1, 7)
    table = lambda s: s(p, t).unrolled()
    np.testing.assert_allclose(table(solvers.sit()), table(solvers.euler_maruyama()), rtol=1e-10, atol=1e-12)
    points = lambda s: table(s)[:, : 1 + s(p, t).nfe]
    for method in ("euler", "heun"):
        same = solvers.get(method, variable="t")
        np.testing.assert_allclose(points(solvers.sit(norm=0.0, method=method)), points(same), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("text", ["ddim", "heun", "dpm_solver_pp", "unipc(order=2, lower_order_final=False)", "sit"])
def test_solvers_keep_their_order_on_the_trigonometric_path(text):
    """Tree by tree, or in law: all that a solver needs of a one-sided interpolant are alpha and sigma."""
    solver = solvers.parse(text)
    assert order.measured_order(solver, PATHS["GVP"], 12) > solver.order - 0.1


def test_grids_and_steps():
    t = solvers.sit_times(PATHS["Linear"])
    assert len(t) == 251 and t[0] == 1 and t[-2] == 0.04 and t[-1] == 0
    np.testing.assert_allclose(-np.diff(t)[:-1], 0.96 / 249)
    np.testing.assert_allclose(solvers.sit_times(PATHS["VP"], 3, end=0.1), [1, 0.7, 0.4, 0.1])
    for form in FORMS:  # out of alpha = 0
        T = solvers.sit(form)(PATHS["Linear"], t)
        assert T.nfe == 250 and np.isfinite(T.A).all()
    assert solvers.sit(method="heun")(PATHS["GVP"], t).nfe <= solvers.sit(method="heun").cost(250)
    mean = solvers.sit(last="mean")(PATHS["VP"], t)
    assert not mean.C[-1].any() and solvers.sit(last="none")(PATHS["VP"], t).C[-1].any()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: solvers.sit("SBDM"), "form is 'SBDM'; expected one of constant, sbdm"),
        (lambda: solvers.sit(last="tweety"), "last is 'tweety'"),
        (lambda: solvers.sit(norm=-1.0), "norm is -1.0; the noise must not be negative"),
        (lambda: solvers.sit(method="rk4"), "method is 'rk4'"),
        (lambda: solvers.sit_times(process.flow(), 1), "at least 2 evaluations"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
