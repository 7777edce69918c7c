"""Solvers against oracles: point mass, exact Gaussian laws, slopes with mutants, lifted tables, DOP853."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from test_process import PROCESSES
from test_trace import VARIANTS

import jdiff
from jdiff import exact, process, solvers, times

each_process = pytest.mark.parametrize("p", PROCESSES.values(), ids=PROCESSES)
DISCRETISED = (
    "euler_t",
    "heun_t",
    "euler_maruyama",
    "reverse_diffusion",
    "predictor_corrector",
    "sit",
)  # x's drift, too
INFLATED = ("edm_stochastic",)  # s_noise > 1
EXACT_FOR_POINTS = {k: s for k, s in VARIANTS.items() if k not in (*DISCRETISED, *INFLATED, "edict")}


# 1. Point mass ---------------------------------------------------------------------------------------------------


def refused(p, solver):
    """A solver that adds Gaussian noise, on a process of another kernel: says so. Whether that is the case."""
    if p.gaussian or not solver.stochastic:
        return False
    with pytest.raises(ValueError, match="deterministic solver"):
        solver(p, times.uniform(p, 6))
    return True


@each_process
@pytest.mark.parametrize("name", EXACT_FOR_POINTS)
def test_point_mass(p, name):
    """With D = mu for ever, alpha mu + sigma eps must go to alpha' mu + sigma' eps' with |eps'| standard: exactly."""
    if refused(p, EXACT_FOR_POINTS[name]):
        return
    for t in (times.karras(p, 7), times.uniform(p, 6), times.logsnr(p, 5, end=0.1), times.quadratic(p, 1)):
        T = EXACT_FOR_POINTS[name](p, t)
        last = T.unrolled()[-1]
        K = T.nfe
        a0, s0, a1, s1 = p.alpha(t[0]), p.sigma(t[0]), p.alpha(t[-1]), p.sigma(t[-1])
        mu_part = last[0] * a0 + last[1 : 1 + K].sum()
        noise_variance = (last[0] * s0) ** 2 + (last[1 + K :] ** 2).sum()
        np.testing.assert_allclose(mu_part, a1, rtol=1e-9, atol=1e-9)
        if name == "ddpm_beta":  # "fixed large": the variance of a law with unit data variance, too much for a point
            assert noise_variance >= s1**2 * (1 - 1e-9)
        else:
            np.testing.assert_allclose(noise_variance, s1**2, rtol=1e-9, atol=1e-14)


@each_process
@pytest.mark.parametrize("name", VARIANTS)
def test_a_grid_that_ends_at_sigma_zero(p, name):
    """Every solver, every process, every grid, also of one step: finite, and NFE as promised."""
    if refused(p, VARIANTS[name]):
        return
    for make in times.ALL.values():
        for n in (1, 2, 5):
            T = VARIANTS[name](p, make(p, n)).validate()
            if name == "restart":  # a pass that ends at sigma = 0, for want of another point below, costs less
                assert T.nfe <= VARIANTS[name].cost(n)
            else:
                two = ("bdia_edm", "dpm_solver_pp_2s_ancestral", "dpm_solver_pp_2s_between")
                less = name == "edict" or (name in two and n > 1)  # out of alpha = 0
                assert T.nfe == VARIANTS[name].cost(n) - (less and p.alpha(p.t_max) == 0)
            own_end = ("euler_t", "heun_t", "deis", "pndm", "ghvb", "heavy_ball", "bdia", "edict", "sit")
            if not name.startswith(own_end) and n > 1:
                np.testing.assert_allclose(T.B[-1, 0, 0], 1.0, atol=1e-12)  # the sample is the last prediction


# 2. Identities ---------------------------------------------------------------------------------------------------


@each_process
def test_reductions(p):
    t = times.logsnr(p, 6, start=0.9 * p.t_max, end=0.05)
    table = lambda s: s(p, t).unrolled()
    ddim = table(solvers.ddim())
    first = [solvers.euler(), solvers.dpm_solver_pp(1), solvers.unipc(1, corrector=False, lower_order_final=False)]
    for same in (*first, solvers.deis(1), solvers.deis(1, "lam"), solvers.deis(1, "rho")):
        np.testing.assert_allclose(table(same), ddim, rtol=1e-9, atol=1e-11)
    if not refused(p, solvers.ddpm()):
        np.testing.assert_allclose(table(solvers.ddpm()), table(solvers.ddim(1.0)), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(
        table(solvers.unipc(2, corrector=False, lower_order_final=False)),
        table(solvers.dpm_solver_pp(2)),
        rtol=1e-9,
        atol=1e-11,
    )  # UniP-2 with bh2 is DPM-Solver++(2M)
    np.testing.assert_allclose(
        table(solvers.unipc(3, corrector=False, lower_order_final=False))[4:],
        table(solvers.dpm_solver_pp(3))[4:],
        rtol=1e-7,
        atol=1e-9,
    )  # UniP-3 solves the Vandermonde system that 3M's differences (with their factor 2) solve in closed form


def test_ddim_is_euler_in_sigma_over_alpha():
    """DDIM on VP equals plain Euler for dy/drho = eps, y = x/alpha, integrated by hand."""
    p, t = process.vp_linear(), times.uniform(process.vp_linear(), 5, end=0.1)
    f = lambda x, t: np.tanh(x) * 0.5 + t
    x = y = np.random.default_rng(0).normal(size=3)
    y = x / p.alpha(t[0])
    for a, b in itertools.pairwise(t):
        xa = p.alpha(a) * y
        eps = (xa - p.alpha(a) * f(xa, a)) / p.sigma(a)
        y = y + (p.sigma(b) / p.alpha(b) - p.sigma(a) / p.alpha(a)) * eps
    den = jdiff.denoiser(lambda x, t: jnp.tanh(x) * 0.5 + t, p, "x0")
    got = jdiff.sample(den, solvers.ddim()(p, t), jnp.asarray(x[None]))
    np.testing.assert_allclose(got[0], p.alpha(t[-1]) * y, rtol=1e-10)


def test_deis_weights_against_quadrature():
    """C_j of eq. 15 by SciPy's adaptive quadrature on d rho = (g^2 / (2 alpha sigma)) dt, tAB of order 3."""
    p = process.vp_linear()
    t = np.array([0.9, 0.7, 0.55, 0.3])
    T = solvers.deis(3)(p, t)
    ell = lambda j, u: np.prod([(u - t[k]) / (t[j] - t[k]) for k in range(3) if k != j])
    speed = lambda u: p.diffusion(u) ** 2 / (2 * p.alpha(u) * p.sigma(u))
    C = [scipy.integrate.quad(lambda u, j=j: -ell(j, u) * speed(u), 0.3, 0.55, epsabs=1e-13)[0] for j in range(3)]
    # over outputs D: eps_j = (x_j - a_j D_j) / s_j
    B = T.unrolled()
    x2 = B[2]
    want = p.alpha(0.3) / p.alpha(0.55) * x2
    for j in range(3):
        eps = (B[j] - p.alpha(t[j]) * np.eye(len(x2))[1 + j]) / p.sigma(t[j])
        want = want + p.alpha(0.3) * C[j] * eps
    np.testing.assert_allclose(B[3], want, rtol=1e-9)


# 3. Slopes -------------------------------------------------------------------------------------------------------

G8 = exact.gaussian(np.linspace(-0.5, 0.7, 8), np.geomspace(0.05, 2.0, 8) ** 2)


def gaussian_error(solver, p, n, grid):
    """Error of the output's mean and standard deviations on an anisotropic Gaussian, lam in [-1.2, 0.4]."""
    t = grid(p, n, start=float(p.t_of_lam(-1.2)), end=float(p.t_of_lam(0.4)))
    mean, cov = G8.law(solver(p, times.graded(t, 12)))
    a, s = p.alpha(t[-1]), p.sigma(t[-1])
    std = np.sqrt(np.diag(cov)) - np.sqrt(a**2 * G8.eigenvalues[0] + s**2)
    return np.sqrt(np.mean(std**2) + np.mean((mean - a * G8.means[0]) ** 2))


def slope(solver, p, ns=(32, 64, 128, 256), grid=times.logsnr):
    """The smallest slope over three halvings, on a graded start."""
    e = np.array([gaussian_error(solver, p, n, grid) for n in ns])
    return float(np.log2(e[:-1] / e[1:]).min())


def zigzag(p, n, start, end):
    """Log-SNR steps long and short in turn: a mistake in the step ratios shows here, and not on smooth grids."""
    lam = np.linspace(p.lam(start), p.lam(end), n + 1)
    lam[1:-1:2] += 0.3 * (lam[1] - lam[0])
    return p.t_of_lam(lam)


def mutant(order, change):
    """DPM-Solver++ (order 2 or 3) with one thing wrong."""

    def sampler(g, x, model, noise):
        past = []
        for i in range(g.n):
            a1 = g.a[i] if change == "off-by-one alpha" else g.a[i + 1]
            h, p = g.h(i), min(order, i + 1)
            past = [model(x, g.t[i]), *past[: order - 1]]
            m0, m1, m2 = solvers.exponential.moments(h, 3)
            bracket = m0 * past[0]
            if p >= 2:
                r0 = 1.0 if change == "step ratio ignored" else g.h(i - 1) / h
                d = (past[0] - past[1]) / r0
                bracket = bracket + m1 * d
                if p == 3:
                    r1 = g.h(i - 2) / h
                    d1 = (past[1] - past[2]) / r1
                    bracket = bracket + (m1 * r0 / (r0 + r1)) * (d - d1) + (m2 / (r0 + r1)) * (d - d1)
            x = (g.s[i + 1] / g.s[i]) * x + a1 * bracket
        return x

    return jdiff.Solver("mutant", sampler, order)


def stale_heun(g, x, model, noise):
    """A Heun whose second stage looks at the first point again."""
    for i in range(g.n):
        d0 = model(x, g.t[i], kind="eps")
        d1 = model(x, g.t[i], kind="eps")
        x = (g.a[i + 1] / g.a[i]) * x + (g.s[i + 1] - g.a[i + 1] * g.s[i] / g.a[i]) * 0.5 * (d0 + d1)
    return x


EVENLY = {  # ordered on grids of a kind: test_solvers_exponential.py has their slopes
    "dpm_solver": "where 3 divides the steps, the last has order 1",
    "dpm_solver_pp_3s": "a last step of lower order where 3 does not divide the steps",
    "unipc_singlestep": "a last step of lower order where 3 does not divide the steps",
    "pndm": "weights of equal steps in t",
    "pndm_s": "weights of equal steps in t",
    "pndm_ramp": "weights of equal steps in t",
    "deis_ipndm": "weights of equal steps in t",
}
NO_ORDER = (
    "unipc",
    "dpm_solver_v3",
    "dc_solver",
    "ghvb",
    "heavy_ball",
    *EVENLY,
)  # ghvb, heavy_ball: tests/test_momentum.py, on equal steps
ORDERS = {
    **{k: s for k, s in VARIANTS.items() if not s.stochastic and k not in NO_ORDER},
    **{f"heun_{a}_{v}": solvers.heun(variable=v, alpha=a) for a in (0.5, 2 / 3) for v in ("sigma", "t")},
    **{f"deis_{o}_{v}": solvers.deis(o, v) for o in (2, 3, 4) for v in ("t", "rho", "lam")},
    **{f"unipc_{o}_{b}": solvers.unipc(o, b, lower_order_final=False) for o in (1, 2, 3) for b in ("bh1", "bh2")},
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("p", [process.vp_linear(), process.flow()], ids=["vp", "flow"])
def test_order_on_a_gaussian(name, p):
    # Adams-Bashforth in t and rho comes near its limit late: 3.84 at 64 steps of order 4, 3.92 at 128. SA-Solver's
    # predictor of noise is one too.
    late = (name.startswith("deis") and "rk" not in name) or name == "sa_solver_eps"
    ns = (64, 128, 256, 512) if late else (24, 48, 96, 192) if "rk" in name else (16, 32, 64, 128)
    assert slope(ORDERS[name], p, ns) >= ORDERS[name].order - 0.1


MUTANTS = [  # (the order that each must fail, a wrong solver or one of lower order); test_order.py has them too
    (2, solvers.euler()),
    (2, jdiff.Solver("stale", stale_heun, 2)),
    (2, mutant(2, "off-by-one alpha")),
    (2, mutant(2, "step ratio ignored")),
    (2, solvers.dpm_solver_pp(1)),
    (3, solvers.dpm_solver_pp(2)),
    (3, solvers.dpm_solver_pp(3, as_published=True)),
    (3, mutant(3, "factor 2 missing")),
    (3, solvers.unipc(2, corrector=False, lower_order_final=False)),
    (3, solvers.unipc(1, lower_order_final=False)),
    (3, solvers.unipc(3)),  # published: the last steps of lower order
    (3, solvers.deis(2)),
    (4, solvers.deis(3)),
    (4, solvers.deis(3, "lam")),
]


@pytest.mark.parametrize(("order", "wrong"), MUTANTS)
def test_mutants_fail_the_slope_test(order, wrong):
    assert slope(wrong, process.vp_linear(), grid=zigzag) < order - 0.1


@pytest.mark.parametrize(
    "right",
    [solvers.dpm_solver_pp(2), solvers.dpm_solver_pp(3), solvers.unipc(3, lower_order_final=False), solvers.deis(4)],
)
def test_order_on_uneven_steps(right):
    assert slope(right, process.vp_linear(), (64, 128, 256, 512), grid=zigzag) >= right.order - 0.1


@pytest.mark.parametrize("name", ["heun", "dpm_solver_pp", "dpm_solver_pp_3", "deis", "unipc_full"])
def test_order_on_a_mixture(name):
    """Against SciPy's DOP853 on the probability-flow ODE, nonlinear denoiser, through jdiff.sample in float64."""
    p = process.vp_linear()
    rng = np.random.default_rng(4)
    model = exact.mixture([0.3, 0.7], rng.normal(size=(2, 3)), [0.3, np.array([0.2, 0.5, 1.0])])
    den = model.denoiser(p)
    start, end = float(p.t_of_lam(-2.0)), float(p.t_of_lam(1.2))
    x = jnp.asarray(rng.normal(size=(16, 3)))
    want = reference(den, p, np.asarray(x), start, end)
    errors = []
    for n in (16, 32, 64, 128):
        T = ORDERS[name](p, times.graded(times.logsnr(p, n, start=start, end=end), 12))
        errors.append(np.sqrt(np.mean((jdiff.sample(den, T, x) - want) ** 2)))
    assert np.log2(np.array(errors[:-1]) / errors[1:])[-1] >= ORDERS[name].order - 0.1, errors


def reference(den, p, x, start, end):
    """The probability flow by DOP853 in u = log(sigma/alpha): d(x/alpha)/du = rho eps."""
    eps = jax.jit(lambda x, t: den(x, t, "eps"))

    def slope(u, y):
        t = p.t_of_lam(-u)
        return (np.exp(u) * np.asarray(eps(p.alpha(t) * y.reshape(x.shape), t))).ravel()

    ends = [-p.lam(start), -p.lam(end)]
    y = scipy.integrate.solve_ivp(slope, ends, (x / p.alpha(start)).ravel(), "DOP853", rtol=1e-12, atol=1e-12)
    return p.alpha(end) * y.y[:, -1].reshape(x.shape)


# 4. Stochastic solvers -------------------------------------------------------------------------------------------

# A Restart pass of two steps keeps its error on any main grid: tests/test_solvers_stochastic.py refines it
STOCHASTIC = {k: s for k, s in VARIANTS.items() if s.stochastic and k != "restart"}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_law_at_a_thousand_evaluations(name):
    """Closed-form law on the anisotropic Gaussian; within the Monte-Carlo error of 20,000 samples."""
    for p in (process.vp_linear(t_min=1e-5), process.flow(), process.edm()):  # t_min: sigma well below the data's 0.05
        solver = STOCHASTIC[name]
        T = solver(p, times.logsnr(p, solver.steps(1000)))
        mean, cov = G8.law(T)
        np.testing.assert_allclose(mean, G8.mean, atol=4 * np.sqrt(G8.cov.max() / 20000))
        error = np.abs(np.diag(cov) / np.diag(G8.cov) - 1)
        assert error.max() < 4 * np.sqrt(2 / 20000), (p, error)


def test_weak_order_of_the_second_order_sde_solver():
    p = process.vp_linear()
    assert slope(solvers.dpm_solver_pp(2, eta=1.0), p) >= 1.9
    assert slope(solvers.dpm_solver_pp(1, eta=1.0), p) < 1.9


def test_churn_keeps_the_marginal():
    """With the exact denoiser churn only exchanges old noise for new: the law as without, to the solver's error."""
    p = process.edm()
    quiet, loud = (G8.law(solvers.heun(churn=c)(p, times.karras(p, 200)))[1] for c in (0.0, 40.0))
    np.testing.assert_allclose(np.diag(loud), np.diag(quiet), rtol=1e-2)
    wrong = G8.law(solvers.heun(churn=40.0, s_noise=1.05)(p, times.karras(p, 200)))[1]
    assert np.abs(np.diag(wrong) / np.diag(quiet) - 1).max() > 0.02


# 5. Bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"order": 4}, {"order": 0}])
def test_bad_options(bad):
    with pytest.raises(ValueError, match="expected 1 to 3"):
        solvers.dpm_solver_pp(**bad)
    with pytest.raises(ValueError, match="expected 1 to 4"):
        solvers.deis(order=5)
    with pytest.raises(ValueError, match="'midpoint' or 'heun'"):
        solvers.dpm_solver_pp(form="euler")
    with pytest.raises(ValueError, match="0 <= eta <= 1"):
        solvers.ddim(eta=2.0)


def test_unknown_solver_and_nfe():
    with pytest.raises(ValueError, match="did you mean dpm_solver or dpm_solver_"):
        solvers.get("dpm_solver++")
    assert [solvers.heun().steps(n) for n in (1, 5, 6, 8, 10)] == [1, 3, 3, 4, 5]
    assert solvers.unipc().steps(10) == 10
    for nfe in (0, -3):
        with pytest.raises(ValueError, match="at least 1"):
            solvers.heun().steps(nfe)
    picky = jdiff.Solver("picky", lambda g, x, m, z: x, 1, cost=lambda n: n + 3, min_steps=2)
    with pytest.raises(ValueError, match=r"needs at least 5 network evaluations \(2 steps\), got NFE 4"):
        picky.steps(4)
