"""Exact models against autodiff, quadrature, SciPy's DOP853 and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from test_process import PROCESSES

import jdiff
from jdiff import exact, process, solvers, times

GAUSSIAN = {name: p for name, p in PROCESSES.items() if p.gaussian}
each = pytest.mark.parametrize("p", GAUSSIAN.values(), ids=GAUSSIAN)
RNG = np.random.default_rng(0)


def spd(d, seed):
    a = np.random.default_rng(seed).normal(size=(d, d))
    return a @ a.T / d + 0.05 * np.eye(d)


MIX = exact.mixture([0.2, 0.5, 0.3], RNG.normal(size=(3, 4)), [spd(4, 1), np.array([0.1, 0.2, 1.0, 0.01]), 0.3])


@each
def test_denoiser_is_tweedies_formula(p):
    """x0 = (x + sigma^2 grad log p_t) / alpha, with the gradient by autodiff of the exact log-density."""
    x = jnp.asarray(RNG.normal(size=(5, 4)))
    for t in (0.02 * p.t_max, 0.3 * p.t_max, 0.9 * p.t_max):
        score = jax.grad(lambda x, t=t: MIX.log_density(p, x, t).sum())(x)
        D = (x + p.sigma(t) ** 2 * score) / p.alpha(t)
        np.testing.assert_allclose(MIX.denoiser(p)(x, t), D, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(MIX.score(p, x, t), score, rtol=1e-7, atol=1e-9)


@each
def test_log_density_against_scipy(p):
    x = RNG.normal(size=(3, 4))
    t = 0.37 * p.t_max
    a, s = p.alpha(t), p.sigma(t)
    covs = [spd(4, 1), np.diag([0.1, 0.2, 1.0, 0.01]), 0.3 * np.eye(4)]
    law = lambda m, c: scipy.stats.multivariate_normal(a * m, a**2 * c + s**2 * np.eye(4))
    each = [w * law(m, c).pdf(x) for w, m, c in zip(MIX.weights, MIX.means, covs, strict=True)]
    np.testing.assert_allclose(MIX.log_density(p, jnp.asarray(x), t), np.log(sum(each)), rtol=1e-10)


def test_denoiser_by_quadrature_in_one_dimension():
    p, t = process.vp_linear(), 0.3
    model = exact.mixture([0.4, 0.6], [[-1.0], [0.5]], [0.04, 0.09])
    pdf = lambda u: 0.4 * scipy.stats.norm.pdf(u, -1, 0.2) + 0.6 * scipy.stats.norm.pdf(u, 0.5, 0.3)
    for x in (-1.2, 0.1, 0.8):
        weight = lambda u, x=x: pdf(u) * scipy.stats.norm.pdf(x, p.alpha(t) * u, p.sigma(t))
        top, bottom = (scipy.integrate.quad(f, -3, 3, epsabs=1e-13)[0] for f in (lambda u, w=weight: u * w(u), weight))
        assert float(model.denoiser(p)(jnp.array([[x]]), t)[0, 0]) == pytest.approx(top / bottom, rel=1e-9)


@each
def test_times_broadcast(p):
    """(batch, 1) and a time a coordinate give what scalars give; unequal coordinates solve the joint Gaussian."""
    x = jnp.asarray(RNG.normal(size=(3, 4)))
    D = MIX.denoiser(p)
    t = np.array([0.1, 0.5, 0.8]) * p.t_max
    rowwise = jnp.concatenate([D(x[i : i + 1], t[i]) for i in range(3)])
    np.testing.assert_allclose(D(x, t[:, None]), rowwise, rtol=1e-9)
    np.testing.assert_allclose(D(x, np.repeat(t[:, None], 4, 1)), rowwise, rtol=1e-8)
    np.testing.assert_allclose(
        MIX.log_density(p, x, np.repeat(t[:, None], 4, 1)), MIX.log_density(p, x, t[:, None]), rtol=1e-9
    )
    mean, cov = RNG.normal(size=4), spd(4, 7)
    u = np.array([0.05, 0.3, 0.6, 0.95]) * p.t_max
    A, S = np.diag(p.alpha(u)), np.diag(p.sigma(u))
    gain = cov @ A @ np.linalg.inv(A @ cov @ A + S @ S)
    expected = mean + (np.asarray(x) - A @ mean) @ gain.T
    np.testing.assert_allclose(exact.gaussian(mean, cov).denoiser(p)(x, u), expected, rtol=1e-9)


def test_point_mass_and_data_end():
    p = process.flow()
    point = exact.gaussian([1.0, -2.0], 0.0)
    np.testing.assert_allclose(point.denoiser(p)(jnp.ones((3, 2)), 0.4), np.tile([1.0, -2.0], (3, 1)))
    x = jnp.asarray(RNG.normal(size=(3, 4)))
    np.testing.assert_allclose(MIX.denoiser(p)(x, 0.0), x, rtol=1e-10)
    np.testing.assert_allclose(MIX.denoiser(p)(x, 1.0), np.tile(MIX.mean, (3, 1)), rtol=1e-10)


@each
def test_gaussian_flow_against_dop853(p):
    g = exact.gaussian(RNG.normal(size=3), spd(3, 5))
    t0, t1 = 0.95 * p.t_max, 0.03 * p.t_max
    x = RNG.normal(size=(2, 3)) * p.sigma(t0)
    velocity = jax.jit(lambda x, t: g.denoiser(p)(x, t, "velocity"))

    def slope(t, y):
        return np.asarray(velocity(y.reshape(2, 3), t)).ravel()

    # The discrete table's velocity jumps at each of its levels: integrate from level to level there.
    knots = np.arange(950, 29, -1) / 1000 if isinstance(p, process.VPDiscrete) else np.array([t0, t1])
    y = x.ravel()
    for a, b in itertools.pairwise(knots):
        tiny = 1e-10 * (a - b)
        y = scipy.integrate.solve_ivp(slope, (a - tiny, b + tiny), y, "DOP853", rtol=1e-11, atol=1e-11).y[:, -1]
    flow = g.flow(p, jnp.asarray(x), t0, t1)
    np.testing.assert_allclose(flow, y.reshape(2, 3), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(g.flow(p, flow, t1, t0), x, rtol=1e-9, atol=1e-9)


def test_samples_and_moments():
    x = np.asarray(MIX.sample(jax.random.key(0), 40000, jnp.float64))
    np.testing.assert_allclose(x.mean(0), MIX.mean, atol=4 * np.sqrt(np.diag(MIX.cov).max() / 40000))
    np.testing.assert_allclose(np.cov(x.T), MIX.cov, atol=0.05)
    np.testing.assert_allclose(MIX.sample(jax.random.key(0), 7), MIX.sample(jax.random.key(0), 40)[:7], rtol=1e-5)


@pytest.mark.parametrize(
    "solver", [solvers.ddpm(), solvers.heun(churn=5.0), solvers.unipc(3), solvers.dpm_solver_pp(2, eta=1.0)]
)
def test_law_against_running_the_table(solver):
    """The closed-form law of a solver's output is what running it on many samples shows."""
    p = process.vp_linear()
    g = exact.gaussian([0.5, -0.2], [[0.5, 0.2], [0.2, 0.3]])
    table = solver(p, times.logsnr(p, 6, start=0.9, end=0.01))
    mean, cov = g.law(table)
    start = p.diffuse(jax.random.key(1), g.sample(jax.random.key(0), 40000, jnp.float64), 0.9)
    x = np.asarray(jdiff.sample(g.denoiser(p), table, start, jax.random.key(2)))
    np.testing.assert_allclose(x.mean(0), mean, atol=4 * np.sqrt(cov.max() / 40000))
    np.testing.assert_allclose(np.cov(x.T), cov, atol=4 * np.sqrt(2 / 40000) * cov.max())


def test_bad_models():
    for call, says in (
        (lambda: exact.gaussian([0, 0], [[1, 2], [2, 1]]), "not positive semi-definite"),
        (lambda: exact.gaussian([0, 0], np.ones((3, 3))), r"shape \(3, 3\)"),
        (lambda: exact.mixture([0.5, 0.6], np.zeros((2, 2)), [1, 1]), "sum to 1.1"),
        (lambda: exact.mixture([1.0], np.zeros((2, 2)), [1, 1]), "expected weights"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
