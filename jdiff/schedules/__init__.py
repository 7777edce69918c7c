"""A time an element: frames, tokens, pixels or modalities of one sample, each at its own noise level.

    M     = schedules.staircase(frames=16, evaluations=20, lag=5)          # who moves when: (steps + 1, 16)
    table = schedules.scheduled(solvers.unipc(3)(process, times), M)       # any solver, its history per frame
    video = jdiff.sample(denoiser, table, noise)                           # noise (batch, 16): a frame is one number
    video = jdiff.sample(denoiser, schedules.along(table, 0, rank=4), noise)   # noise (batch, 16, h, w, c)

The network sees a time for each element (`t` broadcasts against the sample). `stream` is the endless form, one network
call a frame; `training` has the laws of times to train with.
"""

from . import training
from .matrix import (
    active,
    along,
    autoregressive,
    check,
    given,
    latency,
    scheduled,
    staircase,
    synchronous,
)
from .streaming import Stream, stream

__all__ = [
    "Stream",
    "active",
    "along",
    "autoregressive",
    "check",
    "given",
    "latency",
    "scheduled",
    "staircase",
    "stream",
    "synchronous",
    "training",
]
