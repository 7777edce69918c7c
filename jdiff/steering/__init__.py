"""Steering: sequential Monte Carlo around a Stepper, and the potentials that make a target law of it.

out = steering.sample(denoiser, tableau, x, key, steering.fk(reward, 2.0), groups=8)
out.x, out.log_z, out.info.ess
"""

from jdiff.steering.draws import posterior_draws
from jdiff.steering.fk import Rewards, best, fk, guided, host_reward
from jdiff.steering.meshes import exchange, traffic
from jdiff.steering.resampling import ess, in_place, resample
from jdiff.steering.smc import NONE, Info, Particles, Potential, Result, Step, gather, run, sample, smc

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
