"""Layouts of U-Nets and autoencoders: guided-diffusion, EDM, score SDE, latent diffusion, and diffusers'."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jdiff.nets import AutoencoderKL, UNet, VQAutoencoder
from jdiff.nets.unet_blocks import Block, Resample

from .rows import CONV, LINE, LINEAR, POINT, Arrays, Move, Op, Rows, heads_first, joined, layer, norm, one, together


def transformer(theirs: str, ours: str, point: Op = POINT) -> Rows:
    """Latent diffusion's spatial transformer, which diffusers names alike."""
    inner = f"{theirs}.transformer_blocks.0"
    yield from norm(f"{theirs}.norm", f"{ours}/norm")
    yield from layer(f"{theirs}.proj_in", f"{ours}/proj_in", point)
    yield from joined([f"{inner}.attn1.to_{c}" for c in "qkv"], f"{ours}/attention/qkv", bias=False)
    yield from layer(f"{inner}.attn1.to_out.0", f"{ours}/attention/out")
    yield from layer(f"{inner}.attn2.to_q", f"{ours}/cross/q", bias=False)
    yield from joined([f"{inner}.attn2.to_{c}" for c in "kv"], f"{ours}/cross/kv", bias=False)
    yield from layer(f"{inner}.attn2.to_out.0", f"{ours}/cross/out")
    for i, name in enumerate(("attention", "cross", "mlp"), 1):
        yield from norm(f"{inner}.norm{i}", f"{ours}/norm_{name}")
    yield from layer(f"{inner}.ff.net.0.proj", f"{ours}/mlp_in")
    yield from layer(f"{inner}.ff.net.2", f"{ours}/mlp_out")
    yield from layer(f"{theirs}.proj_out", f"{ours}/proj_out", point)


def residual(theirs: str, ours: str, block: Block, names: tuple[str, ...], point: Op = POINT) -> Rows:
    """A residual block; names: its first norm and convolution, conditioning, second norm and convolution, shortcut."""
    norm_in, conv_in, told, norm_out, conv_out, skip = (f"{theirs}.{name}" for name in names)
    yield from norm(norm_in, f"{ours}/norm_in")
    yield from layer(conv_in, f"{ours}/conv_in", CONV)
    if block.modulation is not None:
        yield from layer(told, f"{ours}/modulation")
    yield from norm(norm_out, f"{ours}/norm_out")
    yield from layer(conv_out, f"{ours}/conv_out", CONV)
    if block.skip is not None:
        yield from layer(skip, f"{ours}/skip", point)


ADM = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
HUGGING = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
LDM = ("norm1", "conv1", "", "norm2", "conv2", "nin_shortcut")
EDM = ("norm0", "conv0", "affine", "norm1", "conv1", "skip")
SONG = ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "Conv_2")


def named(net: UNet) -> Iterator[tuple[str, Any]]:
    """(path, block) of a U-Net's blocks in the order of evaluation."""
    for part in ("down", "middle", "up"):
        yield from ((f"{part}/{i}", block) for i, block in enumerate(getattr(net, part)))


def guided(net: UNet, *, new_order: bool = False) -> Rows:
    """guided-diffusion's UNetModel and latent diffusion's, its child (openai/guided-diffusion, CompVis).

    new_order: its use_new_attention_order, (3, heads, d), as in ours: with it the released 64 x 64 net was trained.
    """
    yield from layer("time_embed.0", "conditioning/time_in")
    yield from layer("time_embed.2", "conditioning/time_out")
    if net.num_classes:
        yield one("label_emb.weight", "conditioning/labels")
    yield from layer("input_blocks.0.0", "conv_in", CONV)
    places = [f"input_blocks.{i + 1}" for i in range(len(net.down))]
    group, attended = -1, False
    for path, block in named(net):
        if path.startswith("down"):
            theirs, at = places[int(path.split("/")[1])], 0
        elif path.startswith("middle"):
            theirs, at = "middle_block", 2 * (path == "middle/1")
        else:
            group += block.to != "up"
            at = 0 if block.to != "up" else 1 + attended
            theirs = f"output_blocks.{group}"
        attended = bool(block.heads)
        yield from block_of(f"{theirs}.{at}", path, block, ADM)
        if isinstance(block, Block) and block.transformer is not None:
            yield from transformer(f"{theirs}.{at + 1}", f"{path}/transformer")
        elif isinstance(block, Block) and block.attention is not None:
            width, there = block.attention.out.out_features, f"{theirs}.{at + 1}"
            yield from norm(f"{there}.norm", f"{path}/norm_attention")
            order = None if new_order else heads_first(width, block.heads)
            yield from layer(f"{there}.qkv", f"{path}/attention/qkv", LINE, order=order)
            yield from layer(f"{there}.proj_out", f"{path}/attention/out", LINE)
    yield from norm("out.0", "norm")
    yield from layer("out.2", "conv_out", CONV)


def block_of(theirs: str, path: str, block: Any, names: tuple[str, ...]) -> Rows:
    """A residual block, or a convolution that resamples."""
    if isinstance(block, Resample):
        yield from layer(f"{theirs}.{'op' if block.to == 'down' else 'conv'}", f"{path}/conv", CONV)
    else:
        yield from residual(theirs, path, block, names)


def edm(net: UNet) -> Rows:
    """EDM's SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM); their labels are one-hot vectors times a matrix."""
    song, classes = net.style.labels_first, net.num_classes
    half = net.conditioning.frequencies // 2
    swap: Op = (lambda w: np.roll(w.T, half, 0), lambda w: np.roll(w, half, 0).T)  # sines before cosines there
    yield from layer("map_layer0", "conditioning/time_in", swap if song else LINEAR)
    yield from layer("map_layer1", "conditioning/time_out")
    if net.style.fourier:
        yield one("map_noise.freqs", "conditioning/fourier")
    if classes and song:
        root = np.sqrt(classes).astype(np.float32)

        def rows(a: Arrays) -> np.ndarray:
            told = np.concatenate([a[0].T * root + a[1], a[1][None]])
            return np.roll(told, half, 1)[: classes + net.null_class]

        def matrix(w: np.ndarray) -> Arrays:
            w = np.roll(w, half, 1)
            none = w[-1] if net.null_class else np.zeros_like(w[-1])
            return [((w[:classes] - none) / root).T, none]

        yield Move(("map_label.weight", "map_label.bias"), "conditioning/labels", rows, matrix)
    elif classes:
        none = (lambda w: np.concatenate([w.T, 0 * w.T[:1]])) if net.null_class else (lambda w: w.T)
        yield one("map_label.weight", "conditioning/labels", (none, lambda w: w[:classes].T))
    sizes = [net.size[0] // 2**level for level in range(net.down[-1].level + 1)]
    at = lambda level: f"{sizes[level]}x{sizes[level]}"
    yield from layer(f"enc.{at(0)}_conv", "conv_in", CONV)
    count: dict[Any, int] = {}
    for path, block in named(net):
        side = "enc" if path.startswith("down") else "dec"
        if path.startswith("middle"):
            name = f"in{path[-1]}"
        elif block.to != "same":
            name = block.to
        else:
            name = f"block{count.setdefault((side, block.level), 0)}"
            count[side, block.level] += 1
        theirs = f"{side}.{at(block.level)}_{name}"
        yield from residual(theirs, path, block, EDM)
        if block.attention is not None:
            width = block.attention.out.out_features
            yield from norm(f"{theirs}.norm2", f"{path}/norm_attention")
            order = heads_first(width, block.heads, channels_first=True)
            yield from layer(f"{theirs}.qkv", f"{path}/attention/qkv", POINT, order=order)
            yield from layer(f"{theirs}.proj", f"{path}/attention/out", POINT)
    for i in range(len(net.pyramid or ())):
        aux, op = ("aux_residual", CONV) if net.to_image is None else ("aux_skip", POINT)
        yield from layer(f"enc.{at(i + 1)}_{aux}", f"pyramid/{i}", op)
    for i in range(len(net.to_image or ())):
        yield from norm(f"dec.{at(i + 1)}_aux_norm", f"to_image/{i}/norm")
        yield from layer(f"dec.{at(i + 1)}_aux_conv", f"to_image/{i}/conv", CONV)
    yield from norm(f"dec.{at(0)}_aux_norm" if song else "out_norm", "norm")
    yield from layer(f"dec.{at(0)}_aux_conv" if song else "out_conv", "conv_out", CONV)


def score_sde(net: UNet) -> Rows:
    """score_sde_pytorch's NCSNpp (DDPM++ and NCSN++), whose modules are numbered in the order of construction."""
    half, number = net.conditioning.frequencies // 2, iter(range(10**6))
    swap: Op = (lambda w: np.roll(w.T, half, 0), lambda w: np.roll(w, half, 0).T)  # sines before cosines there
    following = lambda: f"all_modules.{next(number)}"
    if net.style.fourier:
        yield one(f"{following()}.W", "conditioning/fourier")
    yield from layer(following(), "conditioning/time_in", swap)
    yield from layer(following(), "conditioning/time_out")
    yield from layer(following(), "conv_in", CONV)
    for path, block in named(net):
        if block.to == "up" and net.to_image is not None:
            yield from norm(following(), f"to_image/{block.level}/norm")
            yield from layer(following(), f"to_image/{block.level}/conv", CONV)
        yield from residual(following(), path, block, SONG)
        if block.attention is not None:
            there = following()
            yield from norm(f"{there}.GroupNorm_0", f"{path}/norm_attention")
            ins = [f"{there}.NIN_{i}" for i in range(3)]
            side: Op = (lambda w: w, lambda w: w)
            yield Move(
                tuple(f"{n}.W" for n in ins), f"{path}/attention/qkv/kernel",
                lambda a: np.concatenate(a, 1), lambda w: list(np.split(w, 3, 1)),
            )  # fmt: skip
            yield together([f"{n}.b" for n in ins], f"{path}/attention/qkv/bias", side)
            yield one(f"{there}.NIN_3.W", f"{path}/attention/out/kernel")
            yield one(f"{there}.NIN_3.b", f"{path}/attention/out/bias")
        if block.to == "down" and net.pyramid is not None:
            name, op = ("Conv2d_0", CONV) if net.to_image is None else ("Conv_0", POINT)
            yield from layer(f"{following()}.{name}", f"pyramid/{block.level - 1}", op)
    yield from norm(following(), "norm")
    yield from layer(following(), "conv_out", CONV)


def unet_diffusers(net: UNet) -> Rows:
    """diffusers' UNet2DConditionModel (Stable Diffusion 1)."""
    yield from layer("time_embedding.linear_1", "conditioning/time_in")
    yield from layer("time_embedding.linear_2", "conditioning/time_out")
    yield from layer("conv_in", "conv_in", CONV)
    levels, count = net.down[-1].level, {}
    for path, block in named(net):
        part = path.split("/")[0]
        if part == "middle":
            group, j = "mid_block", int(path[-1])
        else:  # a block that resamples belongs to the resolution that it leaves
            level = block.level - (block.to == "down") + (block.to == "up")
            group = f"down_blocks.{level}" if part == "down" else f"up_blocks.{levels - level}"
            j = count.get(group, 0)
            count[group] = j + (block.to == "same")
        if isinstance(block, Resample):
            yield from layer(f"{group}.{block.to}samplers.0.conv", f"{path}/conv", CONV)
            continue
        yield from residual(f"{group}.resnets.{j}", path, block, HUGGING)
        if block.transformer is not None:
            yield from transformer(f"{group}.attentions.{j}", f"{path}/transformer")
    yield from norm("conv_norm_out", "norm")
    yield from layer("conv_out", "conv_out", CONV)


# ----------------------------------------------------------------------------------------------------- autoencoders
def autoencoder(net: AutoencoderKL | VQAutoencoder) -> Rows:
    """Latent diffusion's AutoencoderKL, as in Stable Diffusion's checkpoints."""
    yield from coders(net, LDM, POINT, ("norm", "q", "k", "v", "proj_out"), hugging=False)


def autoencoder_vq(net: VQAutoencoder) -> Rows:
    """Latent diffusion's VQModel."""
    yield from autoencoder(net)
    yield one("quantize.embedding.weight", "codebook")


def vq_diffusers(net: VQAutoencoder) -> Rows:
    """diffusers' VQModel."""
    yield from autoencoder_diffusers(net)
    yield one("quantize.embedding.weight", "codebook")


def autoencoder_diffusers(net: AutoencoderKL | VQAutoencoder) -> Rows:
    """diffusers' AutoencoderKL."""
    names = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
    yield from coders(net, HUGGING, LINEAR, names, hugging=True)


def coders(
    net: AutoencoderKL | VQAutoencoder,
    names: tuple[str, ...],
    point: Op,
    attention: tuple[str, ...],
    *,
    hugging: bool,
) -> Rows:
    for side, coder in (("encoder", net.encoder), ("decoder", net.decoder)):
        down = side == "encoder"
        yield from layer(f"{side}.conv_in", f"{side}/conv_in", CONV)
        levels, count, middle = max(block.level for block in coder.layers), {}, 0
        first = len(coder.layers) - 2 if down else 0  # of the two blocks in the middle
        for i, block in enumerate(coder.layers):
            path, j = f"{side}/layers/{i}", 0
            if first <= i < first + 2:
                middle = i - first
                theirs = f"{side}.mid_block.resnets.{middle}" if hugging else f"{side}.mid.block_{middle + 1}"
                there = f"{side}.mid_block.attentions.0" if hugging else f"{side}.mid.attn_1"
            else:
                level = block.level - (block.to == "down") + (block.to == "up")
                j = count.get(level, 0)
                count[level] = j + (block.to == "same")
                way = "down" if down else "up"
                if hugging:
                    group = f"{side}.{way}_blocks.{level if down else levels - level}"
                    theirs, there = f"{group}.resnets.{j}", f"{group}.attentions.{j}"
                else:
                    group = f"{side}.{way}.{level}"
                    theirs, there = f"{group}.block.{j}", f"{group}.attn.{j}"
                if isinstance(block, Resample):
                    conv = f"{way}samplers.0.conv" if hugging else f"{way}sample.conv"
                    yield from layer(f"{group}.{conv}", f"{path}/conv", CONV)
                    continue
            yield from residual(theirs, path, block, names)
            if block.attention is not None:
                yield from norm(f"{there}.{attention[0]}", f"{path}/norm_attention")
                yield from joined([f"{there}.{name}" for name in attention[1:4]], f"{path}/attention/qkv", point)
                yield from layer(f"{there}.{attention[4]}", f"{path}/attention/out", point)
        yield from norm(f"{side}.{'conv_norm_out' if hugging else 'norm_out'}", f"{side}/norm")
        yield from layer(f"{side}.conv_out", f"{side}/conv_out", CONV)
    yield from layer("quant_conv", "to_latent", POINT)
    yield from layer("post_quant_conv", "from_latent", POINT)
