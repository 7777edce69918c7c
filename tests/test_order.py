"""Order conditions, tree by tree: every solver's nominal order from its tableau alone, and broken ones found out.

A contributor adds a solver to `solvers.ALL`, with its true order, and has nothing to do here. `Solver.order` is the
order on grids that are refined, end above sigma = 0 and start graded; a solver that gives it up on purpose has an
option that keeps it: `lower_order_final=False` is passed wherever it exists. What cannot keep its order at all goes
into NO_ORDER, with the reason; if it keeps it on grids of one kind, such as equal steps, that is tested further down.
"""

import functools
import inspect

import numpy as np
import pytest
import scipy.integrate
from test_solvers import EVENLY, MUTANTS
from test_trace import VARIANTS

import jdiff
from jdiff import order, process, solvers

VP = process.vp_linear()
NO_ORDER: dict[str, str] = {  # name -> why
    **EVENLY,
    "ghvb": "weights of equal steps",
    "heavy_ball": "weights of equal steps",
    "restart": "a pass has steps of its own, whatever the grid",
    "predictor_corrector": "Langevin steps do not shrink with the grid",
    "edm_stochastic": "its noise is inflated on purpose",
    "bdia": "of second order on smooth grids alone, as tests/test_inversion.py has it",
}


def keeping(make):
    """The solver with its full order to the end."""
    return make(**({"lower_order_final": False} if "lower_order_final" in inspect.signature(make).parameters else {}))


SOLVERS = {**VARIANTS, **{name: keeping(make) for name, make in solvers.ALL.items()}}


def reaches(solver, grid=order.uneven, ns=(12, 32)):
    """Some come near their limit late: the first refinement that shows the order will do."""
    return any(order.measured_order(solver, VP, n, grid=grid) >= solver.order - 0.1 for n in ns)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in NO_ORDER])
def test_every_solver_has_its_order(name):
    assert reaches(SOLVERS[name])


def even(of, back, threes=None):
    """Even steps in of(lam); with `threes`, 3 n + threes of them."""

    def grid(p, n):
        n = n if threes is None else 3 * n + threes
        return p.t_of_lam(back(np.linspace(*of(np.array(order.RANGE)), n + 1)))

    return grid


SAME = lambda lam: lam
IN_T, IN_RHO = even(VP.t_of_lam, VP.lam), even(lambda lam: np.exp(-lam), lambda rho: -np.log(rho))


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("dpm_solver", even(SAME, SAME, 2)),
        ("dpm_solver_pp_3s", even(SAME, SAME, 0)),
        ("unipc_singlestep", even(SAME, SAME, 0)),
        ("pndm", IN_T),
        ("pndm_s", IN_T),
        ("pndm_ramp", IN_T),
        ("deis_ipndm", IN_T),
        ("heavy_ball", IN_RHO),
    ],
)
def test_order_on_the_grids_that_a_method_is_made_for(name, grid):
    assert reaches(SOLVERS[name], grid, ns=(8, 32, 64))


@pytest.mark.parametrize(
    ("nominal", "wrong"),
    [
        *MUTANTS,
        (5, solvers.deis(4)),
        (2, solvers.ddim(0.6)),
        (2, solvers.ddpm()),
        (2, solvers.dpm_solver_pp(1, eta=1.0)),
        (1, jdiff.Solver("noisy", lambda *args: solvers.ddim().sampler(*args) + 0.1 * args[-1](), 1)),
    ],
)  # fmt: skip
def test_mutants_and_lower_orders_are_found(nominal, wrong):
    assert order.measured_order(wrong, VP, n=12) < nominal - 0.1


# Runge-Kutta methods of the books, on d(x/alpha)/drho = eps -------------------------------------------------------


def runge_kutta(A, b, kind="eps"):
    """On d(x/alpha)/d(sigma/alpha) = eps, or on d(x/sigma)/d(alpha/sigma) = x0."""
    c = [sum(row) for row in A]

    def sampler(g, x, model, noise):
        p, sign = g.process, -1.0 if kind == "eps" else 1.0
        scale = p.alpha if kind == "eps" else p.sigma
        for i in range(g.n):
            start, h = np.exp(sign * g.lam[i]), np.exp(sign * g.lam[i + 1]) - np.exp(sign * g.lam[i])
            slopes = []
            plus = lambda row, y, h=h, slopes=slopes: sum(((h * w) * k for w, k in zip(row, slopes, strict=False)), y)
            y = (1.0 / scale(g.t[i])) * x
            for row, at in zip(A, c, strict=True):
                t = p.t_of_lam(sign * np.log(start + at * h))
                slopes.append(model(scale(t) * plus(row, y), t, kind=kind))
            x = scale(g.t[i + 1]) * plus(b, y)
        return x

    return jdiff.Solver("rk", sampler, 1, cost=lambda n: n * len(b))


SIMPSON = [1 / 6, 4 / 6, 1 / 6]
TABLES = {
    "midpoint": (2, [[0, 0], [1 / 2, 0]], [0, 1]),
    "Kutta 3": (3, [[0, 0, 0], [1 / 2, 0, 0], [-1, 2, 0]], SIMPSON),
    "RK4": (4, [[0, 0, 0], [1 / 2, 0, 0], [0, 1 / 2, 0], [0, 0, 1]], [1 / 6, 2 / 6, 2 / 6, 1 / 6]),
    "3/8": (4, [[0, 0, 0], [1 / 3, 0, 0], [-1 / 3, 1, 0], [1, -1, 1]], [1 / 8, 3 / 8, 3 / 8, 1 / 8]),
}


@pytest.mark.parametrize("kind", ["eps", "x0"])
@pytest.mark.parametrize("name", TABLES)
def test_methods_of_the_books(name, kind):
    nominal, A, b = TABLES[name]
    assert abs(order.measured_order(runge_kutta(A, b, kind), VP, n=12) - nominal) < 0.1


def test_coupling_is_told_from_quadrature():
    """Simpson's weights with the third stage by Euler: quadrature of order 4, but order 2 where D depends on x."""
    found = order.measured_orders(runge_kutta([[0, 0, 0], [0.5, 0, 0], [1, 0, 0]], SIMPSON, "x0"), VP, n=12)
    assert found["."] > 3.9 and abs(found["[.]"] - 2) < 0.1


def test_trees_are_all_rooted_trees():
    assert [len(order.trees(n)) for n in range(1, 7)] == [1, 2, 4, 8, 17, 37]  # sums of 1, 1, 2, 4, 9, 20
    assert len(set(order.trees(6))) == 37
    assert {order.write(t) for t in order.trees(4)} >= {".", "[.]", "[..]", "[[.]]", "[.[.]]", "[...]"}


START = np.array([0.7, 0.1, -1.0])


def nonlinear(x, lam):
    return np.tanh(2.0 * x) + np.sin(3.0 * lam)


@functools.cache
def exact_end():
    """The flow of `nonlinear` from START over the test grids' range, by DOP853."""
    sigma = lambda lam: np.exp(-0.5 * np.logaddexp(0.0, 2.0 * lam))
    rate = lambda lam, y: np.exp(lam) * nonlinear(y * sigma(lam), lam)
    s0, s1 = map(sigma, order.RANGE)
    return s1 * scipy.integrate.solve_ivp(rate, order.RANGE, START / s0, "DOP853", rtol=1e-13, atol=1e-14).y[:, -1]


@pytest.mark.parametrize(
    "solver", [solvers.heun(), solvers.dpm_solver_pp(3), solvers.deis(2), runge_kutta(*TABLES["RK4"][1:])]
)
def test_the_order_is_that_of_a_nonlinear_run(solver):
    """The same number as the slope on one nonlinear model, stepped in NumPy from three starts."""
    errors = []
    for n in (12, 24, 48):
        T = solver(VP, order.uneven(VP, n))
        U, values = T.unrolled(), np.zeros((1 + T.nfe, 3))
        values[0] = START
        for k in range(T.nfe):
            values[1 + k] = nonlinear(U[k] @ values, VP.lam(T.t[k]))
        errors.append(np.linalg.norm(U[-1] @ values - exact_end()))
    coarse, fine = np.log2(np.array(errors[:-1]) / errors[1:])
    assert abs(2 * fine - coarse - order.measured_order(solver, VP, n=12)) < 0.2, errors


def test_bad_input():
    t = np.array([0.6, 0.3, 0.0])
    with pytest.raises(ValueError, match="finite log-SNR"):
        order.conditions(solvers.ddim()(VP, t), t)
    two = jdiff.trace(lambda x, model, noise: model(x, 0.5)[1], VP, outputs=2)
    with pytest.raises(ValueError, match="one x0 output"):
        order.conditions(two, [0.5, 0.3])
