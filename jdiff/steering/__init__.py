"""Steering: sequential Monte Carlo around a Stepper, and the potentials that make a target law of it.

out = steering.sample(denoiser, tableau, x, key, steering.fk(reward, 2.0), groups=8)
out.x, out.log_z, out.info.ess
"""

from jdiff.steering.correctors import Corrector, anneal, correct, corrected_cfg, geometric, product, tilt
from jdiff.steering.draws import posterior_draws
from jdiff.steering.fk import Rewards, best, fk, guided, host_reward
from jdiff.steering.meshes import exchange, traffic
from jdiff.steering.resampling import ess, in_place, resample
from jdiff.steering.running import Result, run, sample
from jdiff.steering.smc import NONE, Info, Particles, Potential, Step, gather, smc
from jdiff.steering.superposition import superpose

__all__ = [
    "NONE",
    "Corrector",
    "Info",
    "Particles",
    "Potential",
    "Result",
    "Rewards",
    "Step",
    "anneal",
    "best",
    "correct",
    "corrected_cfg",
    "ess",
    "exchange",
    "fk",
    "gather",
    "geometric",
    "guided",
    "host_reward",
    "in_place",
    "posterior_draws",
    "product",
    "resample",
    "run",
    "sample",
    "smc",
    "superpose",
    "tilt",
    "traffic",
]
