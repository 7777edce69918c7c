"""Power-function averages against direct quadrature of the continuous profile (SciPy, float64)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jdiff import ema


def trajectory(tau):
    """Parameters constant on each step (i - 1, i]: what discrete training is in continuous time."""
    i = np.ceil(tau)
    return np.sin(0.05 * i) + 3.0 * np.exp(-i / 40.0) + 0.002 * i


def profile(tau, sigma_rel, t):
    g = ema.gamma_of_sigma_rel(sigma_rel)
    return (g + 1) * (tau / t) ** g / t


def by_quadrature(sigma_rel, t):
    piece = lambda i: integrate.quad(lambda tau: profile(tau, sigma_rel, t) * trajectory(i + 0.5), i, i + 1)[0]
    return sum(map(piece, range(t)))


def test_sigma_rel_is_the_relative_standard_deviation():
    for sigma_rel in (0.03, 0.05, 0.1, 0.2, 0.28):
        moment = lambda k, s=sigma_rel: integrate.quad(lambda tau: profile(tau, s, 1.0) * tau**k, 0, 1)[0]
        np.testing.assert_allclose(moment(0), 1, rtol=1e-10)
        np.testing.assert_allclose(np.sqrt(moment(2) - moment(1) ** 2), sigma_rel, rtol=1e-9)
        np.testing.assert_allclose(ema.sigma_rel_of_gamma(ema.gamma_of_sigma_rel(sigma_rel)), sigma_rel, rtol=1e-10)
    for bad in (0.0, 0.3, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sigma_rel"):
            ema.gamma_of_sigma_rel(bad)


def run(steps, sigma_rels, at, dtype=jnp.float64):
    """Averages at the steps `at`, of the trajectory and of the constant 1 (whose average is the sum of weights)."""
    values = jnp.asarray(np.stack([trajectory(np.arange(1, steps + 1)), np.ones(steps)], 1), dtype)

    def step(state, inputs):
        t, p = inputs
        state = ema.update(state, {"w": p}, t, sigma_rels)
        return state, state

    start = ema.init({"w": jnp.full(2, 1e9, dtype)}, sigma_rels)  # the first update forgets it
    _, history = jax.jit(lambda: jax.lax.scan(step, start, (jnp.arange(1, steps + 1, dtype=jnp.int32), values)))()
    return [tuple({"w": tree["w"][t - 1]} for tree in history) for t in at]


def test_update_is_the_continuous_average():
    (averages,) = run(200, (0.05, 0.1, 0.25), [200])
    for sigma_rel, tree in zip((0.05, 0.1, 0.25), averages, strict=True):
        value, total = np.asarray(tree["w"])
        np.testing.assert_allclose(total, 1, rtol=1e-6)
        np.testing.assert_allclose(value, by_quadrature(sigma_rel, 200), rtol=1e-5)  # beta is float32


def test_beta_keeps_its_digits_late_in_training():
    t = 4_000_003
    got = ema.update(({"w": jnp.zeros((), jnp.float32)},), {"w": jnp.float32(1)}, jnp.int32(t), (0.05,))[0]["w"]
    g = ema.gamma_of_sigma_rel(0.05)
    np.testing.assert_allclose(got, 1 - (1 - 1 / t) ** (g + 1), rtol=1e-6)


def test_inner_products():
    for a, ta, b, tb in ((6.9, 100.0, 16.9, 100.0), (6.9, 40.0, 16.9, 100.0), (0.5, 70.0, 2.0, 30.0)):
        f = lambda tau, a=a, ta=ta, b=b, tb=tb: (a + 1) * (tau / ta) ** a / ta * (b + 1) * (tau / tb) ** b / tb
        np.testing.assert_allclose(ema.profile_product(a, ta, b, tb), integrate.quad(f, 0, min(ta, tb))[0], rtol=1e-8)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.07, 0.15, 0.2])
def test_posthoc_rebuilds_any_length(sigma_rel):
    times, tolerance = list(range(12, 193, 12)), 0.015 if sigma_rel == 0.2 else 3e-3
    snapshots = run(192, ema.SIGMA_RELS, times)
    got = np.asarray(ema.posthoc(snapshots, times, sigma_rel)["w"])
    np.testing.assert_allclose(got[0], by_quadrature(sigma_rel, 192), atol=tolerance)
    np.testing.assert_allclose(got[1], 1, rtol=5e-3)
    earlier = np.asarray(ema.posthoc(snapshots, times, sigma_rel, at=144)["w"])
    np.testing.assert_allclose(earlier[0], by_quadrature(sigma_rel, 144), atol=tolerance)
    # the choice of the length matters: the nearest tracked average is not as good
    tracked = [float(tree["w"][0]) for tree in snapshots[-1]]
    if sigma_rel not in ema.SIGMA_RELS:
        assert min(abs(np.array(tracked) - by_quadrature(sigma_rel, 192))) > 4 * abs(
            got[0] - by_quadrature(sigma_rel, 192)
        )


def test_bfloat16_parameters_have_float32_averages():
    start = ema.init({"w": jnp.ones(3, jnp.bfloat16)})
    after = ema.update(start, {"w": jnp.full(3, 2, jnp.bfloat16)}, 1)
    assert after[0]["w"].dtype == jnp.float32 and (after[0]["w"] == 2).all()


def test_bad_input():
    trees = [({"w": jnp.ones(2)},) * 2] * 2
    for times, s, options, match in (
        ([1, 1], 0.05, {}, "positive and different"),
        ([0, 1], 0.05, {}, "positive and different"),
        ([10, 20], 0.05, {"at": 30}, "end at step 20"),
        ([10, 20], 0.2, {}, "take snapshots more often"),
        ([10, 20], 0.02, {}, "only to 34%"),
        ([10, 20, 30], 0.05, {}, "expected 3 snapshots"),
    ):
        with pytest.raises(ValueError, match=match):
            ema.posthoc(trees, times, s, **options)
