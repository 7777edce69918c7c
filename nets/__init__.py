"""Networks in Flax NNX. A net is called as `net(x, t, y=None)` and knows no process and no solver.

x is (batch, height, width, channels), t a time of order 1 (a scalar, one a sample, or any shape that
broadcasts against x), y integer labels. The output has x's shape. A net is a pytree of parameters:
`graphdef, params = nnx.split(net)` once, then plain jit, grad and scan over
`nnx.merge(graphdef, params)(x, t, y)`.
"""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import nnx

from .dit import DiT as DiT
from .graph import GraphNet as GraphNet
from .layers import REMAT as REMAT
from .macs import macs as macs
from .noise_prompt import NoisePromptNet as NoisePromptNet
from .unet import UNet as UNet

__all__ = ["PRESETS", "REMAT", "DiT", "GraphNet", "NoisePromptNet", "Preset", "UNet", "build", "macs"]


class Preset(NamedTuple):
    """A named net: its class, the options that the name stands for, and one line about it."""

    net: type[DiT] | type[UNet]
    options: dict[str, Any]
    doc: str


def _dit(size: str, patches: Sequence[int], doc: str, **options: int) -> dict[str, Preset]:
    return {f"DiT-{size}/{p}": Preset(DiT, {"patch": p, **options}, f"{doc}, patch {p}") for p in patches}


PRESETS: dict[str, Preset] = {
    "DiT": Preset(DiT, {}, "diffusion transformer with adaLN-Zero; give patch, width, depth and heads"),
    **_dit("Ti", (1, 2), "small DiT of our own for digits, 1.3M parameters", depth=4, width=128, heads=4),
    **_dit("S", (2, 4, 8), "DiT-S of 2212.09748, 33M parameters", depth=12, width=384, heads=6),
    **_dit("B", (2, 4, 8), "DiT-B of 2212.09748, 130M parameters", depth=12, width=768, heads=12),
    **_dit("L", (2, 4, 8), "DiT-L of 2212.09748, 458M parameters", depth=24, width=1024, heads=16),
    **_dit("XL", (2, 4, 8), "DiT-XL of 2212.09748, 675M parameters", depth=28, width=1152, heads=16),
    "UNet": Preset(UNet, {}, "ADM's U-Net; give width, multipliers and blocks"),
    "UNet-Ti": Preset(
        UNet,
        {"width": 32, "multipliers": (1, 2), "blocks": 1, "head_width": 32},
        "small U-Net of our own for digits, 0.8M parameters",
    ),
    "UNet-CIFAR": Preset(
        UNet,
        {"width": 128, "multipliers": (1, 2, 2, 2), "blocks": 2, "attention_at": (16,), "head_width": None},
        "DDPM's widths for 32 x 32 (2006.11239) in ADM's blocks, 42.9M parameters (DDPM: 35.7M)",
    ),
    "UNet-ADM-64": Preset(
        UNet,
        {
            "width": 192,
            "multipliers": (1, 2, 3, 4),
            "blocks": 3,
            "attention_at": (32, 16, 8),
            "head_width": 64,
        },
        "ADM's net for 64 x 64 ImageNet (2105.05233), 296M parameters",
    ),
}
"""Nets by name. Sizes are counted at the papers' own image sizes and labels."""


def build(name: str, image_size: int, channels: int, *, rngs: nnx.Rngs, **options: Any) -> DiT | UNet:
    """The net called `name` in PRESETS, for images (image_size, image_size, channels).

    `options` are the constructor's and win over the preset's. `build(**net.config, rngs=rngs)` is `net` with
    new parameters. ValueError for an unknown name (with the nearest one) and for what the class refuses.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise ValueError(f"unknown net {name!r}; did you mean {nearest[0]!r}? Known: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    net = preset.net(image_size, channels, **{**preset.options, **options}, rngs=rngs)
    net.name = name
    return net
