"""Adaptive sampling, likelihoods and reference trajectories against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import exact, ode, process

P = process.flow()
G = exact.gaussian([0.3, -0.5, 0.1], [[0.5, 0.1, 0.0], [0.1, 0.3, 0.05], [0.0, 0.05, 0.02]])
M = exact.mixture([0.3, 0.7], [[0.5, -0.4], [-0.6, 0.3]], [[0.05, 0.1], 0.08])
KEY = jax.random.key(0)


def start(p, n=4, d=3, dtype=jnp.float64):
    return p.prior(KEY, (n, d), dtype=dtype)


def test_a_tolerance_is_kept_down_to_sigma_zero_and_evaluations_are_counted():
    seen = []

    def apply(x, t, carry):
        jax.debug.callback(lambda: seen.append(1))
        return G.denoiser(P)(x, t), carry

    den = jdiff.Denoiser(lambda x: (), apply, P, "x0")
    x, errors = start(P, 1), []
    for tol in (1e-4, 1e-9):
        seen.clear()
        out, info = ode.sample(den, x, last=0.0, rtol=tol, atol=tol)
        jax.block_until_ready(out)
        jax.effects_barrier()
        assert info.nfe.tolist() == [len(seen)] and bool(info.success[0])
        errors.append(float(jnp.abs(out - G.flow(P, x, 1.0, 0.0)).max()))
    assert errors[0] < 1e-2 and errors[1] < 1e-7 and errors[0] > 1e3 * errors[1]


def test_a_sample_does_not_depend_on_its_batch():
    den, x = M.denoiser(P), jnp.concatenate([1e-3 * start(P, 1, 2), 3.0 * start(P, 2, 2)])
    whole, info = ode.sample(den, x, rtol=1e-6, atol=1e-6)
    alone, one = ode.sample(den, x[:1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(whole[:1], alone, rtol=1e-11)
    assert len(set(info.nfe.tolist())) > 1 and int(info.nfe[0]) == int(one.nfe[0])
    joint, _ = ode.sample(den, x, rtol=1e-6, atol=1e-6, per_sample=False)  # one step size: samples interact
    assert float(jnp.abs(joint[:1] - alone).max()) > 1e-9


def test_the_network_sees_the_whole_batch_with_its_labels():
    """Per-sample steps and a condition a sample: one call of the network on (batch, ...)."""
    shift = jnp.array([[0.0], [1.0], [-2.0]])
    net = lambda x, t, y: y + G.denoiser(P)(x - (1 - t) * y, t)
    den = jdiff.denoiser(net, P, "x0", cond=shift)
    x = jnp.broadcast_to(start(P, 1), (3, 3))
    out, _ = ode.sample(den, x, last=0.0, rtol=1e-7, atol=1e-7, variable="t")
    np.testing.assert_allclose(out, shift + G.flow(P, x, 1.0, 0.0), atol=1e-5)


@pytest.mark.parametrize(("p", "variable"), [(process.vp_linear(), "lam"), (process.edm(), "sigma")])
def test_reference_is_right_at_every_time(p, variable):
    x = start(p)
    times = np.array([p.t_max, 0.7 * p.t_max, 0.3 * p.t_max, 2 * p.t_min, 0.0])
    path, _ = ode.reference(G.denoiser(p), x, times, rtol=1e-9, atol=1e-10, variable=variable)
    for t, got in zip(times[:-1], path[:-1], strict=True):
        np.testing.assert_allclose(got, G.flow(p, x, p.t_max, t), atol=2e-8 * p.prior_std)
    at = G.flow(p, x, p.t_max, p.t_min)
    np.testing.assert_allclose(path[-1], G.denoiser(p)(at, p.t_min), atol=1e-6)


def test_reference_to_sigma_zero_in_single_precision():
    times = np.array([1.0, 0.5, 1e-3, 0.0])
    x = start(P, dtype=jnp.float32)
    path, _ = ode.reference(G.denoiser(P), x, times, last=0.0, rtol=1e-5, atol=1e-5)
    assert path.dtype == jnp.float32 and path.shape == (4, 4, 3)
    for t, got in zip(times, path, strict=True):
        np.testing.assert_allclose(got, G.flow(P, x, 1.0, t), atol=1e-4)


@pytest.mark.parametrize("p", [process.edm(), P])  # where the scale of the state changes, and where it does not
def test_exact_log_likelihood(p):
    x0 = M.sample(KEY, 4, jnp.float64)
    prior = lambda x: M.log_density(p, x, p.t_max)  # on flow this is the process's own prior
    got, error, _ = ode.log_likelihood(M.denoiser(p), x0, prior=prior, rtol=1e-9, atol=1e-9, solver="Dopri8")
    want = M.log_density(p, x0, 0.0)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert (np.asarray(error) == 0).all()
    if p is P:
        plain, _, _ = ode.log_likelihood(M.denoiser(p), x0, rtol=1e-9, atol=1e-9, solver="Dopri8")
        np.testing.assert_allclose(plain, want, atol=1e-6)


@pytest.mark.long
def test_hutchinson_is_unbiased():
    x0, options = M.sample(KEY, 2, jnp.float64), {"rtol": 1e-5, "atol": 1e-5, "divergence": "hutchinson"}
    want = np.asarray(M.log_density(P, x0, 0.0))
    got, error, _ = ode.log_likelihood(M.denoiser(P), x0, KEY, probe="gaussian", probes=400, **options)
    error = np.asarray(error)
    assert (error > 0.002).all() and (error < 0.3).all()
    assert (np.abs(got - want) < 4 * error).all()
    # Where the Jacobian is diagonal, Rademacher vectors give its trace exactly.
    D = exact.gaussian([0.1, 0.2], [0.5, 0.1])
    got, error, _ = ode.log_likelihood(D.denoiser(P), x0, KEY, probes=2, **options)
    np.testing.assert_allclose(got, D.log_density(P, x0, 0.0), atol=1e-3)
    assert float(error.max()) < 1e-10


def test_bits_per_dim_of_uniform_noise_is_eight():
    for span in (1.0, 2.0):
        assert np.isclose(ode.bits_per_dim(-12 * np.log(span), 12, span=span), 8.0)


# DPM-Solver-12 and -23 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_adaptive_has_its_order(order):
    """Steps that keep an estimate of the lower order's error have h ~ tol^(1/order): error ~ NFE^-order."""
    p = process.vp_linear()
    x, end = start(p, 2), 0.05
    errors, nfe = [], []
    for tol in (1e-3, 1e-4, 1e-5, 1e-6):
        out, info = ode.dpm_solver_adaptive(G.denoiser(p), x, order=order, end=end, rtol=tol, atol=tol)
        errors.append(float(jnp.abs(out - G.flow(p, x, p.t_max, end)).max()))
        nfe.append(int(info.nfe[0]))
    slopes = -np.diff(np.log(errors)) / np.diff(np.log(nfe))
    assert slopes.min() > order - 0.3 and errors[-1] < 1e-4
    assert (info.nfe == order * info.steps).all()


def test_dpm_solver_adaptive_as_published_lets_samples_interact():
    p = process.vp_linear()
    den, x = M.denoiser(p), jnp.concatenate([1e-2 * start(p, 1, 2), 3.0 * start(p, 2, 2)])
    run = lambda x, joint: ode.dpm_solver_adaptive(den, x, as_published=joint)
    whole, info = run(x, False)
    alone, one = run(x[:1], True)  # a batch of one: the two are one
    np.testing.assert_allclose(whole[:1], alone, rtol=1e-12)
    assert int(info.nfe[0]) == int(one.nfe[0]) == 2 * int(one.steps[0]) + 1  # and the last x0 prediction
    joint, _ = run(x, True)
    assert float(jnp.abs(joint[:1] - alone).max()) > 1e-6


def test_dpm_solver_adaptive_out_of_alpha_zero():
    x = start(P)
    out, info = ode.dpm_solver_adaptive(G.denoiser(P), x, order=3, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out, G.flow(P, x, 1.0, 0.0), atol=5e-3)  # the first and the last step are of order 1
    assert (info.nfe == 3 * info.steps + 2).all()


# Bad input ---------------------------------------------------------------------------------------------------------


def test_what_users_get_wrong():
    den, x = G.denoiser(P), start(P)
    for call, says in (
        (lambda: ode.sample(den, x, variable="rho"), "variable is 'rho'; expected one of angle"),
        (lambda: ode.sample(den, x, variable="lam"), "'lam' is infinite at time 1; use variable='angle'"),
        (lambda: ode.sample(den, x, start=0.1, end=0.5), "expected 0 <= end < start <= 1"),
        (lambda: ode.sample(den, x, end=-1), "end is -1"),
        (lambda: ode.sample(den, x, last=2.0), "last is 2.0"),
        (lambda: ode.sample(den, x, solver="Tsit6"), "no solver 'Tsit6'"),
        (lambda: ode.reference(den, x, [0.5, 1.0]), "must fall strictly"),
        (lambda: ode.reference(den, x, [1.0, 0.5, 0.0], last=0.7), "last is 0.7, later than"),
        (lambda: ode.log_likelihood(den, x, divergence="trace"), "divergence is 'trace'"),
        (lambda: ode.log_likelihood(den, x, divergence="hutchinson"), "needs key"),
        (lambda: ode.log_likelihood(den, x, KEY, probe="cauchy"), "probe is 'cauchy'"),
        (lambda: ode.dpm_solver_adaptive(den, x, order=4), "order is 4"),
        (lambda: ode.dpm_solver_adaptive(den, x, last=0.0), "expected 0 < last < start"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    with pytest.raises(TypeError, match="ode takes no pytrees"):
        ode.sample(den, {"image": x})
    with pytest.raises(RuntimeError, match="4 of 4 samples did not arrive within max_steps = 3"):
        ode.sample(den, x, rtol=1e-9, atol=1e-9, max_steps=3)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_gradients_against_the_closed_form(gradient):
    """d/dx through the affine flow of a Gaussian, and d/dparameters: a shift of the data shifts every sample."""
    x, c = start(P), jnp.array([1.0, -2.0, 0.5])
    net = lambda shift, x, t, y: shift + G.denoiser(P)(x - (1 - t) * shift, t) + 0.0 * y[:, None].astype(x.dtype)

    def loss(x, shift):
        den = jdiff.denoiser(net, P, "x0", params=shift, cond=jnp.arange(4))
        out, _ = ode.sample(den, x, end=end, last=0.0, rtol=1e-5, atol=1e-5, solver="Bosh3", **options)
        return jnp.sum(jnp.sin(out) @ c)

    end, options = (0.05 if gradient == "adjoint" else 0.0), {"per_sample": False, "gradient": gradient}
    exact_loss = lambda x, shift: jnp.sum(jnp.sin((1 - end) * shift + G.flow(P, x, 1.0, end)) @ c)
    got, want = (jax.grad(f, (0, 1))(x, jnp.zeros(3)) for f in (loss, exact_loss))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    with pytest.raises(ValueError, match="gradient needs per_sample=False"):
        ode.sample(G.denoiser(P), x, gradient=gradient)
    with pytest.raises(ValueError, match="gradient is 'backsolve'; expected one of 'checkpoint', 'adjoint', or None"):
        ode.sample(G.denoiser(P), x, per_sample=False, gradient="backsolve")
    if gradient == "adjoint":
        with pytest.raises(ValueError, match="at sigma = 0 the slope has no derivative"):
            ode.sample(G.denoiser(P), x, last=0.0, per_sample=False, gradient=gradient)
