"""Layouts of transformers: the official DiT and SiT, U-ViT and Stable Diffusion 3, and diffusers'."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jdiff.nets import DiT, MMDiT, UViT
from jdiff.nets.patches import per_axis

from .rows import CONV, LINEAR, SAME, Arrays, Move, Op, Rows, joined, layer, norm, one


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
_OWN = ("attention2/qkv", "attention2/out", "attention2/norm_q", "attention2/norm_k")
_AROUND = (
    "patches", "conditioning/time_in", "conditioning/time_out", "pooled_in", "pooled_out", "text_in", "out",
    "modulation", "table",
)  # fmt: skip


def _parts(block: str, *names: str | tuple[str, ...]) -> dict[str, str | tuple[str, ...]]:
    full = lambda name: f"{block}.{name}"
    each = [full(n) if isinstance(n, str) else tuple(map(full, n)) for n in names]
    ours = _OURS if len(each) == len(_OURS) else _OURS + _OWN  # the image's second attention
    return dict(zip(ours, each, strict=True))


_JOINT = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1", "attn.ln_q", "attn.ln_k")
_DUAL = ("attn2.qkv", "attn2.proj", "attn2.ln_q", "attn2.ln_k")
SD3 = Streams(
    dict(zip(_AROUND, (
        "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2",
        "context_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1", "pos_embed",
    ), strict=True)),
    _parts("joint_blocks.{}.x_block", *_JOINT, *_DUAL),
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
        ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "attn2.to_out.0", "attn2.norm_q", "attn2.norm_k",
    ),
    _parts(
        "transformer_blocks.{}", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.to_add_out",
        "ff_context.net.0.proj", "ff_context.net.2", "norm1_context.linear", "attn.norm_added_q", "attn.norm_added_k",
    ),
    scale_first=True,
)  # fmt: skip


def mmdit(names: Streams) -> Callable[[MMDiT], Rows]:
    """Stable Diffusion 3's MM-DiT, and 3.5's with qk_norm and, if medium, dual, under these names."""

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
            dual = i < net.dual
            path, index = ("last", None) if last else ("dual_blocks", i) if dual else ("blocks", i - net.dual)
            for stream, parts in (("image", names.image), ("text", names.text)):
                dropped = last and stream == "text"
                for ours, theirs in parts.items():
                    at = f"{path}/{stream}/{ours}"
                    if ours.startswith("attention2") and not dual:
                        continue
                    if isinstance(theirs, tuple):
                        yield from joined([name.format(i) for name in theirs], at, index=index)
                    elif "/norm_" in ours:
                        if net.qk_norm:
                            yield one(f"{theirs.format(i)}.weight", f"{at}/scale", index=index)
                    elif not dropped or ours in ("attention/qkv", "modulation"):
                        order = swap if dropped and ours == "modulation" else None
                        yield from layer(theirs.format(i), at, index=index, order=order)

    return rows
