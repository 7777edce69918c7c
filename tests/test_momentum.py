"""Momentum solvers and stability regions: identities, orders and intervals that others published or computed."""

import itertools

import numpy as np
import pytest

from jdiff import exact, process, solvers, stability, times
from jdiff.solvers import momentum
from jdiff.trace import grid

P = process.edm()
UNIFORM = np.linspace(4.0, 0.5, 9)
BETAS = (1.0, 0.8, 0.5, 0.3)


def published_mix(order, b):
    """The weights as the authors write them, one formula an order, times b."""
    return {
        1: [b],
        2: [(2 + b) / 2, -(2 - b) / 2],
        3: [(18 + 5 * b) / 12, -(24 - 8 * b) / 12, (6 - b) / 12],
        4: [(46 + 9 * b) / 24, -(78 - 19 * b) / 24, (42 - 5 * b) / 24, -(10 - b) / 24],
        5: [(1650 + 251 * b) / 720, -(3420 - 646 * b) / 720, (2880 - 264 * b) / 720, -(1380 - 106 * b) / 720,
            (270 - 19 * b) / 720],
    }[order]  # fmt: skip


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_weights_are_the_published_ones(order):
    for b in BETAS:
        want = np.array(published_mix(order, b)) / b
        np.testing.assert_allclose(momentum.mix(order, b), want, rtol=1e-13)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_without_momentum_it_is_adams_bashforth(order):
    """On equal steps of sigma/alpha AB's weights are Lagrange's, which DEIS integrates; warm-up included."""
    for p in (P, process.vp_linear(), process.flow()):
        t = p.t_of_lam(-np.log(UNIFORM))
        want = solvers.deis(order, "rho")(p, t).unrolled()
        for same in (
            solvers.ghvb(order, 1.0),
            solvers.heavy_ball(order, 1.0),
            solvers.heavy_ball(order, 1.0, "plms", True),
        ):
            np.testing.assert_allclose(same(p, t).unrolled(), want, rtol=1e-9, atol=1e-10)
    assert np.abs(solvers.ghvb(order, 0.8)(p, t).unrolled() - want).max() > 1e-3


def test_reductions():
    t = times.karras(P, 8)
    table = lambda s: s(P, t).unrolled()
    np.testing.assert_allclose(table(solvers.ghvb(1, 0.6)), table(solvers.heavy_ball(1, 0.6)), atol=1e-12)
    np.testing.assert_allclose(
        table(solvers.heavy_ball(2, 1.0, "dpm_solver_pp")), table(solvers.dpm_solver_pp(2)), atol=1e-12
    )
    assert np.abs(table(solvers.heavy_ball(2, 0.8, "dpm_solver_pp")) - table(solvers.dpm_solver_pp(2))).max() > 1e-3


def test_heavy_ball_by_hand():
    """HB and Nesterov of PLMS-2, written out on numbers."""
    f, b = lambda x, t: np.tanh(x) * 0.3 + 0.1 * t, 0.7
    for nesterov in (False, True):
        x, e, v = 1.3, [], None
        for t0, t1 in itertools.pairwise(UNIFORM):
            e.append((x - f(x, t0)) / t0)
            u = e[-1] if len(e) == 1 else 1.5 * e[-1] - 0.5 * e[-2]
            v = (1 - b) * (e[0] if v is None else v) + b * u
            x = x + (t1 - t0) * ((1 - b) * v + b * u if nesterov else v)
        model = lambda x, t, kind="x0", label="": (x - f(x, t)) / t
        solver = solvers.heavy_ball(2, b, nesterov=nesterov)
        got = solver.sampler(grid(P, UNIFORM), 1.3, model, lambda: 0.0)
        np.testing.assert_allclose(got, x, rtol=1e-12)


def order_of(solver):
    """Order of a linear multistep method: its principal root is exp(z) + O(z^(order + 1)). No start-up matters."""
    z = -np.array([0.1, 0.05, 0.025])
    error = np.abs(stability.amplification(solver, z)[:, 0] - np.exp(z))
    return float((np.log2(error[:-1] / error[1:]) - 1).min())


@pytest.mark.parametrize("beta", [1.0, 0.8, 0.5])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ghvb_keeps_the_order_and_heavy_ball_does_not(order, beta):
    assert abs(order_of(solvers.ghvb(order, beta)) - order) < 0.15
    if beta < 1:
        assert abs(order_of(solvers.heavy_ball(order, beta)) - 1) < 0.15
        assert solvers.heavy_ball(order, beta).order == 1


def test_order_on_a_gaussian():
    """Orders 1 and 2 survive the start v_0 = eps_0 on equal steps of sigma: slopes of the whole solver."""
    G = exact.gaussian(np.zeros(4), np.geomspace(0.3, 2.0, 4) ** 2)

    def slope(solver):
        errors = []
        for n in (32, 64, 128):
            cov = np.diag(G.law(solver(P, np.linspace(4.0, 0.5, n + 1)))[1])
            errors.append(np.abs(np.sqrt(cov) - np.sqrt(G.eigenvalues[0] + 0.25)).max())
        return np.log2(np.array(errors[:-1]) / errors[1:]).min()

    assert slope(solvers.ghvb(1, 0.8)) >= 0.9 and slope(solvers.ghvb(2, 1.0)) >= 1.9
    assert slope(solvers.heavy_ball(2, 0.8)) < 1.5


INTERVALS = {  # computed elsewhere, on the scalar recurrences
    ("ghvb", 2): (1.0, 1.2, 1.5, 1.7),
    ("ghvb", 4): (0.30, 0.35, 0.43, 0.48),
    ("heavy_ball", 2): (1.0, 1.5, 3.0, 5.7),
    ("heavy_ball", 4): (0.30, 0.45, 0.90, 1.7),
}


@pytest.mark.parametrize(("name", "order"), INTERVALS)
def test_stability_intervals(name, order):
    for beta, want in zip(BETAS, INTERVALS[name, order], strict=True):
        got = stability.interval(solvers.get(name, order=order, beta=beta))
        assert abs(got / want - 1) < 0.021, (beta, got)  # two digits are given


def test_known_regions():
    """Euler's disc, the interval of Heun and midpoint, AB2's 1 and AB3's 6/11, and z = 0 on every boundary."""
    want = {"euler()": 2.0, "heun()": 2.0, "heun(alpha=0.5)": 2.0, "deis(order=2, variable='rho')": 1.0}
    for text, r in {**want, "ghvb(order=3, beta=1.0)": 6 / 11}.items():
        np.testing.assert_allclose(stability.interval(solvers.parse(text)), r, atol=1e-3)
    z = np.array([-1 + 0.99j, -1 + 1.01j, -0.5 + 0.5j])
    np.testing.assert_allclose(stability.amplification(solvers.euler(), z)[:, 0], np.abs(1 + z), rtol=1e-9)
    np.testing.assert_allclose(stability.amplification(solvers.heun(), z)[:, 0], np.abs(1 + z + z * z / 2), rtol=1e-9)
    np.testing.assert_allclose(stability.amplification(solvers.dpm_solver_pp(2), 0.0, "lam")[0], 1.0, rtol=1e-9)
    h = 1 / 80  # the exponential step of D = (1 + z/h) y: e^-h + (1 - e^-h)(1 + z/h)
    exponential = np.exp(-h) - np.expm1(-h) * (1 - 0.5 / h)
    np.testing.assert_allclose(
        stability.amplification(solvers.dpm_solver_pp(1), -0.5, "lam")[0], exponential, rtol=1e-9
    )


def test_bad_options():
    with pytest.raises(ValueError, match="ghvb: order is 6; expected 1 to 5"):
        solvers.ghvb(6)
    with pytest.raises(ValueError, match="0 < beta <= 1"):
        solvers.heavy_ball(2, 0.0)
    with pytest.raises(ValueError, match="'plms', 'dpm_solver_pp' or 'unipc'"):
        solvers.heavy_ball(2, base="euler")
    with pytest.raises(ValueError, match="has order 2"):
        solvers.heavy_ball(4, base="dpm_solver_pp")
    with pytest.raises(ValueError, match="'sigma' or 'lam'"):
        stability.amplification(solvers.euler(), 0.0, "t")
    with pytest.raises(ValueError, match="expected equal steps"):
        stability.amplification(solvers.restart({(0.5, 30.0): (2, 1)}), 0.0)
