"""Oracles of the anchored papers: identities with known samplers, closed forms, published numbers, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import anchored, exact, metrics, process, solvers, times
from jdiff.anchored import Anchored
from jdiff.data.synthetic import audio, restoration
from jdiff.experiments import _restoration
from jdiff.experiments.restoration import pooled
from jdiff.solvers import residual_path

BETAS = np.linspace(1e-4, 2e-2, 1000)
BAR = np.cumprod(1 - BETAS)
RNG = np.random.default_rng(0)
Y = jnp.asarray(RNG.normal(size=(3, 4)))
X0 = jnp.asarray(RNG.normal(size=(3, 4)))
EPS = jnp.asarray(RNG.normal(size=(3, 4)))


def at(A, t, x0=X0, y=Y, eps=EPS):
    """The unshifted state of a known (x0, y, eps)."""
    return A.process.alpha(t) * x0 + A.b(A.process, t) * y + A.process.sigma(t) * eps


# ResShift and UPSR --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [4, 15])
def test_resshift_steps_are_the_published_ones(T):
    """mean (eta_s / eta_t) x + ((eta_t - eta_s) / eta_t) x0, variance kappa^2 (eta_s / eta_t) (eta_t - eta_s), in x."""
    first = 0.1 if T == 4 else 0.02
    eta = np.append(0.0, (first * (0.99 / first) ** ((np.arange(T) / (T - 1)) ** 0.3)) ** 2)
    A = anchored.ALL["resshift_journal" if T == 4 else "resshift"]()
    table = solvers.ddpm()(A.process, np.arange(T, -1, -1) / T)
    for k, i in enumerate(range(T, 0, -1)):
        q = A.posterior((i - 1) / T, i / T)
        want = [eta[i - 1] / eta[i], 1 - eta[i - 1] / eta[i], 0, 4 * eta[i - 1] / eta[i] * (eta[i] - eta[i - 1])]
        np.testing.assert_allclose(q, want, atol=1e-12)
        np.testing.assert_allclose([table.A[k, 0, 0], table.B[k, 0, 0]], want[:2], atol=1e-12)
        np.testing.assert_allclose(np.sum(table.C[k] ** 2), want[3], atol=1e-12)


def test_resshift_steps_keep_the_marginal_on_any_subset_and_find_the_posterior():
    """With x0 known the steps give q(x_s) whatever is skipped; with E[x0 | x_t] and many of them, the law of x0."""
    p = process.resshift()
    for subset in ([15, 9, 4, 2], [15, 1], [12, 11, 3]):
        mean, cov = exact.gaussian([1.3], 0.0).law(solvers.ddpm()(p, np.array(subset) / 15))
        np.testing.assert_allclose(
            [mean[0], cov[0, 0]], [p.alpha(subset[-1] / 15) * 1.3, p.sigma(subset[-1] / 15) ** 2]
        )
    model, errors = exact.gaussian([1.3], 0.25), []
    for n in (15, 150, 1500):
        p = process.resshift(n)
        errors.append(abs(model.law(solvers.ddpm()(p, times.uniform(p, n)))[1][0, 0] / 0.25 - 1))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02
    with np.testing.assert_raises(AssertionError):  # the chain x = alpha x0 + .. is another: DDIM's eta = 1
        np.testing.assert_allclose(p.posterior(0.2, 0.6).x, p.spread(0.2) / p.alpha(0.2) / p.spread(0.6) * p.alpha(0.6))


def test_upsr_is_resshift_at_a_noise_map():
    A = anchored.ALL["upsr"]()
    un = anchored.uncertainty(Y + 0.6 * EPS, Y)
    assert (un >= 0.4).all() and (un <= 1).all() and (un == 1).any() and (un < 1).any()
    np.testing.assert_allclose(un, 0.4 + 0.6 * np.clip(np.abs(0.6 * EPS) / 2, 0, 0.1) / 0.1, rtol=1e-12)
    y, scale = jnp.broadcast_to(Y[0], (6000, 4)), jnp.broadcast_to(un[0], (6000, 4))
    x = A.prior(jax.random.key(0), y, scale=scale)
    seen = np.asarray(A.unshift(x, y, 1.0, scale))
    np.testing.assert_allclose(seen.std(0), 2.5 * 0.99 * un[0], rtol=4 / np.sqrt(12000))
    np.testing.assert_allclose(A.shift(jnp.asarray(seen), y, 1.0, scale), x, atol=1e-12)
    # x0 | y is N(y / 2, 0.04): E[x0 | x_t, y] where pixel j's noise is un_j sigma, and the law of what comes out
    p = A.process

    def network(x, t, y):
        a, s = p.alpha(t), p.sigma(t) * un[0]
        return y / 2 + a * 0.04 / (a**2 * 0.04 + s**2) * (x - (1 - a) * y - a * y / 2)

    table = solvers.ddpm()(p, times.uniform(p, 5))
    out = jdiff.sample(A.denoiser(network, "x0", y, scale=scale), table, x, jax.random.key(1))
    found = np.asarray(A.unshift(out, y, 0.0, scale))
    for j in range(4):  # the exact law of the table on a Gaussian of x0 / un, pixel by pixel, from the published start
        start = np.array([p.alpha(1.0) * float(Y[0, j] / un[0, j])]), np.array([[p.sigma(1.0) ** 2]])
        mean, cov = exact.gaussian([float(Y[0, j] / un[0, j]) / 2], 0.04 / float(un[0, j]) ** 2).law(table, *start)
        sd = np.sqrt(cov[0, 0]) * float(un[0, j])
        assert abs(found[:, j].mean() - mean[0] * un[0, j]) < 4 * sd / 77
        assert abs(found[:, j].std() / sd - 1) < 4 / np.sqrt(12000)
    plain = A.denoiser(lambda x, t, y: 0.3 * x + y, "x0", Y)
    ones = A.denoiser(lambda x, t, y: 0.3 * x + y, "x0", Y, scale=jnp.ones_like(Y))
    np.testing.assert_allclose(ones(X0, 0.5), plain(X0, 0.5), rtol=1e-12)


# RDDM ---------------------------------------------------------------------------------------------------------------

DDPM_AS_RDDM = process.tabulated(np.sqrt(BAR), np.sqrt(1 - BAR))  # abar = 1 - sqrt(alpha_bar), bbar^2 = 1 - alpha_bar


def test_rddm_with_ddpms_schedules_is_ddim():
    p, t = process.vp_discrete(BETAS), np.array([1000, 700, 300, 40, 1]) / 1000
    ours, ddim = (solvers.ddim()(q, t).unrolled() for q in (DDPM_AS_RDDM, p))
    np.testing.assert_allclose(ours, ddim, rtol=1e-9, atol=1e-12)
    # and RDDM's own steps on (res, eps), I_in = 0: res = -x0
    table = residual_path(DDPM_AS_RDDM, t)
    x, rng = 0.7, np.random.default_rng(1)
    for i in range(4):
        x0, ref = rng.normal(), solvers.ddim()(p, t[i : i + 2])
        a, s = p.alpha(t[i]), p.sigma(t[i])
        new = table.A[i, 0, 0] * x + table.B[i, 0] @ [-x0, (x - a * x0) / s]
        np.testing.assert_allclose(new, ref.A[0, 0, 0] * x + ref.B[0, 0, 0] * x0, rtol=1e-9)
        x = new


def test_rddms_variance_is_ddpms_times_abar():
    """The sum-constrained sigma^2 = beta_t^2 bbar_{t-1}^2 / bbar_t^2, and DDPM's posterior variance."""
    vp = process.vp_discrete(BETAS)
    for i in (2, 10, 100, 500, 1000):
        s, t = (i - 1) / 1000, i / 1000
        b0, b1 = 1 - BAR[i - 1], 1 - BAR[i - 2]
        got = DDPM_AS_RDDM.posterior(s, t).var
        np.testing.assert_allclose(got, (b0 - b1) * b1 / b0, rtol=1e-6)
        np.testing.assert_allclose(got / vp.posterior(s, t).var, BAR[i - 2], rtol=1e-6)


def test_rddm_paths_end_in_one_place_and_are_its_ddim():
    A = anchored.ALL["rddm"]()
    p = A.process
    paths = {
        "together": [(1, 1), (0.6, 0.6), (0.2, 0.2), (0, 0)],
        "residual first": [(1, 1), (0.4, 1), (0, 1), (0, 0.5), (0, 0)],
        "noise first": [(1, 1), (1, 0.3), (1, 0), (0.5, 0), (0, 0)],
        "one after another": [(1, 1), (0.7, 1), (0.7, 0.4), (0.1, 0.4), (0, 0)],
    }
    told = []

    def constant(x, t, y):
        told.append(t.shape)
        return y - X0, EPS

    D = jdiff.denoiser(constant, p, "x0", cond=Y)
    for path in paths.values():
        got = jdiff.sample(D, residual_path(p, np.array(path, float)), at(A, 1.0))
        np.testing.assert_allclose(got, X0, atol=1e-12)
    assert set(told) == {(2,)}
    # a consistent network: one output decides the other, and the steps are ddim(eta) of the shifted state
    net = lambda x, t, y: jnp.tanh(x) - y + t
    pair = jdiff.denoiser(
        lambda x, t, y: (net(x, t, y), (x - y + (1 - (1 - p.alpha(t))) * net(x, t, y)) / p.sigma(t)), p, "x0", cond=Y
    )
    t = np.array([1.0, 0.5, 0.2, 0.05])
    for eta in (0.0, 1.0):
        want = jdiff.sample(A.denoiser(net, "residual", Y), solvers.ddim()(p, t), A.shift(at(A, 1.0), Y, 1.0))
        got = jdiff.sample(pair, residual_path(p, t, eta), at(A, 1.0), jax.random.key(0))
        same = np.allclose(A.shift(got, Y, 0.05), want, atol=1e-10)
        assert same == (eta == 0)
    # eta = 1 is the chain's own posterior: RDDM's variance, RDDM's mean
    table, chain = residual_path(p, t, 1.0), solvers.ddpm()(p, t)
    np.testing.assert_allclose(np.abs(table.C[:, 0, 0]), np.abs(chain.C[:, 0, 0]), rtol=1e-9)


def test_predictions_of_anchored_networks():
    """Each kind, made of the known (x0, y, eps), gives x0 back; with a noise map too."""
    for name in ("rddm", "resshift", "ir_sde"):
        A = anchored.ALL[name]()
        for kind, out in (("residual", Y - X0), ("residual, noise", (Y - X0, EPS)), ("x0", X0), ("eps", EPS)):
            D = A.denoiser(lambda x, t, y, out=out: out, kind, Y)
            np.testing.assert_allclose(D(A.shift(at(A, 0.5), Y, 0.5), 0.5), X0, atol=1e-9)
            un = 0.5 + 0.1 * jnp.abs(EPS)
            D = A.denoiser(lambda x, t, y, out=out: out, kind, Y, scale=un)
            state = at(A, 0.5, eps=un * EPS)
            np.testing.assert_allclose(D(A.shift(state, Y, 0.5, un), 0.5) * un, X0, atol=1e-9)
    A = anchored.ALL["resfusion"]()
    betas = np.asarray(A.process.base.betas)
    for i in (1, 2, 4, 5):
        r, bar = np.sqrt(1 - betas[i - 1]), np.prod(1 - betas[:i])
        resnoise = EPS + (1 - r) * np.sqrt(1 - bar) / betas[i - 1] * (Y - X0)  # Shi et al. 2024, eq. 24
        D = A.denoiser(lambda x, t, y, out=resnoise: out, "resnoise", Y)
        np.testing.assert_allclose(D(A.shift(at(A, i / 5), Y, i / 5), i / 5), X0, atol=1e-9)


# Resfusion ----------------------------------------------------------------------------------------------------------


def test_resfusion_starts_at_half_of_y_and_steps_as_ddpm():
    A = anchored.ALL["resfusion"]()
    p = A.process
    assert len(p.base.betas) == 5 and p.alpha(1.0) == 0 and float(A.b(p, 1.0)) == 0.5
    assert p.sigma(1.0) == pytest.approx(np.sqrt(0.75), rel=1e-12) and A.mismatch()[:2] == (0, 0)
    np.testing.assert_allclose(at(A, 1.0), Y / 2 + np.sqrt(0.75) * EPS, atol=1e-12)
    # one step of DDPM on x with resnoise, against the step on the shifted state
    betas = np.asarray(p.base.betas)
    for i in (5, 3):
        r, bar = np.sqrt(1 - betas[i - 1]), np.prod(1 - betas[:i])
        x, resnoise = at(A, i / 5), EPS + (1 - r) * np.sqrt(1 - bar) / betas[i - 1] * (Y - X0)
        want = (x - betas[i - 1] / np.sqrt(1 - bar) * resnoise) / r
        q = A.posterior((i - 1) / 5, i / 5)
        np.testing.assert_allclose(q.x * x + q.x0 * X0 + q.y * Y, want, atol=1e-9)
        beta_tilde = betas[i - 1] * (1 - bar / (1 - betas[i - 1])) / (1 - bar)
        np.testing.assert_allclose(q.var, beta_tilde, rtol=1e-9)
    zero = process.vp_discrete(betas).posterior(0.4, 0.6)  # R = y - x0 = 0: DDPM itself
    q = A.posterior(0.4, 0.6)
    np.testing.assert_allclose(
        [q.x, q.x0 + q.y - (1 - q.x), q.var], [zero.x, zero.x0 - (1 - zero.x), zero.var], atol=1e-9
    )


@pytest.mark.parametrize(("T", "variance"), [(12, 0.024), (50, 0.039), (200, 0.046), (1000, 0.049)])
def test_resfusions_chain_finds_the_mean_and_its_variance_comes_from_below(T, variance):
    """Cosine betas: the deficit is the posterior variance that a step takes for given."""
    p = process.resfusion(T, "cosine")
    mean, cov = exact.gaussian([0.4], 0.05).law(solvers.ddpm()(p, times.uniform(p, len(p.base.betas))))
    assert abs(mean[0] - 0.4) < 1e-9 and cov[0, 0] == pytest.approx(variance, abs=1e-3)


# Bridges ------------------------------------------------------------------------------------------------------------


def test_consecutive_bridges():
    """Sums of the steps' variances over T = 1000: DDPM 10.04, a bridge of max_var 1 1.98, the consecutive 0.99;
    and the published step x - (1 - s/t) (x - x0) + sqrt(s - s^2 / t) z from x = y, which draws noise at once."""
    t = np.arange(1, 1001) / 1000
    total = lambda p: sum(p.posterior(t[i - 1], t[i]).var for i in range(1, 1000))
    cbbd = anchored.ALL["cbbd"]()
    assert total(process.vp_discrete(BETAS)) == pytest.approx(10.04, abs=0.006)
    assert total(process.brownian_bridge(1.0, t_max=1.0)) == pytest.approx(1.98, abs=0.006)
    assert total(cbbd.process) == pytest.approx(0.99, abs=0.006)
    q = cbbd.posterior(0.3, 0.8)
    np.testing.assert_allclose(q, [0.3 / 0.8, 1 - 0.3 / 0.8, 0, 0.3 - 0.09 / 0.8], atol=1e-12)
    y = jnp.broadcast_to(Y[:1], (8000, 4))
    x = cbbd.prior(jax.random.key(0), y)
    np.testing.assert_array_equal(cbbd.unshift(x, y, 1.0), y)
    D = cbbd.denoiser(lambda x, t, y: jnp.zeros_like(x) + 0.5, "x0", y)
    mid = np.asarray(
        cbbd.unshift(jdiff.sample(D, solvers.ddpm()(cbbd.process, [1.0, 0.6, 0.3]), x, jax.random.key(1)), y, 0.3)
    )
    np.testing.assert_allclose(mid.mean(0), 0.7 * 0.5 + 0.3 * Y[0], atol=4 * np.sqrt(0.21 / 8000))
    np.testing.assert_allclose(mid.std(0), np.sqrt(0.21), rtol=4 / np.sqrt(16000))
    seen = []
    for side in (1, -1):
        anchored.Side(lambda x, t, y: seen.append(float(t)), side)(X0, 0.25, Y)
    assert seen == [0.25, -0.25]


def test_gaussian_triplet_gives_the_mean_between_two_frames():
    """(y, x, z) jointly Gaussian: from y, with E[x | x_t, y, z] exact, the bridge's samples have mean E[x | y, z]."""
    cbbd, y, z = anchored.ALL["cbbd"](), jnp.full((4000, 1), 0.8), -0.4
    mean, var = 0.5 * (0.8 + z), 0.02  # x | y, z
    p = cbbd.process

    def network(x, t, y):
        m = jnp.where(t < 1, p.alpha(t) * var / (p.alpha(t) ** 2 * var + jnp.maximum(p.sigma(t) ** 2, 1e-12)), 0.0)
        return mean + m * (x - (1 - p.alpha(t)) * y - p.alpha(t) * mean)

    table = solvers.ddpm()(p, times.uniform(p, 100))
    start = cbbd.prior(jax.random.key(0), y)
    out = np.asarray(jdiff.sample(cbbd.denoiser(network, "x0", y), table, start, jax.random.key(1)))
    law = exact.gaussian([mean], var).law(table, np.zeros(1), np.zeros((1, 1)))[1][0, 0]
    assert abs(out.mean() - mean) < 4 * np.sqrt(law / 4000) and abs(out.var() / law - 1) < 4 * np.sqrt(2 / 4000)
    fine = exact.gaussian([mean], var).law(solvers.ddpm()(p, times.uniform(p, 3000)), np.zeros(1), np.zeros((1, 1)))[1][
        0, 0
    ]
    assert law < fine < var and abs(fine / var - 1) < 0.07


# SGMSE --------------------------------------------------------------------------------------------------------------


def test_sgmses_start_leaves_a_bias_that_steps_do_not_remove():
    """x0 | y ~ N(m, v): the SDE forgets the start by Cov(x_0, x_1) / Var(x_1), so y in the place of m leaves
    e^-1.5 (y - m) a v / (a^2 v + s^2) however many steps; from the exact law at t = 1 there is none."""
    p, v = process.ouve(), 0.15
    a, s2 = p.alpha(1.0), p.sigma(1.0) ** 2
    model, limit = exact.gaussian([0.0], v), a * a * v / (a * a * v + s2)  # y - m = 1
    bias = {}
    for n in (30, 120, 1000):
        t = times.uniform(p, n, end=0.0)
        table = solvers.ddpm()(p, t)
        bias[n] = model.law(table, np.array([a]), np.array([[s2]]))[0][0]
        assert abs(model.law(table)[0][0]) < 1e-12  # from the exact terminal marginal
    np.testing.assert_allclose(bias[1000], limit, rtol=0.02)
    assert 0.03 < limit < 0.06 and all(0.8 * limit < b < 1.4 * limit for b in bias.values())
    near = anchored.ALL["sgmse_bbed"]()
    assert near.mismatch().y < 0.0011 < 200 * near.mismatch().y < anchored.ALL["sgmse_ouve"]().mismatch().y


def test_sb_steps_are_the_published_ones():
    """SB-SDE: x r + (1 - r) x0 + s_t sqrt(1 - r) z, r = (s_t / s_p)^2, with s_t^2 = c (k^2t - 1) / (2 log k)."""
    p, square = process.sb_ve(), lambda t: 0.4 * (2.6 ** (2 * t) - 1) / (2 * np.log(2.6))
    q, r = p.posterior(0.3, 0.7), square(0.3) / square(0.7)
    np.testing.assert_allclose(q, [r, 1 - r, square(0.3) * (1 - r)], rtol=1e-9)
    np.testing.assert_allclose(p.alpha(0.3), 1 - square(0.3) / square(1.0), rtol=1e-9)


# DDDM-VC, RDEIC, DiffuseVAE ------------------------------------------------------------------------------------------


def test_dddm_vc_sums_scores():
    """Two attributes with one prior and half the score each are the single model; N = 1 is the reverting VP SDE."""
    A = anchored.ALL["dddm_vc"]()
    B = 0.05 + 0.5 * 19.95
    np.testing.assert_allclose(
        [A.process.alpha(1.0), A.process.sigma(1.0) ** 2], [np.exp(-B / 2), 1 - np.exp(-B)], rtol=1e-12
    )
    score = lambda x, t, y: -(x - 0.3 * y) / (1 + t)

    def summed(x, t, y):
        total = sum(0.5 * score(x[k], t, y[k]) for k in x)
        return dict.fromkeys(x, total)

    table, key = solvers.ddim()(A.process, times.uniform(A.process, 6, end=0.01)), jax.random.key(0)
    x = A.prior(key, Y)
    want = jdiff.sample(A.denoiser(score, "score", Y), table, x)
    both = {"source": Y, "filter": Y}
    got = jdiff.sample(A.denoiser(summed, "score", both), table, {"source": x, "filter": x})
    for k in both:
        np.testing.assert_allclose(got[k], want, rtol=1e-9)


def test_rdeic_relays_a_pretrained_network():
    """z = A z0 + S eps' with eps' = eps + rate (z_c - z0): the base process's own DDIM, fed eps', is ours."""
    A = anchored.ALL["rdeic"]()
    p, base = A.process, A.process.base
    for t in (0.3, 0.11):
        noise = EPS + p.rate * (Y - X0)
        np.testing.assert_allclose(at(A, t), base.alpha(t) * X0 + base.sigma(t) * noise, atol=1e-12)
    np.testing.assert_allclose(at(A, 0.3), base.alpha(0.3) * Y + base.sigma(0.3) * EPS, atol=1e-12)
    np.testing.assert_allclose(at(A, 0.2, y=X0), base.alpha(0.2) * X0 + base.sigma(0.2) * EPS, atol=1e-12)
    net = lambda x, t: jnp.tanh(x) + t  # some eps' network of the base
    t = np.array([0.3, 0.2, 0.08, 0.0])
    start = base.alpha(0.3) * Y + base.sigma(0.3) * EPS
    want = jdiff.sample(jdiff.denoiser(net, base, "eps"), solvers.ddim()(base, t), start)
    x0 = lambda x, t, y: (x - base.sigma(t) * net(x, t)) / base.alpha(t)
    got = jdiff.sample(A.denoiser(x0, "x0", Y), solvers.ddim()(p, t), A.shift(start, Y, 0.3))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    for n in (1, 2, 5):  # true eps': z0 in any number of steps
        D = jdiff.denoiser(lambda x, t: EPS + p.rate * (Y - X0), base, "eps")
        np.testing.assert_allclose(
            jdiff.sample(D, solvers.ddim()(base, np.linspace(0.3, 0, n + 1)), start), X0, atol=1e-9
        )


def test_diffusevaes_second_form_is_a_ddpm_around_the_reconstruction():
    A = anchored.ALL["diffusevae"]()
    p, t = A.process, np.array([1.0, 0.6, 0.2, 0.001])
    np.testing.assert_allclose(A.shift(at(A, 0.6), Y, 0.6), p.alpha(0.6) * X0 + p.sigma(0.6) * EPS, atol=1e-12)
    net = lambda x, t, y: jnp.tanh(x - y) * (1 + t)
    blind = jdiff.denoiser(lambda x, t: jnp.tanh(x) * (1 + t), p, "eps")
    T, key = solvers.ddpm()(p, t), jax.random.key(3)
    x = A.prior(jax.random.key(2), Y)
    got, want = jdiff.sample(A.denoiser(net, "eps", Y), T, x, key), jdiff.sample(blind, T, x, key)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(x, p.prior(jax.random.key(2), Y.shape, dtype=Y.dtype), atol=1e-12)
    np.testing.assert_allclose(
        Anchored(p, lambda p, t: 0.0 * p.alpha(t)).posterior(0.2, 0.6)[:2], p.posterior(0.2, 0.6)[:2]
    )


def test_mt_diffusion_without_weights_is_ddpm():
    p = process.vp_discrete(BETAS)
    q = Anchored(p, anchored.Aggregated((0.0,) * 1000)).posterior(0.4, 0.5)
    np.testing.assert_allclose(q, [*p.posterior(0.4, 0.5)[:2], 0.0, p.posterior(0.4, 0.5).var], atol=1e-15)


# Data, metrics, experiments' parts ---------------------------------------------------------------------------------


def test_chirps_and_si_sdr():
    clean, noisy = audio.noisy_chirps(40, 256, snr=5.0, seed=3)
    np.testing.assert_allclose(np.sqrt(np.mean(clean**2, 1)), 0.5, rtol=1e-12)
    np.testing.assert_array_equal(audio.chirps(3, 256, seed=3), clean[:3])
    assert abs(metrics.si_sdr(noisy, clean).mean() - 5.0) < 4 * 8.7 * np.sqrt(2 / 256 / 40)
    np.testing.assert_allclose(metrics.si_sdr(3.0 * noisy, clean), metrics.si_sdr(noisy, clean), rtol=1e-9)
    orthogonal = noisy - (noisy * clean).sum(1, keepdims=True) / (clean**2).sum(1, keepdims=True) * clean
    unit = orthogonal / np.sqrt((orthogonal**2).mean(1, keepdims=True))
    np.testing.assert_allclose(metrics.si_sdr(clean + 0.05 * unit, clean), 20.0, rtol=1e-9)  # 0.5 against 0.05
    spectrum = np.abs(np.fft.rfft(audio.chirps(50, 256, 1)))
    assert spectrum[:, 95:].max() < 0.4 * spectrum.max()  # below 0.2 + 0.15 cycles a sample
    h = audio.room(32)
    assert h[0] == 1 and np.sum(h[1:] ** 2) == pytest.approx(1.0)
    impulse = np.eye(1, 32)
    np.testing.assert_allclose(audio.reverberated(impulse, h)[0], h, rtol=1e-12)


def test_restoration_pairs():
    images = np.arange(2 * 6 * 6 * 3, dtype=np.uint8).reshape(2, 6, 6, 3)
    cut = restoration.patches(images, 4, 9)
    assert cut.shape == (9, 4, 4) and cut.min() >= -1 and cut.max() <= 1
    whole = images.mean(-1) / 127.5 - 1
    for patch in cut:
        assert any(np.array_equal(patch, w[i : i + 4, j : j + 4]) for w in whole for i in range(3) for j in range(3))
    x0 = RNG.normal(size=(5, 8, 8))
    flat = restoration.degraded(x0, noise=0.1, seed=7).reshape(5, 64)
    np.testing.assert_allclose(flat, _restoration.view(x0.reshape(5, 64), 7), atol=1e-12)
    bright = restoration.patches(images, 4, 9, colour=True)
    np.testing.assert_allclose(bright.mean(-1), cut, atol=1e-12)  # the same places
    x0 = RNG.normal(size=(5, 8, 8, 3))
    low = np.stack([restoration.degraded(x0[..., k], noise=0.0) for k in range(3)], -1)
    np.testing.assert_allclose(restoration.degraded(x0, noise=0.0), low, atol=1e-12)
    see = pooled(192)
    np.testing.assert_allclose(x0.reshape(5, 192) @ see.T @ (4 * see), low.reshape(5, 192), atol=1e-12)


# Bad input ----------------------------------------------------------------------------------------------------------

R = anchored.ALL["rddm"]()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: R.shift(X0, Y[:2], 0.5), r"the anchor has shape \(2, 4\) beside a sample of shape \(3, 4\)"),
        (lambda: R.shift(X0, {"y": Y}, 0.5), "they must be alike"),
        (lambda: R.denoiser(lambda x, t, y: x, "x0", Y[:, :2])(X0, 0.5), r"the anchor has shape \(3, 2\)"),
        (lambda: R.denoiser(lambda x, t, y: x, "resnoise", Y), "'resnoise' is Resfusion's"),
        (lambda: anchored.ALL["diffusevae"]().denoiser(lambda x, t, y: x, "angular", Y), "where b = 1 - a"),
        (lambda: R.denoiser(lambda x, t, y: x, "noise", Y), "unknown prediction kind 'noise'"),
        (lambda: R.denoiser(lambda x, t, y: x, "velocity", Y, scale=Y), "no form under a noise map"),
        (lambda: R.posterior(0.5, 1.5), r"0 <= s < t <= 1"),
        (lambda: R.posterior(0.5, 0.5), r"0 <= s < t <= 1"),
        (lambda: process.resshift(kappa=0.0), "kappa > 0"),
        (lambda: process.resshift(0), "at least 1"),
        (lambda: process.resshift(min_noise=3.0), "< end <= 1"),
        (lambda: process.rddm(alphas="rising"), "'rising'; expected one of increased, decreased, average"),
        (lambda: process.rddm(3, alphas=[0.5, 0.5, 0.5]), "sum to 1"),
        (lambda: process.rddm(sum_scale=0.0), "sum_scale > 0"),
        (lambda: process.tabulated([0.9, 0.95], [0.1, 0.1]), "must rise from level to level"),
        (lambda: process.tabulated([0.9], [0.1, 0.2]), "two vectors of one length"),
        (lambda: process.resfusion(1), "at least 2"),
        (lambda: process.resfusion(12, "quadratic"), "'linear' or 'cosine'"),
        (lambda: process.relay(t_max=2.0), "< t_max <"),
        (lambda: process.relay(process.edm()), "variance-preserving"),
        (lambda: process.brownian_bridge(0.0), "max_var > 0"),
        (lambda: process.brownian_bridge(t_max=1.5), "0 < t_max <= 1"),
        (lambda: process.sb_ve(k=1.0), "k > 1"),
        (lambda: process.ouve(theta=-1.0), "theta > 0"),
        (lambda: process.bbed(t_max=1.0), "0 < t_max < 1"),
        (lambda: anchored.Side(lambda x, t, y: x, 2), "1 .next frame. and -1"),
        (lambda: anchored.uncertainty(X0, Y, low=0.0), "0 < low"),
        (lambda: residual_path(R.process, [1.0, 0.5, 0.5]), "step 1 moves neither"),
        (lambda: residual_path(R.process, [0.2, 0.5]), "must fall"),
        (lambda: residual_path(R.process, np.ones((3, 3))), r"shape \(3, 3\)"),
        (lambda: residual_path(R.process, [1.0, 0.5], eta=2.0), "0 <= eta <= 1"),
        (lambda: solvers.ddim()(process.brownian_bridge(t_max=1.0), [1.0, 0.5]), "starts at a point"),
        (lambda: metrics.si_sdr(np.ones((1, 3)), np.zeros((1, 3))), "is silent"),
        (lambda: metrics.si_sdr(np.ones((1, 3)), np.ones((1, 4))), "the clean signal"),
        (lambda: audio.chirps(0, 10), "n >= 1"),
        (lambda: restoration.degraded(np.ones((1, 5, 4))), "must divide"),
        (lambda: restoration.patches(np.ones((1, 5, 4, 1)), 6, 1), "1 to 4"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
