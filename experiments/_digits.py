"""Trained digits models that experiments share: trained once into runs/models, found there afterwards."""

from pathlib import Path
from typing import Any

from jdiff import train

KINDS: dict[str, dict[str, Any]] = {
    "flow": {"prediction": "velocity", "weighting": "flow", "time": "logit_normal"},
    "vp_linear": {"prediction": "eps", "weighting": "none", "time": "uniform"},
    "edm": {"prediction": "x0", "weighting": "edm", "time": "log_normal"},
}


def trained(
    process: str = "flow",
    seed: int = 0,
    steps: int = 4000,
    folder: str = "runs/models",
    width: int = 64,
    depth: int = 4,
) -> Path:
    """The run folder of a small class-conditional DiT on the 8 x 8 digits; `train.denoiser_from` reads it.

    process: "flow" (velocity, the model of fast-sampling), "vp_linear" (eps) or "edm" (preconditioned x0).
    """
    if process not in KINDS:
        raise ValueError(f"process is {process!r}; expected one of {', '.join(KINDS)}")
    size = "" if (depth, width) == (4, 64) else f"-{depth}x{width}"
    config = train.TrainConfig(
        out=f"{folder}/digits-{process}-{steps}-{seed}{size}",
        net="DiT",
        net_options={"patch": 2, "width": width, "depth": depth, "heads": 4, "unroll": depth},
        process=process,
        **KINDS[process],
        batch=64,
        steps=steps,
        learning_rate=1.5e-3,
        seed=seed,
        tensorboard=False,
    )
    return train.train(config).out
