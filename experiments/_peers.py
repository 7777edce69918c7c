"""The set-ups that won a cell of the peer survey (papers/peer_survey.toml), by our solvers, grids and ends.

`SETUPS` maps the survey's name of a set-up to (starts, fewest NFE, build(process, nfe) -> Tableau). They run where the
survey cannot: on other noise, on models drawn afresh. On the survey's own noise (seed 7) they give its numbers to the
two digits printed, which `solver-frontier` checks in each run.
"""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jdiff import solvers, times
from jdiff.process import Process
from jdiff.statistics import Statistics
from jdiff.tableau import Tableau

Build = Callable[[Process, int], Tableau]
SURVEY: dict[str, Any] = tomllib.loads((Path(__file__).parent / "papers" / "peer_survey.toml").read_text())
SEED: int = SURVEY["seed"]


def published(what: str, model: str, start: str, nfe: int) -> tuple[float, str]:
    """(number, set-up) of the best peer: `what` is "rms", "median" or "sw2" (start: "stochastic" or "ode")."""
    return tuple(SURVEY[what][model][start][SURVEY["nfe"].index(nfe)])


def _on(grid: str, *, stop: bool = False, **grid_options: Any) -> Callable[[Process, int], np.ndarray]:
    """Times of n steps: to sigma = 0, or with `stop` to t_min only (the official codes' end)."""
    return lambda p, n: times.ALL[grid](p, n, end=p.t_min if stop else 0.0, **grid_options)


def _wasted(p: Process, n: int) -> np.ndarray:
    """diffusers' DEIS on Karras sigmas has its last sigma twice: one evaluation of n goes into a step of no length."""
    return times.karras(p, n - 1, end=p.t_min)


def _near_one(gap: float) -> Callable[[Process, int], np.ndarray]:
    """diffusers' flow grids start at 0.999 (DPM-Solver++) or 1 - 1e-6 (UniPC), to keep the log-SNR finite."""
    return lambda p, n: np.append(times.uniform(p, n, start=1.0 - gap)[:-1], 0.0)


def _setups() -> dict[str, tuple[str, Build]]:
    found: dict[str, tuple[str, Build]] = {}

    def add(start: str, name: str, solver: str, grid: Any, lower: int | None = None, **options: Any) -> None:
        """`lower`: the option lower_order_final holds below this NFE."""

        def build(p: Process, nfe: int) -> Tableau:
            extra = {} if lower is None else {"lower_order_final": nfe < lower}
            made = solvers.get(solver, **options, **extra)
            return made(p, grid(p, made.steps(nfe)))

        found[name] = (start, build)

    official = {"logSNR": "logsnr", "time_uniform": "uniform", "time_quadratic": "quadratic"}
    for skip, grid in official.items():
        stop = _on(grid, stop=True)
        for order in (2, 3):
            published = {"as_published": True} if order == 3 else {}
            name = f"dpm-solver* multistep[dpmsolver++,o{order},{skip}]"
            add("vp", name, "dpm_solver_pp", stop, 10, order=order, **published)
            name = f"dpm-solver* multistep[dpmsolver,o{order},{skip}]"
            add("vp", name, "dpm_solver", stop, 10, order=order, method="multistep", **published)
    single = "dpm-solver* singlestep[dpmsolver++,o3,logSNR], evenly spaced"  # the official steps are not
    add("vp", single, "dpm_solver_pp", _on("logsnr", stop=True), order=3, method="fast")
    for order in (2, 3):
        add("vp", f"UniPC* bh2,o{order},logSNR", "unipc", _on("logsnr", stop=True), order=order)
        vary = {"variant": "vary_coeff", "as_published": True}
        add("vp", f"UniPC* vary_coeff,o{order},logSNR", "unipc", _on("logsnr", stop=True), order=order, **vary)
        add("vp", f"df UniPCMultistep[bh2,o{order},use_exponential]", "unipc", _on("logsnr"), order=order)
        add("vp", f"df UniPCMultistep[bh2,o{order},use_karras]", "unipc", _on("karras"), order=order)
        published = {"as_published": True} if order == 3 else {}
        name = f"df DPMSolverMultistep[++,o{order},lu_lambdas]"
        add("vp", name, "dpm_solver_pp", _on("logsnr"), 15, order=order, **published)
        name = f"df DPMSolverMultistep[++,o{order},use_karras]"
        add("vp", name, "dpm_solver_pp", _on("karras"), 15, order=order, **published)
    add("vp", "df DEISMultistep[o3,use_karras]", "deis", _wasted, order=3, variable="lam")
    add("vp", "df LMSDiscrete[use_karras]", "deis", _on("karras"), order=4, variable="rho")

    for short, grid in {"karras": "karras", "exp": "logsnr"}.items():
        for order in (2, 3):
            name = f"df DEISMultistep[o{order},end=0.002]{{{short}}}"
            add("edm", name, "deis", _on(grid, stop=True), 15, order=order, variable="lam")
            add("edm", f"df UniPCMultistep[bh2,o{order}]{{{short}}}", "unipc", _on(grid), order=order)
            add(
                "edm",
                f"df UniPCMultistep[bh2,o{order},end=0.002]{{{short}}}",
                "unipc",
                _on(grid, stop=True),
                order=order,
            )
        stop, unipc = _on(grid, stop=True), "df UniPCMultistep"
        add("edm", f"{unipc}[bh1,o3,end=0.002]{{{short}}}", "unipc", stop, order=3, variant="bh1")
        add("edm", f"{unipc}[bh2,o3,eps,end=0.002]{{{short}}}", "unipc", stop, order=3, prediction="eps")
        add("edm", f"kd sample_dpmpp_2m{{{short}}}", "dpm_solver_pp", _on(grid), order=2)
        heun = {"order": 2, "form": "heun"}
        add("edm", f"kd sample_dpmpp_2m_sde[eta=0,heun]{{{short}}}", "dpm_solver_pp", _on(grid), **heun)
        add("edm", f"kd sample_lms{{{short}}}", "deis", _on(grid), order=4, variable="rho")

    for order in (1, 2, 3):
        add("flow", f"df UniPCMultistep[bh2,o{order},flow]", "unipc", _near_one(1e-6), order=order)
    for order in (2, 3):
        published = {"as_published": True} if order == 3 else {}
        name = f"df DPMSolverMultistep[++,o{order},flow]"
        add("flow", name, "dpm_solver_pp", _near_one(1e-3), 15, order=order, **published)
    single = "df DPMSolverSinglestep[++,o2,flow]"
    add("flow", single, "dpm_solver_pp", _near_one(1e-3), order=2, method="singlestep")
    return found


def with_statistics(measured: Statistics) -> dict[str, tuple[str, Build]]:
    """DPM-Solver-v3's set-ups, with statistics of the model that `jdiff.statistics` measured."""
    found: dict[str, tuple[str, Build]] = {}
    for skip, grid in {"logSNR": "logsnr", "time_uniform": "uniform"}.items():
        for order in (2, 3):
            for name, corrector in {"corrector": "pseudo", "no corrector": None}.items():
                solver = solvers.get("dpm_solver_v3", statistics=measured, order=order, corrector=corrector)
                build = lambda p, nfe, s=solver, g=grid: s(p, times.ALL[g](p, nfe, end=p.t_min))
                found[f"dpm-solver-v3* o{order},{skip},{name}"] = ("vp", build)
    return found


SETUPS = _setups()
