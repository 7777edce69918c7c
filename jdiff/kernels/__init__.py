"""Attention: one definition, and a kernel for each accelerator beside it.

    out = kernels.attention(q, k, v, mask=kernels.masks.window((32, 32), 8.0))      # (b, n, heads, d)
    net = nets.DiT(..., attention=kernels.attention)
    kernels.choice(q.shape, platform="tpu")                                         # which path, and why

`reference` says what is computed; `tpu` and `gpu` are flash attention in Pallas, the second taken only by name; `ring`
and `ulysses` are for sequences that are split over a mesh.
"""

from jdiff.kernels import masks as masks
from jdiff.kernels.dispatch import IMPLEMENTATIONS, PLATFORMS, Choice, attention, choice, flops
from jdiff.kernels.masks import Mask
from jdiff.kernels.sequence import ring, ulysses

__all__ = ["IMPLEMENTATIONS", "PLATFORMS", "Choice", "Mask", "attention", "choice", "flops", "masks", "ring", "ulysses"]
