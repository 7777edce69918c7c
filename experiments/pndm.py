"""PNDM (Liu et al. 2022, arXiv 2202.09778) against DDIM at the same evaluations: rms error on an exact mixture.

    jdiff reproduce pndm

The claim: pseudo numerical methods need a twentieth of DDIM's steps, and are of second order. Columns are counted
evaluations: F-PNDM in n steps makes n + 9, so that 19, 29, 49, 89 are its 10, 20, 40 and 80 steps. Eight modes in two
dimensions, standard deviation 0.5; uniform times from 1 to 1e-3.
"""

import numpy as np

from jdiff import exact, process
from jdiff.experiments._claims import Claim, Exact, Run, table
from jdiff.reproduce import Published

angle = np.arange(8) * np.pi / 4
RING = Exact(
    exact.mixture(np.full(8, 1 / 8), np.stack([np.cos(angle), np.sin(angle)], 1), [0.25] * 8),
    process.vp_linear(),
    end=1e-3,
)
TABLE = table(
    "pndm",
    "PNDM against DDIM at the same number of evaluations: rms error to the true flow on an exact mixture.",
    rows={
        "DDIM": Run("ddim", RING, "uniform"),
        "S-PNDM": Run("pndm(order=2)", RING, "uniform"),
        "F-PNDM": Run("pndm", RING, "uniform"),
        "F-PNDM, ramp": Run("pndm(warmup='ramp')", RING, "uniform"),
        "tAB-DEIS, r = 3": Run("deis(order=4)", RING, "uniform"),
    },
    nfe=(19, 29, 49, 89),
    metric="rms",
    notes=(
        "At 80 steps what is left is the last step, where eps moves like sqrt(t) and uniform times are coarse: no "
        "order is seen any more. On grids that end at t = 0.1 or so it is (tests/test_solvers_exponential.py).",
    ),
    claims=(
        Claim("20 steps: F-PNDM over DDIM", lambda e: e("F-PNDM", 29) / e("DDIM", 29), 1 / 4),
        Claim("40 steps: F-PNDM over DDIM", lambda e: e("F-PNDM", 49) / e("DDIM", 49), 1 / 15),
        Claim("F-PNDM: error of 20 steps over that of 40", lambda e: e("F-PNDM", 29) / e("F-PNDM", 49), 20, 3),
        Claim("F-PNDM: error of 40 steps over that of 80", lambda e: e("F-PNDM", 49) / e("F-PNDM", 89), 20, 3),
        Claim("DDIM: error of 49 evaluations over that of 89", lambda e: e("DDIM", 49) / e("DDIM", 89), 2.2, 1.5),
    ),
    published=(Published.load("pndm_cifar10.toml"),),
)
