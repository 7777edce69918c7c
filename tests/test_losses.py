"""Losses against the exact Gaussian denoiser: data N(0, d^2), so E[x0 | x_t] and its variance are closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jdiff import losses, process
from jdiff.denoiser import edm_precondition
from jdiff.predict import KINDS, convert

D = 0.7  # standard deviation of the data
PROCESSES = {
    "vp_linear": process.vp_linear(),
    "vp_cosine": process.vp_cosine(),
    "edm": process.edm(),
    "flow": process.flow(),
}
SAMPLES, DIM = 4000, 6


def exact(p, kind):
    """apply(params, x, t, y): the exact posterior mean of N(0, D^2) data, as `kind`."""

    def apply(params, x, t, y):
        a, s = p.alpha(t), p.sigma(t)
        return convert(p, x, t, a * D**2 / (a * a * D**2 + s * s) * x, "x0", kind)

    return apply


def error_ratio(p, kind, t):
    """|error of kind|^2 over |error of x0|^2 at fixed x_t, written out by hand for each kind."""
    a, s, da, ds = (np.asarray(f(t)) for f in (p.alpha, p.sigma, p.dalpha, p.dsigma))
    # eps = (x - a x0) / s, so an error e of x0 is -a e / s of eps; the other kinds combine the two
    return {
        "x0": 1.0,
        "eps": (a / s) ** 2,
        "score": (a / s**2) ** 2,
        "v": (a * a / s + s) ** 2,
        "velocity": (da - ds * a / s) ** 2,
    }[kind]


def x0_weight(p, weighting, kind, t):
    """The weight on |error of x0|^2, as each paper writes it."""
    a, s = np.asarray(p.alpha(t)), np.asarray(p.sigma(t))
    r, snr = s / a, (a / s) ** 2
    return {
        "none": error_ratio(p, kind, t),
        "edm": (r * r + 0.5**2) / (r * 0.5) ** 2,
        "min_snr": np.minimum(snr, 5.0),
        "flow": error_ratio(p, "velocity", t),
    }[weighting]


def irreducible(p, kind, weighting, t):
    a, s = np.asarray(p.alpha(t)), np.asarray(p.sigma(t))
    return x0_weight(p, weighting, kind, t) * D**2 * s * s / (a * a * D**2 + s * s)


@pytest.mark.parametrize("name", PROCESSES)
def test_exact_denoiser_reaches_the_irreducible_loss(name):
    """Against quadrature over time. The four processes share out the 20 pairs of prediction kind and weighting."""
    p = PROCESSES[name]
    sampler = losses.log_normal(p, -0.5, 0.6)
    x0 = D * jax.random.normal(jax.random.key(1), (SAMPLES, DIM), jnp.float64)

    first = list(PROCESSES).index(name)
    pairs = [(kind, losses.WEIGHTINGS[(first + i) % 4]) for i, kind in enumerate(KINDS)]

    def all_losses(x0):
        made = (losses.denoising_loss(exact(p, k), p, k, weighting=w, time=sampler) for k, w in pairs)
        return [loss(None, jax.random.key(2), x0) for loss in made]

    for (kind, weighting), values in zip(pairs, jax.jit(all_losses)(x0), strict=True):
        values = np.asarray(values)
        assert values.shape == (SAMPLES,) and values.dtype == np.float64
        want = stats.norm.expect(
            lambda z, k=kind, w=weighting: irreducible(p, k, w, p.t_of_lam(0.5 - 0.6 * z)), lb=-5.3, ub=5.3
        )
        error = values.std() / np.sqrt(SAMPLES)
        assert abs(values.mean() - want) < 4.5 * error, (kind, weighting, values.mean(), want, error)
        assert error < 0.1 * want  # the test has teeth


def test_weights_are_one_quantity_in_different_clothes():
    """w_kind |error of kind|^2 is the same number for every kind, and Hang et al.'s forms come out."""
    for p in PROCESSES.values():
        t = jnp.asarray(np.geomspace(max(p.t_min, 0.01), 0.97 * p.t_max, 40))
        for weighting in ("edm", "min_snr", "flow"):
            for kind in KINDS:
                got = losses.weight(p, kind, weighting, t) * error_ratio(p, kind, np.asarray(t))
                np.testing.assert_allclose(got, x0_weight(p, weighting, kind, np.asarray(t)), rtol=1e-9)
    p = PROCESSES["vp_cosine"]
    snr = np.asarray(p.alpha(t := jnp.linspace(0.01, 0.99, 30)) / p.sigma(t)) ** 2
    g = np.minimum(snr, 5.0)
    for kind, want in {"x0": g, "eps": g / snr, "v": g / (snr + 1)}.items():
        np.testing.assert_allclose(losses.weight(p, kind, "min_snr", t), want, rtol=1e-9)
    np.testing.assert_allclose(losses.weight(p, "eps", "min_snr", jnp.asarray(1.0)), 1)  # alpha = 0: the limit, not NaN
    np.testing.assert_allclose(losses.weight(PROCESSES["flow"], "velocity", "flow", t), 1.0)


def test_edm_weighting_makes_the_loss_one_at_init():
    """With preconditioning, F = 0 and data of standard deviation sigma_data, the loss is 1 at every noise level."""
    p = PROCESSES["edm"]
    raw = edm_precondition(lambda params, x, t: jnp.zeros_like(x), p, D)
    x0 = D * jax.random.normal(jax.random.key(1), (20_000, 4), jnp.float64)
    for sigma in (0.01, 0.3, 1.0, 20.0):
        loss = losses.denoising_loss(
            lambda params, x, t, y: raw(params, x, t), p, "x0", weighting="edm", sigma_data=D,
            time=lambda u, sigma=sigma: jnp.full_like(u, sigma),
        )  # fmt: skip
        values = np.asarray(loss(None, jax.random.key(3), x0))
        assert abs(values.mean() - 1) < 4.5 * values.std() / np.sqrt(len(values)), sigma


def test_a_sample_has_the_same_loss_in_any_batch():
    """Time, noise and dropped label come from (key, global index) alone; the mean of a batch hides nothing."""
    p = PROCESSES["flow"]
    apply = lambda w, x, t, y: jnp.tanh(x * w) + y[:, None].astype(x.dtype)
    x0 = jax.random.normal(jax.random.key(0), (12, 5), jnp.float32)
    y = jnp.arange(12, dtype=jnp.int32)
    for stratified in (False, True):
        loss = jax.jit(
            losses.denoising_loss(
                apply, p, "velocity", stratified=stratified, label_dropout=0.4, null_label=-3, weighting="flow"
            )
        )
        whole = loss(jnp.float32(0.3), jax.random.key(7), x0, y)
        assert whole.dtype == jnp.float32
        rows = np.array([9, 2, 4])
        part = loss(jnp.float32(0.3), jax.random.key(7), x0[rows], y[rows], jnp.asarray(rows))
        np.testing.assert_array_equal(part, whole[rows])
        assert len(np.unique(np.asarray(whole))) == 12


def test_labels_are_dropped_at_the_rate_asked_for():
    y = jnp.ones(20_000, jnp.int32)
    index = jnp.arange(20_000)
    dropped = np.asarray(losses.drop_labels(jax.random.key(0), y, 0.1, 10, index) == 10)
    assert abs(dropped.mean() - 0.1) < 4.5 * np.sqrt(0.09 / 20_000)


@pytest.mark.parametrize("stratified", [False, True])
def test_time_samplers_have_their_quantiles(stratified):
    n = 20_000
    u = losses.uniforms(jax.random.key(5), jnp.arange(n), stratified)
    assert u.dtype == jnp.float32 and u.min() > 0 and u.max() < 1
    p = PROCESSES["vp_cosine"]
    q = np.array([0.05, 0.3, 0.5, 0.8, 0.97])
    tolerance = 4.5 * np.sqrt(q * (1 - q) / n) if not stratified else np.full(5, 3 / n)
    log_ratio = lambda t: -np.asarray(p.lam(np.asarray(t, np.float64)))
    for got, law in (
        (losses.uniform(p)(u), stats.uniform(p.t_min, p.t_max - p.t_min)),
        (log_ratio(losses.log_normal(p)(u)), stats.norm(-1.2, 1.2)),
        (log_ratio(losses.logit_normal(p)(u)), stats.norm(0, 1)),
    ):
        below = (np.asarray(got)[:, None] < law.ppf(q)).mean(0)
        assert (abs(below - q) < tolerance).all(), (below, q)
    flow_times = np.asarray(losses.logit_normal(PROCESSES["flow"], 0.3, 0.8)(u), np.float64)
    below = (np.log(flow_times / (1 - flow_times))[:, None] < stats.norm(0.3, 0.8).ppf(q)).mean(0)
    assert (abs(below - q) < tolerance).all()


def test_stratified_batches_are_even():
    """Any run of 64 consecutive indices fills the unit interval: no gap above 3 / 64."""
    for start in (0, 1000, 2**31 - 32):
        u = np.sort(np.asarray(losses.uniforms(jax.random.key(1), jnp.arange(start, start + 64), True)))
        assert np.diff(np.r_[0, u, 1]).max() < 3 / 64


def test_extreme_bits_stay_inside_the_interval():
    """The largest and smallest of the 2^23 values survive float32, and the inverse normal of them is finite."""
    u = (jnp.asarray([0, 2**23 - 1], jnp.uint32).astype(jnp.float32) + 0.5) * 2.0**-23
    assert u[0] > 0 and u[1] < 1 and jnp.isfinite(jax.scipy.special.ndtri(u)).all()


def test_pytrees_of_arrays():
    p = PROCESSES["vp_linear"]
    x0 = {"a": jnp.ones((3, 2), jnp.float32), "b": jnp.zeros((3, 6), jnp.float32)}
    zero = lambda params, x, t, y: jax.tree.map(jnp.zeros_like, x)
    got = losses.denoising_loss(zero, p, "x0")(None, jax.random.key(0), x0)
    np.testing.assert_allclose(got, 2 / 8)
    with pytest.raises(ValueError, match="axes"):
        losses.denoising_loss(zero, p, "x0")(None, jax.random.key(0), {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2, 2))})


def test_bad_input():
    p = PROCESSES["flow"]
    apply = lambda params, x, t, y: x
    for options, match in (
        ({"prediction": "noise"}, "unknown prediction"),
        ({"weighting": "snr"}, "unknown weighting 'snr'.*min_snr"),
        ({"label_dropout": 1.0}, "probability"),
        ({"label_dropout": 0.1}, "null_label"),
    ):
        with pytest.raises(ValueError, match=match):
            losses.denoising_loss(apply, p, **{"prediction": "eps", **options})
    with pytest.raises(ValueError, match="shape"):
        losses.denoising_loss(lambda *a: jnp.zeros((2, 3)), p, "eps")(None, jax.random.key(0), jnp.ones((2, 4)))


def test_beta_times_are_scipys_quantiles_and_a_curriculum_compiles_once():
    u = jnp.asarray([1e-3, 0.1, 0.5, 0.77, 0.999])
    traces = []

    @jax.jit
    def times(mean, u):
        traces.append(0)
        return losses.beta(mean, 4.0)(u)

    for mean in (0.3, 0.5, 0.8):
        np.testing.assert_allclose(times(mean, u), stats.beta.ppf(u, 4 * mean, 4 * (1 - mean)), atol=2e-7)
    assert len(traces) == 1
    np.testing.assert_allclose(losses.beta(0.5, 2.0)(u), u, atol=2e-7)
    for mean, c, match in ((1.0, 4.0, "mean is 1.0"), (0.5, 0.0, "concentration is 0.0")):
        with pytest.raises(ValueError, match=match):
            losses.beta(mean, c)


def test_uncertain_conditions_move_by_the_batchs_own_spread():
    """Mean and deviation over tokens move by normals of their spread over the batch; in between all is affine."""
    c = jax.random.normal(jax.random.key(0), (400, 6, 3)) * 2 + jax.random.normal(jax.random.key(1), (400, 1, 3))
    found = losses.uncertain(jax.random.key(2), c, 1.0)
    for statistic in (lambda v: v.mean(1), lambda v: v.std(1)):
        moved = np.asarray(statistic(jnp.asarray(found)) - statistic(c))
        spread = np.asarray(statistic(c)).std(0)
        right = 4 / np.sqrt(400)
        if statistic(c).mean() > 1:  # a deviation that would be negative turns over
            moved = moved[(np.asarray(statistic(c)) > 4 * spread).all(1)]
            right = 4 / np.sqrt(len(moved))
        assert (np.abs(moved.mean(0)) < right * spread).all()
        assert (np.abs(moved.std(0) / spread - 1) < right / np.sqrt(2)).all()
    order = lambda v: np.argsort(np.abs(np.asarray(v) - np.asarray(v).mean(1, keepdims=True)), 1)
    np.testing.assert_array_equal(order(found), order(c))
    np.testing.assert_array_equal(losses.uncertain(jax.random.key(2), c, 0.0), c)
    half = np.asarray(losses.uncertain(jax.random.key(3), c, 0.5) == c).all((1, 2)).mean()
    assert abs(half - 0.5) < 4 * 0.5 / np.sqrt(400)
    with pytest.raises(ValueError, match=r"probability is 1\.5"):
        losses.uncertain(jax.random.key(0), c, 1.5)
