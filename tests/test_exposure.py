"""Wrappers that ask the network something else: recovery of hidden times, closed forms, identities; thresholding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import exact, exposure, guidance, process, solvers, times

VP, EDM, FLOW = process.vp_linear(), process.edm(), process.flow()


def told(p, prediction="eps"):
    """A denoiser that tells the time it is asked at, as an array of the sample's shape."""
    return jdiff.denoiser(lambda x, t: jnp.broadcast_to(t, x.shape), p, prediction)


# Time shift ------------------------------------------------------------------------------------------------------


def asked(den, x, t):
    """The times that a time-shifted `told` is asked at, one a sample, at its first and its second evaluation."""
    first, carry = den.apply(x, jnp.float64(t), den.init(x))
    second, _ = den.apply(x, jnp.float64(t), carry)
    return np.asarray(first[:, 0, 0]), np.asarray(second[:, 0, 0])


def spread(p, t, d, data=0.0):
    """Standard deviation of the time read off the variance of d elements: the variance's own over its slope in t."""
    variance = lambda t: p.sigma(t) ** 2 + p.alpha(t) ** 2 * data
    return variance(t) * np.sqrt(2 / (d - 1)) / ((variance(t + 1e-5) - variance(t - 1e-5)) / 2e-5)


@pytest.mark.parametrize(("p", "hidden"), [(VP, 0.05), (VP, 0.2), (FLOW, 0.4)])
def test_time_shift_recovers_hidden_times(p, hidden):
    """Data of little variance: the time is found to within the noise of a sample's variance, and not better."""
    n, d = 400, (48, 64)
    x = p.diffuse(jax.random.key(0), jnp.full((n, *d), 0.3), hidden)
    first, second = asked(exposure.time_shift(told(p), 0.05, 0.0, levels=1001), x, hidden + 0.02)
    np.testing.assert_allclose(first, hidden + 0.02)
    z = (second - hidden) / spread(p, hidden, 48 * 64)
    assert np.mean(np.abs(z) < 2) > 0.91 and abs(z.mean()) < 0.2 and 0.85 < z.std() < 1.15
    if hidden == 0.05:
        assert np.mean(np.abs(second - hidden) <= 0.003) >= 0.95  # within 3 of 1000 steps


def test_time_shift_needs_the_datas_variance():
    """Data of variance 0.3: the published rule is biased, as var(x_t) = sigma^2 + 0.3 alpha^2; with it named, not."""
    n, d, t = 400, (48, 64), 0.3
    x0 = np.sqrt(0.3) * jax.random.normal(jax.random.key(1), (n, *d), jnp.float64)
    x = VP.diffuse(jax.random.key(0), x0, t)
    published, corrected = (
        asked(exposure.time_shift(told(VP), 0.1, 0.0, levels=1001, data_variance=v), x, t)[1] for v in (0.0, 0.3)
    )
    wanted = np.interp(VP.sigma(t) ** 2 + 0.3 * VP.alpha(t) ** 2, VP.sigma(g := np.linspace(0, 1, 10001)) ** 2, g)
    assert abs(published.mean() - min(wanted, t + 0.1)) < 3e-3 and published.mean() > t + 0.05
    assert abs(corrected.mean() - t) < 3 * spread(VP, t, 48 * 64, 0.3) / np.sqrt(n)


@pytest.mark.parametrize(("prediction", "keep"), [("eps", "eps"), ("x0", "eps"), ("x0", "x0"), ("v", "eps")])
def test_time_shift_keeps_the_update(prediction, keep):
    """DDIM by hand: what the network says at its own time is used at the sampler's."""
    f = lambda x, t: np.tanh(x) * np.cos(t) - 0.3 * t
    fj = lambda x, t: jnp.tanh(x) * jnp.cos(t) - 0.3 * t
    x = 0.7 * np.random.default_rng(0).normal(size=(4, 5, 6))
    t = times.uniform(VP, 5, end=0.1)
    y = x
    for i, (now, after) in enumerate(itertools.pairwise(t)):
        near = np.clip(now + 0.0625 * np.linspace(-1, 1, 9), VP.t_min, 1.0)
        at = near[np.argmin(np.abs(VP.sigma(near) ** 2 - y.var((1, 2), ddof=1)[:, None]), 1)][:, None, None]
        at = np.full_like(at, now) if i == 0 or now <= 0.375 else at
        kept = jdiff.predict.convert(VP, y, at, f(y, at), prediction, keep)
        D = jdiff.predict.convert(VP, y, now, kept, keep, "x0")
        y = VP.sigma(after) / VP.sigma(now) * (y - VP.alpha(now) * D) + VP.alpha(after) * D
    den = exposure.time_shift(jdiff.denoiser(fj, VP, prediction), 0.0625, 0.375, levels=9, keep=keep)
    np.testing.assert_allclose(jdiff.sample(den, solvers.ddim()(VP, t), jnp.asarray(x)), y, rtol=1e-9)


def test_time_shift_above_the_cutoff_alone():
    den = jdiff.denoiser(lambda x, t: jnp.tanh(x + t), VP, "eps")
    x, T = jax.random.normal(jax.random.key(0), (3, 8, 8)), solvers.unipc()(VP, times.logsnr(VP, 6))
    plain = jdiff.sample(den, T, x)
    np.testing.assert_array_equal(jdiff.sample(exposure.time_shift(den, 0.05, 1.0), T, x), plain)
    assert np.abs(jdiff.sample(exposure.time_shift(den, 0.05, 0.3), T, x) - plain).max() > 1e-3


def test_time_shift_of_a_guided_model():
    """Times a sample go through the doubled batch of classifier-free guidance."""
    fn = lambda x, t, y: jnp.broadcast_to(t + y[:, None, None], x.shape)
    con = jdiff.denoiser(fn, VP, "eps", cond=jnp.array([1.0, 2.0, 3.0]))
    x = VP.diffuse(jax.random.key(0), jnp.zeros((3, 40, 40)), jnp.array([0.1, 0.13, 0.16])[:, None, None])
    plain, guided = (
        asked(exposure.time_shift(den, 0.05, 0.0, levels=1001), x, 0.13)[1]
        for den in (told(VP), guidance.cfg(con, con.with_cond(jnp.zeros(3)), 2.0))
    )
    np.testing.assert_allclose(guided, plain + 2.0 * np.array([1, 2, 3]), rtol=1e-6)
    assert (np.diff(plain) > 0.01).all()


def test_time_shift_does_not_help_an_exact_model():
    """Unit-variance data, the exact denoiser: there is no bias to mend, and the published rule takes data for noise."""
    den = exact.gaussian(np.zeros(256), 1.0).denoiser(VP)
    T, x = solvers.unipc()(VP, times.logsnr(VP, 20)), VP.prior(jax.random.key(0), (500, 256))
    plain, shifted = (np.var(jdiff.sample(d, T, x)) for d in (den, exposure.time_shift(den, 0.03, 0.3)))
    assert abs(plain - 1) < 0.01 and shifted < 0.97  # 1.001 and 0.959; with a window of 0.1 it is 0.901


# Epsilon scaling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eps", "x0", "velocity"])
def test_epsilon_scaling_on_a_gaussian(kind):
    """eps is linear in x there, so DDIM multiplies x by a known number a step, with eps / (k t + b) by another."""
    model = exact.gaussian([0.0, 0.0], 0.25)
    den = jdiff.denoiser(lambda x, t: model.denoiser(VP)(x, t, kind), VP, kind)
    t, b, k = times.uniform(VP, 8, end=0.05), 1.01, 0.02
    a, s = VP.alpha(t), VP.sigma(t)
    gain = s / (0.25 * a**2 + s**2) / (k * t + b)  # eps = gain x
    want = np.prod(a[1:] / a[:-1] + (s[1:] - a[1:] * s[:-1] / a[:-1]) * gain[:-1])
    x = jnp.asarray([[1.0, -2.0]])
    got = jdiff.sample(exposure.epsilon_scaling(den, b, k), solvers.ddim()(VP, t), x)
    np.testing.assert_allclose(got, want * x, rtol=1e-6)  # b and k are float32
    np.testing.assert_allclose(exposure.epsilon_scaling(den, 1.0)(x, 0.3), den(x, 0.3), rtol=1e-12)
    np.testing.assert_allclose(exposure.epsilon_scaling(den, 1.25)(x, 0.3, "eps"), den(x, 0.3, "eps") / 1.25)


def test_settings_are_arguments():
    """Another window, cutoff, b or table compiles nothing."""
    traces = []

    def fn(x, t):
        traces.append(None)
        return jnp.tanh(x + t)

    den = jdiff.denoiser(fn, VP, "eps")
    x, T = jnp.ones((2, 3, 3)) * jnp.linspace(-1, 1, 3), solvers.ddim()(VP, times.uniform(VP, 4))
    for make in (
        lambda v: exposure.time_shift(den, 0.1 * v, 0.3 * v),
        lambda v: exposure.epsilon_scaling(den, 1.0 + v),
        lambda v: exposure.conditioning_map(den, [0.2, 0.8], [0.1 * v, 0.7]),
        lambda v: guidance.threshold(den, 0.9 * v),
    ):
        outs = [jdiff.sample(make(v), T, x) for v in (0.5, 1.0)]
        assert np.abs(outs[0] - outs[1]).max() > 1e-6
    assert len(traces) == 4


# NoiseShift ------------------------------------------------------------------------------------------------------

UNIT = exact.gaussian(np.zeros(32), 1.0)  # a denoiser of N(0, I); the data are N(0, c^2 I)
LEVELS = np.geomspace(0.1, 20.0, 8)


@pytest.mark.parametrize("c", [0.5, 1.0, 1.6])
def test_noise_shift_on_gaussians(c):
    """x / (1 + s^2) denoises N(0, c^2) best at s = sigma / c; on the data it was made for the map is the identity."""
    x0 = c * jax.random.normal(jax.random.key(3), (2000, 32), jnp.float64)
    at, found = exposure.calibrate_noise_shift(UNIT.denoiser(EDM), x0, LEVELS[::-1], jax.random.key(0))
    np.testing.assert_array_equal(at, LEVELS)
    cell = 1.5 / 6**3  # of the third round, in log sigma
    inside = found < 0.999 * EDM.t_max
    # The optimum's own noise: of the gain 1 / (1 + s^2) found on n d products x0 x, in log s.
    gain = c**2 / (c**2 + LEVELS**2)
    noise = 3 * np.sqrt((1 - gain) / gain / x0.size) / (2 * (1 - gain))
    assert (np.abs(np.log(found * c / LEVELS)) <= cell + noise)[inside].all() and (np.diff(found) >= 0).all()


def test_noise_shift_mends_the_samples_variance():
    """Unit-variance denoiser, data of variance 0.25: samples have variance 1 without the map, and 0.25 with it."""
    p, c = process.edm(0.02, 20.0), 0.5
    t = times.karras(p, 40)
    den = UNIT.denoiser(p)
    x0 = c * jax.random.normal(jax.random.key(3), (500, 32), jnp.float64)
    table = exposure.calibrate_noise_shift(den, x0, t[:-1], jax.random.key(0))
    x = p.prior(jax.random.key(1), (1000, 32), dtype=jnp.float64)
    T = solvers.dpm_solver_pp(2)(p, t)
    plain = np.var(jdiff.sample(den, T, x))
    mended = np.var(jdiff.sample(exposure.conditioning_map(den, *table), T, x))
    np.testing.assert_allclose(plain, 1.0, rtol=0.05)
    np.testing.assert_allclose(mended, c**2, rtol=0.1)


def test_noise_shift_finds_the_least_error_of_a_step():
    """What the docstring says: with one noise in both, a step's error is least where the x0 prediction's is."""
    p, t0, t1 = FLOW, 0.6, 0.45
    den = exact.gaussian(np.zeros(4), 1.0).denoiser(p)
    flow = jdiff.denoiser(lambda x, t: den(x, t, "velocity"), p, "velocity")
    x0 = 0.5 * jax.random.normal(jax.random.key(0), (200, 4), jnp.float64)
    _, found = exposure.calibrate_noise_shift(flow, x0, [t0], jax.random.key(1))
    eps = jdiff.noise.normal(jax.random.key(1), x0)
    x, goal = p.mix(x0, eps, t0), p.mix(x0, eps, t1)
    error = jax.jit(lambda s: jnp.mean((x + (t1 - t0) * flow(x, s, "velocity") - goal) ** 2))  # one Euler step
    candidates = np.linspace(0.6, 0.9, 151)
    best = candidates[np.argmin([error(s) for s in candidates])]
    assert abs(found[0] - best) < 4e-3 and error(found[0]) < error(t0)


def test_conditioning_map_interpolates_and_keeps():
    x = jnp.ones((2, 3))
    den = exposure.conditioning_map(told(VP), [0.2, 0.6, 0.4], [0.1, 0.5, 0.4])
    for t, want in ((0.1, 0.1), (0.2, 0.1), (0.3, 0.25), (0.5, 0.45), (0.9, 0.5)):
        np.testing.assert_allclose(den(x, t, "eps"), want, rtol=1e-6)
    den = exposure.conditioning_map(told(VP, "x0"), [0.5], [0.3], keep="eps")
    eps = (1.0 - VP.alpha(0.3) * 0.3) / VP.sigma(0.3)
    np.testing.assert_allclose(den(x, 0.5), (1.0 - VP.sigma(0.5) * eps) / VP.alpha(0.5), rtol=1e-6)


# Thresholding ----------------------------------------------------------------------------------------------------


def test_threshold():
    """Against NumPy's percentile; untouched where the quantile is inside the range; x0 from any prediction."""
    D = np.random.default_rng(0).normal(size=(3, 40, 5)) * np.array([0.2, 1.0, 3.0])[:, None, None]
    den = jdiff.denoiser(lambda x, t: (x - VP.alpha(t) * jnp.asarray(D)) / VP.sigma(t), VP, "eps")
    x = jnp.asarray(np.random.default_rng(1).normal(size=D.shape))
    s = np.maximum(np.percentile(np.abs(D), 95, axis=(1, 2), keepdims=True), 1.0)
    got = guidance.threshold(den, 0.95)(x, 0.4)
    np.testing.assert_allclose(got, np.clip(D, -s, s) / s, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(got[0], D[0], rtol=1e-6, atol=1e-9)  # no quantile above 1
    np.testing.assert_allclose(guidance.threshold(den, None, 0.5)(x, 0.4), np.clip(D, -0.5, 0.5), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(guidance.threshold(den, 1.0, 2.0)(x, 0.4)[2], D[2] * 2 / np.abs(D[2]).max(), rtol=1e-6)


# Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda den: exposure.time_shift(den, 0.0, 0.3), "window > 0"),
        (lambda den: exposure.time_shift(den, 0.1, 0.3, levels=10), "odd number of levels"),
        (lambda den: exposure.time_shift(den, 0.1, 300.0), r"cutoff is 300.0; expected a time in \[0, 1\]"),
        (lambda den: exposure.time_shift(den, 0.1, 0.3, keep="noise"), "unknown prediction kind 'noise'"),
        (lambda den: exposure.epsilon_scaling(den, -1.0), "b is -1.0; expected a divisor near 1"),
        (lambda den: exposure.conditioning_map(den, [0.1, 0.2], [0.1]), r"one length, got \(2,\) and \(1,\)"),
        (lambda den: exposure.conditioning_map(den, [0.1], [7.0]), r"times in \[0.1, 7\]; expected \[0, 1\]"),
        (lambda den: exposure.calibrate_noise_shift(den, jnp.ones((2, 2)), [0.5], jax.random.key(0), grid=2), "grid=2"),
        (lambda den: guidance.threshold(den, 99.5), "quantile is 99.5"),
        (lambda den: guidance.threshold(den, limit=0.0), "limit is 0.0"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says):
        make(told(VP))


def test_time_shift_takes_arrays():
    den = jdiff.denoiser(lambda x, t: x, VP, "eps")
    with pytest.raises(TypeError, match="one array a sample"):
        exposure.time_shift(den, 0.1, 0.3)({"a": jnp.ones((2, 3))}, 0.5)
