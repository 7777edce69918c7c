"""Analysis of fields against closed forms: Jacobians, gauge terms, Fokker-Planck residuals, dimension."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import analysis, exact, losses, ode, process, solvers, times
from jdiff.experiments import gauge

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
P, T = process.vp_linear(), 0.3
MIX = exact.mixture([0.4, 0.6], [[1.0, 0.0], [-0.8, 0.5]], [[0.2, 0.05], [[0.3, 0.1], [0.1, 0.1]]])
X = jnp.asarray(RNG.normal(size=(5, 2)))
A = gauge.antisymmetric(2, 1.0)


def score(x):
    return MIX.score(P, x, T)


def gauged(x):
    return score(x) + score(x) @ jnp.asarray(A.T)


@functools.cache
def hessians():
    return np.asarray(jax.jit(jax.vmap(jax.hessian(lambda x: MIX.log_density(P, x[None], T)[0])))(X))


def unbiased(draws, want):
    """Within 4 standard errors of the mean."""
    draws = np.asarray(draws)
    return abs(draws.mean() - want) < 4 * draws.std() / np.sqrt(len(draws)) + 1e-12


def test_divergence_and_jacobian():
    H = hessians()
    J = H + A @ H
    many = jnp.broadcast_to(X[:1], (4000, 2))

    @jax.jit
    def run(x):
        draws = [analysis.divergence(gauged, many, KEY, n) for n in (1, 4)]
        return analysis.jacobian(gauged, x), analysis.divergence(gauged, x), draws

    jacobian, trace, (one, four) = run(X)
    np.testing.assert_allclose(jacobian, J, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(trace, np.trace(J, axis1=1, axis2=2), rtol=1e-8)
    assert unbiased(one, np.trace(J[0]))
    assert 1.8 < np.std(one) / np.std(four) < 2.2


def test_asymmetry():
    """|J - J^T|^2 of (I + A) grad log p is |A H + H A|^2; a gradient has none, that of a network neither."""
    H = hessians()
    want = np.sum((A @ H + H @ A) ** 2, (1, 2))
    potential = lambda params, x, t: jnp.sum(jnp.tanh(x @ params) ** 3, 1) + t * jnp.sum(x**2, 1)
    weights = jnp.asarray(RNG.normal(size=(2, 7)))
    field = jdiff.denoiser(analysis.conservative(potential), P, "score", params=weights)
    network = lambda x: field(x, T, "score")

    @jax.jit
    def run(x):
        found = [analysis.asymmetry(f, x) for f in (gauged, score, network)]
        draws = analysis.asymmetry(gauged, jnp.broadcast_to(X[1:2], (4000, 2)), KEY)
        each = jax.vmap(jax.grad(lambda x: potential(weights, x[None], T)[0]))(x)
        return found, draws, network(x), each

    (found, gradient, of_network), draws, value, each = run(X)
    np.testing.assert_allclose(found, want, rtol=1e-8)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-18)
    assert unbiased(draws, want[1])
    np.testing.assert_allclose(of_network, 0.0, atol=1e-18)
    np.testing.assert_allclose(value, each, rtol=1e-10)


def test_gauge_residual_and_penalty():
    """0 for A grad log p; c d - c |x|^2 / v for c x beside N(0, v); the Hutchinson penalty is unbiased."""
    normal, radial = lambda x: -x / 0.7, lambda x: 0.3 * x + x[:, ::-1] * x
    own = lambda x: 0.6 + x[:, ::-1].sum(1) - (0.3 * (x**2).sum(1) + x[:, 0] * x[:, 1] * x.sum(1)) / 0.7
    mixing = lambda x: x @ jnp.asarray([[0.3, 1.0], [0.5, 0.3]])

    @jax.jit
    def run(x):
        penalty = lambda key: analysis.gauge_penalty(mixing, normal, jnp.broadcast_to(x[:1], (500, 2)), key)
        draws = jax.lax.map(penalty, jax.random.split(KEY, 12))
        return (
            analysis.gauge_residual(lambda x: gauged(x) - score(x), score, x),
            analysis.gauge_residual(radial, normal, x),
            analysis.gauge_penalty(radial, normal, x),
            analysis.gauge_penalty(mixing, normal, x[:1]),
            draws,
        )

    antisymmetric, residual, penalty, want, draws = run(X)
    np.testing.assert_allclose(antisymmetric, 0.0, atol=1e-12)
    np.testing.assert_allclose(residual, own(np.asarray(X)), rtol=1e-10)
    np.testing.assert_allclose(penalty, np.mean(own(np.asarray(X)) ** 2), rtol=1e-10)
    assert unbiased(draws, float(want))


def test_decomposition_finds_the_conservative_part():
    """(I + A) grad log N projected on gradients of quadratics: grad log N and A grad log N, n = 20,000."""
    model = exact.gaussian([0.3, -0.2], [[0.6, 0.2], [0.2, 0.3]])
    s = lambda x: model.score(P, x, T)
    features = lambda x: jnp.concatenate([x, x**2, x[:, :1] * x[:, 1:]], 1)

    @jax.jit
    def run():
        x = P.diffuse(KEY, model.sample(KEY, 20_000, jnp.float64), T)
        found = analysis.gauge_decomposition(lambda x: s(x) + s(x) @ jnp.asarray(A.T), features, x)
        return found, s(x)

    found, gradient = jax.tree.map(np.asarray, run())
    for part, want in ((found.conservative, gradient), (found.remainder, gradient @ A.T)):
        assert np.mean((part - want) ** 2) / np.mean(want**2) < 25 / 20_000


def test_gauge_terms_leave_samples_and_densities():
    """Closed-form log p by the gauged flow within 1e-3, and its samples' moments; a symmetric term changes both."""

    fn = lambda M, x, t: MIX.score(P, x, t) @ (jnp.eye(2) + M.T)
    with_matrix = lambda M: jdiff.denoiser(fn, P, "score", params=jnp.asarray(M))

    start = 0.05
    at = {"start": start, "rtol": 1e-7, "atol": 1e-7, "prior": lambda x: MIX.log_density(P, x, 1.0)}
    want = MIX.log_density(P, X, start)
    np.testing.assert_allclose(ode.log_likelihood(with_matrix(A), X, **at)[0], want, atol=1e-3)
    wrong = ode.log_likelihood(with_matrix(0.3 * np.eye(2)), X, **at)[0]
    assert float(jnp.abs(wrong - want).max()) > 0.1
    n, table = 4000, solvers.heun()(P, times.logsnr(P, 40, end=0.05))
    x = P.prior(KEY, (n, 2), dtype=jnp.float64)
    plain, moved = (np.asarray(jdiff.sample(with_matrix(c * A), table, x)) for c in (0.0, 1.0))
    assert np.median(np.linalg.norm(plain - moved, axis=1)) > 0.1
    a, s = P.alpha(0.05), P.sigma(0.05)
    cov = a * a * MIX.cov + s * s * np.eye(2)
    for x in (plain, moved):
        assert (np.abs(x.mean(0) - a * MIX.mean) < 4 * np.sqrt(np.diag(cov) / n)).all()
        assert np.abs(np.cov(x.T) - cov).max() < 4 * np.sqrt(2 / n) * cov.max() * 1.5


@pytest.mark.parametrize(
    "p", [P, process.edm(), process.flow(), process.subvp(), process.ve()], ids=lambda p: type(p).__name__
)
def test_exact_densities_satisfy_fokker_planck(p):
    t = 0.4 if p.t_max == 1 else 0.7
    log_p, grad = lambda x, t: MIX.log_density(p, x, t), lambda x, t: MIX.score(p, x, t)
    scale = float(p.diffusion(t) ** 2)
    both = lambda x: (analysis.fokker_planck(log_p, p, x, t), analysis.score_fokker_planck(grad, p, x, t))
    for residual, tolerance in zip(jax.jit(both)(X), (1e-9, 1e-8), strict=True):
        np.testing.assert_allclose(residual / scale, 0.0, atol=tolerance)


def test_residual_of_a_wrong_potential():
    """phi = log p + c |x|^2 / 2 + b t: R = b + c f |x|^2 - g^2 / 2 (c d + 2 c <x, s> + c^2 |x|^2), and its gradient."""
    b, c, f, g2 = 0.7, 0.4, P.drift(T), P.diffusion(T) ** 2
    wrong = lambda x, t: MIX.log_density(P, x, t) + 0.5 * c * jnp.sum(x**2, 1) + b * t

    def want(x):
        square, cross = jnp.sum(x**2, 1), jnp.sum(x * score(x), 1)
        return b + c * f * square - 0.5 * g2 * (2 * c + 2 * c * cross + c * c * square)

    field = lambda x, t: MIX.score(P, x, t) + c * x
    many = jnp.broadcast_to(X[:1], (4000, 2))

    @jax.jit
    def run(x):
        slope = jax.grad(lambda x: want(x).sum())(x)
        exactly = analysis.fokker_planck(wrong, P, x, T) - want(x)
        return (
            exactly,
            analysis.score_fokker_planck(field, P, x, T) - slope,
            analysis.fokker_planck(wrong, P, many, T, KEY),
        )

    scalar, vector, draws = run(X)
    np.testing.assert_allclose(scalar, 0.0, atol=1e-9)
    np.testing.assert_allclose(vector, 0.0, atol=1e-8)
    assert unbiased(draws, float(want(X)[0]))


def test_fokker_planck_loss():
    x0 = MIX.sample(KEY, 6, jnp.float64)
    time = lambda u: 0.2 + 0.5 * u
    exactly = lambda params, x, t, y: MIX.denoiser(P)(x, t) + params * x
    added_to = lambda: losses.denoising_loss(exactly, P, "x0", time=time)(0.0, KEY, x0)
    make = lambda power, probes: analysis.fokker_planck_loss(exactly, P, "x0", time=time, probes=probes, power=power)

    @jax.jit
    def run(c, index):
        values = lambda c: make(2, None)(c, KEY, x0[index], None, index)
        slope = jax.grad(lambda c: values(c).sum())(c)
        return (
            values(c),
            slope,
            make(1, None)(c, KEY, x0[index], None, index),
            make(2, 2)(c, KEY, x0[index], None, index),
        )

    some, other = jnp.arange(6), jnp.array([3, 4, 0, 1, 2, 5])
    np.testing.assert_allclose(run(0.0, some)[0], 0.0, atol=1e-14)
    value, slope, root, estimate = run(0.1, some)
    assert float(value.min()) > 1e-4 and np.isfinite(slope) and not np.allclose(estimate, value)
    np.testing.assert_allclose(root, np.sqrt(value), rtol=1e-9)
    np.testing.assert_allclose(run(0.1, other)[0], value[other], rtol=1e-9)
    assert jax.eval_shape(added_to).shape == (6,)


@pytest.mark.parametrize("method", ["score_svd", "flow_svd"])
def test_dimension_of_a_sphere(method):
    """S^2, turned, in five dimensions: right at 95 % of points or more, and the gauge term narrows the flow's gap."""
    x = jnp.asarray(gauge.sphere(40, 0))
    plain = gauge.sphere_denoiser(gauge.EDM)
    found = analysis.intrinsic_dim(plain, x, 0.02, method=method, key=KEY)
    assert np.mean(np.asarray(found) == 2) >= 0.95


def test_bad_input():
    heavy = process.pfgmpp(4)
    for call, says in (
        (lambda: analysis.divergence(score, X, KEY, 0), "probes 0"),
        (lambda: analysis.fokker_planck(lambda x, t: x[:, 0], heavy, X, T), "no SDE"),
        (lambda: analysis.fokker_planck_loss(lambda *a: a[1], P, "x0", power=3), "power is 3"),
        (lambda: analysis.intrinsic_dim(MIX.denoiser(P), X, 0.1, method="svd"), "method is 'svd'"),
        (lambda: analysis.intrinsic_dim(MIX.denoiser(P), X, 0.1), "needs a key"),
        (lambda: analysis.intrinsic_dim(MIX.denoiser(P), X, 0.0, key=KEY), "t is 0.0"),
        (lambda: analysis.gauge_decomposition(score, lambda x: jnp.zeros((len(x), 50)), X), "50 features"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
