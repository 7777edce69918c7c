"""Order conditions: the order of a solver from its tableau alone, without a network; float64, on the host.

With Y = x / sigma the probability flow is dY/dlam = e^lam D(Y, lam). Expanding a smooth D about zero, one power of it
after another, gives one functional for every rooted tree (Butcher): a node holds a weight w(lam), a derivative of D
along the path, and its children multiply:

    exact     Y_tree(lam)  = int e^u w(u) prod_children Y_child(u) du
    tableau   Y_tree[k]    = sum_j U[k, j] w(lam_j) prod_children Y_child[j] / sigma_k         (U: `tableau.unrolled()`)

The tree of one node is quadrature (D a function of lam alone: exactness on polynomials), tall trees are the linear
models with a Jacobian that varies, bushy trees the nonlinear ones. A solver is of order p if and only if on grids that
are refined each tree of at most p nodes errs by O(h^p); the tree "x" is D = 0. No network, no sample and no step is
run: a tree costs one product with the triangle U.

A stochastic tableau is judged in law, by the mean and variance that it gives on Gaussian data: the weak order for
linear denoisers, in closed form. Nothing is drawn.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.polynomial.chebyshev import Chebyshev

from jdiff import exact, times
from jdiff.process import Process
from jdiff.tableau import Tableau

Tree = tuple[Any, ...]  # a node's children
Builder = Callable[[Process, Any], Tableau]  # a `jdiff.Solver`, or any function like it

RANGE = (-0.5, 0.3)  # half log-SNR of the test grids: short, so that few steps are near the limit of small ones
ROUNDING = 1e-12  # residuals below are rounding, and their slopes mean nothing

_WEIGHTS = (  # smooth, of one sign, and no polynomials
    lambda u: np.exp(u),
    lambda u: np.exp(-2.0 * u),
    lambda u: 2.0 + np.cos(4.0 * u),
    lambda u: 2.0 + np.sin(5.0 * u),
)
_DATA = exact.gaussian([1.0, 1.0, 1.0], [0.2, 0.6, 2.0])


@functools.cache
def trees(nodes: int) -> tuple[Tree, ...]:
    """All rooted trees of 1 to `nodes` nodes, smallest first: 1, 2, 4, 8, 17 of them."""
    if nodes == 1:
        return ((),)
    smaller = trees(nodes - 1)
    return tuple(dict.fromkeys([*smaller, *(grown for tree in smaller for grown in _grown(tree))]))


def _grown(tree: Tree) -> list[Tree]:
    """The tree with a leaf added, at each of its nodes; children sorted, so that equal trees are equal."""
    deeper = [(*tree[:i], grown, *tree[i + 1 :]) for i, child in enumerate(tree) for grown in _grown(child)]
    return [tuple(sorted(t)) for t in [(*tree, ()), *deeper]]


def write(tree: Tree) -> str:
    """A tree as in the books: "." for a node without children, "[..]" for one with two."""
    return "[" + "".join(map(write, tree)) + "]" if tree else "."


def conditions(tableau: Tableau, grid: Any, nodes: int = 4) -> dict[str, float]:
    """Relative residual of every order condition of a tableau that goes from time grid[0] to grid[-1].

    Deterministic: "x" and all trees of up to `nodes` nodes. Stochastic: "mean" and "variance".
    ValueError for tableaux with coefficients an element or several outputs, and for a grid that ends at sigma = 0
    (the last step is infinite in lam there, and no order exists).
    """
    p, record, ends = tableau.record.process, tableau.record, np.asarray(grid, np.float64)[[0, -1]]
    if np.ndim(tableau.t) > 1 or record.outputs != 1 or record.prediction != "x0":
        raise ValueError(f"{record.name}: order conditions are for scalar tableaux of one x0 output")
    if not np.isfinite(p.lam(ends)).all():
        raise ValueError(f"{record.name}: the grid runs from {ends[0]:g} to {ends[1]:g}; expected a finite log-SNR")
    a, s = p.alpha(ends), p.sigma(ends)
    if tableau.stochastic:
        means = [c * _DATA.means[0] for c in a]
        variances = [c**2 * _DATA.eigenvalues[0] + d**2 for c, d in zip(a, s, strict=True)]
        mean, cov = _DATA.law(tableau, means[0], np.diag(variances[0]))
        off = {"mean": mean / means[1] - 1.0, "variance": np.diag(cov) / variances[1] - 1.0}
        return {name: float(np.linalg.norm(residual)) for name, residual in off.items()}

    U = tableau.unrolled() / np.append(p.sigma(tableau.t), s[1])[:, None]
    (first, last), lam = p.lam(ends), p.lam(tableau.t)
    residual: dict[str, Any] = {"x": U[-1:, 0] * s[0] - 1.0}
    for tree in trees(nodes):
        got = [_tableau(U[:, 1:], w(lam), tree)[-1] for w in _WEIGHTS]
        want = [_exact(tree, j, first, last)(last) for j in range(len(_WEIGHTS))]
        residual[write(tree)] = np.array(got) / want - 1.0
    return {name: float(np.linalg.norm(r)) for name, r in residual.items()}


def _tableau(U: np.ndarray, w: np.ndarray, tree: Tree) -> np.ndarray:
    """The tableau's Y_tree at every evaluation and at the end."""
    return U @ (w * np.prod([_tableau(U, w, child)[:-1] for child in tree], axis=0))


@functools.lru_cache(maxsize=4096)
def _exact(tree: Tree, j: int, first: float, last: float) -> Callable[[Any], Any]:
    """The exact Y_tree on [first, last], as a Chebyshev series good to rounding."""
    children = [_exact(child, j, first, last) for child in tree]
    rate = lambda u: np.exp(u) * _WEIGHTS[j](u) * np.prod([child(u) for child in children], axis=0)
    return Chebyshev.interpolate(rate, 32, domain=[first, last]).integ(lbnd=first)


def uneven(process: Process, n: int, levels: int = 10) -> np.ndarray:
    """n steps over RANGE, long and short in turn (a mistake in step ratios hides on even grids), on a graded start."""
    lam = np.linspace(*RANGE, n + 1)
    lam[1:-1:2] += 0.3 * (lam[1] - lam[0])
    return times.graded(process.t_of_lam(lam), levels)


def measured_orders(
    solver: Builder, process: Process, n: int = 20, nodes: int = 4, grid: Callable[[Process, int], Any] = uneven
) -> dict[str, float]:
    """The order in each condition, inf where it holds to rounding.

    The slopes from n to 2n steps and from 2n to 4n, extrapolated to steps of no size; the finest slope alone where the
    two differ much or the residual comes near rounding.
    """
    return {name: order for name, (order, _) in _study(solver, process, n, nodes, grid).items()}


def measured_order(
    solver: Builder, process: Process, n: int = 20, nodes: int = 4, grid: Callable[[Process, int], Any] = uneven
) -> float:
    """The order of `solver`: the least over the conditions, a whole number but for about 0.1.

    Of the conditions whose finest residual is within a factor of 10 of the largest: one that fails is, at 4n steps, far
    above those that hold, and far below lie those where two terms nearly cancel, whose slopes say nothing yet.
    `nodes` bounds what can be told: with 4, an order above 4 is that of the trees of up to 4 nodes. `grid(process, n)`
    is another refinement, for methods whose weights are those of equal steps; every solver wants `uneven` else.
    """
    found = _study(solver, process, n, nodes, grid).values()
    largest = max(residual for _, residual in found)
    return min(order for order, residual in found if residual >= 0.1 * largest)


def _study(solver: Builder, process: Process, n: int, nodes: int, grid: Any) -> dict[str, tuple[float, float]]:
    """Of each condition (order, residual at 4n steps)."""
    grids = [grid(process, m) for m in (n, 2 * n, 4 * n)]
    found = [conditions(solver(process, t), t, nodes) for t in grids]

    def order(name: str) -> float:
        e = np.array([residual[name] for residual in found])
        if e[1] < ROUNDING:
            return np.inf
        coarse, fine = np.log2(e[:-1] / np.maximum(e[1:], ROUNDING))
        return float(2.0 * fine - coarse if e[2] > 100 * ROUNDING and abs(fine - coarse) < 0.5 else fine)

    return {name: (order(name), found[2][name]) for name in found[2]}
