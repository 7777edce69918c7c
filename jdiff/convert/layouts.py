"""Where the parameters of published nets lie, and where those of ours: one table a layout, read in both directions.

A layout is a function from one of our nets to rows (their names, our path, how the arrays correspond). Where our blocks
are stacked, a row says which slice is meant. Nothing here knows files.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jdiff.nets import AutoencoderKL, DiT, UNet
from jdiff.nets.patches import per_axis
from jdiff.nets.unet_blocks import Block, Resample

Arrays = list[np.ndarray]


class Move(NamedTuple):
    """One of our arrays and those of theirs that hold the same numbers."""

    theirs: tuple[str, ...]
    ours: str
    here: Callable[[Arrays], np.ndarray]
    there: Callable[[np.ndarray], Arrays]
    slice: int | None = None  # of a stacked array of ours


Rows = Iterator[Move]
Op = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]

SAME: Op = (lambda w: w, lambda w: w)
LINEAR: Op = (lambda w: w.T, lambda w: w.T)
CONV: Op = (lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))
POINT: Op = (lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None])  # a 1 x 1 convolution
LINE: Op = (lambda w: w[:, :, 0].T, lambda w: w.T[:, :, None])  # a convolution of length 1


def one(theirs: str, ours: str, op: Op = SAME, index: int | None = None) -> Move:
    return Move((theirs,), ours, lambda a: op[0](a[0]), lambda w: [op[1](w)], index)


def together(theirs: list[str], ours: str, op: Op = SAME, index: int | None = None) -> Move:
    """Several of theirs, one after another along their first axis."""
    n = len(theirs)
    return Move(tuple(theirs), ours, lambda a: op[0](np.concatenate(a)), lambda w: list(np.split(op[1](w), n)), index)


def after(op: Op, rows: np.ndarray) -> Op:
    """op with the rows of theirs taken in this order first: ours[i] is theirs[rows[i]]."""
    back = np.argsort(rows)
    return (lambda w: op[0](w[rows]), lambda w: op[1](w)[back])


def layer(
    theirs: str, ours: str, op: Op = LINEAR, index: int | None = None, order: Any = None, bias: bool = True
) -> Rows:
    """A linear layer or convolution; order: of its outputs, see `after`."""
    yield one(f"{theirs}.weight", f"{ours}/kernel", op if order is None else after(op, order), index)
    if bias:
        yield one(f"{theirs}.bias", f"{ours}/bias", SAME if order is None else after(SAME, order), index)


def norm(theirs: str, ours: str) -> Rows:
    yield one(f"{theirs}.weight", f"{ours}/scale")
    yield one(f"{theirs}.bias", f"{ours}/bias")


def joined(theirs: list[str], ours: str, op: Op = LINEAR, index: int | None = None, bias: bool = True) -> Rows:
    """Separate queries, keys and values, or keys and values, as one layer of ours."""
    yield together([f"{name}.weight" for name in theirs], f"{ours}/kernel", op, index)
    if bias:
        yield together([f"{name}.bias" for name in theirs], f"{ours}/bias", SAME, index)


def heads_first(width: int, heads: int, channels_first: bool = False) -> np.ndarray:
    """Their order (heads, 3, d), or (heads, d, 3), of queries, keys and values, as ours, (3, heads, d)."""
    shape = (heads, width // heads, 3) if channels_first else (heads, 3, width // heads)
    return np.arange(3 * width).reshape(shape).transpose((2, 0, 1) if channels_first else (1, 0, 2)).ravel()


# --------------------------------------------------------------------------------------------------- transformers
def patches(net: DiT) -> Op:
    """A convolution over patches, as one matrix for their flattened pixels."""
    sides = per_axis(net.patch, 2)
    return (
        lambda w: w.transpose(2, 3, 1, 0).reshape(-1, net.width),
        lambda w: w.reshape(*sides, net.channels, net.width).transpose(3, 2, 0, 1),
    )


def dit(net: DiT) -> Rows:
    """The official DiT and SiT (facebookresearch/DiT, willisma/SiT)."""
    yield from layer("x_embedder.proj", "patches", patches(net))
    yield from layer("t_embedder.mlp.0", "conditioning/time_in")
    yield from layer("t_embedder.mlp.2", "conditioning/time_out")
    if net.num_classes:
        yield one("y_embedder.embedding_table.weight", "conditioning/labels")
    for i in range(net.depth):
        for theirs, ours in (
            ("attn.qkv", "attention/qkv"),
            ("attn.proj", "attention/out"),
            ("mlp.fc1", "mlp_in"),
            ("mlp.fc2", "mlp_out"),
            ("adaLN_modulation.1", "modulation"),
        ):
            yield from layer(f"blocks.{i}.{theirs}", f"blocks/{ours}", index=i)
    yield from layer("final_layer.adaLN_modulation.1", "modulation")
    yield from layer("final_layer.linear", "out")


def dit_diffusers(net: DiT) -> Rows:
    """diffusers' DiTTransformer2DModel, in which every block has a copy of the embedders of time and label."""
    yield from layer("pos_embed.proj", "patches", patches(net))
    copies = [f"transformer_blocks.{i}.norm1.emb" for i in range(net.depth)]

    def tied(name: str, ours: str, op: Op) -> Move:
        def here(found: Arrays) -> np.ndarray:
            if any(not np.array_equal(found[0], a) for a in found[1:]):
                raise ValueError(f"{name}: the blocks have different embedders; a DiT has one")
            return op[0](found[0])

        return Move(tuple(f"{c}.{name}" for c in copies), ours, here, lambda w: [op[1](w)] * net.depth)

    for k, ours in (("1", "time_in"), ("2", "time_out")):
        yield tied(f"timestep_embedder.linear_{k}.weight", f"conditioning/{ours}/kernel", LINEAR)
        yield tied(f"timestep_embedder.linear_{k}.bias", f"conditioning/{ours}/bias", SAME)
    if net.num_classes:
        yield tied("class_embedder.embedding_table.weight", "conditioning/labels", SAME)
    for i in range(net.depth):
        at = f"transformer_blocks.{i}"
        yield from joined([f"{at}.attn1.to_{c}" for c in "qkv"], "blocks/attention/qkv", index=i)
        yield from layer(f"{at}.attn1.to_out.0", "blocks/attention/out", index=i)
        yield from layer(f"{at}.ff.net.0.proj", "blocks/mlp_in", index=i)
        yield from layer(f"{at}.ff.net.2", "blocks/mlp_out", index=i)
        yield from layer(f"{at}.norm1.linear", "blocks/modulation", index=i)
    yield from layer("proj_out_1", "modulation")
    yield from layer("proj_out_2", "out")


# ---------------------------------------------------------------------------------------------------------- U-Nets
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


def guided(net: UNet) -> Rows:
    """guided-diffusion's UNetModel and latent diffusion's, its child (openai/guided-diffusion, CompVis)."""
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
            order = heads_first(width, block.heads)
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
        yield from layer(f"enc.{at(i + 1)}_aux_residual", f"pyramid/{i}", CONV)
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
            yield from layer(f"{following()}.Conv2d_0", f"pyramid/{block.level - 1}", CONV)
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


# ----------------------------------------------------------------------------------------------------- autoencoder
def autoencoder(net: AutoencoderKL) -> Rows:
    """Latent diffusion's AutoencoderKL, as in Stable Diffusion's checkpoints."""
    yield from coders(net, LDM, POINT, ("norm", "q", "k", "v", "proj_out"), hugging=False)


def autoencoder_diffusers(net: AutoencoderKL) -> Rows:
    """diffusers' AutoencoderKL."""
    names = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
    yield from coders(net, HUGGING, LINEAR, names, hugging=True)


def coders(net: AutoencoderKL, names: tuple[str, ...], point: Op, attention: tuple[str, ...], *, hugging: bool) -> Rows:
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


class Layout(NamedTuple):
    """A published net's table; `nets` of ours that it fits, prefixes that its names may have, what may be left over."""

    rows: Callable[[Any], Rows]
    nets: tuple[type, ...]
    prefixes: tuple[str, ...]
    ignored: str  # a pattern of names: buffers, and parts that are used in training alone
    doc: str


LAYOUTS = {
    "dit": Layout(dit, (DiT,), ("", "ema.", "model."), r"pos_embed", "official DiT and SiT (.pt)"),
    "edm": Layout(
        edm, (UNet,), ("ema.model.", "model.", ""), r".*resample_filter|map_augment\.weight|u",
        "EDM's DDPM++, NCSN++ and ADM (.pkl)",
    ),
    "guided-diffusion": Layout(guided, (UNet,), ("",), r"(?!)", "guided-diffusion's ADM (.pt)"),
    "ldm": Layout(
        guided, (UNet,), ("model.diffusion_model.", ""), r"(?!)", "latent diffusion's U-Net, as in Stable Diffusion 1"
    ),
    "score-sde": Layout(
        score_sde, (UNet,), ("model.module.", "module.", ""), r"sigmas", "score_sde_pytorch's DDPM++ and NCSN++ (.pth)"
    ),
    "sd-vae": Layout(
        autoencoder, (AutoencoderKL,), ("first_stage_model.", "state_dict.", ""), r"loss\..*|model_ema\..*",
        "Stable Diffusion's autoencoder (.ckpt)",
    ),
    "diffusers-dit": Layout(dit_diffusers, (DiT,), ("",), r"pos_embed\.pos_embed", "diffusers' DiTTransformer2DModel"),
    "diffusers-unet": Layout(unet_diffusers, (UNet,), ("",), r"(?!)", "diffusers' UNet2DConditionModel (SD 1)"),
    "diffusers-vae": Layout(autoencoder_diffusers, (AutoencoderKL,), ("",), r"(?!)", "diffusers' AutoencoderKL"),
}  # fmt: skip
"""By name."""
