"""Integrals that the solvers' weights are made of; float64, on the host."""

import math
from collections.abc import Callable

import numpy as np

_GAUSS = np.polynomial.legendre.leggauss(16)
_SERIES = np.array([[1.0 / math.factorial(j + k + 1) for j in range(24)] for k in range(16)])


def moments(h: float, n: int) -> np.ndarray:
    """m_k(h) = int_0^h e^(u - h) (u/h)^k / k! du for k < n, (n,); also at h = inf, where m_k = 1/k!, and h < 0.

    The phi functions of exponential integrators, m_k = h phi_{k+1}(-h); a series for |h| < 1, where the recursion
    m_k = 1/k! - m_{k-1}/h would cancel. m_0 = 1 - e^(-h).
    """
    if abs(h) < 1.0:
        return h * _SERIES[:n] @ (-h) ** np.arange(24)
    m = [-np.expm1(-h)]
    for k in range(1, n):
        m.append(1.0 / math.factorial(k) - m[-1] / h)
    return np.array(m)


def lagrange(nodes: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Lagrange basis polynomials of `nodes` (r,) at points u (m,): (r, m)."""
    basis = np.ones((len(nodes), len(u)))
    for j, a in enumerate(nodes):
        for k, b in enumerate(nodes):
            if k != j:
                basis[j] *= (u - b) / (a - b)
    return basis


def nodes(a: float, b: float, panels: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of composite Gauss-Legendre on [a, b], 16 points a panel."""
    x, w = _GAUSS
    edges = np.linspace(a, b, panels + 1)
    half = 0.5 * np.diff(edges)
    points = (edges[:-1] + half)[:, None] + half[:, None] * x
    return points.ravel(), (half[:, None] * w).ravel()


def quadrature(f: Callable[[np.ndarray], np.ndarray], a: float, b: float, panels: int = 16) -> np.ndarray:
    """int_a^b f by `nodes`; f maps (m,) to (..., m)."""
    points, w = nodes(a, b, panels)
    return f(points) @ w
