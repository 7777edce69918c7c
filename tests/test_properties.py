"""What must hold for EVERY process: chain = marginal, conditioning = posterior, conversions, the start of sampling.

The instances are `process.ALL` and `anchored.ALL`: a new process is tested by being there. What a process does not
have is skipped by name of that property.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import jdiff
from jdiff import anchored, predict, process, solvers, times

BETAS = np.linspace(1e-4, 2e-2, 1000)
PROCESSES = {name: make(BETAS) if name == "vp_discrete" else make() for name, make in process.ALL.items()}
ANCHORED = {name: make() for name, make in anchored.ALL.items()}
INSTANCES = {**PROCESSES, **{f"{name} (anchored)": a.process for name, a in ANCHORED.items()}}
each = pytest.mark.parametrize("p", INSTANCES.values(), ids=INSTANCES)
each_anchored = pytest.mark.parametrize("name", ANCHORED)


def gaussian(p):
    if not getattr(p, "gaussian", True):
        pytest.skip("its kernel is not Gaussian, so it has no linear SDE and no Gaussian posterior")


def levels(p):
    """Where a published table has kinks; a Gauss rule or a difference must not step over one."""
    table = getattr(getattr(p, "base", p), "betas", None) or getattr(p, "alphas", (0,))[1:]
    return np.arange(1, len(table)) / max(len(table), 1)


def inside(p, n=33):
    """Times inside the support and inside the pieces of a table."""
    t = np.linspace(0.003, 0.997, n) * p.t_max
    near = levels(p)
    return t + 3e-5 * (np.abs(t[:, None] - near).min(1) < 2e-5) if len(near) else t


@each
def test_ends_inverse_and_derivatives(p):
    assert p.alpha(0.0) == 1 and p.sigma(0.0) == 0 and p.lam(0.0) == np.inf and p.t_of_lam(np.inf) == 0
    t = inside(p)
    np.testing.assert_allclose(p.t_of_lam(p.lam(t)), t, rtol=1e-10)
    assert (np.diff(p.lam(t)) < 0).all() and hash(p) == hash(p)
    h = 1e-7 * p.t_max
    for f, df in ((p.alpha, p.dalpha), (p.sigma, p.dsigma)):
        np.testing.assert_allclose(df(t), (f(t + h) - f(t - h)) / (2 * h), rtol=1e-5, atol=1e-6)


@each
def test_float32_on_the_device_agrees_with_float64_on_the_host(p):
    t = np.float32([1e-4, 1e-2, 0.3, 0.9, 0.999]) * np.float32(p.t_max)
    device = jax.jit(lambda t: (p.alpha(t), p.sigma(t), p.lam(t), p.t_of_lam(p.lam(t))))(jnp.asarray(t))
    device = [np.asarray(v) for v in device]
    assert all(v.dtype == np.float32 for v in device)
    wide = t.astype(np.float64)
    a, s = p.alpha(wide), p.sigma(wide)
    slack = 4e-6 / np.maximum(a, 1e-3)  # what rounding alpha = A - .. to float32 leaves of log alpha
    rounded = 2.0**-24 * p.t_max * np.abs(p.dalpha(wide))  # what an ulp of t is worth where a table is steep
    assert (np.abs(device[0] - a) <= 1e-6 + 1e-7 * a + rounded).all()
    np.testing.assert_allclose(device[1], s, rtol=1e-4)
    assert (np.abs(device[2] - p.lam(wide)) <= 3e-5 + slack).all()
    np.testing.assert_allclose(device[3], wide, rtol=1e-4)


@each
def test_conversions_invert_each_other(p):
    rng = np.random.default_rng(0)
    for t in inside(p, 5):
        x0, eps = rng.normal(size=(2, 7))
        a, s = p.alpha(t), p.sigma(t)
        want = {
            "x0": x0,
            "eps": eps,
            "score": -eps / s,
            "v": a * eps - s * x0,
            "velocity": p.dalpha(t) * x0 + p.dsigma(t) * eps,
        }
        x = a * x0 + s * eps
        kinds = [kind for kind in predict.KINDS if p.gaussian or kind != "score"]
        for source in kinds:
            for target in kinds:
                got = predict.convert(p, x, t, want[source], source, target)
                np.testing.assert_allclose(got, want[target], rtol=1e-7, atol=1e-7 * np.abs(want[target]).max())


@each
def test_monte_carlo_chain_is_the_marginal(p):
    """Euler-Maruyama of dx = f x dt + g dW from x0 = 1.5, midpoints, 300 steps: mean and std within 4 standard errors
    and 1 % for the steps."""
    gaussian(p)
    n, rng, end = 8000, np.random.default_rng(1), 0.9 * p.t_max
    lam = np.linspace(min(p.lam(1e-4 * p.t_max), 7.0), p.lam(end), 300)
    t = np.concatenate([[0.0], p.t_of_lam(lam)])
    x = np.full(n, 1.5)
    for t0, t1 in itertools.pairwise(t):
        m = 0.5 * (t0 + t1)
        x = x * (1 + p.drift(m) * (t1 - t0)) + p.diffusion(m) * np.sqrt(t1 - t0) * rng.normal(size=n)
    a, s = p.alpha(end), p.sigma(end)
    assert abs(x.mean() - 1.5 * a) < 4 * s / np.sqrt(n) + 0.015 * a
    assert abs(x.std() / s - 1) < 4 / np.sqrt(2 * n) + 0.01


@each
def test_conditioning_is_the_posterior_of_markov_chains(p):
    """c = exp of the integral of f by a Gauss rule, g^2 by its identity, and conditioning of the joint covariance."""
    gaussian(p)
    if type(p).spread is not process.Process.spread and not isinstance(p, process.Bridge):
        pytest.skip("its published chain depends on x0: `test_conditioning_is_the_posterior_of_published_chains`")
    nodes, weights = np.polynomial.legendre.leggauss(6)
    for s, t in ((0.013, 0.4), (0.2, 0.6), (0.49, 0.51), (0.3, 0.93)):
        s, t = s * p.t_max, t * p.t_max
        edges = np.union1d(np.linspace(s, t, 201), levels(p)[(levels(p) > s) & (levels(p) < t)])
        half = 0.5 * np.diff(edges)[:, None]
        at = edges[:-1, None] + half * (1 + nodes)
        c = np.exp(np.sum(half * weights * p.drift(at)))
        f, g, sigma = p.drift(at), p.diffusion(at), p.sigma(at)
        np.testing.assert_allclose(2 * sigma * p.dsigma(at), 2 * f * sigma**2 + g**2, rtol=1e-8, atol=1e-12)
        k, x0, _, var = condition(c, p.alpha(s), 0.0, p.sigma(s) ** 2, p.alpha(t), 0.0, p.sigma(t) ** 2)
        np.testing.assert_allclose(p.posterior(s, t), [k, x0, var], rtol=1e-6, atol=1e-9)


def condition(c, x0_s, y_s, var_s, x0_t, y_t, var_t):
    """x_s given x_t = c x_s + .., x0, y: the coefficients of x_t, x0, y and the variance, by the joint covariance."""
    joint = np.array([[var_s, c * var_s], [c * var_s, var_t]])
    k = joint[0, 1] / joint[1, 1]
    return k, x0_s - k * x0_t, y_s - k * y_t, joint[0, 0] - k * joint[1, 0]


# The published chains, from their papers: x_i = c x_{i-1} + d x0 + e y + sqrt(q) z, and the times of their levels ----


def resshift_chain(T, kappa, power, first):
    root = first * (0.99 / first) ** ((np.arange(T) / (T - 1)) ** power)  # Yue et al. 2023, as coded
    step = np.diff(root**2, prepend=0.0)
    return np.ones(T), -step, step, kappa**2 * step


def rddm_chain():
    a = np.arange(1000, 0, -1) / 500500  # Liu et al. 2024: I_t = I_{t-1} + alpha_t (I_in - I_0) + beta_t eps
    return np.ones(1000), -a, a, 0.01 * np.arange(1, 1001) / 500500


def resfusion_chain():
    beta = 1000 / 12 * np.linspace(1e-4, 0.02, 12)[:5]  # Shi et al. 2024, eq. 14: sqrt(a) x + (1 - sqrt(a)) R + noise
    beta[-1] = 1 - 0.25 / np.prod(1 - beta[:-1])
    r = np.sqrt(1 - beta)
    return r, -(1 - r), 1 - r, beta


def vp_chain(e, betas=BETAS):
    r = np.sqrt(1 - betas)
    return r, 0 * r, e(r), betas


def ir_sde_chain():
    bars = np.cos((np.arange(103) / 102 + 0.008) / 1.008 * np.pi / 2) ** 2
    theta = 1 - (bars / bars[0])[1:-1]
    c = np.exp(theta * np.log(0.01) / theta.sum())
    return c, 0 * c, 1 - c, (50 / 255) ** 2 * (1 - c**2)


def bridge_chain(v, m):
    """Li et al. 2023, eq. 7 and 8."""
    before, delta = np.append(0.0, m[:-1]), v * m * (1 - m)
    c = (1 - m) / (1 - before)
    return c, 0 * c, m - before * c, delta - np.append(0.0, delta[:-1]) * c**2


def sde_chain(rate, g, end, n=12):
    """dx = rate(t) (y - x) dt + g(t) dW between n levels, by DOP853: the weight of x and of y, and the variance."""
    rows = []
    for i in range(n):
        rhs = lambda t, u: [-rate(t) * u[0], rate(t) * (1 - u[1]), -2 * rate(t) * u[2] + g(t) ** 2]
        span = end * i / n, end * (i + 1) / n
        u = scipy.integrate.solve_ivp(rhs, span, [1.0, 0.0, 0.0], "DOP853", rtol=1e-11, atol=1e-13).y[:, -1]
        rows.append([u[0], 0.0, u[1], u[2]])
    return tuple(np.array(rows).T)


K = 2.6
CHAINS = {
    "ir_sde": ir_sde_chain,
    "sgmse_ouve": lambda: sde_chain(lambda t: 1.5, lambda t: 0.05 * 10**t * np.sqrt(2 * np.log(10)), 1.0),
    "sgmse_bbed": lambda: sde_chain(lambda t: 1 / (1 - t), lambda t: np.sqrt(0.52) * K**t, 0.999),
    "sgmse_sb": lambda: sde_chain(  # Brownian motion with g^2 = c k^(2t), tied to y at t = 1
        lambda t: K ** (2 * t) * 2 * np.log(K) / (K**2 - K ** (2 * t)), lambda t: np.sqrt(0.4) * K**t, 0.999
    ),
    "resshift": lambda: resshift_chain(15, 2.0, 0.3, 0.02),
    "resshift_journal": lambda: resshift_chain(4, 2.0, 0.3, 0.1),
    "upsr": lambda: resshift_chain(5, 2.5, 0.2, 0.016),
    "rddm": rddm_chain,
    "resfusion": resfusion_chain,
    "bbdm": lambda: bridge_chain(2.0, np.arange(1, 1001) / 1000 * 0.999),
    "cbbd": lambda: bridge_chain(1.0, np.arange(1, 1001) / 1000),
    "diffusevae": lambda: vp_chain(lambda r: 1 - r),
    "dddm_vc": lambda: sde_chain(
        lambda t: 0.5 * (0.05 + t * 19.95), lambda t: np.sqrt(0.05 + t * 19.95), 1.0
    ),  # dX = b/2 (Z - X) dt + sqrt(b) dW
    "mt_diffusion": lambda: vp_chain(lambda r: r * 1e-3),
}


def composed(name):
    """Levels (n + 1,) of: c since the start, the weights of x0 and y, the variance."""
    c, d, e, q = CHAINS[name]()
    since, x0, y, var = [1.0], [1.0], [1.0 if name == "diffusevae" else 0.0], [0.0]
    for i in range(len(c)):
        since.append(since[-1] * c[i])
        x0.append(c[i] * x0[-1] + d[i])
        y.append(c[i] * y[-1] + e[i])
        var.append(c[i] ** 2 * var[-1] + q[i])
    return np.array([since, x0, y, var])


@each_anchored
def test_conditioning_is_the_posterior_of_published_chains(name):
    """Marginal, prior and posterior of the published kernels, composed level by level in float64."""
    A = ANCHORED[name]
    if name not in CHAINS:
        pytest.skip("no forward kernel is published; `test_anchored.py` has its identity with the base process")
    since, x0, y, var = composed(name)
    n = len(since) - 1
    t = np.arange(n + 1) / n * A.process.t_max
    p = A.process
    np.testing.assert_allclose(p.alpha(t), x0, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose([float(A.b(p, u)) for u in t[:: max(n // 20, 1)]], y[:: max(n // 20, 1)], atol=1e-9)
    np.testing.assert_allclose(p.sigma(t) ** 2, var, rtol=1e-6, atol=1e-9)
    for i, j in ((1, n), (n // 2, n), (n - 2, n - 1), (1, 2), (0, n // 2)):
        got = A.posterior(t[i], t[j])
        if var[j] < 1e-15:  # a bridge's end: x_t = y says nothing that y does not, so x_s has its marginal
            np.testing.assert_allclose([got.x + got.y, got.x0, got.var], [y[i], x0[i], var[i]], atol=1e-9)
            continue
        want = condition(since[j] / since[i], x0[i], y[i], var[i], x0[j], y[j], var[j])
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


@each_anchored
def test_monte_carlo_of_published_chains(name):
    """4,000 draws of the kernels themselves, x0 = 1.5 and y = -0.5: mean and std at the last level within 4 errors."""
    if name not in CHAINS:
        pytest.skip("no forward kernel is published")
    A, rng, n = ANCHORED[name], np.random.default_rng(3), 4000
    x = np.full(n, 1.0 if name == "diffusevae" else 1.5)
    for c, d, e, q in zip(*CHAINS[name](), strict=True):
        x = c * x + d * 1.5 - e * 0.5 + np.sqrt(max(q, 0.0)) * rng.normal(size=n)
    p, t = A.process, A.process.t_max
    s = float(p.sigma(t))
    mean = 1.5 * float(p.alpha(t)) - 0.5 * float(A.b(p, t))
    assert abs(x.mean() - mean) <= 4 * s / np.sqrt(n) + 1e-6 and abs(x.std() - s) <= 4 * s / np.sqrt(2 * n) + 1e-6


@each_anchored
def test_prior_is_the_marginal_or_off_by_what_is_said(name):
    """Of the unshifted state, x0 = 1 and y = 3: the start's mean and std less the true ones are `mismatch`."""
    A, n = ANCHORED[name], 20_000
    p, y = A.process, jnp.full((20_000, 1), 3.0)
    x = np.asarray(A.unshift(A.prior(jax.random.key(0), y), y, p.t_max))
    off, b = A.mismatch(), float(A.b(p, p.t_max))
    s = float(p.sigma(p.t_max)) + off.std
    mean = (float(p.alpha(p.t_max)) + off.x0) * 1.0 + (b + off.y) * 3.0
    assert abs(x.mean() - mean) <= 4 * s / np.sqrt(n) + 1e-12 and abs(x.std() - s) <= 4 * s / np.sqrt(2 * n)
    large = {"sgmse_ouve": 0.2231, "resshift": 0.0199, "resshift_journal": 0.0199, "upsr": 0.0199, "ir_sde": 0.01}
    assert -off.x0 == pytest.approx(large.get(name, 0.0), abs=1e-4 if name in large else 0.007)
    assert (off.x0 == 0) == (name in ("rddm", "resfusion", "cbbd", "rdeic"))


@each
def test_prior_of_the_process(p):
    off = p.mismatch()
    assert off.x0 == -p.alpha(p.t_max) and off.y == 0
    assert p.prior_std == pytest.approx(float(p.sigma(p.t_max)) + off.std, rel=1e-12)
    if getattr(p, "gaussian", True):
        x = np.asarray(p.prior(jax.random.key(2), (20_000, 1), dtype=jnp.float64))
        assert abs(x.mean()) <= 4 * p.prior_std / 141 and abs(x.std() - p.prior_std) <= 4 * p.prior_std / 200


# Solvers, steps and grids on all of them ------------------------------------------------------------------------------

SOLVERS = {
    "ddim": solvers.ddim(),
    "ddpm": solvers.ddpm(),
    "heun": solvers.heun(),
    "mrs data 2": solvers.mrs(2),
    "mrs data 3": solvers.mrs(3),
    "mrs noise 2": solvers.mrs(2, prediction="eps"),
    "mrs sde 2": solvers.mrs(2, "sde"),
    "dpm_solver_pp 2": solvers.dpm_solver_pp(2),
    "unipc": solvers.unipc(),
}


@each_anchored
def test_solvers_and_grids(name):
    """A point mass at mu: each solver takes a mu + s e at the first time to a' mu + s' e at the last, on each grid;
    the chain's own step takes the whole law along. Bridges that start at y, without noise, have `ddpm` alone."""
    A = ANCHORED[name]
    p, mu, start = A.process, 0.7, A.process.t_max
    law = jdiff.exact.gaussian([mu], 0.0).law
    end = 0.1 * start
    for solver_name, solver in SOLVERS.items():
        if p.sigma(start) == 0 and solver_name != "ddpm":
            with pytest.raises(ValueError, match="starts at a point"):
                solver(p, times.uniform(p, 5, end=end))
            continue
        if "noise" in solver_name and p.alpha(start) == 0:
            continue  # eps says nothing of x0 at alpha = 0
        for grid in ("uniform", "logsnr"):
            mean, cov = law(solver(p, times.ALL[grid](p, 5, end=end)))
            np.testing.assert_allclose(mean, p.alpha(end) * mu, atol=1e-9)
            if "noise" not in solver_name:
                np.testing.assert_allclose(cov, p.sigma(end) ** 2, rtol=1e-6)
