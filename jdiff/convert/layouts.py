"""Where the parameters of published nets lie, and where those of ours: one table a layout, read in both directions.

A layout is a function from one of our nets to rows (their names, our path, how the arrays correspond). Where our blocks
are stacked, a row says which slice is meant. Nothing here knows files. The rows are in `transformers` and
`convolutional`; here is what they are called, and where files keep averages.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdiff.nets import AutoencoderKL, DiT, MMDiT, UNet, UViT, VQAutoencoder

from .convolutional import (
    autoencoder,
    autoencoder_diffusers,
    autoencoder_vq,
    edm,
    guided,
    score_sde,
    unet_diffusers,
    vq_diffusers,
)
from .rows import Rows
from .torch_file import WeightsError
from .transformers import SD3, SD3_DIFFUSERS, dit, dit_diffusers, mmdit, uvit

# --------------------------------------------------------------------------------------- averages beside the weights
Named = Mapping[str, np.ndarray]


def shadows(arrays: Named, names: Sequence[str]) -> dict[str, str]:
    """score_sde's averages: a list without names, in the order of the trained parameters of `model`; {} if none.

    Its buffers (sigmas) and the random frequencies of the first module are not trained, and are the model's own.
    """
    found = [name for name in arrays if name.startswith("ema.shadow_params.")]  # in the list's order
    model = {n.removeprefix("model.").removeprefix("module."): n for n in arrays if n.startswith("model.")}
    trained = [n for n in model if not re.fullmatch(r"sigmas|all_modules\.0\.W", n)]
    if found and [arrays[n].shape for n in found] != [arrays[model[n]].shape for n in trained]:
        raise WeightsError(
            f"the {len(found)} arrays of ema.shadow_params are not the {len(trained)} trained ones of the model, one "
            "after another; without averages (--no-ema) the model's own are read"
        )
    return model | dict(zip(trained, found, strict=True)) if found else {}


def undotted(arrays: Named, names: Sequence[str]) -> dict[str, str]:
    """Latent diffusion's averages: under model_ema, dots left out of the names; {} if none."""
    place = {name: f"model_ema.{('diffusion_model.' + name).replace('.', '')}" for name in names}
    return {name: there for name, there in place.items() if there in arrays}


class Layout(NamedTuple):
    """A published net's table, `nets` of ours that it fits, and how its files differ from it."""

    rows: Callable[[Any], Rows]
    nets: tuple[type, ...]
    prefixes: tuple[str, ...]  # that the names may have; those of averages begin with "ema"
    ignored: str  # a pattern of names: buffers, and parts that are used in training alone
    doc: str
    averages: Callable[[Named, Sequence[str]], dict[str, str]] = lambda arrays, names: {}  # name -> name in the file
    older: tuple[tuple[str, str], ...] = ()  # parts of names in files of older versions, and what they are now


ATTENTION_BLOCK = ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))
LAYOUTS = {
    "dit": Layout(dit, (DiT,), ("", "ema.", "model."), r"pos_embed", "official DiT and SiT (.pt)"),
    "uvit": Layout(uvit, (UViT,), ("",), r"(?!)", "official U-ViT (.pth)"),
    "sd3": Layout(
        mmdit(SD3), (MMDiT,), ("model.diffusion_model.", ""), r"(?!)", "Stable Diffusion 3's MM-DiT (.safetensors)"
    ),
    "edm": Layout(
        edm, (UNet,), ("ema.model.", "model.", ""), r".*resample_filter|map_augment\.weight|u",
        "EDM's DDPM++, NCSN++ and ADM (.pkl)",
    ),
    "guided-diffusion": Layout(guided, (UNet,), ("",), r"(?!)", "guided-diffusion's ADM (.pt), but for 64 x 64"),
    "guided-diffusion-64": Layout(
        functools.partial(guided, new_order=True), (UNet,), ("",), r"(?!)",
        "its ADM for 64 x 64, and any of use_new_attention_order",
    ),
    "ldm": Layout(
        guided, (UNet,), ("model.diffusion_model.", ""), r"(?!)", "latent diffusion's U-Net, as in Stable Diffusion 1",
        undotted,
    ),
    "score-sde": Layout(
        score_sde, (UNet,), ("model.module.", "module.", ""), r"sigmas", "score_sde_pytorch's DDPM++ and NCSN++ (.pth)",
        shadows,
    ),
    "sd-vae": Layout(
        autoencoder, (AutoencoderKL,), ("first_stage_model.", "state_dict.", ""), r"loss\..*|model_ema\..*",
        "Stable Diffusion's autoencoder (.ckpt)",
    ),
    "ldm-vq": Layout(
        autoencoder_vq, (VQAutoencoder,), ("first_stage_model.", ""), r"loss\..*|model_ema\..*",
        "latent diffusion's autoencoder with a codebook (.ckpt)",
    ),
    "diffusers-dit": Layout(dit_diffusers, (DiT,), ("",), r"pos_embed\.pos_embed", "diffusers' DiTTransformer2DModel"),
    "diffusers-sd3": Layout(
        mmdit(SD3_DIFFUSERS), (MMDiT,), ("",), r"(?!)", "diffusers' SD3Transformer2DModel"
    ),
    "diffusers-unet": Layout(unet_diffusers, (UNet,), ("",), r"(?!)", "diffusers' UNet2DConditionModel (SD 1)"),
    "diffusers-vae": Layout(
        autoencoder_diffusers, (AutoencoderKL,), ("",), r"(?!)", "diffusers' AutoencoderKL", older=ATTENTION_BLOCK
    ),
    "diffusers-vq": Layout(
        vq_diffusers, (VQAutoencoder,), ("",), r"(?!)", "diffusers' VQModel", older=ATTENTION_BLOCK
    ),
}  # fmt: skip
"""By name."""
