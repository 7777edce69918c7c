"""Public PyTorch modules of small sizes, the nets of ours that are the same functions, and inputs for both.

Those of diffusers come from its package. Official repositories are imported from the user's own clones: folders named
DiT, SiT, U-ViT, edm, guided-diffusion, score_sde_pytorch, latent-diffusion, sd3-ref and sd3.5 under $JDIFF_OFFICIAL.
Needs the extra `parity`.

    python tests/parity/official.py       writes tests/golden/nets.npz, what the ordinary tests compare with
"""

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SIZE = 8


class Case(NamedTuple):
    """module() -> the PyTorch module; call(module, x, t, y) -> its output; net: name and options of ours."""

    layout: str
    module: Callable[[], Any]
    call: Callable[..., Any]
    net: tuple[str, int, dict[str, Any]]
    classes: int = 0
    text: int = 0
    pooled: int = 0


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The same numbers on both sides: drawn in the order of the names, of a size that keeps signals alive."""
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        w = rng.normal(size=shape) * (np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.2)
        return (w + (len(shape) == 1 and name.endswith("weight"))).astype(np.float32)

    return {name: draw(name, shapes[name]) for name in sorted(shapes)}


def drawn(case: Case, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """`weights` for this case: diffusers' DiT has one embedder, of which every block holds a copy."""
    found = weights(shapes)
    first = lambda name: name.replace("blocks.1.norm1.emb", "blocks.0.norm1.emb")
    return {name: found[first(name)] for name in found} if case.layout == "diffusers-dit" else found


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray, Any]:
    """Samples (2, 8, 8, c), times, and labels, a text's embeddings, or those and its vector."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, SIZE, SIZE, case.net[1])).astype(np.float32)
    # diffusers' DiT spaces its sinusoids by 1 / 127, the official one by 1 / 128: they agree at t = 0 alone
    t = np.asarray([0.3, 0.85], np.float32) * (case.layout != "diffusers-dit")
    y = rng.integers(0, case.classes, 2) if case.classes else None
    if case.text:
        y = rng.normal(size=(2, 5, case.text)).astype(np.float32)
    return x, t, (y, rng.normal(size=(2, case.pooled)).astype(np.float32)) if case.pooled else y


@contextlib.contextmanager
def clone(folder: str, *forget: str) -> Any:
    """Import from a clone; modules whose names begin with `forget` are dropped again, since clones share names."""
    root = Path(os.environ.get("JDIFF_OFFICIAL", "")) / folder
    if "JDIFF_OFFICIAL" not in os.environ or not root.exists():
        raise FileNotFoundError(f"set JDIFF_OFFICIAL to the folder that holds a clone of {folder}")
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name in [n for n in sys.modules if n.split(".")[0] in forget]:
            del sys.modules[name]


def transformer(folder: str, kind: str) -> Callable[[], Any]:
    def build() -> Any:
        with clone(folder, "models"):
            make = getattr(importlib.import_module("models"), kind)
            return make(
                input_size=SIZE, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4, num_classes=5
            )

    return build


def uvit(file: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        with clone("U-ViT", "libs"):
            make = importlib.import_module(f"libs.{file}").UViT
            return make(img_size=SIZE, patch_size=2, in_chans=3, embed_dim=32, depth=4, num_heads=4, **options)

    return build


def sd3(folder: str = "sd3-ref", name: str = "mmdit", use: str = "MMDiT", width: int = 128, **options: Any) -> Any:
    def build() -> Any:
        text = {"target": "torch.nn.Linear", "params": {"in_features": 6, "out_features": width}}
        return module(
            folder, name, f"{name} other_impls", use=use, input_size=None, depth=width // 64, in_channels=3,
            adm_in_channels=4, context_embedder_config=text, pos_embed_max_size=7, num_patches=49, **options,
        )  # fmt: skip

    return build


def edm(kind: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        with clone("edm", "training", "torch_utils", "dnnlib"):
            make = getattr(importlib.import_module("training.networks"), kind)
            return make(SIZE, 3, 3, label_dim=3, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], **options)

    return build


def adm(**options: Any) -> Any:
    with clone("guided-diffusion", "guided_diffusion"):
        make = importlib.import_module("guided_diffusion.unet").UNetModel
        return make(
            SIZE, 3, 128, 6, 1, (2,), channel_mult=(1, 1), num_classes=5, num_heads=2, use_scale_shift_norm=True,
            resblock_updown=True, **options,
        )  # fmt: skip


def score_sde(**options: Any) -> Callable[[], Any]:
    def build() -> Any:
        import torch.utils.cpp_extension as extension

        extension.load = lambda *_, **__: None  # CUDA kernels, for which it has plain PyTorch as well
        with clone("score_sde_pytorch", "models", "op", "sde_lib", "utils"):
            make = importlib.import_module("models.ncsnpp").NCSNpp
            model = {
                "sigma_max": 50.0,
                "sigma_min": 0.01,
                "num_scales": 10,
                "dropout": 0.0,
                "nf": 128,
                "ch_mult": (1, 1),
                "num_res_blocks": 1,
                "attn_resolutions": (4,),
                "resamp_with_conv": True,
                "conditional": True,
                "fir": False,
                "fir_kernel": [1, 3, 3, 1],
                "skip_rescale": True,
                "resblock_type": "biggan",
                "progressive": "none",
                "progressive_input": "none",
                "progressive_combine": "sum",
                "embedding_type": "positional",
                "fourier_scale": 16,
                "init_scale": 0.0,
                "nonlinearity": "swish",
                "beta_min": 0.1,
                "beta_max": 20.0,
                "scale_by_sigma": False,
            } | options
            size = model.pop("image_size", SIZE)
            data = types.SimpleNamespace(image_size=size, num_channels=3, centered=True)
            training = types.SimpleNamespace(continuous=True)
            return make(types.SimpleNamespace(model=types.SimpleNamespace(**model), data=data, training=training))

    return build


def ldm_unet() -> Any:
    with clone("latent-diffusion", "ldm"):
        make = importlib.import_module("ldm.modules.diffusionmodules.openaimodel").UNetModel
        return make(
            image_size=SIZE, in_channels=3, model_channels=128, out_channels=3, num_res_blocks=1, num_heads=2,
            attention_resolutions=(1,), channel_mult=(1, 1), use_spatial_transformer=True, transformer_depth=1,
            context_dim=6, legacy=False, use_checkpoint=False,
        )  # fmt: skip


def ldm_autoencoder() -> Any:
    return _ldm_coders(4, attn_resolutions=[4], double_z=True)


def ldm_vq() -> Any:
    import torch

    parts = _ldm_coders(2, attn_resolutions=[], double_z=False)
    parts["quantize"] = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(9, 2)})  # of taming's, its weights alone
    return parts


def _ldm_coders(moments: int, **options: Any) -> Any:
    import torch

    with clone("latent-diffusion", "ldm"):
        model = importlib.import_module("ldm.modules.diffusionmodules.model")
        options |= {"ch": 128, "out_ch": 3, "ch_mult": (1, 1), "num_res_blocks": 1}
        options |= {"in_channels": 3, "resolution": SIZE, "z_channels": 2}
        parts = {"encoder": model.Encoder(**options), "decoder": model.Decoder(**options)}
    quant = torch.nn.Conv2d(moments, moments, 1)
    return torch.nn.ModuleDict({**parts, "quant_conv": quant, "post_quant_conv": torch.nn.Conv2d(2, 2, 1)})


def nearest(codes: Any, z: Any) -> Any:
    """Each latent (b, c, h, w) moved to the nearest row of codes."""
    import torch

    return codes[torch.cdist(z.permute(0, 2, 3, 1), codes).argmin(-1)].permute(0, 3, 1, 2)


def diffusers(kind: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module("diffusers"), kind)(**options)


def one_hot(y: Any) -> Any:
    import torch

    return torch.nn.functional.one_hot(y, 3).float()


def through(encode: Any, decode: Any, x: Any) -> Any:
    """The mean of the latent's law, and the image of it, side by side as one flat row."""
    import torch

    mean = encode(x)[:, :2]
    return torch.cat([mean.permute(0, 2, 3, 1).flatten(1), decode(mean).permute(0, 2, 3, 1).flatten(1)], 1)


TIME = {"time_scale": 1.0}
TRANSFORMER = {"patch": 2, "width": 32, "depth": 2, "heads": 4, "num_classes": 5, "learn_sigma": True, **TIME}
SMALL = {"multipliers": (1, 2), "blocks": 1, "attention_at": (4,), "num_classes": 3, "head_width": None, **TIME}
WIDE = {"width": 128, "multipliers": (1, 1), "blocks": 1, "attention_at": (4,), "heads": 2, **TIME}
LATENT = {"width": 128, "multipliers": (1, 1), "blocks": 1, "latent_channels": 2}
TEXT = {**WIDE, "attention_at": (8,), "style": "ldm", "context": 6}
SCORE = {**WIDE, "heads": None, "head_width": None}
DUAL = {"qk_norm": True, "dual": 2}
TOLD = {"context": 6, "pooled": 4}
VQ = {**LATENT, "codes": 9}
SKIP = {"fir": True, "progressive": "output_skip", "progressive_input": "input_skip", "embedding_type": "fourier"}
CROSS = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
CASES = {
    "DiT": Case("dit", transformer("DiT", "DiT"), lambda m, x, t, y: m(x, t, y), ("DiT", 3, TRANSFORMER), 5),
    "SiT": Case("dit", transformer("SiT", "SiT"), lambda m, x, t, y: m(x, t, y), ("SiT", 3, TRANSFORMER), 5),
    "U-ViT": Case(
        "uvit", uvit("uvit", num_classes=6), lambda m, x, t, y: m(x, t, y),
        ("UViT", 3, {"patch": 2, "width": 32, "depth": 4, "heads": 4, "num_classes": 5, **TIME}), 5,
    ),
    "U-ViT (text)": Case(
        "uvit", uvit("uvit_t2i", clip_dim=6, num_clip_token=5), lambda m, x, t, y: m(x, t, y),
        ("UViT", 3, {"patch": 2, "width": 32, "depth": 4, "heads": 4, "context": 6, "context_length": 5, **TIME}),
        text=6,
    ),
    "SD3": Case(
        "sd3", sd3(), lambda m, x, t, y: m(x, t, y[1], y[0]),
        ("MMDiT", 3, {"patch": 2, "width": 128, "depth": 2, "heads": 2, "positions_table": 7, **TOLD, **TIME}),
        text=6, pooled=4,
    ),
    "SD3.5 (medium)": Case(
        "sd3", sd3("sd3.5", "mmditx", "MMDiTX", 192, qk_norm="rms", x_block_self_attn_layers=[0]),
        lambda m, x, t, y: m(x, t, y[1], y[0]),
        (
            "MMDiT", 3,
            {"patch": 2, "width": 192, "depth": 3, "heads": 3, "positions_table": 7, **DUAL, "dual": 1, **TOLD, **TIME},
        ),
        text=6, pooled=4,
    ),
    "SD3 (diffusers)": Case(
        "diffusers-sd3",
        diffusers(
            "SD3Transformer2DModel", sample_size=SIZE, in_channels=3, out_channels=3, num_layers=3,
            attention_head_dim=8, num_attention_heads=4, joint_attention_dim=6, caption_projection_dim=32,
            pooled_projection_dim=4, pos_embed_max_size=7, qk_norm="rms_norm",
        ),
        lambda m, x, t, y: m(x, encoder_hidden_states=y[0], pooled_projections=y[1], timestep=t).sample,
        (
            "MMDiT", 3,
            {"patch": 2, "width": 32, "depth": 3, "heads": 4, "positions_table": 7, "qk_norm": True, **TOLD, **TIME},
        ),
        text=6, pooled=4,
    ),
    "SD3.5 (medium, diffusers)": Case(
        "diffusers-sd3",
        diffusers(
            "SD3Transformer2DModel", sample_size=SIZE, in_channels=3, out_channels=3, num_layers=4,
            attention_head_dim=8, num_attention_heads=4, joint_attention_dim=6, caption_projection_dim=32,
            pooled_projection_dim=4, pos_embed_max_size=7, qk_norm="rms_norm", dual_attention_layers=(0, 1),
        ),
        lambda m, x, t, y: m(x, encoder_hidden_states=y[0], pooled_projections=y[1], timestep=t).sample,
        (
            "MMDiT", 3,
            {"patch": 2, "width": 32, "depth": 4, "heads": 4, "positions_table": 7, **DUAL, **TOLD, **TIME},
        ),
        text=6, pooled=4,
    ),
    "DDPM++": Case(
        "edm", edm("SongUNet", model_channels=32), lambda m, x, t, y: m(x, t, one_hot(y)),
        ("UNet", 3, {**SMALL, "width": 32, "style": "ddpm++"}), 3,
    ),
    "NCSN++": Case(
        "edm",
        edm(
            "SongUNet", model_channels=32, embedding_type="fourier", channel_mult_noise=2, encoder_type="residual",
            resample_filter=[1, 3, 3, 1],
        ),
        lambda m, x, t, y: m(x, t, one_hot(y)), ("UNet", 3, {**SMALL, "width": 32, "style": "ncsn++"}), 3,
    ),
    "ADM (EDM)": Case(
        "edm", edm("DhariwalUNet", model_channels=64), lambda m, x, t, y: m(x, t, one_hot(y)),
        ("UNet", 3, {**SMALL, "width": 64, "head_width": 64}), 3,
    ),
    "ADM": Case(
        "guided-diffusion", adm, lambda m, x, t, y: m(x, t, y),
        ("UNet", 3, {**WIDE, "num_classes": 5, "null_class": False, "learn_sigma": True}), 5,
    ),
    "ADM (64)": Case(
        "guided-diffusion-64", lambda: adm(use_new_attention_order=True), lambda m, x, t, y: m(x, t, y),
        ("UNet", 3, {**WIDE, "num_classes": 5, "null_class": False, "learn_sigma": True}), 5,
    ),
    "DDPM++ (score SDE)": Case(
        "score-sde", score_sde(), lambda m, x, t, y: m(x, t), ("UNet", 3, {**SCORE, "style": "ddpm++"}),
    ),
    "NCSN++ (score SDE)": Case(
        "score-sde", score_sde(fir=True, progressive_input="residual", embedding_type="fourier"),
        lambda m, x, t, y: m(x, t.exp()), ("UNet", 3, {**SCORE, "style": "ncsn++"}),
    ),
    "NCSN++ skip (score SDE)": Case(
        "score-sde", score_sde(**SKIP, ch_mult=(1, 2, 1), attn_resolutions=(4,)), lambda m, x, t, y: m(x, t.exp()),
        ("UNet", 3, {**SCORE, "multipliers": (1, 2, 1), "style": "ncsn++-skip"}),
    ),
    "NCSN++ skip": Case(
        "edm",
        edm(
            "SongUNet", model_channels=32, embedding_type="fourier", channel_mult_noise=2, encoder_type="skip",
            decoder_type="skip", resample_filter=[1, 3, 3, 1],
        ),
        lambda m, x, t, y: m(x, t, one_hot(y)), ("UNet", 3, {**SMALL, "width": 32, "style": "ncsn++-skip"}), 3,
    ),
    "LDM": Case("ldm", ldm_unet, lambda m, x, t, y: m(x, t, context=y), ("UNet", 3, TEXT), text=6),
    "SD VAE": Case(
        "sd-vae", ldm_autoencoder,
        lambda m, x, t, y: through(
            lambda x: m["quant_conv"](m["encoder"](x)), lambda z: m["decoder"](m["post_quant_conv"](z)), x
        ),
        ("AutoencoderKL", 3, {**LATENT, "attention_at": (4,)}),
    ),
    "VQ": Case(
        "ldm-vq", ldm_vq,
        lambda m, x, t, y: through(
            lambda x: m["quant_conv"](m["encoder"](x)),
            lambda z: m["decoder"](m["post_quant_conv"](nearest(m["quantize"]["embedding"].weight, z))), x,
        ),
        ("VQAutoencoder", 3, VQ),
    ),
    "DiT (diffusers)": Case(
        "diffusers-dit",
        diffusers(
            "DiTTransformer2DModel", num_attention_heads=4, attention_head_dim=8, in_channels=3, out_channels=6,
            num_layers=2, sample_size=SIZE, patch_size=2, num_embeds_ada_norm=5, norm_eps=1e-6,
        ),
        lambda m, x, t, y: m(x, timestep=t, class_labels=y).sample, ("DiT", 3, TRANSFORMER), 5,
    ),
    "U-Net (diffusers)": Case(
        "diffusers-unet",
        diffusers(
            "UNet2DConditionModel", sample_size=SIZE, in_channels=3, out_channels=3, block_out_channels=(128, 128),
            layers_per_block=1, cross_attention_dim=6, attention_head_dim=2, down_block_types=CROSS[0],
            up_block_types=CROSS[1],
        ),
        lambda m, x, t, y: m(x, t, encoder_hidden_states=y).sample, ("UNet", 3, TEXT), text=6,
    ),
    "VAE (diffusers)": Case(
        "diffusers-vae",
        diffusers(
            "AutoencoderKL", block_out_channels=(128, 128), layers_per_block=1, latent_channels=2,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        lambda m, x, t, y: through(
            lambda x: m.quant_conv(m.encoder(x)), lambda z: m.decoder(m.post_quant_conv(z)), x
        ),
        ("AutoencoderKL", 3, LATENT),
    ),
    "VQ (diffusers)": Case(
        "diffusers-vq",
        diffusers(
            "VQModel", block_out_channels=(128, 128), layers_per_block=1, latent_channels=2, num_vq_embeddings=9,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        lambda m, x, t, y: through(lambda x: m.encode(x).latents, lambda z: m.decode(z).sample, x),
        ("VQAutoencoder", 3, VQ),
    ),
}  # fmt: skip


def module(folder: str, name: str, forget: str, key: str | None = None, *, use: str = "", **options: Any) -> Any:
    """A class or function (under a key of a dict) of a module in a clone, called with options."""
    with clone(folder, *forget.split()):
        found = getattr(importlib.import_module(name), use)
        return (found if key is None else found[key])(**options)


def transformers(kind: str, size: str) -> Callable[[], Any]:
    return lambda: module(kind, "models", "models", size, use=f"{kind}_models", input_size=32, num_classes=1000)


def uvit_of(size: str, width: int, depth: int, heads: int) -> tuple[Any, ...]:
    make = lambda: module(
        "U-ViT", "libs.uvit", "libs", use="UViT", img_size=32, patch_size=2, in_chans=4, embed_dim=width, depth=depth,
        num_heads=heads, num_classes=1001,
    )  # fmt: skip
    return "uvit", 32, 4, {"num_classes": 1000}, make


def edm_of(kind: str, size: int, classes: int, **options: Any) -> Callable[[], Any]:
    forget = "training torch_utils dnnlib"
    return lambda: module(
        "edm", "training.networks", forget, use=kind, img_resolution=size, in_channels=3, out_channels=3,
        label_dim=classes, **options,
    )  # fmt: skip


def coder_of(double: bool, channels: int, multipliers: tuple[int, ...], codes: int = 0) -> Callable[[], Any]:
    def build() -> Any:
        import torch

        kind = {
            "ch": 128,
            "out_ch": 3,
            "ch_mult": multipliers,
            "num_res_blocks": 2,
            "attn_resolutions": [],
            "in_channels": 3,
            "resolution": 256,
            "z_channels": channels,
            "double_z": double,
        }
        with clone("latent-diffusion", "ldm"):
            model = importlib.import_module("ldm.modules.diffusionmodules.model")
            parts = {"encoder": model.Encoder(**kind), "decoder": model.Decoder(**kind)}
        twice = channels * (1 + double)
        parts |= {"quant_conv": torch.nn.Conv2d(twice, twice, 1)}
        parts |= {"post_quant_conv": torch.nn.Conv2d(channels, channels, 1)}
        if codes:
            parts["quantize"] = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(codes, channels)})
        return torch.nn.ModuleDict(parts)

    return build


def sd3_medium(side: int, *where: str, **options: Any) -> Callable[[], Any]:
    folder, name, use = where
    text = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}}
    return lambda: module(
        folder, name, f"{name} other_impls", use=use, input_size=None, depth=24, in_channels=16, adm_in_channels=2048,
        context_embedder_config=text, pos_embed_max_size=side, num_patches=side * side, **options,
    )  # fmt: skip


def adm_of(size: int, width: int, multipliers: tuple[int, ...], blocks: int, **options: Any) -> Callable[[], Any]:
    return lambda: module(
        "guided-diffusion", "guided_diffusion.unet", "guided_diffusion", use="UNetModel", image_size=size,
        in_channels=3, model_channels=width, out_channels=6, num_res_blocks=blocks, channel_mult=multipliers,
        num_classes=1000, num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True, **options,
    )  # fmt: skip


_ADM = {"num_classes": 1000, "null_class": False, "learn_sigma": True}
_ADM256 = {"width": 256, "multipliers": (1, 1, 2, 2, 4, 4), "blocks": 2, "attention_at": (32, 16, 8), "head_width": 64}
_TEN, _SONG = {"num_classes": 10}, {"model_channels": 128, "channel_mult": [2, 2, 2]}
_NCSN = {"channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1], "embedding_type": "fourier"}
PUBLISHED: dict[str, tuple[Any, ...]] = {  # preset (which): layout, size, channels, options of ours, the public module
    "DiT-S/8": ("dit", 32, 4, {"num_classes": 1000, "learn_sigma": True}, transformers("DiT", "DiT-S/8")),
    "DiT-XL/2": ("dit", 32, 4, {"num_classes": 1000, "learn_sigma": True}, transformers("DiT", "DiT-XL/2")),
    "SiT-B/4": ("dit", 32, 4, {"num_classes": 1000}, transformers("SiT", "SiT-B/4")),
    "SiT-XL/2": ("dit", 32, 4, {"num_classes": 1000}, transformers("SiT", "SiT-XL/2")),
    "UViT-S/2": uvit_of("S", 512, 12, 8),
    "UViT-M/2": uvit_of("M", 768, 16, 12),
    "UViT-L/2": uvit_of("L", 1024, 20, 16),
    "UViT-H/2": uvit_of("H", 1152, 28, 16),
    "MMDiT-SD3": ("sd3", 128, 16, {}, sd3_medium(192, "sd3-ref", "mmdit", "MMDiT")),
    "MMDiT-SD3.5-medium": (
        "sd3", 128, 16, {},
        sd3_medium(384, "sd3.5", "mmditx", "MMDiTX", qk_norm="rms", x_block_self_attn_layers=[*range(13)]),
    ),
    "MMDiT-SD3.5-medium (diffusers)": (
        "diffusers-sd3", 128, 16, {},
        diffusers(
            "SD3Transformer2DModel", sample_size=128, in_channels=16, out_channels=16, num_layers=24,
            attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
            pooled_projection_dim=2048, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=range(13),
        ),
    ),
    "UNet-DDPM++": ("edm", 32, 3, _TEN, edm_of("SongUNet", 32, 10, **_SONG, augment_dim=9)),
    "UNet-NCSN++": (
        "edm", 32, 3, _TEN, edm_of("SongUNet", 32, 10, **_SONG, **_NCSN, encoder_type="residual", augment_dim=9),
    ),
    "UNet-ADM-64": ("edm", 64, 3, {"num_classes": 1000}, edm_of("DhariwalUNet", 64, 1000)),
    "UNet-ADM-64 (guided-diffusion)": (
        "guided-diffusion-64", 64, 3, _ADM,
        adm_of(64, 192, (1, 2, 3, 4), 3, attention_resolutions=(2, 4, 8), use_new_attention_order=True),
    ),
    "UNet (ADM for 256 x 256)": (
        "guided-diffusion", 256, 3, {**_ADM, **_ADM256},
        adm_of(256, 256, (1, 1, 2, 2, 4, 4), 2, attention_resolutions=(8, 16, 32)),
    ),
    "UNet-NCSN++-256": (
        "score-sde", 256, 3, {},
        lambda: score_sde(
            **SKIP, ch_mult=(1, 1, 2, 2, 2, 2, 2), num_res_blocks=2, attn_resolutions=(16,), image_size=256
        )(),
    ),
    "UNet-LDM": (
        "ldm", 64, 4, {},
        lambda: module(
            "latent-diffusion", "ldm.modules.diffusionmodules.openaimodel", "ldm", use="UNetModel", image_size=32,
            in_channels=4, out_channels=4, model_channels=320, attention_resolutions=[4, 2, 1], num_res_blocks=2,
            channel_mult=[1, 2, 4, 4], num_heads=8, use_spatial_transformer=True, transformer_depth=1, context_dim=768,
            use_checkpoint=False, legacy=False,
        ),
    ),
    "AutoencoderKL": ("sd-vae", 256, 3, {}, coder_of(True, 4, (1, 2, 4, 4))),
    "VQAutoencoder": ("ldm-vq", 256, 3, {}, coder_of(False, 3, (1, 2, 4), 8192)),
}  # fmt: skip


def shapes_of(make: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's state, made without memory where its constructor lets it."""
    import torch

    try:
        with torch.device("meta"):
            built = make()
    except RuntimeError:  # it sets its initial values itself
        built = make()
    return {name: tuple(w.shape) for name, w in built.state_dict().items()}


KEPT = {"dit": "pos_embed", "diffusers-dit": "pos_embed", "edm": "resample_filter"}  # ends of names: not drawn


def run(case: Case) -> tuple[dict[str, tuple[int, ...]], np.ndarray]:
    """Names and shapes of the module's parameters, and its output for the drawn weights, channels last, float32."""
    import torch

    module = case.module().eval()
    own = module.state_dict()
    kept = KEPT.get(case.layout, "none is")
    shapes = {name: tuple(w.shape) for name, w in own.items() if not name.endswith(kept)}
    module.load_state_dict(own | {name: torch.from_numpy(w) for name, w in drawn(case, shapes).items()})
    x, t, y = inputs(case)
    with torch.no_grad():
        given = tuple(map(torch.from_numpy, y)) if isinstance(y, tuple) else None if y is None else torch.from_numpy(y)
        out = case.call(module, torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t), given)
    out = out if out.ndim == 2 else out.permute(0, 2, 3, 1)
    return shapes, out.numpy()


if __name__ == "__main__":
    import json

    frozen: dict[str, np.ndarray] = {}
    for name, case in CASES.items():
        shapes, out = run(case)
        frozen[f"{name}/shapes"] = np.asarray(json.dumps(shapes))
        frozen[f"{name}/output"] = out
        print(f"{name:20s} {len(shapes)} arrays, output {out.shape}, rms {np.sqrt(np.square(out).mean()):.3f}")
    file = Path(__file__).parent.parent / "golden" / "nets.npz"
    np.savez_compressed(file, **frozen)
    print(f"{file}: {file.stat().st_size} bytes")
