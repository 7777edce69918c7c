"""Nets by name."""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import nnx

from .autoencoder import AutoencoderKL, VQAutoencoder
from .dit import DiT, SiT
from .mmdit import MMDiT
from .net import Net
from .patches import Size
from .points import PointDiT
from .unet import UNet
from .uvit import UViT


class Preset(NamedTuple):
    """A named net: its class, the options that the name stands for, and one line about it."""

    net: type[Net]
    options: dict[str, Any]
    doc: str


_SIZES = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}
_MILLIONS = {"S": 33, "B": 130, "L": 458, "XL": 675}


def _transformers(net: type[Net], source: str, patches: Sequence[int]) -> dict[str, Preset]:
    return {
        f"{net.__name__}-{size}/{p}": Preset(
            net,
            {"patch": p, **_SIZES[size]},
            f"{net.__name__}-{size} of {source}, {_MILLIONS[size]}M parameters, patch {p}",
        )
        for size in _SIZES
        for p in patches
    }


_SONG = {
    "width": 128,
    "multipliers": (2, 2, 2),
    "blocks": 4,
    "attention_at": (16,),
    "head_width": None,
    "time_scale": 1.0,
}
_SD3 = {"patch": 2, "width": 1536, "depth": 24, "heads": 24, "context": 4096, "pooled": 2048}
_TINY = {"depth": 4, "width": 128, "heads": 4}

PRESETS: dict[str, Preset] = {
    "DiT": Preset(DiT, {}, "diffusion transformer with adaLN-Zero; give patch, width, depth and heads"),
    **{
        f"DiT-Ti/{p}": Preset(
            DiT, {"patch": p, **_TINY}, f"small DiT of our own for digits, 1.3M parameters, patch {p}"
        )
        for p in (1, 2)
    },
    **_transformers(DiT, "2212.09748", (2, 4, 8)),
    "SiT": Preset(SiT, {}, "DiT with SiT's time and channels; give patch, width, depth and heads"),
    **_transformers(SiT, "2401.08740", (2, 4, 8)),
    "PointDiT": Preset(PointDiT, {}, "DiT of point clouds (2307.01831); image_size is voxels an axis; options of DiT"),
    "UViT": Preset(UViT, {}, "transformer with long skips, all is a token; give patch, width, depth and heads"),
    **{
        f"UViT-{size}/{patch}": Preset(
            UViT,
            {"patch": patch, "width": width, "depth": depth, "heads": heads},
            f"U-ViT-{size} of 2209.12152, {millions}M parameters, patch {patch}",
        )
        for size, width, depth, heads, millions in (
            ("S", 512, 12, 8, 44),
            ("M", 768, 16, 12, 131),
            ("L", 1024, 20, 16, 287),
            ("H", 1152, 28, 16, 501),
        )
        for patch in (2, 4)
    },
    "MMDiT": Preset(MMDiT, {}, "two streams, joint attention; give patch, width, depth, heads, context, pooled"),
    "MMDiT-SD3": Preset(
        MMDiT,
        {**_SD3, "positions_table": 192},
        "Stable Diffusion 3 medium (2403.03206), 2.03B parameters and a table of positions, told a text",
    ),
    "MMDiT-SD3.5-medium": Preset(
        MMDiT,
        {**_SD3, "positions_table": 384, "qk_norm": True, "dual": 13},
        "Stable Diffusion 3.5 medium, 2.24B parameters and a table of positions, told a text",
    ),
    "AutoencoderKL": Preset(AutoencoderKL, {}, "Stable Diffusion's autoencoder, 83.7M parameters; not a net of (x, t)"),
    "VQAutoencoder": Preset(
        VQAutoencoder, {}, "latent diffusion's autoencoder with a codebook (VQ-f4), 55.3M parameters; not of (x, t)"
    ),
    "UNet": Preset(UNet, {}, "U-Net of ADM, score SDE or latent diffusion; give width, multipliers, blocks, style"),
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
    "UNet-DDPM++": Preset(
        UNet, {**_SONG, "style": "ddpm++"}, "DDPM++ for 32 x 32 as in EDM (2206.00364), 55.7M parameters; time_scale 1"
    ),
    "UNet-NCSN++": Preset(
        UNet, {**_SONG, "style": "ncsn++"}, "NCSN++ for 32 x 32 as in EDM (2206.00364), 56.4M parameters; time_scale 1"
    ),
    "UNet-NCSN++-256": Preset(
        UNet,
        {**_SONG, "multipliers": (1, 1, 2, 2, 2, 2, 2), "blocks": 2, "style": "ncsn++-skip"},
        "score SDE's NCSN++ for 256 x 256 (2011.13456), 65.6M parameters; time_scale 1",
    ),
    "UNet-LDM": Preset(
        UNet,
        {
            "width": 320,
            "multipliers": (1, 2, 4, 4),
            "blocks": 2,
            "attention_at": (64, 32, 16),
            "heads": 8,
            "style": "ldm",
            "context": 768,
        },
        "latent diffusion's U-Net as in Stable Diffusion 1 for 64 x 64 latents, 860M parameters, told a text",
    ),
}
"""Nets by name. Sizes are counted at the papers' own image sizes and labels."""


def build(name: str, image_size: Size, channels: int, *, rngs: nnx.Rngs, **options: Any) -> Any:
    """The net called `name` in PRESETS, for images (image_size, image_size, channels), or (*image_size, channels).

    `options` are the constructor's and win over the preset's. `build(**net.config, rngs=rngs)` is `net` with
    new parameters. ValueError for an unknown name (with the nearest one) and for what the class refuses.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise ValueError(f"unknown net {name!r}; did you mean {nearest[0]!r}? Known: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    make: Any = preset.net
    known = [p for kind in make.__mro__ if kind is not object for p in inspect.signature(kind.__init__).parameters]
    if unknown := [option for option in options if option not in known]:
        nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)
        raise ValueError(f"{name} has no option {unknown[0]!r}; did you mean {nearest[0]!r}?")
    net = make(image_size, channels, **{**preset.options, **options}, rngs=rngs)
    net.name = name
    return net
