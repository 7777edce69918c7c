"""Prediction kinds: conversions invert each other, agree with their definitions, and are finite at both ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_process import PROCESSES

import jdiff
from jdiff import predict, process

each = pytest.mark.parametrize("p", PROCESSES.values(), ids=PROCESSES)


def truth(p, t, x0, eps):
    """The definitions, from x0 and eps."""
    a, s = p.alpha(t), p.sigma(t)
    h = 1e-7 * p.t_max
    slope = lambda f: (f(t + h) - f(t - h)) / (2 * h)
    velocity = slope(p.alpha) * x0 + slope(p.sigma) * eps
    return {"x0": x0, "eps": eps, "v": a * eps - s * x0, "score": -eps / s, "velocity": velocity}


def known(p):
    """All kinds; without a score where the noise is not Gaussian."""
    return [kind for kind in predict.KINDS if p.gaussian or kind != "score"]


@each
def test_all_conversions(p):
    rng = np.random.default_rng(0)
    x0, eps = rng.normal(size=(2, 6, 3))
    t = (np.array([[50.5], [200.5], [400.5], [500.5], [700.5], [900.5]]) / 1000) * p.t_max  # one time a sample
    x = p.alpha(t) * x0 + p.sigma(t) * eps
    kinds = truth(p, t, x0, eps)
    for source in known(p):
        for target in known(p):
            got = predict.convert(p, x, t, kinds[source], source, target)
            np.testing.assert_allclose(got, kinds[target], rtol=1e-5, atol=1e-5, err_msg=f"{source} -> {target}")


@each
@pytest.mark.parametrize("end", ["data", "noise"])
def test_ends_are_finite_and_right(p, end):
    t = jnp.float32(0.0 if end == "data" else p.t_max)
    x = jnp.linspace(-1, 1, 6, dtype=jnp.float32).reshape(2, 3)
    out = 0.3 * jnp.ones_like(x)
    for source in known(p):
        for target in known(p):
            got = predict.convert(p, x, t, out, source, target)
            assert np.isfinite(got).all(), (source, target)
    if end == "data":  # at sigma = 0 the sample is the data, whatever the network says, unless it predicts x0 itself
        for source in [kind for kind in known(p) if kind != "x0"]:
            np.testing.assert_allclose(predict.convert(p, x, t, out, source, "x0"), x, atol=1e-6)
    if end == "noise" and p.alpha(p.t_max) < 1e-15:
        np.testing.assert_allclose(predict.convert(p, x, t, out, "v", "x0"), -out, atol=1e-6)
        np.testing.assert_allclose(predict.convert(p, x, t, out, "x0", "eps"), x, atol=1e-6)


def test_float32_conversions_lose_nothing_they_need_not():
    """eps -> x0 at small sigma, and v -> x0 everywhere, to a few units in the last place."""
    for p in PROCESSES.values():
        t = 1e-3 * p.t_max
        x, out = np.float32([[0.7]]), np.float32([[0.2]])
        for source in ("eps", "v"):
            got = predict.convert(p, jnp.asarray(x), jnp.float32(t), jnp.asarray(out), source, "x0")
            want = predict.convert(p, x.astype(float), float(np.float32(t)), out.astype(float), source, "x0")
            np.testing.assert_allclose(got, want, rtol=2e-6)


def test_pytrees_and_unknown_kinds():
    p = process.flow()
    x = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 1))}
    got = predict.convert(p, x, jnp.asarray(0.5), x, "velocity", "x0")
    np.testing.assert_allclose(got["a"], 0.5 * np.ones((2, 3)))
    with pytest.raises(ValueError, match="unknown prediction kind 'noise'"):
        jdiff.denoiser(lambda x, t: x, p, "noise")
    with pytest.raises(TypeError, match="process"):
        jdiff.denoiser(lambda x, t: x, "flow", "x0")


def test_model_time_is_never_half_precision():
    assert predict.model_time(0.98849, jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
    assert predict.model_time(0.5, jnp.ones(2)).dtype == jnp.float64
    a, b = (predict.model_time(v, jnp.ones(2, jnp.bfloat16)) for v in (0.98849, 0.98717))
    assert a != b


def test_edm_preconditioning():
    """D for F = 0 is c_skip x, the denoiser of N(0, sigma_data^2) data; F sees unit variance on every process."""
    for p in PROCESSES.values():
        seen = {}

        def network(params, x, t, seen=seen):
            seen["x"], seen["t"] = x, t
            return 0 * x

        t = 0.4 * p.t_max
        x = jnp.ones((1, 2))
        D = jdiff.edm_precondition(network, p, 0.5)((), x, jnp.asarray(t))
        exact = jdiff.exact.gaussian(np.zeros(2), 0.25).denoiser(p if p.gaussian else process.edm())(x, t)
        np.testing.assert_allclose(D, exact, rtol=1e-10)
        std = np.sqrt(p.alpha(t) ** 2 * 0.25 + p.sigma(t) ** 2)
        np.testing.assert_allclose(seen["x"], x / std, rtol=1e-10)
        np.testing.assert_allclose(seen["t"], -0.25 * p.lam(t), rtol=1e-10)
    assert np.isfinite(jdiff.edm_precondition(network, process.flow())((), x, jnp.asarray(1.0))).all()
    assert np.isfinite(
        jax.grad(lambda x: jdiff.edm_precondition(network, process.edm())((), x, jnp.asarray(0.0)).sum())(x)
    ).all()
