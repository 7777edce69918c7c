"""Steering: sequential Monte Carlo around a Stepper, and the potentials that make a target law of it.

out = steering.sample(denoiser, tableau, x, key, steering.fk(reward, 2.0), groups=8)
out.x, out.log_z, out.info.ess
"""

import importlib
from typing import TYPE_CHECKING, Any

from jdiff.steering.draws import posterior_draws
from jdiff.steering.fk import Rewards, best, fk, guided, host_reward
from jdiff.steering.meshes import exchange, traffic
from jdiff.steering.resampling import ess, in_place, resample
from jdiff.steering.smc import NONE, Info, Particles, Potential, Result, Step, gather, run, sample, smc

if TYPE_CHECKING:
    from jdiff.steering.correctors import Corrector as Corrector
    from jdiff.steering.correctors import anneal as anneal
    from jdiff.steering.correctors import correct as correct
    from jdiff.steering.correctors import corrected_cfg as corrected_cfg
    from jdiff.steering.correctors import geometric as geometric
    from jdiff.steering.correctors import product as product
    from jdiff.steering.correctors import tilt as tilt
    from jdiff.steering.superposition import superpose as superpose

_LAZY = {
    **dict.fromkeys(
        ("Corrector", "anneal", "correct", "corrected_cfg", "geometric", "product", "tilt"), "jdiff.steering.correctors"
    ),
    "superpose": "jdiff.steering.superposition",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jdiff.steering' has no attribute {name!r}")


__all__ = [
    "NONE",
    "Info",
    "Particles",
    "Potential",
    "Result",
    "Rewards",
    "Step",
    "best",
    "ess",
    "exchange",
    "fk",
    "gather",
    "guided",
    "host_reward",
    "in_place",
    "posterior_draws",
    "resample",
    "run",
    "sample",
    "smc",
    "traffic",
]
