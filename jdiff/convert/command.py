"""The command `jdiff convert`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HELP = """Weights of published nets to one .safetensors file of ours, and back. Nothing in the file given is executed.

  jdiff convert DiT-XL-2-256x256.pt --layout dit --net DiT-XL/2 --size 32 --channels 4 \\
      --net-options num_classes 1000 learn_sigma True
  jdiff convert SiT-XL-2-256x256.pt --layout dit --net SiT-XL/2 --size 32 --channels 4 --net-options num_classes 1000
  jdiff convert edm-cifar10-32x32-cond-vp.pkl --layout edm --net UNet-DDPM++ --net-options num_classes 10
  jdiff convert edm-imagenet-64x64-cond-adm.pkl --layout edm --net UNet-ADM-64 --size 64 \\
      --net-options num_classes 1000 time_scale 1.0
  jdiff convert 64x64_diffusion.pt --layout guided-diffusion-64 --net UNet-ADM-64 --size 64 \\
      --net-options num_classes 1000 null_class False learn_sigma True
  jdiff convert v1-5-pruned.ckpt --layout sd-vae --net AutoencoderKL --size 512
  jdiff convert imagenet256_uvit_large.pth --layout uvit --net UViT-L/2 --size 32 --channels 4 \\
      --net-options num_classes 1000
  jdiff convert sd3_medium.safetensors --layout sd3 --net MMDiT-SD3 --size 128 --channels 16
  jdiff convert checkpoint_24.pth --layout score-sde --net UNet-NCSN++-256 --size 256
  jdiff convert vae.safetensors --layout sd-vae --back --out official.safetensors

The net is then `net, params, meta = jdiff.checkpoint.load_params("converted.safetensors")`. Layouts:

"""


@dataclass(frozen=True)
class ConvertConfig:
    layout: str  # where the parameters lie there: one of those above
    net: str | None = None  # the net of ours that they fit, a name of `jdiff list nets`; with --back the file says it
    size: int = 32  # height and width of its images or latents
    channels: int = 3  # of its images or latents
    net_options: dict[str, str] = field(default_factory=dict)  # more of the net's arguments: name value name value ..
    out: Path = Path("converted.safetensors")  # the file to write
    ema: bool = True  # averaged weights, where the file has them beside the others
    resize: bool = False  # weights of another image size: learned positions are interpolated
    back: bool = False  # the file given is ours; write the layout's names


def convert(file: Path, config: ConvertConfig) -> str:
    """Convert `file`, write config.out, and say in a line what was done."""
    from flax import nnx

    from jdiff import convert, nets
    from jdiff.checkpoint import load_params, write_net

    if config.out.suffix != ".safetensors":
        raise ValueError(f"--out is {str(config.out)!r}; expected a name that ends in .safetensors")
    if config.back:
        net, _, _ = load_params(file)
        convert.save(net, config.layout, config.out)
        return f"{config.out}: {net.name} under the names of {config.layout}"
    if config.net is None:
        raise ValueError("give --net, the net of ours that the weights fit: a name of `jdiff list nets`")
    kind = config.net
    options = {name: _value(text) for name, text in config.net_options.items()}
    make = lambda: nets.build(kind, config.size, config.channels, rngs=nnx.Rngs(0), **options)
    net, left = convert.load(file, config.layout, nnx.eval_shape(make), ema=config.ema, resize=config.resize)
    write_net(net, config.out, source=file.name, layout=config.layout)
    shown = f"; left aside: {', '.join(left[:10])}{', ..' if len(left) > 10 else ''}" if left else ""
    count = sum(v.size for _, v in nnx.to_flat_state(nnx.state(net)))
    return f"{config.out}: {kind}, {count:,} parameters{shown}"


def run(args: Sequence[str]) -> None:
    import tyro

    from jdiff.convert import LAYOUTS

    listed = "\n".join(f"  {name:20s}{layout.doc}" for name, layout in LAYOUTS.items())
    named = bool(args) and not args[0].startswith("-")
    config = tyro.cli(ConvertConfig, args=args[named:], prog="jdiff convert FILE", description=HELP + listed)
    if not named:
        raise ValueError("name the weights file first: jdiff convert FILE --layout .. --net ..")
    print(convert(Path(args[0]), config))


def _value(text: str) -> Any:
    """A number, true, false, null or a list as JSON has them (or Python); any other word is itself."""
    try:
        return json.loads(text.replace("True", "true").replace("False", "false").replace("None", "null"))
    except json.JSONDecodeError:
        return text
