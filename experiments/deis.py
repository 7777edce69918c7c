"""DEIS (Zhang and Chen 2022, arXiv 2204.13902) against DDIM: median error to the true flow on an exact mixture.

    jdiff reproduce deis

The claims: a polynomial through past eps needs a fraction of DDIM's evaluations, and rhoAB of degree r is of order
r + 1. Eight modes in 16 dimensions, standard deviation 1 or 0.3; the median, since at a watershed between sharp modes
any error sends a trajectory to another one. Times even in sqrt(t), as the official default, from 1 to 1e-3.
"""

import numpy as np

from jdiff import exact, process
from jdiff.experiments._claims import Claim, Exact, Run, table
from jdiff.reproduce import Published

MEANS = np.random.default_rng(1).normal(size=(8, 16))
SMOOTH, SHARP = (Exact(exact.mixture(np.full(8, 1 / 8), MEANS, [s**2] * 8), process.vp_linear(), end=1e-3)
                 for s in (1.0, 0.3))  # fmt: skip
ROWS = {"DDIM": Run("ddim", SMOOTH, "quadratic"), "sharp: DDIM": Run("ddim", SHARP, "quadratic")}
for r in (1, 2, 3):
    ROWS[f"tAB-DEIS, r = {r}"] = Run(f"deis(order={r + 1})", SMOOTH, "quadratic")
    ROWS[f"rhoAB-DEIS, r = {r}"] = Run(f"deis(order={r + 1}, variable='rho')", SMOOTH, "quadratic")
ROWS |= {
    "sharp: tAB-DEIS, r = 3": Run("deis(order=4)", SHARP, "quadratic"),
    "rhoRK, Kutta 3": Run("deis(order=3, method='rk')", SMOOTH, "quadratic"),
    "iPNDM, uniform t": Run("deis(order=4, method='ipndm')", SMOOTH, "uniform"),
}


def slope(row: str):
    return lambda e: np.log2(e(row, 40) / e(row, 80))


TABLE = table(
    "deis",
    "DEIS against DDIM: median trajectory error to the true flow on exact mixtures.",
    rows=ROWS,
    nfe=(10, 20, 40, 80),
    claims=(
        *(Claim(f"{kind.strip(': ') or 'smooth'}, NFE {n}: tAB-3 over DDIM", lambda e, k=kind, n=n:
                e(f"{k}tAB-DEIS, r = 3", n) / e(f"{k}DDIM", n), bound)
          for kind in ("", "sharp: ") for n, bound in ((10, 0.4), (20, 0.12), (40, 0.03))),
        Claim("slope of DDIM, NFE 40 to 80", slope("DDIM"), 1.2, 0.3),
        *(Claim(f"slope of rhoAB-{r}, NFE 40 to 80", slope(f"rhoAB-DEIS, r = {r}"), r + 1.2, r + 0.3)
          for r in (1, 2, 3)),
    ),
    published=(Published.load("deis_cifar10.toml"),),
)  # fmt: skip
