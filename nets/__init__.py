"""Networks in Flax NNX. A net is called as `net(x, t, y=None)` and knows no process and no solver.

x is (batch, *size, channels), t a time of order 1 (a scalar, one a sample, or any shape that broadcasts against x), y
integer labels, or what the net's docstring says. The output has x's shape. A net is a pytree of parameters:
`graphdef, params = nnx.split(net)` once, then plain jit, grad and scan over `nnx.merge(graphdef, params)(x, t, y)`.

Its blocks can be run one by one (`net.embed`, `net.run`, `net.project`, `net.features`: see `Net`), and its layers,
token mixers and blocks be taken over (`intercept`, `replace`).
"""

from .autoencoder import AutoencoderKL as AutoencoderKL
from .autoencoder import VQAutoencoder as VQAutoencoder
from .conditioning import Text as Text
from .dit import DiT as DiT
from .dit import SiT as SiT
from .graph import GraphNet as GraphNet
from .hooks import intercept as intercept
from .hooks import replace as replace
from .layers import REMAT as REMAT
from .macs import macs as macs
from .mmdit import MMDiT as MMDiT
from .net import Net as Net
from .noise_prompt import NoisePromptNet as NoisePromptNet
from .points import PointDiT as PointDiT
from .presets import PRESETS as PRESETS
from .presets import Preset as Preset
from .presets import build as build
from .unet import UNet as UNet
from .uvit import UViT as UViT

__all__ = [
    "PRESETS",
    "REMAT",
    "AutoencoderKL",
    "DiT",
    "GraphNet",
    "MMDiT",
    "Net",
    "NoisePromptNet",
    "PointDiT",
    "Preset",
    "SiT",
    "Text",
    "UNet",
    "UViT",
    "VQAutoencoder",
    "build",
    "intercept",
    "macs",
    "replace",
]
