"""Guidance: functions Denoiser -> Denoiser. What is nonlinear in the network's output belongs here, not in solvers.

`ALL` maps names to what wraps a denoiser; docs/guidance.md says which to use and what each costs.
"""

from collections.abc import Callable
from typing import Any

from .attention import Head, Hunt, head_hunter, head_mask, perturbed, soft_pag
from .branches import combine
from .compose import Factor, Track, compose, factor_graph, mix, timeline
from .free import apg, autoguidance, cfg, cfg_pp, cfg_zero
from .gradient import classifier, dps, flowchef, loss_guidance, softplus
from .parts import alone
from .reflection import reflection
from .residual import residual_cfg
from .schedule import at_steps, beta, cosine, linear, score_units, sine, step_gain
from .search import Pairs, Reflected, fit_noise_prompt, golden_noise, golden_pairs, reflect_loop
from .threshold import threshold

ALL: dict[str, Callable[..., Any]] = {
    "cfg": cfg,
    "cfg_pp": cfg_pp,
    "cfg_zero": cfg_zero,
    "apg": apg,
    "autoguidance": autoguidance,
    "residual_cfg": residual_cfg,
    "reflection": reflection,
    "soft_pag": soft_pag,
    "classifier": classifier,
    "loss_guidance": loss_guidance,
    "dps": dps,
    "flowchef": flowchef,
    "compose": compose,
    "mix": mix,
    "factor_graph": factor_graph,
    "timeline": timeline,
    "threshold": threshold,
}

__all__ = [
    "ALL", "Factor", "Head", "Hunt", "Pairs", "Reflected", "Track", "alone", "apg", "at_steps", "autoguidance", "beta",
    "cfg", "cfg_pp", "cfg_zero", "classifier", "combine", "compose", "cosine", "dps", "factor_graph",
    "fit_noise_prompt", "flowchef", "golden_noise", "golden_pairs", "head_hunter", "head_mask", "linear",
    "loss_guidance", "mix", "perturbed", "reflect_loop", "reflection", "residual_cfg", "score_units", "sine",
    "soft_pag", "softplus", "step_gain", "threshold", "timeline",
]  # fmt: skip
