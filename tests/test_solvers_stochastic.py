"""Stochastic solvers: closed-form laws on Gaussians, the published loops written out on numbers, mutants."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from test_trace import run_rows

import jdiff
from jdiff import exact, noise, process, solvers, times
from jdiff.solvers import markov
from jdiff.trace import Solver

EDM, VP, FLOW = process.edm(), process.vp_linear(t_min=1e-5), process.flow()
G = exact.gaussian(np.array([0.4, -0.2, 0.1, 0.0]), np.geomspace(0.1, 1.5, 4) ** 2)
f = lambda x, t: np.tanh(2 * x + t) - 0.1 * x  # a nonlinear "denoiser"


def std_error(solver, p, t, start=None):
    """Worst relative error of the output's standard deviations against the noised law at the last time."""
    mean, cov = G.law(solver(p, t), *(start or ()))
    want = p.alpha(t[-1]) ** 2 * G.eigenvalues[0] + p.sigma(t[-1]) ** 2
    assert np.abs(mean - p.alpha(t[-1]) * G.mean).max() < 0.2
    return np.abs(np.sqrt(np.diag(cov) / want) - 1).max()


def slope(solver, p, ns, grid):
    e = np.array([std_error(solver, p, grid(n)) for n in ns])
    return np.log2(e[:-1] / e[1:])


# 1. EDM's family ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2 / 3])
def test_edm_sampler_by_hand(alpha):
    """Algorithm 2 with the general second-order step of the ablations, on numbers, noises in the same order."""
    t, churn, low, high, inflate = times.karras(EDM, 7), 5.0, 0.05, 50.0, 1.003
    x = x0 = np.random.default_rng(0).normal(size=3) * 80
    rng = np.random.default_rng(1)
    for i, (now, then) in enumerate(itertools.pairwise(t)):
        gamma = min(churn / 7, np.sqrt(2) - 1) if low <= now <= high else 0
        hat = now * (1 + gamma)
        if gamma:
            x = x + np.sqrt(hat**2 - now**2) * inflate * rng.normal(size=3)
        d = (x - f(x, hat)) / hat
        h = then - hat
        if i == 6:
            x = x + h * d
            continue
        y, mid = x + alpha * h * d, hat + alpha * h
        x = x + h * ((1 - 1 / (2 * alpha)) * d + (y - f(y, mid)) / mid / (2 * alpha))
    T = solvers.heun(churn, low, high, inflate, alpha=alpha)(EDM, t)
    got, _ = run_rows(T, x0, f, np.random.default_rng(1))
    np.testing.assert_allclose(got, x, rtol=1e-10)
    wrong = solvers.heun(churn, low, high, inflate, alpha=0.9)(EDM, t)
    assert np.abs(run_rows(wrong, x0, f, np.random.default_rng(1))[0] - x).max() > 1e-6


def test_churn_is_capped_and_the_alias_is_the_papers():
    t = times.karras(EDM, 8)
    table = lambda s: s(EDM, t).unrolled()
    np.testing.assert_array_equal(table(solvers.heun(churn=8 * 0.5)), table(solvers.heun(churn=8e3)))
    paper = solvers.edm_stochastic()
    assert paper.cost(256) == 511 and paper.stochastic
    np.testing.assert_array_equal(table(paper), table(solvers.heun(40.0, 0.05, 50.0, 1.003)))


def test_noise_in_an_interval():
    """eta acts in the steps that start inside: nowhere is the ODE, everywhere the SDE; any interval keeps the law."""
    t = times.logsnr(EDM, 12)
    make = lambda **o: solvers.dpm_solver_pp(2, **o)(EDM, t).unrolled()
    np.testing.assert_array_equal(make(eta=1.0, interval=(100.0, 200.0)), make())
    np.testing.assert_array_equal(make(eta=1.0, interval=(0.0, 81.0)), make(eta=1.0))
    some = make(eta=1.0, interval=(2.0, np.inf))[-2, 13:]
    assert (some != 0).sum() == (t[:-1] >= 2.0).sum() < 12
    assert std_error(solvers.dpm_solver_pp(2, eta=1.0, interval=(0.2, 5.0)), EDM, times.logsnr(EDM, 200)) < 5e-3
    with pytest.raises(ValueError, match=r"interval is \(2, 1\)"):
        solvers.dpm_solver_pp(2, eta=1.0, interval=(2, 1))


# 2. Restart --------------------------------------------------------------------------------------------------------


def test_restart_by_hand():
    """The published loop on numbers: t_min moves to the grid, K passes of N points, noise before each."""
    t, (low, high, N, K) = times.karras(EDM, 9), (0.06, 0.30, 4, 2)
    x = x0 = np.random.default_rng(0).normal(size=3) * 80
    rng = np.random.default_rng(1)

    def heun(x, a, b):
        d = (x - f(x, a)) / a
        y = x + (b - a) * d
        return y if b == 0 else x + (b - a) * 0.5 * (d + (y - f(y, b)) / b)

    at = int(np.argmin(abs(t - low)))
    for i, (a, b) in enumerate(itertools.pairwise(t)):
        x = heun(x, a, b)
        if i + 1 == at:
            down = (high ** (1 / 7) + np.arange(N) / (N - 1) * (b ** (1 / 7) - high ** (1 / 7))) ** 7
            for _ in range(K):
                x = x + np.sqrt(high**2 - b**2) * 1.003 * rng.normal(size=3)
                for c, d in itertools.pairwise(down):
                    x = heun(x, c, d)
    T = solvers.restart({(low, high): (N, K)}, s_noise=1.003)(EDM, t)
    got, _ = run_rows(T, x0, f, np.random.default_rng(1))
    np.testing.assert_allclose(got, x, rtol=1e-9)
    uninflated, _ = run_rows(solvers.restart({(low, high): (N, K)})(EDM, t), x0, f, np.random.default_rng(1))
    assert np.abs(uninflated - x).max() > 1e-6


IMAGENET = {
    (19.35, 40.79): (4, 1), (1.09, 1.92): (4, 1), (0.59, 1.09): (4, 5), (0.30, 0.59): (4, 5), (0.06, 0.30): (6, 6)
}  # fmt: skip


def test_restart_costs_what_the_paper_says():
    for K, nfe in ((2, 43), (5, 55), (10, 75), (20, 115)):
        solver = solvers.restart({(0.06, 0.30): (3, K)})
        assert solver.cost(18) == nfe == solver(EDM, times.karras(EDM, 18)).nfe
    assert solvers.restart(IMAGENET).cost(36) == 203 == solvers.restart(IMAGENET)(EDM, times.karras(EDM, 36)).nfe


@pytest.mark.parametrize("p", [EDM, VP, FLOW], ids=["edm", "vp", "flow"])
def test_restart_keeps_the_law_and_contracts_errors(p):
    """With fine passes the law is right; a wrong law above t_max is half forgotten in each pass."""
    t = times.logsnr(p, 60)
    fine = lambda K, **o: solvers.restart({(0.06, 2.0): (40, K)}, solver="heun(alpha=0.5)", **o)
    base = solvers.heun(alpha=0.5)
    np.testing.assert_array_equal(fine(0)(p, t).unrolled()[-1], base(p, t).unrolled()[-1])  # K = 0
    assert std_error(fine(2), p, t) < 2e-3
    assert std_error(fine(2, s_noise=1.2), p, t) > 0.02
    a, s = p.alpha(t[0]), p.sigma(t[0])
    wrong = a * G.mean, 1.4 * np.diag(a**2 * G.eigenvalues[0] + s**2)  # start 18 % too wide
    errors = [std_error(fine(K), p, t, wrong) for K in (0, 1, 2)]
    assert errors[0] > 0.17 and errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1], errors


def test_restart_composes_and_says_what_is_wrong():
    t = times.logsnr(VP, 12)
    for text in ("ddim", "unipc(order=2)", "dpm_solver_pp(order=3)", "deis"):
        solver = solvers.restart({(0.2, 1.0): (5, 2), (0.06, 0.2): (3, 1)}, solver=text, inner="ddim")
        assert solver(VP, t).nfe == solver.cost(12) == 12 + 2 * 4 + 2
    never = solvers.restart({(0.001, 0.002): (3, 2)}, "ddim")(VP, times.logsnr(VP, 6, end=0.1))
    assert never.nfe == 6
    for bad in ({(0.3, 0.06): (3, 2)}, {(0.06, 0.3): (1, 2)}, {(0.06, 0.3): (3, -1)}):
        with pytest.raises(ValueError, match="0 <= t_min < t_max, N_restart >= 2"):
            solvers.restart(bad)


# 3. Score SDE ------------------------------------------------------------------------------------------------------


def test_predictors_by_hand():
    """One step of each published predictor, from its formula over score, beta and sigma."""
    betas = np.linspace(1e-4, 2e-2, 1000)
    p = process.vp_discrete(betas)
    i, x = 700, np.array([0.3, -1.0])
    t = np.array([(i + 1) / 1000, i / 1000])
    score = -(x - p.alpha(t[0]) * f(x, t[0])) / p.sigma(t[0]) ** 2
    z = lambda: np.random.default_rng(3).normal(size=2)
    one = lambda solver, p, t: run_rows(solver(p, t), x, f, np.random.default_rng(3))[0]
    b = betas[i]
    reverse = x - (np.sqrt(1 - b) * x - x) + b * score + np.sqrt(b) * z()
    np.testing.assert_allclose(one(solvers.reverse_diffusion(), p, t), reverse, rtol=1e-10)
    np.testing.assert_allclose(
        one(solvers.ddpm("beta"), p, t), (x + b * score) / np.sqrt(1 - b) + np.sqrt(b) * z(), rtol=1e-8
    )
    s0, s1 = t = np.array([3.0, 2.0])
    score = -(x - f(x, 3.0)) / s0**2
    G2 = s0**2 - s1**2
    np.testing.assert_allclose(one(solvers.reverse_diffusion(), EDM, t), x + G2 * score + np.sqrt(G2) * z(), rtol=1e-10)
    np.testing.assert_allclose(
        one(solvers.ddpm(), EDM, t), x + G2 * score + np.sqrt(s1**2 * G2 / s0**2) * z(), rtol=1e-10
    )
    t = np.array([0.8, 0.7])
    score = -(x - VP.alpha(0.8) * f(x, 0.8)) / VP.sigma(0.8) ** 2
    beta = 0.1 + 0.8 * 19.9
    maruyama = x - (-0.5 * beta * x - beta * score) * 0.1 + np.sqrt(beta * 0.1) * z()
    np.testing.assert_allclose(one(solvers.euler_maruyama(), VP, t), maruyama, rtol=1e-8)


def test_as_published_step_lengths():
    """linspace(1, eps, N): N evaluations, N steps of length 1/N, the last at eps and without noise."""
    N, eps, x0 = 50, 1e-3, np.array([0.3, -1.0])
    for make in (solvers.euler_maruyama, solvers.reverse_diffusion):
        rng, x = np.random.default_rng(3), x0
        for k, t in enumerate(np.linspace(1, eps, N)):
            beta = (0.1 + 19.9 * t) / N
            score = -(x - VP.alpha(t) * f(x, t)) / VP.sigma(t) ** 2
            drift = 0.5 * beta * x if make is solvers.euler_maruyama else x - np.sqrt(1 - beta) * x
            x = x + drift + beta * score + (np.sqrt(beta) * rng.normal(size=2) if k < N - 1 else 0)
        T = make(as_published=True)(VP, times.uniform(VP, N - 1, end=eps))
        assert T.nfe == N == make(as_published=True).cost(N - 1)
        np.testing.assert_allclose(run_rows(T, x0, f, np.random.default_rng(3))[0], x, rtol=1e-8)
        ours = make()(VP, times.uniform(VP, N - 1, end=eps))
        assert np.abs(run_rows(ours, x0, f, np.random.default_rng(3))[0] - x).max() > 1e-3
    with pytest.raises(ValueError, match="beta = 4 at t = 1"):
        solvers.reverse_diffusion(as_published=True)(VP, times.uniform(VP, 4, end=eps))
    with pytest.raises(ValueError, match="uniform times ending at 1e-3"):
        solvers.euler_maruyama(as_published=True)(VP, times.uniform(VP, 5))
    with pytest.raises(ValueError, match="variance-preserving"):
        solvers.reverse_diffusion(as_published=True)(EDM, [3.0, 2.0, 1.0])


def no_noise_in_half(g, x, model, noise):
    """A mutant: Euler-Maruyama with half the noise variance."""
    for i in range(g.n):
        step = g.t[i] - g.t[i + 1]
        s = model(x, g.t[i], kind="score")
        x = (1 - g.process.drift(g.t[i]) * step) * x + g.process.diffusion(g.t[i]) ** 2 * step * s
        x = x + np.sqrt(0.5 * step) * g.process.diffusion(g.t[i]) * noise()
    return x


@pytest.mark.parametrize("p", [EDM, VP], ids=["edm", "vp"])
def test_weak_order_one(p):
    """Euler-Maruyama and reverse diffusion: the law's error halves with the step, asymmetric log-SNR range."""
    start, end = float(p.t_of_lam(-1.0)), float(p.t_of_lam(1.6))
    grid = lambda n: times.logsnr(p, n, start=start, end=end)
    for solver in (solvers.euler_maruyama(), solvers.reverse_diffusion(), solvers.ddpm()):
        assert slope(solver, p, (64, 128, 256, 512), grid).min() >= 0.9
    assert slope(Solver("mutant", no_noise_in_half, 1, stochastic=True), p, (64, 128), grid).max() < 0.5


def test_langevin_bias_is_the_known_one():
    """At one level Langevin steps of length e (x + e score + sqrt(2 e) z) have the law N(m, v / (1 - e / (2 v)))."""
    s, e = 1.0, 0.05
    v = G.eigenvalues[0] + s**2

    def chain(x, model, noise):
        for _ in range(400):
            score = model(x, s, kind="score")
            x = x + e * score + np.sqrt(2 * e) * noise()
        return x

    mean, cov = G.law(jdiff.trace(chain, EDM), np.zeros(4), np.eye(4))
    np.testing.assert_allclose(np.diag(cov), v / (1 - e / (2 * v)), rtol=1e-5)
    np.testing.assert_allclose(mean, G.mean, atol=2e-4)
    exact_start = G.law(jdiff.trace(chain, EDM), G.mean, np.diag(v))[1]
    np.testing.assert_allclose(np.diag(exact_start), v, rtol=e)  # and the right law is left by O(e)


def test_correctors_of_a_table():
    """A corrector step's length is 2 (A snr sigma)^2; correction mends a predictor's law; none is the predictor."""
    t = np.array([3.0, 2.0])
    x = np.array([0.3, -1.0])
    got, _ = run_rows(solvers.predictor_corrector("ddim", 0.16)(EDM, t), x, f, np.random.default_rng(3))
    e = 2 * (0.16 * 3.0) ** 2
    z = np.random.default_rng(3).normal(size=2)
    y = x - e * (x - f(x, 3.0)) / 9 + np.sqrt(2 * e) * z
    np.testing.assert_allclose(got, y + (2.0 - 3.0) * (y - f(y, 3.0)) / 3.0, rtol=1e-10)
    t = times.karras(EDM, 25)
    plain, mended = (solvers.predictor_corrector("reverse_diffusion", 0.16, m) for m in (0, 1))
    np.testing.assert_array_equal(plain(EDM, t).unrolled(), solvers.reverse_diffusion()(EDM, t).unrolled())
    assert std_error(mended, EDM, t) < 0.95 * std_error(plain, EDM, t)
    assert mended.cost(25) == 50 and mended(EDM, t).registers == 1
    with pytest.raises(ValueError, match="snr and steps must not be negative"):
        solvers.predictor_corrector(snr=-1.0)


# 4. Markov chains --------------------------------------------------------------------------------------------------

MIX = exact.mixture([0.3, 0.7], [[-0.6, 0.2], [0.5, -0.1]], [0.04, np.array([0.02, 0.1])])


def test_langevin_corrector_of_a_stepper():
    """On one-hot-free numbers: batch norms as published; its law is the table's; no step is the plain sampler."""
    t = np.array([3.0, 2.0])
    den = jdiff.denoiser(lambda x, t: jnp.tanh(2 * x + t) - 0.1 * x, EDM, "x0")
    x, key = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)) * 3), jax.random.key(7)
    z = np.asarray(noise.normal(jax.random.fold_in(jax.random.fold_in(key, 1), markov.CORRECTOR), x))
    s = -(np.asarray(x) - f(np.asarray(x), 3.0)) / 9
    rows = lambda v: np.sqrt((v**2).sum(1, keepdims=True))
    for norms, r in (("batch", rows(z).mean() / rows(s).mean()), ("sample", rows(z) / rows(s)), ("level", 3.0)):
        e = 2 * (0.16 * r) ** 2
        y = np.asarray(x) + e * s + np.sqrt(2 * e) * z
        chain = markov.langevin_corrector(den, solvers.ddim()(EDM, t), 0.16, norms=norms, dtype=np.float64)
        want = y - (y - f(y, 3.0)) / 3.0
        np.testing.assert_allclose(chain.sample(x, key), want, rtol=1e-9)
        alone = chain.sample(x[:1], key)
        assert np.allclose(alone, want[:1], rtol=1e-9) == (norms != "batch")  # does a sample depend on its batch?
        assert chain.nfe == 2
    T = solvers.heun(churn=3.0)(EDM, times.karras(EDM, 4))
    plain = markov.langevin_corrector(den, T, steps=0, dtype=np.float64)
    np.testing.assert_allclose(plain.sample(x, key), jdiff.sample(den, T, x, key), rtol=1e-9)


def test_corrected_laws():
    """20 predictor steps on a Gaussian in 2 d: what is predicted by the table, and what the norms of a sample do."""
    pair = exact.gaussian([0.3, -0.2], [0.25, 1.0])
    p, n = VP, 20000
    den, x = pair.denoiser(p), VP.prior(jax.random.key(0), (n, 2), dtype=jnp.float64)
    t = times.uniform(p, 20)
    want = np.diag(pair.law(solvers.predictor_corrector()(p, t), np.zeros(2), np.eye(2))[1])
    table = solvers.reverse_diffusion()(p, t)
    run = lambda norms: markov.langevin_corrector(den, table, norms=norms, dtype=np.float64).sample(
        x, jax.random.key(1)
    )
    np.testing.assert_allclose(np.var(run("level"), axis=0), want, rtol=5 * np.sqrt(2 / n))
    assert np.var(run("sample"), axis=0).max() > 2 * want.max()  # 1/|score|^2 has no mean in 2 d


def test_published_sampler():
    """langevin_pc: NFE, both forms near the right law at 100 steps."""
    pair = exact.gaussian([0.3, -0.2], [0.25, 1.0])
    for p, as_published in ((VP, True), (EDM, True), (VP, False)):
        x = p.prior(jax.random.key(0), (4000, 2), dtype=jnp.float64)
        chain = markov.langevin_pc(pair.denoiser(p), 100, as_published=as_published, dtype=np.float64)
        y = np.asarray(chain.sample(x, jax.random.key(1)))
        assert chain.nfe == 200
        np.testing.assert_allclose(np.diag(np.cov(y.T)), [0.25, 1.0], rtol=0.13)
    with pytest.raises(ValueError, match="rows of unipc carry state"):
        markov.langevin_corrector(pair.denoiser(VP), solvers.unipc()(VP, times.logsnr(VP, 5)))
    with pytest.raises(ValueError, match="'level', 'batch' or 'sample'"):
        markov.langevin_corrector(pair.denoiser(VP), solvers.ddim()(VP, times.logsnr(VP, 5)), norms="image")


LEVELS = np.geomspace(2.0, 0.1, 8)
N = 4000


def product_draws(key):
    """Exact draws of (y, level): levels alike, y = x0 + sigma eps."""
    keys = jax.random.split(key, 3)
    level = jax.random.randint(keys[0], (N,), 0, len(LEVELS))
    y = MIX.sample(keys[1], N, jnp.float64) + jnp.asarray(LEVELS)[level, None] * noise.normal(
        keys[2], jnp.zeros((N, 2))
    )
    return y, level


@pytest.mark.long
def test_metropolised_chain_leaves_the_product_density_alone():
    """(side, level) histograms after 30 moves from exact draws, against fresh exact draws: chi-square p > 0.01.

    Two mutants fail the same test: the published argmax, and an unadjusted Langevin step of that length.
    """
    posterior = markov.level_posterior(MIX, LEVELS)
    log_density = lambda y, s: MIX.log_density(EDM, y, s[:, None])
    den = MIX.denoiser(EDM)

    def p_value(**options):
        chain = markov.langevin_gibbs(den, LEVELS, posterior, 0.15, **options)
        y, level = product_draws(jax.random.key(5))
        state, _ = jax.jit(lambda s, k: jdiff.run(chain, jnp.arange(30), s, k))((y, level), jax.random.key(6))

        def cell(y, level):
            y, level = np.asarray(y), np.asarray(level)
            return np.bincount(4 * level + 2 * (y[:, 0] > 0) + (np.abs(y[:, 1]) > 0.3), minlength=32)

        fresh = sum(cell(*product_draws(jax.random.key(100 + k))) for k in range(20))
        return scipy.stats.chi2_contingency(np.stack([cell(state.x, state.level), fresh])).pvalue

    assert p_value(log_density=log_density) > 0.01
    assert p_value() < 1e-6
    assert p_value(log_density=log_density, argmax=True) < 1e-6


def test_level_posterior_is_bayes():
    """Ratios of the densities of mixtures that were widened by hand."""
    y = jnp.asarray([[0.1, 0.2], [2.0, -1.0]])
    got = np.asarray(jax.nn.softmax(markov.level_posterior(MIX, LEVELS)(y), -1))
    wide = lambda s: exact.mixture(MIX.weights, MIX.means, [v + s**2 for v in MIX.eigenvalues])
    density = np.stack([np.exp(wide(s).log_density(EDM, y, 0.0)) for s in LEVELS], 1)
    np.testing.assert_allclose(got, density / density.sum(1, keepdims=True), rtol=1e-9)


def test_dmcmc_without_a_chain_is_the_solver():
    """n_skip = 0: each sample by the solver from its own level, Tweedie after it; with moves the lowest is kept."""
    den = MIX.denoiser(VP)  # any process: the chain lives in x/alpha
    at_the_end = jax.jit(lambda x, t: den(x, t))
    y, level = product_draws(jax.random.key(1))
    y, level = y[:16], level[:16] % 3
    chain = markov.langevin_gibbs(den, LEVELS, markov.level_posterior(MIX, LEVELS), 0.02)
    for solver, tweedie in ((solvers.heun(), None), (solvers.dpm_solver_pp(2), 0.05)):
        denoise = markov.denoise_from_levels(den, LEVELS, solver, 3, tweedie=tweedie)
        got, (same, _) = jax.jit(markov.dmcmc(chain, denoise, 0))(jax.random.key(2), (y, level))
        np.testing.assert_array_equal(same, y)
        for i in range(3):
            t = times.karras(VP, 3, start=float(VP.t_of_lam(-np.log(LEVELS[level[i]]))))
            want = jdiff.sample(den, solver(VP, t), VP.alpha(t[0]) * y[i : i + 1])
            want = want if tweedie is None else at_the_end(want, float(VP.t_of_lam(-np.log(tweedie))))
            np.testing.assert_allclose(got[i], want[0], rtol=1e-8)
    moves = jax.jit(lambda start, key: jdiff.run(chain, jnp.arange(6), start, key))
    state, visited = moves((y, level), jax.random.key(3))
    np.testing.assert_array_equal(state.low, np.maximum(np.asarray(visited).max(0), np.asarray(level)))
    stochastic = markov.denoise_from_levels(den, LEVELS, solvers.heun(churn=4.0), 3)
    samples, (next_y, next_level) = jax.jit(markov.dmcmc(chain, stochastic, 2))(jax.random.key(2), (y, level))
    assert samples.shape == next_y.shape == (16, 2) and next_level.shape == (16,) and np.isfinite(samples).all()


def test_bad_chains():
    den, posterior = MIX.denoiser(EDM), markov.level_posterior(MIX, LEVELS)
    with pytest.raises(ValueError, match="falling vector of noise levels"):
        markov.langevin_gibbs(den, LEVELS[::-1], posterior, 0.1)
    with pytest.raises(ValueError, match="eta is 0"):
        markov.langevin_gibbs(den, LEVELS, posterior, 0.0)
    with pytest.raises(ValueError, match="n_skip is -1"):
        markov.dmcmc(markov.langevin_gibbs(den, LEVELS, posterior, 0.1), lambda *a: a[0], -1)
