"""Mean reversion and zero terminal SNR: published schedules, the paper's own steps with mu, laws, slopes, mutants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import test_process
import test_solvers
from test_trace import run_rows

import jdiff
from jdiff import anchored, exact, process, solvers, times
from jdiff.experiments import _restoration

BETAS = np.linspace(1e-4, 2e-2, 1000)
PROCESSES = {
    **{f"mr {theta}": process.mean_reverting(theta, 0.4) for theta in ("constant", "linear", "cosine")},
    "zero vp_discrete": process.zero_terminal_snr(BETAS),
    "zero vp_linear": process.zero_terminal_snr(process.vp_linear()),
}


@pytest.mark.parametrize("p", PROCESSES.values(), ids=PROCESSES)
def test_they_are_processes(p):
    test_process.test_data_end_is_exact_and_log_snr_inverts(p)
    test_process.test_forward_sde_moments(p)
    for name in times.ALL:
        test_process.test_grids(p, name)
    t, h = (np.arange(5, 101, 7) + 0.5) / 101, 1e-7  # inside the pieces of every table
    for f, df in ((p.alpha, p.dalpha), (p.sigma, p.dsigma)):
        np.testing.assert_allclose(df(t), (f(t + h) - f(t - h)) / (2 * h), rtol=1e-5, atol=1e-6)
    t32 = np.float32([1e-6, 1e-4, 1e-2, 0.3, 0.9, 0.999])
    for name in ("alpha", "sigma", "lam"):
        device = np.asarray(jax.jit(getattr(p, name))(jnp.asarray(t32)))
        np.testing.assert_allclose(device, getattr(p, name)(t32.astype(np.float64)), rtol=1e-4, atol=3e-6)
    assert hash(p) == hash(p) and p.alpha(1.0) < 0.01


# Mean reversion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("sigma_inf", "end"), [(50 / 255, 0.005), (1.3, 0.01)])
def test_schedules_are_ir_sdes(theta, sigma_inf, end):
    """The recurrences of IR-SDE, which start from x_0 at state -1: theta_i dt sums to -log(end), i = 0 .. T."""
    T, s = 100, 0.008
    if theta == "cosine":
        bars = np.cos((np.linspace(0, T + 2, T + 3) / (T + 2) + s) / (1 + s) * np.pi / 2) ** 2
        thetas = 1 - (bars / bars[0])[1:-1]
    else:
        thetas = np.linspace(1e-4, 2e-2, T + 1) * 1000 / (T + 1) if theta == "linear" else np.ones(T + 1)
    dt = -np.log(end) / thetas.sum()
    p, t = process.mean_reverting(theta, sigma_inf, end=end), (np.arange(T + 1) + 1) / (T + 1)
    a = v = 1.0, 0.0  # x_i - mu given x_{i-1} - mu: multiplied by e^(-theta dt), and the stationary variance restored
    a, v = 1.0, 0.0
    for i in range(T + 1):
        decay = np.exp(-thetas[i] * dt)
        a, v = a * decay, v * decay**2 + sigma_inf**2 * (1 - decay**2)
        np.testing.assert_allclose([p.alpha(t[i]), p.sigma(t[i])], [a, np.sqrt(v)], rtol=1e-12)
    assert p.alpha(1.0) == pytest.approx(end, rel=1e-12) and p.prior_std == sigma_inf


def paper(a, s, mu, order, kind, prediction, network, x, rng, factor=1.0):
    """MR Sampler as printed, with mu, on x itself (grid given by a and s); `network(x, i)` returns q."""
    lam = np.log(a / s)
    past = []
    for i in range(1, len(a)):
        a0, s0, a1, s1, h = a[i - 1], s[i - 1], a[i], s[i], lam[i] - lam[i - 1]
        past = [network(x, i - 1), *past[:2]]
        q, n = past[0], min(order, i)
        D1 = D2 = 0.0
        if n == 2:
            D1 = (q - past[1]) / ((lam[i - 1] - lam[i - 2]) / h)
        if n == 3:
            r, r1 = (lam[i - 1] - lam[i - 2]) / h, (lam[i - 2] - lam[i - 3]) / h
            D10, D11 = (q - past[1]) / r, (past[1] - past[2]) / r1
            D1, D2 = D10 + (D10 - D11) * r / (r + r1), factor * (D10 - D11) / (r + r1)
        if prediction == "x0" and kind == "ode":
            f1 = np.exp(-h) - 1
            f2 = f1 / h + 1
            f3 = f2 / h - 0.5
            new = s1 / s0 * x - a1 * (f1 * q - f2 * D1 + f3 * D2) + mu * (1 - s1 / s0 + s1 / s0 * a0 - a1)
        elif prediction == "eps":
            f1 = np.exp(h) - 1
            f2 = f1 / h - 1
            f3 = f2 / h - 0.5
            twice = 2 if kind == "sde" else 1
            new = a1 / a0 * x - twice * s1 * (f1 * q + f2 * D1 + f3 * D2) + mu * (1 - a1 / a0)
            if kind == "sde":
                new = new + s1 * np.sqrt(np.exp(2 * h) - 1) * rng.normal(size=x.shape)
        else:
            P = 1 - np.exp(-2 * h)
            new = s1 / s0 * np.exp(-h) * x + a1 * P * q + a1 * (1 - P / (2 * h)) * D1
            new = new + mu * (1 - a1 / a0 * np.exp(-2 * h) - a1 * P) + s1 * np.sqrt(P) * rng.normal(size=x.shape)
        x = new
    return x


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize(("kind", "order"), [("ode", 1), ("ode", 2), ("ode", 3), ("sde", 1), ("sde", 2)])
def test_the_papers_steps_with_mu(kind, order, prediction):
    """The shift is an identity: the printed steps on x, with a network that sees x and mu, against our rows on x'."""
    p = process.mean_reverting("cosine", 0.3)
    t = np.linspace(1.0, 0.03, 8)
    a, s = p.alpha(t), p.sigma(t)
    rng = np.random.default_rng(0)
    mu, x = rng.normal(size=5), rng.normal(size=5)
    network = lambda x, i: np.tanh(x - 0.5 * mu + t[i]) + 0.3 * mu
    want = paper(a, s, mu, order, kind, prediction, network, x, np.random.default_rng(1), factor=2.0)

    def D(shifted, time):  # the network as an x0 prediction at the shifted state
        i = int(np.argmin(abs(t - time)))
        q = network(shifted + (1 - a[i]) * mu, i)
        return q if prediction == "x0" else (shifted - s[i] * q) / a[i]

    shifted = x - (1 - a[0]) * mu
    got = lambda solver: run_rows(solver(p, t), shifted, D, np.random.default_rng(1))[0] + (1 - a[-1]) * mu
    np.testing.assert_allclose(got(solvers.mrs(order, kind, prediction)), want, rtol=1e-10, atol=1e-10)
    others = [solvers.mrs(order % 3 + 1, kind, prediction)]
    others += [solvers.mrs(order, kind, "x0" if prediction == "eps" else "eps")] * (order > 1)
    for other in others:
        assert np.abs(got(other) - want).max() > 1e-4


def test_as_published():
    """D2 without its factor 2; below 10 steps the official order of each step."""
    p = process.mean_reverting()
    build = lambda n, order, **o: solvers.mrs(order, **o)(p, times.uniform(p, n, end=0.01))
    labels = lambda n, order: build(n, order, as_published=True).record.labels
    assert labels(6, 3) == tuple(f"order {o}" for o in (1, 2, 3, 2, 1, 3))
    assert labels(6, 2) == tuple(f"order {o}" for o in (1, 2, 2, 2, 1, 2))
    assert labels(10, 3) == tuple(f"order {o}" for o in (1, 2, *[3] * 8))
    t, rng = times.logsnr(p, 10, end=0.01), np.random.default_rng(0)
    x, f = rng.normal(size=3), lambda x, t: np.tanh(x) + t
    want = paper(p.alpha(t), p.sigma(t), 0.0, 3, "ode", "x0", lambda x, i: f(x, t[i]), x, rng)
    got = lambda **o: run_rows(solvers.mrs(3, **o)(p, t), x, f, rng)[0]
    np.testing.assert_allclose(got(as_published=True), want, rtol=1e-10)
    assert np.abs(got() - want).max() > 1e-4


def test_reductions():
    """Data prediction is DPM-Solver++ with its exact weights; order 1 is DDIM either way, or its SDE."""
    for p in (process.mean_reverting(), process.vp_linear(), process.flow(), process.edm()):
        t = times.logsnr(p, 7, start=0.9 * p.t_max)
        table = lambda solver, p=p, t=t: solver(p, t).unrolled()
        for order in (1, 2, 3):
            for kind, eta in (("ode", 0.0), ("sde", 1.0)):
                want = table(solvers.dpm_solver_pp(order, eta, form="heun"))
                np.testing.assert_allclose(table(solvers.mrs(order, kind)), want, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(table(solvers.mrs(1, prediction="eps")), table(solvers.ddim()), atol=1e-10)


MR = process.mean_reverting("cosine", 1.0)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize(("kind", "order"), [("ode", 2), ("ode", 3), ("sde", 2)])
def test_order_of_the_law_on_a_gaussian(kind, prediction, order):
    """Mean and standard deviations of the output against the exact law: the ODE's order, and the SDE's weak order."""
    slope = lambda solver: test_solvers.slope(solver, MR, (16, 32, 64, 128))
    assert slope(solvers.mrs(order, kind, prediction)) >= order - 0.1
    assert order - 1.1 <= slope(solvers.mrs(order - 1, kind, prediction)) < order - 0.1
    if order == 3:
        assert slope(solvers.mrs(3, kind, prediction, as_published=True)) < 2.9


def test_order_3_of_the_sde_is_of_weak_order_2_and_better():
    error = lambda order, n: test_solvers.gaussian_error(solvers.mrs(order, "sde"), MR, n, times.logsnr)
    assert 1.9 < np.log2(error(3, 128) / error(3, 256)) < 2.5 and error(3, 128) < 0.4 * error(2, 128)
    assert solvers.mrs(3, "sde").order == 2


# The anchor -------------------------------------------------------------------------------------------------------

A = anchored.Anchored(process.mean_reverting("cosine", 0.5))


def exact_network(kind, x, t, y):
    """x0 given y is N(y / 2, 0.09): the exact network at the unshifted x, as any kind of output."""
    p = A.process
    a, s = p.alpha(t), p.sigma(t)
    x0 = y / 2 + a * 0.09 / (a**2 * 0.09 + s**2) * (x - a * y / 2 - (1 - a) * y)
    eps = (x - a * x0 - (1 - a) * y) / s
    sin = jnp.sqrt(1 - a**2)
    return {
        "x0": x0,
        "eps": eps,
        "velocity": p.dalpha(t) * (x0 - y) + p.dsigma(t) * eps,
        "angular": sin * (y - x0) + 0.5 * a * eps,
    }[kind]


KINDS = ("x0", "eps", "velocity", "angular")
NETWORKS = {kind: functools.partial(exact_network, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", NETWORKS)
def test_restoration_follows_the_exact_flow(kind):
    """The whole path, a network that sees the unshifted state and y: x0 = m + (x' - a m) sd(x0) / sd(x')."""
    y = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))
    x = A.prior(jax.random.key(1), y)
    p, end = A.process, 0.004
    t = times.graded(times.logsnr(p, 60, end=end), 8)
    got = jdiff.sample(A.denoiser(NETWORKS[kind], kind, y), solvers.mrs(3)(p, t), x)
    a, s, a1, s1 = p.alpha(1.0), p.sigma(1.0), p.alpha(end), p.sigma(end)
    want = a1 * y / 2 + (x - a * y / 2) * np.sqrt((a1**2 * 0.09 + s1**2) / (a**2 * 0.09 + s**2))
    np.testing.assert_allclose(got, want, atol=5e-5)
    if kind != "x0":
        return
    blind = anchored.Anchored(p, b=lambda p, t: 0.0 * t)  # the shift forgotten
    assert np.abs(jdiff.sample(blind.denoiser(NETWORKS[kind], kind, y), solvers.mrs(3)(p, t), x) - want).max() > 0.05


def test_shift_and_prior():
    y = jnp.full((20000, 2), 3.0)
    x = A.prior(jax.random.key(0), y)
    seen = A.unshift(x, y, 1.0)  # y + sigma_inf z, as published
    assert abs(seen.mean() - 3) < 4 * 0.5 / 200 and abs(seen.std() - 0.5) < 4 * 0.5 / 280
    np.testing.assert_allclose(A.shift(seen, y, 1.0), x, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(A.shift(seen, y, 0.0), seen, rtol=1e-12)  # no shift where the data is
    one = A.prior(jax.random.key(0), y[:3], index=jnp.array([4, 5, 6]))
    np.testing.assert_allclose(one, x[4:7], rtol=1e-6)
    weights = jnp.asarray(0.25)
    net = lambda w, x, t, y: w * x + y
    D = A.denoiser(net, "x0", y[:2], params=weights)
    np.testing.assert_allclose(D(x[:2], 0.5), 0.25 * A.unshift(x[:2], y[:2], 0.5) + 3.0, rtol=1e-6)


def test_the_experiments_exact_network():
    """E[x0 | x_t, y] of each class by conditioning on both views at once, in NumPy; weights by the joint density."""
    p, t = process.mean_reverting("cosine", 0.5), 0.4
    a, s, (images, labels) = p.alpha(t), p.sigma(t), _restoration.digits("train")
    y, rng = _restoration.view(images[:3], 0), np.random.default_rng(1)
    x = a * images[:3] + (1 - a) * y + s * rng.normal(size=(3, 64))
    seen = np.concatenate([y @ _restoration.POOL.T, x - (1 - a) * y], 1)
    H = np.concatenate([_restoration.POOL, a * np.eye(64)])
    R = np.diag([_restoration.NOISE**2] * 16 + [s**2] * 64)
    means, log_w = [], []
    for k in range(10):
        mine = images[labels == k]
        m, C = mine.mean(0), np.cov(mine.T) + 0.03 * np.eye(64)
        V = H @ C @ H.T + R
        means.append(m + (seen - m @ H.T) @ np.linalg.solve(V, H @ C))
        log_w.append(scipy.stats.multivariate_normal(m @ H.T, V).logpdf(seen))
    w = np.exp(np.array(log_w) - np.max(log_w, 0))
    want = np.einsum("kn,kni->ni", w / w.sum(0), np.array(means))
    arrays = {k: jnp.asarray(v) for k, v in _restoration.posterior().items()}
    got = _restoration.network(anchored.Anchored(p), arrays, jnp.asarray(x), jnp.asarray(t), jnp.asarray(y))
    np.testing.assert_allclose(got, want, atol=1e-8)


# Zero terminal SNR ------------------------------------------------------------------------------------------------


def test_zero_terminal_snr_is_the_papers_algorithm():
    """Algorithm 1 of Lin et al. on sqrt(alpha_bar), and its betas back by division; trailing steps."""
    p, n = process.zero_terminal_snr(BETAS), 1000
    root = np.sqrt(np.cumprod(1 - BETAS))
    want = (root - root[-1]) * root[0] / (root[0] - root[-1])
    got = p.alpha((np.arange(n) + 1) / n)
    np.testing.assert_allclose(got, want, atol=1e-15)
    assert got[-1] == 0 and got[0] == pytest.approx(root[0], rel=1e-15) and p.sigma(1.0) == 1
    betas = 1 - (got[1:] / got[:-1]) ** 2
    assert betas[-1] == 1 and ((betas > 0) & (betas[:] <= 1)).all()
    assert p.alpha(0.5 / n) == process.vp_discrete(BETAS).alpha(0.5 / n)  # before the first level: as it was
    trailing = np.round(np.arange(1000, 0, -1000 / 20)) - 1
    np.testing.assert_allclose(times.uniform(p, 20)[:-1] * n - 1, trailing, atol=1e-9)


def test_zero_terminal_snr_removes_the_start_bias():
    """Sampling starts from N(0, I): the law's mean is biased on the plain schedule, and right on the rescaled one."""
    model = exact.gaussian([0.8, -0.5], 0.04)
    betas = np.linspace(1e-4, 5e-3, 1000)  # alpha_bar_T = 0.078
    bias = {}
    for name, p in (("plain", process.vp_discrete(betas)), ("zero", process.zero_terminal_snr(betas))):
        T = solvers.dpm_solver_pp(2)(p, times.uniform(p, 400))
        mean, cov = model.law(T, np.zeros(2), np.eye(2))
        bias[name] = mean - model.mean, np.sqrt(np.diag(cov)) / 0.2 - 1
    bar = np.prod(1 - betas)  # the exact flow carries the missing sqrt(bar) m to the data, times sd(x0) / sd(x_T)
    np.testing.assert_allclose(
        bias["plain"][0], -np.sqrt(bar) * model.mean * 0.2 / np.sqrt(0.04 * bar + 1 - bar), rtol=5e-3
    )
    np.testing.assert_allclose(bias["plain"][1], 1 / np.sqrt(0.04 * bar + 1 - bar) - 1, atol=5e-3)
    np.testing.assert_allclose(bias["zero"], 0, atol=5e-3)
    v = jdiff.denoiser(lambda x, t: -jnp.ones_like(x) * 0.3, process.zero_terminal_snr(betas), "v")
    np.testing.assert_allclose(v(jnp.ones((1, 2)), 1.0), 0.3, rtol=1e-12)  # at alpha = 0 v is -x0


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: process.mean_reverting("cosin"), "theta is 'cosin'; expected one of constant, linear, cosine"),
        (lambda: process.mean_reverting([1.0, -1.0]), "at least two values > 0"),
        (lambda: process.mean_reverting(end=0.0), "0 < end < 1"),
        (lambda: process.zero_terminal_snr(process.flow()), "not variance preserving"),
        (lambda: process.zero_terminal_snr(process.vp_cosine()), "already ends at alpha = 0"),
        (lambda: process.zero_terminal_snr([0.1, 1.0]), "vp_discrete"),
        (lambda: solvers.mrs(4), "mrs: order is 4; expected 1 to 3"),
        (lambda: solvers.mrs(kind="odes"), "kind is 'odes'"),
        (lambda: solvers.mrs(prediction="velocity"), "expected 'x0' or 'eps'"),
        (lambda: A.denoiser(NETWORKS["x0"], "angle", jnp.zeros(2)), "unknown prediction kind 'angle'"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
