"""Where the parameters of published nets lie, and where those of ours: one table a layout, read in both directions.

A layout is a function from one of our nets to rows (their names, our path, how the arrays correspond). Where our blocks
are stacked, a row says which slice is meant. Nothing here knows files.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdiff.nets import AutoencoderKL, DiT, MMDiT, UNet, UViT, VQAutoencoder
from jdiff.nets.patches import per_axis
from jdiff.nets.unet_blocks import Block, Resample

from .torch_file import WeightsError

Arrays = list[np.ndarray]


class Move(NamedTuple):
    """One of our arrays and those of theirs that hold the same numbers."""

    theirs: tuple[str, ...]
    ours: str
    here: Callable[[Arrays], np.ndarray]
    there: Callable[[np.ndarray], Arrays]
    slice: int | None = None  # of a stacked array of ours
    extras: int | None = None  # of a table of positions: its rows before those of the patches


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
def patches(net: DiT | UViT | MMDiT) -> Op:
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


def uvit(net: UViT) -> Rows:
    """U-ViT (baofff/U-ViT): of labels, and of a text, whose embeddings stand after the time there."""
    yield from layer("patch_embed.proj", "patches", patches(net))
    if net.num_classes:
        yield one("label_emb.weight", "labels")
    if net.context:
        yield from layer("context_embed", "text")
    n, turn = net.extras, 1 if net.context else 0
    moved = lambda w, k: np.concatenate([np.roll(w[:n], k, 0), w[n:]])
    table = one("pos_embed", "positions", (lambda w: moved(w[0], -turn), lambda w: moved(w, turn)[None]))
    yield table._replace(extras=n)
    half = net.depth // 2
    places = [("in_blocks.", "down", half), ("mid_block", "middle", 1), ("out_blocks.", "up", half)]
    for theirs, ours, count in places:
        for i in range(count):
            at, index = (f"{theirs}{i}", i) if ours != "middle" else (theirs, None)
            for k, name in ((1, "attention"), (2, "mlp")):
                yield one(f"{at}.norm{k}.weight", f"{ours}/norm_{name}/scale", index=index)
                yield one(f"{at}.norm{k}.bias", f"{ours}/norm_{name}/bias", index=index)
            yield from layer(f"{at}.attn.qkv", f"{ours}/attention/qkv", index=index, bias=False)
            yield from layer(f"{at}.attn.proj", f"{ours}/attention/out", index=index)
            yield from layer(f"{at}.mlp.fc1", f"{ours}/mlp_in", index=index)
            yield from layer(f"{at}.mlp.fc2", f"{ours}/mlp_out", index=index)
            if ours == "up":
                yield from layer(f"{at}.skip_linear", f"{ours}/skip", index=index)
    yield from norm("norm", "norm")
    yield from layer("decoder_pred", "out")
    yield from layer("final_layer", "smooth", CONV)


class Streams(NamedTuple):
    """An MM-DiT's names: of what stands around the blocks, and of each stream's parts of block {}, under ours.

    scale_first: the modulation of the output, and of the last block's text, has scale before shift.
    """

    around: dict[str, str]
    image: dict[str, str | tuple[str, ...]]
    text: dict[str, str | tuple[str, ...]]
    scale_first: bool


_OURS = (
    "attention/qkv", "attention/out", "mlp_in", "mlp_out", "modulation", "attention/norm_q", "attention/norm_k",
)  # fmt: skip
_AROUND = (
    "patches", "conditioning/time_in", "conditioning/time_out", "pooled_in", "pooled_out", "text_in", "out",
    "modulation", "table",
)  # fmt: skip


def _parts(block: str, *names: str | tuple[str, ...]) -> dict[str, str | tuple[str, ...]]:
    full = lambda name: f"{block}.{name}"
    each = [full(n) if isinstance(n, str) else tuple(map(full, n)) for n in names]
    return dict(zip(_OURS, each, strict=True))


_JOINT = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1", "attn.ln_q", "attn.ln_k")
SD3 = Streams(
    dict(zip(_AROUND, (
        "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2",
        "context_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1", "pos_embed",
    ), strict=True)),
    _parts("joint_blocks.{}.x_block", *_JOINT),
    _parts("joint_blocks.{}.context_block", *_JOINT),
    scale_first=False,
)  # fmt: skip
SD3_DIFFUSERS = Streams(
    dict(zip(_AROUND, (
        "pos_embed.proj", "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
        "time_text_embed.text_embedder.linear_1", "time_text_embed.text_embedder.linear_2", "context_embedder",
        "proj_out", "norm_out.linear", "pos_embed.pos_embed",
    ), strict=True)),
    _parts(
        "transformer_blocks.{}", ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_out.0", "ff.net.0.proj", "ff.net.2",
        "norm1.linear", "attn.norm_q", "attn.norm_k",
    ),
    _parts(
        "transformer_blocks.{}", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.to_add_out",
        "ff_context.net.0.proj", "ff_context.net.2", "norm1_context.linear", "attn.norm_added_q", "attn.norm_added_k",
    ),
    scale_first=True,
)  # fmt: skip


def mmdit(names: Streams) -> Callable[[MMDiT], Rows]:
    """Stable Diffusion 3's MM-DiT, and 3.5's with qk_norm, under these names."""

    def rows(net: MMDiT) -> Rows:
        swap = np.roll(np.arange(2 * net.width), net.width) if names.scale_first else None
        for ours, theirs in names.around.items():
            if ours == "table":
                if net.table is not None:
                    yield one(theirs, "table", (lambda w: w[0], lambda w: w[None]))
            elif ours == "patches":
                yield from layer(theirs, ours, patches(net))
            else:
                yield from layer(theirs, ours, order=swap if ours == "modulation" else None)
        for i in range(net.depth):
            last = i == net.depth - 1
            path, index = ("last", None) if last else ("blocks", i)
            for stream, parts in (("image", names.image), ("text", names.text)):
                dropped = last and stream == "text"
                for ours, theirs in parts.items():
                    at = f"{path}/{stream}/{ours}"
                    if isinstance(theirs, tuple):
                        yield from joined([name.format(i) for name in theirs], at, index=index)
                    elif ours.startswith("attention/norm"):
                        if net.qk_norm:
                            yield one(f"{theirs.format(i)}.weight", f"{at}/scale", index=index)
                    elif not dropped or ours in ("attention/qkv", "modulation"):
                        order = swap if dropped and ours == "modulation" else None
                        yield from layer(theirs.format(i), at, index=index, order=order)

    return rows


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


# ----------------------------------------------------------------------------------------------------- autoencoder
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
