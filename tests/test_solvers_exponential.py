"""Exponential integrators: official tables, exactness on polynomials, slopes, weak orders, identities."""

import functools

import numpy as np
import pytest
import scipy.integrate
from test_golden import FILE as LIBRARIES
from test_golden import META as LIBRARY_META
from test_golden import PROCESS as LIBRARY_PROCESS
from test_official import FILE, META, PROCESS
from test_process import PROCESSES
from test_solvers import G8, gaussian_error, slope, zigzag

import jdiff
from jdiff import process, solvers, times
from jdiff.solvers import exponential

dpm, pp, uni, sa, deis, pndm = (
    solvers.dpm_solver, solvers.dpm_solver_pp, solvers.unipc, solvers.sa_solver, solvers.deis, solvers.pndm,
)  # fmt: skip
VP = process.vp_linear()
FINAL = {"lower_order_final": True}

# 1. Lifted tables ------------------------------------------------------------------------------------------------

OFFICIAL = {  # name -> (ours, how many of our steps each official one is)
    **{f"dpm_multi{o}_{f}_lof{lof}_logsnr8": (dpm(o, "multistep", f, bool(lof), True), None)
       for o in (2, 3) for f in ("dpmsolver", "taylor") for lof in (0, 1)},
    **{f"unipc_{k}_{b}_{o}_lof{lof}_logsnr8": (uni(o, b, lower_order_final=bool(lof), prediction=k,
                                                   as_published=b == "vary_coeff"), None)
       for k in ("x0", "eps") for b in ("bh1", "bh2", "vary_coeff") for o in (1, 2, 3, 4) for lof in (0, 1)},
    **{f"{k}_singlestep{o}_uniform10": (make(o, method="singlestep"), "t")
       for k, make in (("dpm", dpm), ("dpmpp", pp)) for o in (1, 2, 3)},
    **{f"{k}_{m}_{f}_logsnr{n}": (make(o, method=way, form=f), sizes)
       for k, make in (("dpm", dpm), ("dpmpp", pp)) for f in ("dpmsolver", "taylor")
       for m, n, o, way, sizes in (
           ("singlestep2", 9, 2, "singlestep", [2, 2, 2, 2, 1]), ("singlestep2", 10, 2, "singlestep", [2] * 5),
           ("singlestep3", 9, 3, "fast", [3, 3, 2, 1]), ("singlestep3", 10, 3, "fast", [3, 3, 3, 1]),
           ("singlestep_fixed3", 9, 3, "singlestep", [3, 3, 3]),
       )},
    **{f"deis_rk_{k}": (deis(o, method="rk"), None) for k, o in (("2heun", 2), ("3kutta", 3), ("4rk", 4))},
    "deis_ipndm": (deis(4, method="ipndm"), None),
    **{f"diff_ipndm{o}": (deis(o, method="ipndm"), None) for o in (2, 3, 4)},
    "diff_ipndm_v2": (deis(2, "rho"), None),
    "diff_ipndm_v3": (deis(3, "rho", as_published=True), None),
    "diff_dpm2": (dpm(2, "singlestep"), [2] * 5),
    "pndm_s_8": (pndm(2), None), "pndm_s_10": (pndm(2), None), "pndm_f_10": (pndm(4), None),
    **{f"sa_{m}_steps_tau{tau:g}_{p}{c}": (sa(p, c, tau, None, few_steps=m == "few"), None)
       for m in ("few", "more") for tau in (0.0, 1.0, 0.4)
       for p, c in ((1, 0), (2, 0), (3, 0), (1, 2), (2, 3), (3, 4))},
}  # fmt: skip
OFFICIAL = {name: case for name, case in OFFICIAL.items() if name in META}


def refined(p, t, sizes):
    """The grid whose step k, in log-SNR, is sizes[k] equal ones (the last may go to sigma = 0 in one)."""
    lam = p.lam(t)
    inner = [np.linspace(lam[k], lam[k + 1], n + 1)[:-1] if n > 1 else lam[k : k + 1] for k, n in enumerate(sizes)]
    return np.append(p.t_of_lam(np.concatenate(inner)), t[-1])


def compare(name, solver, sizes=None, file=FILE, meta=META, processes=PROCESS):
    """Largest difference of our table from the lifted one, relative to the largest coefficient; inf if none fits."""
    p, K = processes[meta[name]["process"]], meta[name]["calls"]
    a, s = file[f"{name}/grid"].T
    with np.errstate(divide="ignore"):
        t = np.minimum(p.t_of_lam(np.log(a) - np.log(s)), p.t_max)
    if sizes == "t":  # an official grid lists the ends of steps; inner points are evenly spaced in t
        t = np.linspace(t[0], t[-1], K + 1)
    elif sizes:
        t = refined(p, t, sizes)
    want, got, last = file[f"{name}/points"], solver(p, t).unrolled(), K + 1
    if name.startswith("sa_more"):  # evaluates again at the corrected last point: all points before that
        last, want = K - 1, np.delete(want, K, 1)
        K -= 1
    used = lambda u: u[:last, [j for j in range(u.shape[1]) if j <= K or np.abs(u[:last, j]).max() > 1e-9]]
    want, got = used(want), used(got)
    return np.abs(got - want).max() / np.abs(want).max() if got.shape == want.shape else np.inf


@pytest.mark.parametrize("name", OFFICIAL)
def test_agrees_with_the_official_code(name):
    assert compare(name, *OFFICIAL[name]) < 1e-8


@pytest.mark.parametrize(
    ("name", "solver", "sizes"),
    [
        ("dpm1_low_trailing10_nolof", dpm(1, "multistep"), None),
        ("dpm2m_midpoint_low_trailing10_nolof", dpm(2, "multistep"), None),
        ("dpm2m_heun_low_trailing10_nolof", dpm(2, "multistep", "heun"), None),
        ("dpm3m_low_trailing10_nolof", dpm(3, "multistep", as_published=True), None),
        ("unipc3_bh2_eps_low_trailing10", uni(3, prediction="eps"), None),
        ("k_lms2_karras8", deis(2, "rho"), None),  # k-diffusion integrates the same polynomials in sigma numerically
        ("k_lms4_karras8", deis(4, "rho"), None),
        ("k_lms4_vp10", deis(4, "rho"), None),
        ("k_dpm2_karras8", dpm(2, "singlestep"), [2] * 7 + [1]),
    ],
)
def test_agrees_with_libraries(name, solver, sizes):
    assert compare(name, solver, sizes, LIBRARIES, LIBRARY_META, LIBRARY_PROCESS) < 1e-8


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dpm_multi3_dpmsolver_lof0_logsnr8", dpm(3, "multistep")),  # the factor 2
        ("dpm_multi2_dpmsolver_lof0_logsnr8", pp(2)),  # the other prediction
        ("unipc_x0_vary_coeff_3_lof1_logsnr8", uni(3, "vary_coeff")),  # ours sums over all k
        ("unipc_eps_bh2_3_lof1_logsnr8", uni(3)),
        ("deis_rk_3kutta", deis(4, method="rk")),
        ("pndm_f_10", pndm(4, "ramp")),
        ("pndm_s_10", pndm(3)),
        ("diff_ipndm_v3", deis(3, "rho")),  # published weights lack a pair of brackets
        ("sa_few_steps_tau1_23", sa(2, 3, 1.0, None)),
        ("sa_more_steps_tau0.4_34", sa(3, 4, 1.0, None)),
    ],
)
def test_named_differences_are_differences(name, wrong):
    assert compare(name, wrong) > 1e-3


# 2. Exactness on polynomials -------------------------------------------------------------------------------------


def last_step_error(solver, variable, kind, degree, n=6, group=1, eta=0.0):
    """Relative error of the last step where the output is a polynomial in `variable`, against SciPy's quadrature."""
    p, t = VP, np.array([0.6, 0.54, 0.5, 0.42, 0.37, 0.3, 0.22])[: n + 1]
    coefficients = np.random.default_rng(degree).normal(size=degree + 1)
    u = {"t": lambda lam: p.t_of_lam(lam), "lam": lambda lam: lam, "rho": lambda lam: np.exp(-lam)}[variable]
    F = lambda lam: np.polyval(coefficients, u(lam))
    T = solver(p, t)
    U, values = T.unrolled()[:, : T.nfe + 1], [0.7]
    points = []
    for k in range(T.nfe + 1):
        points.append(U[k, : len(values)] @ values)
        if k < T.nfe:
            a, s, out = p.alpha(T.t[k]), p.sigma(T.t[k]), F(p.lam(T.t[k]))
            values.append(out if kind == "x0" else (points[k] - s * out) / a)
    start, end, x = t[n - group], t[n], points[-1 - (T.nfe // n) * group]
    (l0, l1), (a0, a1), (s0, s1) = (f(np.array([start, end])) for f in (p.lam, p.alpha, p.sigma))
    if kind == "x0":
        rate = lambda l: (1 + eta) * np.exp((1 + eta) * (l - l1)) * F(l)
        want = (s1 / s0) * np.exp(-eta * (l1 - l0)) * x + a1 * scipy.integrate.quad(rate, l0, l1, epsabs=1e-13)[0]
    else:
        want = a1 * (x / a0 - scipy.integrate.quad(lambda l: np.exp(-l) * F(l), l0, l1, epsabs=1e-13)[0])
    return abs(points[-1] / want - 1.0)


@pytest.mark.parametrize(
    ("solver", "variable", "kind", "degree", "options"),
    [
        (pp(2, form="taylor"), "lam", "x0", 1, {}),
        (pp(3), "lam", "x0", 2, {}),
        (pp(2, 1.0, "heun"), "lam", "x0", 1, {"eta": 1.0}),
        (pp(3, 1.0), "lam", "x0", 2, {"eta": 1.0}),  # the coefficient whose sign is wrong in diffusers
        (sa(3, 0, 1.0, None, lower_order_final=False), "lam", "x0", 2, {}),  # no noise in the last step
        (dpm(3, "multistep"), "lam", "eps", 2, {}),
        (dpm(3, "singlestep", "taylor"), "lam", "eps", 2, {"group": 3}),
        (pp(3, method="singlestep", form="taylor"), "lam", "x0", 2, {"group": 3}),
        (pp(2, method="singlestep", form="taylor"), "lam", "x0", 1, {"group": 2}),
        (uni(5, corrector=False, lower_order_final=False), "lam", "x0", 4, {}),
        (uni(6, corrector=False, lower_order_final=False, prediction="eps"), "lam", "eps", 5, {}),
        (uni(2, "vary_coeff", corrector=False, lower_order_final=False), "lam", "x0", 1, {}),
        (uni(3, "vary_coeff", method="singlestep"), "lam", "x0", 2, {"group": 3}),
        (deis(4, "lam"), "lam", "eps", 3, {}),
        (deis(4, "t"), "t", "eps", 3, {}),
        (deis(4, "rho"), "rho", "eps", 3, {}),
        (deis(2, method="rk"), "rho", "eps", 1, {}),
        (deis(3, method="rk"), "rho", "eps", 2, {}),
        (deis(4, method="rk"), "rho", "eps", 3, {}),
    ],
)  # fmt: skip
def test_exact_on_polynomials_of_the_right_degree_and_no_higher(solver, variable, kind, degree, options):
    assert last_step_error(solver, variable, kind, degree, **options) < 1e-9
    # Kutta's method of order 3 is Simpson's rule, and so exact for one degree more.
    higher = degree + (2 if (degree, variable, solver.order) == (2, "rho", 3) else 1)
    assert last_step_error(solver, variable, kind, higher, **options) > 1e-8


@pytest.mark.parametrize(
    ("wrong", "kind", "degree", "options"),
    [
        (pp(3, as_published=True), "x0", 2, {}),
        (dpm(3, "multistep", as_published=True), "eps", 2, {}),
        (pp(2), "x0", 1, {}),
        (dpm(3, "singlestep"), "eps", 2, {"group": 3}),  # these inner points are not at 1/3 and 2/3
        (uni(2, "bh1", corrector=False, lower_order_final=False), "x0", 1, {}),
    ],
)
def test_published_approximations_are_not_exact(wrong, kind, degree, options):
    assert last_step_error(wrong, "lam", kind, degree, **options) > 1e-5


# 3. Slopes -------------------------------------------------------------------------------------------------------


def rate(solver, ns, grid=times.logsnr):
    """The smallest slope, by the real numbers of steps (12 of them in the graded start)."""
    e = np.array([gaussian_error(solver, VP, n, grid) for n in ns])
    return float((np.log(e[:-1] / e[1:]) / np.log(np.array(ns[1:]) / ns[:-1])).min())


THREES = (24, 48, 96, 192)


@pytest.mark.parametrize(
    ("solver", "order", "ns"),
    [
        (dpm(3, "singlestep"), 3, THREES),
        (dpm(3, "fast"), 3, (26, 53, 107, 215)),  # ends with order 2
        (pp(3, method="singlestep"), 3, THREES),
        (pp(3, method="singlestep", form="heun"), 3, THREES),
        (uni(3, method="singlestep"), 4, (36, 72, 144, 288)),
        (uni(3, method="singlestep", corrector=False), 3, THREES),
        (uni(2, "bh1", method="singlestep"), 3, THREES),
    ],
)
def test_order_of_singlestep_methods(solver, order, ns):
    assert rate(solver, ns) >= order - 0.1


def test_singlestep_methods_need_their_inner_points():
    """Order 3 at 1/3 and 2/3, and not on steps long and short in turn; nor with a last step of order 1."""
    assert rate(dpm(3, "singlestep"), THREES, zigzag) < 2.9
    assert rate(dpm(3, "singlestep", "heun"), THREES, zigzag) < 2.9
    assert rate(dpm(3, "fast"), (25, 49, 97, 193)) < 2.9


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_corrector_raises_the_order_by_one(order, prediction):
    measured = lambda c: jdiff.order.measured_order(
        uni(order, corrector=c, lower_order_final=False, prediction=prediction), VP, 12 if order < 3 else 24
    )
    assert order - 0.1 <= measured(False) < order + 0.5 and measured(True) >= order + 0.9


def test_higher_orders():
    four, five = (slope(uni(o, lower_order_final=False), VP, (16, 32, 64)) for o in (4, 5))
    assert four >= 4.9 and five >= 5.7


@pytest.mark.parametrize("order", [2, 3])
def test_the_published_vary_coeff_is_of_first_order(order):
    make = functools.partial(uni, order, "vary_coeff", lower_order_final=False)
    assert slope(make(as_published=True), VP, (16, 32, 64)) < 1.5
    assert slope(make(), VP, (16, 32, 64)) >= order + 1 - 0.1


@pytest.mark.parametrize(
    ("p", "c", "order"), [(1, 0, 1), (2, 0, 2), (3, 0, 3), (1, 1, 1), (1, 2, 2), (2, 3, 3), (3, 4, 4)]
)
def test_order_of_sa_solver_without_noise(p, c, order):
    solver = sa(p, c, 0.0, lower_order_final=False)
    assert solver.order == order and not solver.stochastic
    assert order - 0.1 <= slope(solver, VP, grid=zigzag) < order + 0.5


def uniform_rate(solver):
    """Slope on equal steps in t, without a graded start, through DDIM's own error measure."""

    def error(n):
        t = np.linspace(0.9, 0.2, n + 1)
        mean, cov = G8.law(solver(VP, t))
        a, s = VP.alpha(t[-1]), VP.sigma(t[-1])
        std = np.sqrt(np.diag(cov)) - np.sqrt(a**2 * G8.eigenvalues[0] + s**2)
        return np.sqrt(np.mean(std**2) + np.mean((mean - a * G8.means[0]) ** 2))

    e = np.array([error(n) for n in (48, 96, 192)])
    return float(np.log2(e[:-1] / e[1:]).min())


def broken(weights):
    """PLMS-2 with other weights."""

    def sampler(g, x, model, noise):
        past = []
        for i in range(g.n):
            past = [model(x, g.t[i], kind="eps"), *past[:1]]
            e = past[0] if i == 0 else weights[0] * past[0] + weights[1] * past[1]
            x = solvers.adams.move(x, e, "eps", g.a[i], g.s[i], g.a[i + 1], g.s[i + 1])
        return x

    return jdiff.Solver("broken", sampler, 2)


def test_pndm_is_of_second_order():
    """The paper's theorem: orders 2 and 4 both are, through the transfer part."""
    for solver in (pndm(2), pndm(4), pndm(4, "ramp"), deis(4, method="ipndm")):
        assert uniform_rate(solver) >= 1.9
    for wrong in (pndm(1), broken((1.4, -0.4)), broken((1.0, 0.0))):
        assert uniform_rate(wrong) < 1.9


# 4. Stochastic ---------------------------------------------------------------------------------------------------


def loose_noise(g, x, model, noise):
    """SDE-DPM-Solver++(2S) whose noise at the end has not seen the noise at the inner point."""
    for i in range(0, g.n - 1, 2):
        D = model(x, g.t[i])
        u = exponential.step(g, i, i + 1, x, [(i, D)], eta=1.0) + exponential.noise_std(g, i, i + 1, 1.0) * noise()
        points = [(i, D), (i + 1, model(u, g.t[i + 1]))]
        x = exponential.step(g, i, i + 2, x, points, eta=1.0) + exponential.noise_std(g, i, i + 2, 1.0) * noise()
    return x


def test_weak_orders():
    """Of second order in law; with uncorrelated noise inside a step the singlestep method is of first."""
    ns = (32, 64, 128)
    assert slope(pp(2, 1.0, method="singlestep"), VP, ns) >= 1.9
    assert slope(jdiff.Solver("loose", loose_noise, 2), VP, ns) < 1.5
    for solver in (sa(2, 2, 1.0, None, lower_order_final=False), sa(3, 4, 0.7, None, lower_order_final=False)):
        assert slope(solver, VP, ns) >= 1.9
    assert slope(sa(1, 0, 1.0, None, lower_order_final=False), VP, ns) < 1.9


def test_noise_of_one_path():
    """Inner point and end of a 2S SDE step: variances and covariance of the SDE's own noise, in closed form."""
    t = np.array([0.8, 0.6, 0.5])
    U = pp(2, 1.0, method="singlestep")(VP, t).unrolled()[:, 3:]
    lam, s = VP.lam(t), VP.sigma(t)
    variance = lambda i, j: s[j] ** 2 * -np.expm1(-2 * (lam[j] - lam[i]))
    carried = (s[2] / s[1]) * np.exp(lam[1] - lam[2])
    np.testing.assert_allclose(U[1] @ U[1], variance(0, 1), rtol=1e-12)
    np.testing.assert_allclose(U[2] @ U[2], variance(0, 2), rtol=1e-12)
    np.testing.assert_allclose(U[1] @ U[2], carried * variance(0, 1), rtol=1e-12)


def test_tau():
    """A function, a number and an interval say the same; diffusers' default is timesteps 200 to 800 of DDPM's."""
    p, n = process.vp_discrete(np.linspace(1e-4, 2e-2, 1000)), 40
    t = times.uniform(p, n)
    table = lambda *args: sa(2, 2, *args)(p, t).unrolled()
    np.testing.assert_array_equal(table(0.5, None), table(lambda t: 0.5))
    timestep = np.round(1000 * t[1:]) - 1
    noisy = np.abs(sa()(p, t).C[:, 0, 0]) > 0
    np.testing.assert_array_equal(noisy, (timestep >= 200) & (timestep <= 800))
    assert not sa(tau=0.0)(p, t).stochastic


# 5. Identities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", PROCESSES.values(), ids=PROCESSES)
def test_first_orders_are_ddim(p):
    for t in (times.logsnr(p, 6, start=0.9 * p.t_max, end=0.05), times.uniform(p, 5)):
        want = solvers.ddim()(p, t).unrolled()
        first = [dpm(1, m) for m in ("multistep", "singlestep")] + [pp(1, method="singlestep"), pndm(1), sa(1, 0, 0.0)]
        first += [deis(1, method=m) for m in ("rk", "ipndm")]
        for same in [*first, uni(1, corrector=False, prediction="eps", method="singlestep")]:
            np.testing.assert_allclose(same(p, t).unrolled(), want, rtol=1e-9, atol=1e-11)


def test_identities():
    t = times.logsnr(VP, 9, start=0.9, end=0.05)
    table = lambda s, t=t: s(VP, t).unrolled()
    same = lambda a, b, **k: np.testing.assert_allclose(table(a, **k), table(b, **k), rtol=1e-8, atol=1e-10)
    same(dpm(2, "multistep"), uni(2, corrector=False, prediction="eps", lower_order_final=False))
    same(dpm(3, "multistep", "heun"), deis(3, "lam"))
    same(pp(2, method="singlestep"), uni(2, corrector=False, method="singlestep"))
    same(sa(3, 4, 0.0), uni(3, "vary_coeff"))  # Adams methods in lam, both
    same(sa(2, 3, 0.0, few_steps=True, lower_order_final=False), uni(2, "bh1", lower_order_final=False))
    even = VP.t_of_lam(-np.log(np.linspace(3.0, 0.5, 9)))  # equal steps in rho: Adams-Bashforth of the books
    same(deis(4, method="ipndm"), deis(4, "rho"), t=even)


@pytest.mark.parametrize(
    ("solver", "n", "sizes"),
    [
        (dpm(), 9, [3, 3, 2, 1]), (dpm(), 10, [3, 3, 3, 1]), (dpm(), 11, [3, 3, 3, 1, 1]),
        (dpm(3, "singlestep"), 9, [3, 3, 2, 1]), (dpm(2, "singlestep"), 7, [2, 2, 2, 1]), (dpm(), 1, [1]),
        (dpm(), 2, [1, 1]),
    ],
)  # fmt: skip
def test_what_singlestep_methods_spend(solver, n, sizes):
    """Exactly the NFE that is asked for; the step into sigma = 0 is one of them."""
    T = solver(VP, times.logsnr(VP, n))
    assert T.nfe == n == solver.steps(n)
    starts = [k for k, label in enumerate(T.record.labels) if label != "inner point"]
    assert [*np.diff(starts), n - starts[-1]] == sizes


def test_costs():
    assert [pndm().cost(n) for n in (1, 2, 4, 10)] == [1, 5, 13, 19] and pndm(2).cost(10) == 11
    assert pndm(4, "ramp").cost(10) == 11 and deis(3, method="rk").cost(5) == 13
    t = times.uniform(VP, 10, end=0.1)
    assert [s(VP, t).nfe for s in (pndm(), pndm(2), deis(4, method="rk"))] == [19, 11, 40]


# 6. Bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: dpm(4), "dpm_solver: order is 4; expected 1 to 3"),
        (lambda: dpm(2), "dpm_solver: order is 2 with method='fast'"),
        (lambda: dpm(3, "adaptive"), "method is 'adaptive'; expected 'multistep', 'singlestep' or 'fast'"),
        (lambda: pp(3, method="singlestep", as_published=True), "belong to method='multistep', got 'singlestep'"),
        (lambda: uni(7), "unipc: order is 7; expected 1 to 6"),
        (lambda: uni(3, "bh3"), "variant is 'bh3'; expected 'bh1', 'bh2' or 'vary_coeff'"),
        (lambda: uni(prediction="v"), "prediction is 'v'; expected 'x0' or 'eps'"),
        (lambda: uni(as_published=True), "official corrector of variant='vary_coeff'"),
        (lambda: deis(4, "rho", as_published=True), "as_published is iPNDM_v's form of order=3"),
        (lambda: deis(2, method="rk", lower_order_final=True), "methods with past points, got method='rk'"),
        (lambda: deis(2, method="pc"), "method is 'pc'; expected 'ab', 'rk' or 'ipndm'"),
        (lambda: pndm(5), "pndm: order is 5; expected 1 to 4"),
        (lambda: pndm(warmup="heun"), "warmup is 'heun'; expected 'rk' or 'ramp'"),
        (lambda: sa(4), "sa_solver: order is 4; expected 1 to 3"),
        (lambda: sa(corrector=5), "corrector is 5; expected 0, 1, 2, 3 or 4"),
        (lambda: sa(tau=-1.0), "expected tau >= 0, or a function"),
        (lambda: sa(interval=(2.0, 1.0)), r"interval is \(2.0, 1.0\); expected \(low, high\)"),
    ],
)
def test_bad_options(make, says):
    with pytest.raises(ValueError, match=says):
        make()
