"""The derivatives and the steps of the fit, against automatic differentiation of the plain rollout, and SciPy."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.optimize import approx_fprime

import jdiff
from jdiff import exact, fit, process
from jdiff.fit import free, newton
from jdiff.fit.newton import objective

MODEL = exact.mixture([0.4, 0.6], [[1.0, -0.5], [-0.7, 0.4]], [[0.1, 0.3], [0.2, 0.05]])
VP = process.vp_linear()
DENOISER = MODEL.denoiser(VP)


def problem(n, seed=0):
    rng = np.random.default_rng(seed)
    params = fit.Params(0.1 * rng.normal(size=3), 0.3 * rng.normal(size=(3, 3)), 0.1 * rng.normal(size=(2, 3)))
    x = VP.prior(jax.random.key(seed), (n, 2), dtype=jnp.float64)
    return params, fit.Reference(x, rng.normal(size=(n, 2)), np.arange(n), seed)


@pytest.mark.parametrize("shape", [(2,), (1, 2, 1)])
def test_each_trajectory_has_its_own_derivatives(shape, monkeypatch):
    """J^T r and J^T s by one pass backward are those of forward differentiation of the whole sampler."""
    params, ref = problem(5)
    look = lambda x, t: DENOISER(x.reshape(-1, 2), t).reshape(x.shape)
    d, x, target = jdiff.denoiser(look, VP, "x0"), ref.x.reshape(5, *shape), jnp.asarray(ref.target).reshape(5, *shape)
    signs = jnp.asarray(np.random.default_rng(1).choice([-1.0, 1.0], (5, *shape)))
    flat, back = ravel_pytree(jax.tree.map(jnp.asarray, params))
    end = lambda flat: free.rollout(d, free.coefficients(VP, back(flat)), x)[0][-1]
    J = jax.jit(jax.jacfwd(end))(flat)  # (5, *shape, P)
    wanted = [np.einsum("nd,ndp->np", r.reshape(5, 2), J.reshape(5, 2, -1)) for r in (end(flat) - target, signs)]
    given = (d, back(flat), x, target, jnp.asarray(ref.index), signs)
    for a, b in zip(newton._derivatives(*given), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    real = free.evaluate  # a mutant: what the times do is forgotten
    monkeypatch.setattr(newton, "evaluate", lambda d, x, t, c: real(d, x, jax.lax.stop_gradient(t), c))
    compiled = cast(Any, newton._derivatives)
    compiled.clear_cache()
    wrong = compiled(*given)
    compiled.clear_cache()
    assert np.abs(np.asarray(wrong[0]) - wanted[0]).max() > 1e-2


def test_slopes_of_the_objective():
    e = np.array([0.3, 1.0, 4.0, 0.01])
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    by_differences = np.asarray(approx_fprime(e, lambda e: objective(e, 2.0, shares), 1e-9))
    np.testing.assert_allclose(newton._slopes(e, 2.0, shares), by_differences, rtol=1e-4)
    assert objective(e * 9.0) == pytest.approx(objective(e) + 2 * np.log(9.0))  # free of scale
    assert objective(np.append(e, np.nan)) == np.inf


def test_steps_lower_the_objective_and_batches_do_not_matter():
    params, ref = problem(24)
    right = free.rollout(DENOISER, free.coefficients(VP, problem(1, 9)[0]), ref.x)[0][-1]  # a table hits it exactly
    ref = fit.Reference(ref.x, np.asarray(right), ref.index, 0)
    error = lambda p: newton.squares(DENOISER, p, ref)
    one, _ = newton.descend(DENOISER, params, ref, jax.random.key(0), steps=1)
    parts, _ = newton.descend(DENOISER, params, ref, jax.random.key(0), steps=1, batch=7)
    for a, b in zip(one, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
    assert objective(error(one)) < objective(error(params))
    many, _ = newton.descend(DENOISER, params, ref, jax.random.key(0), steps=40)
    assert np.sqrt(np.mean(error(many))) < 0.1 * np.sqrt(np.mean(error(params)))


def test_no_trajectory_rules_a_step():
    G = np.random.default_rng(0).normal(size=(40, 4))
    G[3] *= 1e3
    less = newton._even(G, 3.0)
    leverage = lambda less: less * np.sum(G * np.linalg.solve((less[:, None] * G).T @ G, G.T).T, 1)
    assert leverage(np.ones(40))[3] > 0.99 and leverage(less)[3] < 3.5 * 4 / 40
    assert (less[np.arange(40) != 3] == 1.0).mean() > 0.9
