"""jdiff: diffusion and flow generative models in JAX. Any process, any solver, any guidance, any network.

import jax, jdiff
process  = jdiff.process.edm()
denoiser = jdiff.denoiser(my_network, process, prediction="x0")      # my_network(x, t) -> x0
solver   = jdiff.solvers.dpm_solver_pp(order=2)(process, jdiff.times.karras(process, 10))
x        = jdiff.sample(denoiser, solver, process.prior(jax.random.key(0), (16, 32, 32, 3)))
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if not os.path.isdir(os.path.join(os.path.dirname(__file__), "solvers")):  # a checkout where links are plain files
    __path__.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jdiff import exact, noise, predict, process, times
from jdiff.denoiser import Denoiser, denoiser, edm_precondition
from jdiff.execute import Info, State, Stepper, Trajectory, rows, run, sample, stepper
from jdiff.inversion import invert, registers
from jdiff.tableau import Record, Tableau
from jdiff.trace import Solver, trace

if TYPE_CHECKING:
    from jdiff import analysis as analysis
    from jdiff import anchored as anchored
    from jdiff import checkpoint as checkpoint
    from jdiff import data as data
    from jdiff import ema as ema
    from jdiff import exposure as exposure
    from jdiff import fields as fields
    from jdiff import fit as fit
    from jdiff import gradients as gradients
    from jdiff import graphs as graphs
    from jdiff import guidance as guidance
    from jdiff import interpolants as interpolants
    from jdiff import kernels as kernels
    from jdiff import losses as losses
    from jdiff import mesh as mesh
    from jdiff import metrics as metrics
    from jdiff import multitask as multitask
    from jdiff import nets as nets
    from jdiff import ode as ode
    from jdiff import order as order
    from jdiff import reproduce as reproduce
    from jdiff import schedules as schedules
    from jdiff import solvers as solvers
    from jdiff import starts as starts
    from jdiff import steering as steering
    from jdiff import train as train

__version__ = "0.1.0"

_LAZY = {
    "analysis",
    "anchored",
    "checkpoint",
    "data",
    "ema",
    "exposure",
    "fields",
    "fit",
    "gradients",
    "graphs",
    "guidance",
    "interpolants",
    "kernels",
    "losses",
    "mesh",
    "metrics",
    "multitask",
    "nets",
    "ode",
    "order",
    "reproduce",
    "schedules",
    "solvers",
    "steering",
    "starts",
    "train",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"jdiff.{name}")
    raise AttributeError(f"module 'jdiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | _LAZY)


__all__ = [
    "Denoiser", "Info", "Record", "Solver", "State", "Stepper", "Tableau", "Trajectory", "denoiser",
    "edm_precondition", "exact", "invert", "noise", "predict", "process", "registers", "rows", "run", "sample",
    "stepper", "times", "trace",
]  # fmt: skip
