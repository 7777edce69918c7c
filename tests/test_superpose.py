"""Superposition against exact densities: those followed along the path, mixtures by "or", equal ones by "and"."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import exact, process, steering, times

P = process.vp_linear()
N = 500
LEFT, RIGHT = exact.gaussian([-2.0, 0.0], [0.16, 0.16]), exact.gaussian([2.0, 0.0], [0.16, 0.16])
WIDE, TALL = exact.gaussian([-0.6, 0.2], [0.6, 0.2]), exact.gaussian([0.6, -0.2], [0.2, 0.6])
MODELS = {"left": LEFT, "right": RIGHT, "wide": WIDE, "tall": TALL}


@functools.cache
def run(models, mode, steps, noise=1.0, seed=0, **options):
    x = P.prior(jax.random.key(seed), (N, 2), dtype=jnp.float64)
    grid = times.logsnr(P, steps)
    models = [MODELS[m].denoiser(P) for m in models]
    return steering.superpose(models, grid, x, jax.random.key(seed + 1), mode, noise=noise, **options)


def errors(out, models, steps):
    """|estimate - exact log q_i| (points, batch, m) at some 16 times of the way, and the exact values."""
    grid = times.logsnr(P, steps)[:-1]
    chosen = np.linspace(0, steps - 1, 17)[1:].astype(int)
    truth = lambda k: [np.asarray(MODELS[m].log_density(P, out.info.x[k], grid[k])) for m in models]
    found = np.stack([np.stack(truth(k), -1) for k in chosen])
    return np.abs(np.asarray(out.info.log_q)[chosen] - found), found


def test_density_estimates_and_their_rates():
    """Order 1/2 in the step; with the data's variance known, under 1 % of the range at 1,024 steps, where plain Ito is
    not."""
    pair, mean = ("wide", "tall"), {}
    for steps in (64, 256):
        for variance in (None, 0.4):
            e, _ = errors(run(pair, "or", steps, variance=variance), pair, steps)
            mean[variance, steps] = e[-1].mean()
    assert 0.35 < mean[None, 256] / mean[None, 64] < 0.65, mean
    assert mean[0.4, 256] < 0.6 * mean[None, 256], mean
    pair = ("left", "right")
    (e, truth), (plain, _) = (errors(run(pair, "or", 1024, variance=v), pair, 1024) for v in (0.16, None))
    assert e.max() < 0.01 * np.ptp(truth) < plain.max(), (e.max(), plain.max(), np.ptp(truth))


def test_the_flow_needs_its_divergence():
    """n = 0: order 1."""
    pair = ("wide", "tall")
    mean = [errors(run(pair, "or", s, 0.0), pair, s)[0][-1].mean() for s in (64, 256)]
    assert 0.2 < mean[1] / mean[0] < 0.35 and mean[1] < 0.3, mean


def test_or_is_the_mixture():
    """Equal weights, and 4 : 1 by the bias; averaged scores land between the two."""
    for bias, share in ((0.0, 0.5), ((np.log(0.8), np.log(0.2)), 0.8)):
        x = np.asarray(run(("left", "right"), "or", 256, bias=bias).x)
        error = np.sqrt(share * (1 - share) / N)
        assert abs((x[:, 0] < 0).mean() - share) < 3.5 * error + 0.01, (x[:, 0] < 0).mean()
        assert (np.abs(np.abs(x[:, 0]) - 2.0) < 1.2).mean() > 0.99
        assert abs(x[x[:, 0] < 0].std(0) / 0.4 - 1).max() < 0.1
    x = np.asarray(run(("left", "right"), "average", 64).x)
    assert (np.abs(np.abs(x[:, 0]) - 2.0) < 1.2).mean() < 0.1


def test_the_limits_of_the_temperature():
    """T = 0 averages, and a large T follows the denser model alone."""
    pair = ("left", "right")
    np.testing.assert_allclose(run(pair, "or", 64, temperature=0.0).x, run(pair, "average", 64).x, atol=1e-9)
    info = run(pair, "or", 64, temperature=1e9).info
    kappa, denser = np.asarray(info.kappa)[1:], np.argmax(np.asarray(info.log_q)[1:], -1)
    np.testing.assert_allclose(np.take_along_axis(kappa, denser[..., None], -1), 1.0, atol=1e-6)


def test_and_keeps_densities_equal():
    """By construction in the estimates; in the exact densities up to the estimator, where averaged scores do not."""
    pair = ("wide", "tall")
    exactly = lambda out: [MODELS[m].log_density(P, out.info.x[-1], times.logsnr(P, 256)[-2]) for m in pair]
    apart = lambda out: np.abs(np.diff(np.stack(exactly(out)), axis=0)).mean()
    out = run(pair, "and", 256)
    assert np.abs(np.diff(np.asarray(out.info.log_q), axis=-1)).max() < 1e-6
    np.testing.assert_allclose(np.asarray(out.info.kappa).sum(-1), 1.0, atol=1e-9)
    average = run(pair, "average", 256)
    assert apart(out) < 0.3 * apart(average), (apart(out), apart(average))
    shifted = run(pair, "and", 256, bias=(0.0, 1.0))
    np.testing.assert_allclose(np.asarray(shifted.log_q) @ [1.0, -1.0], 255 / 256, atol=0.01)


@pytest.mark.parametrize("mode", ["or", "and"])
def test_identical_models_are_the_single_model(mode):
    out, single = run(("wide", "wide"), mode, 256), run(("wide", "wide"), "average", 256)
    np.testing.assert_allclose(out.x, single.x, atol=1e-9)
    np.testing.assert_allclose(out.info.kappa, 0.5, atol=1e-9)
    x = np.asarray(out.x)
    assert np.all(np.abs(x.mean(0) - WIDE.mean) < 4 * x.std(0) / np.sqrt(N) + 0.01)


def test_three_models():
    """ "and" of three: all densities equal at each step, two of them the same model."""
    out = run(("wide", "tall", "wide"), "and", 64)
    assert np.ptp(np.asarray(out.info.log_q), axis=-1).max() < 1e-6
    np.testing.assert_allclose(out.info.kappa[..., 0], out.info.kappa[..., 2], atol=1e-6)


def test_bad_input():
    den, x, key = WIDE.denoiser(P), jnp.zeros((3, 2)), jax.random.key(0)
    grid = times.logsnr(P, 4)
    with pytest.raises(ValueError, match=r"models\[1\] is on Flow.*models\[0\] on VPLinear"):
        steering.superpose([den, WIDE.denoiser(process.flow())], grid, x, key)
    with pytest.raises(ValueError, match="no models"):
        steering.superpose([], grid, x, key)
    with pytest.raises(ValueError, match="mode is 'xor'"):
        steering.superpose([den], grid, x, key, "xor")
    with pytest.raises(ValueError, match="variance is -1"):
        steering.superpose([den], grid, x, key, variance=-1.0)
    with pytest.raises(ValueError, match=r"bias has shape \(2,\) for 1 models"):
        steering.superpose([den], grid, x, key, bias=(0.0, 1.0))
    with pytest.raises(ValueError, match="noise is -1"):
        steering.superpose([den], grid, x, key, noise=-1.0)
    with pytest.raises(ValueError, match="divergence is 'some'"):
        steering.superpose([den], grid, x, key, divergence=cast("str", "some"))
