"""Solvers: functions that return a builder, `builder(process, times)` -> Tableau.

`ALL` maps every name to its function; tests, benchmarks, tables and the command line iterate over it.
"""

import difflib
from collections.abc import Callable
from typing import Any

from jdiff.trace import Solver

from .classic import ddim, ddpm, euler, heun
from .exponential import deis, dpm_solver_pp, unipc

ALL: dict[str, Callable[..., Solver]] = {
    "euler": euler,
    "heun": heun,
    "ddim": ddim,
    "ddpm": ddpm,
    "dpm_solver_pp": dpm_solver_pp,
    "deis": deis,
    "unipc": unipc,
}


def get(name: str, **options: Any) -> Solver:
    """The solver called `name`. ValueError for an unknown one, with the nearest names."""
    if name not in ALL:
        near = difflib.get_close_matches(name, ALL, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(ALL)}"
        raise ValueError(f"unknown solver {name!r}; {hint}")
    return ALL[name](**options)


__all__ = ["ALL", "Solver", "ddim", "ddpm", "deis", "dpm_solver_pp", "euler", "get", "heun", "unipc"]
