"""The probability-flow ODE with adaptive steps: samples, log-likelihoods, reference trajectories. On Diffrax.

A step size that depends on the state makes a loop of unknown length, so nothing here is a tableau. Every sample has
its own step sizes (per_sample=True): what comes out does not depend on the batch it is in, as everywhere in jdiff;
the network still sees the whole batch at once, with a time a sample.

The independent variable u and the state z = x / c that are integrated:

    "angle"  phi = atan2(sigma, alpha)   c = hypot(alpha, sigma)   dz/dphi = cos(phi) eps - sin(phi) x0
    "lam"    half log-SNR                c = hypot(alpha, sigma)   dz/dlam = -sin(phi) cos(phi) dz/dphi
    "sigma"  rho = sigma/alpha           c = alpha                 dz/drho = eps
    "t"      the process's own time      c = 1                     dx/dt = velocity

The angle is finite at both ends of every process and its slope is smooth there, so it alone may start at alpha = 0
and end at sigma = 0, and z keeps the size of data and noise, which is what atol is measured by.
A denoiser's carry starts afresh at every evaluation: caches make no sense between points that may be rejected.
"""

from .diffeq import Info
from .dpm import dpm_solver_adaptive
from .likelihood import bits_per_dim, log_likelihood
from .samples import reference, sample
from .variables import VARIABLES

__all__ = ["VARIABLES", "Info", "bits_per_dim", "dpm_solver_adaptive", "log_likelihood", "reference", "sample"]
