"""Solvers: functions that return a builder, `builder(process, times)` -> Tableau.

`ALL` maps every name to its function; tests, benchmarks, tables and the command line iterate over it.
"""

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from jdiff.trace import Solver

from .adams import deis, pndm
from .auto import auto
from .classic import ddim, ddpm, edm_stochastic, euler, heun
from .compensated import dc_solver
from .empirical import dpm_solver_v3
from .exponential import dpm_solver, dpm_solver_pp
from .file import load
from .mean_reverting import mrs
from .momentum import ghvb, heavy_ball
from .multistep import sa_solver, unipc
from .residual import residual_path
from .restart import restart
from .reversible import bdia, ddim_inversion, edict
from .sde import euler_maruyama, predictor_corrector, reverse_diffusion
from .sit import sit, sit_times
from .usf import Decision, schedule

ALL: dict[str, Callable[..., Solver]] = {
    "euler": euler,
    "heun": heun,
    "ddim": ddim,
    "ddpm": ddpm,
    "dpm_solver": dpm_solver,
    "dpm_solver_pp": dpm_solver_pp,
    "deis": deis,
    "unipc": unipc,
    "pndm": pndm,
    "sa_solver": sa_solver,
    "dpm_solver_v3": dpm_solver_v3,
    "dc_solver": dc_solver,
    "mrs": mrs,
    "edm_stochastic": edm_stochastic,
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "predictor_corrector": predictor_corrector,
    "sit": sit,
    "restart": restart,
    "ghvb": ghvb,
    "heavy_ball": heavy_ball,
    "bdia": bdia,
    "edict": edict,
}


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """What to say of an unknown name: the nearest known ones, or all."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return f"unknown {kind} {name!r}; {hint}"


def get(name: str, **options: Any) -> Solver:
    """The solver called `name`. ValueError for an unknown one, with the nearest names, or for an unknown option."""
    if name not in ALL:
        raise ValueError(unknown("solver", name, ALL))
    known = inspect.signature(ALL[name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(unknown(f"option of {name}", option, known))
    return ALL[name](**options)


def parse(text: str) -> Solver:
    """A solver from text: "unipc", or "dpm_solver_pp(order=3, eta=1.0)". ValueError for anything else."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return get(node.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            options = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
            return get(node.func.id, **options)
    except SyntaxError:
        pass
    raise ValueError(f"cannot read the solver {text!r}; write a name, or name(option=value, ...)")


__all__ = [
    "ALL", "Decision", "Solver", "auto", "bdia", "dc_solver", "ddim", "ddim_inversion", "ddpm", "deis", "dpm_solver",
    "dpm_solver_pp", "dpm_solver_v3", "edict", "edm_stochastic", "euler", "euler_maruyama", "get", "ghvb",
    "heavy_ball", "heun", "load", "mrs", "parse", "pndm", "predictor_corrector", "residual_path", "restart",
    "reverse_diffusion", "sa_solver", "schedule", "sit", "sit_times", "unipc", "unknown",
]  # fmt: skip
