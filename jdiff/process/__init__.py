"""A process is two functions of time: x_t = alpha(t) x0 + sigma(t) eps, eps standard normal (`pfgmpp`: Student's t).

Everything else follows from alpha and sigma: the half log-SNR lam = log(alpha / sigma), the forward SDE
dx = f(t) x dt + g(t) dW, the probability-flow ODE, and the conversions in `jdiff.predict`.

Time: t = 0 is data (alpha = 1, sigma = 0, exactly), t = t_max is noise. `t_min` is the last time a grid
visits before the exact data end where the grid's own formula cannot reach sigma = 0 (log-SNR, Karras).
Time is a scalar or an array that broadcasts against the sample: one time a sample, a frame, a token, a pixel.

Host and device run the same source: NumPy numbers and arrays are computed in float64 by NumPy, JAX arrays
(traced or not) by JAX in their own dtype. Formulas are written so that neither end cancels in float32.

Own processes: subclass `Process`, give `alpha`, `sigma`, `dalpha`, `dsigma` and `t_of_lam`.
"""

from .base import Mismatch, Posterior, Process, Time
from .bridge import BBED, OUVE, Bridge, bbed, brownian_bridge, ouve, sb_ve
from .pfgm import PFGMPP, pfgmpp
from .residual import Residual, rddm, resshift, tabulated
from .reverting import MeanReverting, mean_reverting
from .score_sde import VE, SubVP, subvp, ve
from .shifted import Shifted, shift, shifted
from .straight import EDM, Flow, edm, flow
from .system import System, system
from .terminal import ZeroTerminal, zero_terminal_snr
from .truncated import Relay, Resfusion, relay, resfusion
from .vp import (
    Trigonometric,
    VPCosine,
    VPDiscrete,
    VPLinear,
    trigonometric,
    vp_cosine,
    vp_discrete,
    vp_exponential,
    vp_linear,
)

ALL = {
    "vp_linear": vp_linear,
    "vp_cosine": vp_cosine,
    "vp_discrete": vp_discrete,
    "vp_exponential": vp_exponential,
    "trigonometric": trigonometric,
    "edm": edm,
    "pfgmpp": pfgmpp,
    "flow": flow,
    "mean_reverting": mean_reverting,
    "ve": ve,
    "subvp": subvp,
    "resshift": resshift,
    "rddm": rddm,
    "resfusion": resfusion,
    "relay": relay,
    "brownian_bridge": brownian_bridge,
    "sb_ve": sb_ve,
    "ouve": ouve,
    "bbed": bbed,
}

__all__ = [
    "ALL",
    "BBED",
    "EDM",
    "OUVE",
    "PFGMPP",
    "VE",
    "Bridge",
    "Flow",
    "MeanReverting",
    "Mismatch",
    "Posterior",
    "Process",
    "Relay",
    "Resfusion",
    "Residual",
    "Shifted",
    "SubVP",
    "System",
    "Time",
    "Trigonometric",
    "VPCosine",
    "VPDiscrete",
    "VPLinear",
    "ZeroTerminal",
    "bbed",
    "brownian_bridge",
    "edm",
    "flow",
    "mean_reverting",
    "ouve",
    "pfgmpp",
    "rddm",
    "relay",
    "resfusion",
    "resshift",
    "sb_ve",
    "shift",
    "shifted",
    "subvp",
    "system",
    "tabulated",
    "trigonometric",
    "ve",
    "vp_cosine",
    "vp_discrete",
    "vp_exponential",
    "vp_linear",
    "zero_terminal_snr",
]
