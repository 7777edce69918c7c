"""PFGM++ and finite data sets: radii against the Beta law, the limits in D, exact fields, laws and densities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import jdiff
from jdiff import exact, losses, ode, process, solvers, times

KEY = jax.random.key(0)
DATA = np.array([[1.0, 0.2], [-0.7, 0.9], [-0.6, -0.8], [0.3, -0.3]])


def radii(D, n, N, dtype=jnp.float32):
    eps = np.asarray(process.pfgmpp(D).kernel(KEY, jax.ShapeDtypeStruct((n, N), dtype)), np.float64)
    return eps, np.sum(eps * eps, 1)


@pytest.mark.parametrize("D", [1, 8, 128])
def test_radii_follow_the_beta_law(D):
    """R^2 / (R^2 + D) ~ Beta(N/2, D/2), float32 draws, n = 20,000; directions uniform."""
    eps, square = radii(D, 20_000, 6)
    assert scipy.stats.kstest(square / (square + D), scipy.stats.beta(3, D / 2).cdf).pvalue > 1e-3
    u = eps / np.sqrt(square)[:, None]
    assert np.abs(u.mean(0)).max() < 4 / np.sqrt(6 * 20_000)
    assert np.abs(u.T @ u / 20_000 - np.eye(6) / 6).max() < 4 * np.sqrt(2 / 8) / 6 / np.sqrt(20_000) * 1.5


def test_radii_of_large_samples_and_many_dimensions():
    """N = 300,000 and D = 1e6 in float32: R^2 / (R^2 + D) ~ Beta; its standard deviation is 4e-4 of its mean 0.23."""
    for D, n in ((1e6, 40), (1.0, 20)):
        _, square = radii(D, n, 300_000)
        ratio = square / D if D == 1 else square / (square + D)
        law = scipy.stats.betaprime(150_000, 0.5) if D == 1 else scipy.stats.beta(150_000, D / 2)
        assert np.isfinite(square).all() and scipy.stats.kstest(ratio, law.cdf).pvalue > 1e-3


def test_second_moment():
    """E|x - x0|^2 = N D sigma^2 / (D - 2)."""
    p, x0 = process.pfgmpp(16), jnp.ones((40_000, 3))
    square = np.sum(np.square(np.asarray(p.diffuse(KEY, x0, 2.5) - x0)), 1)
    assert abs(square.mean() - 3 * 16 * 2.5**2 / 14) < 4 * square.std() / 200


def test_many_dimensions_are_edm_on_the_same_noise():
    like = jnp.zeros((50, 4))
    plain = process.edm().kernel(KEY, like)
    assert process.pfgmpp(np.inf) == process.edm()
    errors = [float(jnp.abs(process.pfgmpp(D).kernel(KEY, like) - plain).max()) for D in (1e4, 1e8, 1e14)]
    assert errors[2] < 1e-6 and 50 < errors[0] / errors[1] < 200  # D^-1/2: 100
    prior = [process.pfgmpp(D).prior(KEY, (50, 4)) for D in (1e14, np.inf)]
    np.testing.assert_allclose(*prior, rtol=1e-6)


def test_one_radius_a_sample_by_key_and_index():
    p, like = process.pfgmpp(3), {"a": jnp.zeros((6, 2)), "b": jnp.zeros((6, 2, 2))}
    eps, z = p.kernel(KEY, like), process.edm().kernel(KEY, like)
    prior = lambda p: p.prior(KEY, {k: v.shape for k, v in like.items()}, dtype=jnp.float64)
    factor = {k: np.asarray(eps[k] / z[k]).reshape(6, -1) for k in eps}
    np.testing.assert_allclose(factor["a"], factor["b"][:, :2], rtol=1e-10)
    assert np.ptp(factor["a"][:, 0]) > 0.1 and np.ptp(factor["a"], 1).max() < 1e-10
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, 80.0 * v, rtol=1e-10), prior(p), eps)
    part = p.kernel(KEY, {k: v[:2] for k, v in like.items()}, jnp.array([4, 1]))
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v[np.array([4, 1])], rtol=1e-10), part, eps)


def test_loss_sees_the_kernel():
    p, x0 = process.pfgmpp(4), jnp.zeros((8, 5))
    eps = p.kernel(jax.random.fold_in(KEY, 1), x0)
    at = lambda apply: losses.denoising_loss(apply, p, "x0", time=lambda u: jnp.full_like(u, 2.0))(None, KEY, x0)
    np.testing.assert_allclose(at(lambda _, x, t, y: x - 2.0 * eps), 0.0, atol=1e-25)


@pytest.mark.parametrize("D", [1.0, 8.0])
def test_denoiser_against_the_formula(D):
    """Weights (|x - y|^2 + D sigma^2)^(-(N + D) / 2) in float64 by SciPy; in float32 too, far out and close up."""
    w = np.array([0.1, 0.2, 0.3, 0.4])
    model, p = exact.points(DATA, w), process.pfgmpp(D)
    x = np.concatenate([2.0 * np.random.default_rng(1).normal(size=(6, 2)), [[3e4, -2e4], [1e-3, 0.0]]])
    for t in (0.002, 0.7, 80.0):
        square = np.sum((x[:, None] - DATA) ** 2, -1)
        r = scipy.special.softmax(np.log(w) - 0.5 * (2 + D) * np.log(square + D * t * t), -1)
        np.testing.assert_allclose(model.denoiser(p)(jnp.asarray(x), t), r @ DATA, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(model.denoiser(p)(jnp.asarray(x, jnp.float32), t), r @ DATA, atol=3e-5)
        law = lambda y, t=t: scipy.stats.multivariate_t.pdf(x, loc=y, shape=t * t * np.eye(2), df=D)
        mixed = np.log(sum(wi * law(y) for wi, y in zip(w, DATA, strict=True)))
        np.testing.assert_allclose(model.log_density(p, jnp.asarray(x), t), mixed, rtol=1e-9)


def test_denoiser_of_gaussian_kernels_and_of_many_dimensions():
    """Equal to a mixture without width; D = 1e6 within 1e-4; a time a coordinate; the data end."""
    model = exact.points(DATA)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(7, 2)))
    narrow = exact.mixture(np.full(4, 0.25), DATA, [0.0] * 4)
    for p in (process.edm(), process.flow(), process.vp_cosine()):
        at = 0.4 if p.t_max == 1 else 0.6
        np.testing.assert_allclose(model.denoiser(p)(x, at), narrow.denoiser(p)(x, at), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(model.log_density(p, x, at), narrow.log_density(p, x, at), rtol=1e-9)
        np.testing.assert_allclose(model.denoiser(p)(x, np.full((7, 2), at)), model.denoiser(p)(x, at), rtol=1e-9)
    x32 = x.astype(jnp.float32)
    many = model.denoiser(process.pfgmpp(1e6))(x32, 0.6)
    np.testing.assert_allclose(many, model.denoiser(process.edm())(x32, 0.6), atol=1e-4)
    np.testing.assert_allclose(model.denoiser(process.pfgmpp(8))(jnp.asarray(DATA + 0.01), 0.0), DATA, atol=1e-12)


def test_regression_optimum_is_the_exact_denoiser():
    """E[(x0 - D(x)) f(x)] = 0 for bounded f, by Monte Carlo under the kernel, n = 100,000; a wrong D is seen."""
    p, model, n = process.pfgmpp(4), exact.points(DATA), 100_000
    x0 = model.sample(jax.random.key(3), n, jnp.float64)
    x = p.diffuse(jax.random.key(4), x0, 0.8)
    f = np.stack([np.ones(n), *np.tanh(np.asarray(x)).T, np.cos(3 * np.asarray(x)[:, 0])])
    for kernel, right in ((p, True), (process.edm(), False)):
        gap = f[:, :, None] * np.asarray(x0 - model.denoiser(kernel)(x, 0.8))
        z = np.abs(gap.mean(1)) / (gap.std(1) / np.sqrt(n))
        assert (z.max() < 4.5) == right


@pytest.mark.parametrize("D", [1, 16, np.inf])
def test_flow_from_the_prior_reproduces_the_points(D):
    """Each point equally often (chi-square, n = 3,000), and nothing else; Heun, 40 steps."""
    p = process.pfgmpp(D)
    table = solvers.heun()(p, times.karras(p, 40))
    x = np.asarray(jdiff.sample(exact.points(DATA - DATA.mean(0)).denoiser(p), table, p.prior(KEY, (3000, 2))))
    distance = np.linalg.norm(x[:, None] - (DATA - DATA.mean(0)), axis=-1)
    assert np.quantile(distance.min(1), 0.99) < 0.02
    assert scipy.stats.chisquare(np.bincount(distance.argmin(1), minlength=4)).pvalue > 1e-3


def test_likelihood_along_the_flow():
    """The field carries the kernel's law: log p at sigma = 0.5 by the flow to t_max, where the law is given."""
    p, model = process.pfgmpp(6, sigma_max=20.0), exact.points(DATA)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(6, 2)))
    want = np.asarray(model.log_density(p, x, 0.5))
    run = lambda **options: ode.log_likelihood(model.denoiser(p), x, start=0.5, rtol=1e-8, atol=1e-8, **options)[0]
    np.testing.assert_allclose(run(prior=lambda x: model.log_density(p, x, 20.0)), want, atol=1e-5)
    np.testing.assert_allclose(run(), want, atol=0.1)  # the prior's own law: off by the data's size over sigma_max


def test_solvers_build_the_tables_of_edm():
    grid, built = times.karras(process.edm(), 8), 0
    for name, make in solvers.ALL.items():
        try:
            solver = make()
            table = solver(process.edm(), grid)
        except (TypeError, ValueError):  # needs arguments, or another process
            continue
        if solver.stochastic:
            with pytest.raises(ValueError, match="Gaussian eps"):
                solver(process.pfgmpp(8), grid)
            continue
        other = solver(process.pfgmpp(8), grid)
        for field in ("t", "A", "B", "h0"):
            np.testing.assert_array_equal(getattr(table, field), getattr(other, field), err_msg=name)
        built += 1
    assert built >= 15


def test_bad_input():
    p, mixed = process.pfgmpp(8), exact.gaussian([0.0], 1.0)
    for call, says in (
        (lambda: process.pfgmpp(0.5), "D is 0.5; expected"),
        (lambda: process.pfgmpp(np.nan), "D is nan"),
        (lambda: process.pfgmpp(8, sigma_min=-1), "0 < sigma_min"),
        (lambda: jdiff.predict.convert(p, 1.0, 1.0, 1.0, "x0", "score"), "without Gaussian noise"),
        (lambda: mixed.denoiser(p), "no Gaussian mixture"),
        (lambda: process.system({"a": p}), "not Gaussian"),
        (lambda: exact.points(np.zeros(3)), r"shape \(3,\)"),
        (lambda: exact.points(DATA, [0.5, 0.6, 0.0, 0.0]), "sum 1.1"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
