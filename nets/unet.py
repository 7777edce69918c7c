"""Convolutional U-Nets: ADM (Dhariwal & Nichol, 2105.05233), DDPM++ and NCSN++, latent diffusion's."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from .conditioning import Conditioning, Text
from .layers import Attention, Conv, GroupNorm, Linear, rematerialise, xavier, zeros
from .net import Net
from .patches import pool_time
from .unet_blocks import STYLES, Block, Resample, resample


class State(NamedTuple):
    """What passes between blocks."""

    h: Float[Array, "b h w c"]  # features
    skips: tuple[Array, ...]  # features of the way down that the way up has not taken yet, the last one on top
    image: Array | None  # NCSN++'s downsampled image
    output: Array | None = None  # the sum of images on the way up of "ncsn++-skip"


class Told(NamedTuple):
    """What the blocks are told: an embedding a resolution, and a text's embeddings."""

    levels: tuple[Array, ...]
    text: Array | None


class Head(nnx.Module):
    """Features to an image: Conv(SiLU(GN(h)))."""

    def __init__(self, width: int, out: int, epsilon: float, **options: Any):
        self.norm = GroupNorm(width, options["param_dtype"], epsilon)
        self.conv = Conv(width, out, (3, 3), kernel_init=zeros, **options)

    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h w o"]:
        return self.conv(jax.nn.silu(self.norm(h)))


class UNet(Net):
    """Convolutional U-Net of residual blocks, with attention at chosen resolutions.

    Each resolution has `blocks` of them on the way down and one more on the way up, which concatenates every feature
    map of the way down once, and blocks or convolutions that resample between; the middle has attention. No dropout:
    drawing random numbers does not belong in a pure function of (x, t, y).

    NCSN++ (2011.13456) also takes the image at each resolution. "ncsn++", for small images: on the way down, strided
    convolutions take it from one resolution to the next and the features are added to it. "ncsn++-skip", for large
    ones: it is downsampled by the filter alone and added to the features through a matrix, and on the way up each
    resolution gives an image of its own, whose sum, upsampled by the filter, is the output.

    Args:
        image_size: height and width of the (square) images; divisible by 2 ** (len(multipliers) - 1).
        channels: channels of the images.
        width: channels at multiplier 1; an even number.
        multipliers: width of each resolution over `width`, from the image's own resolution to the coarsest.
        blocks: residual blocks a resolution on the way down.
        attention_at: heights of feature maps where every block is followed by attention, such as (16, 8).
        head_width: channels of an attention head; None for one head.
        heads: attention heads everywhere, in place of head_width.
        style: "adm", "ddpm++", "ncsn++", "ncsn++-skip" or "ldm"; what they are: `unet_blocks.Style`.
        context: width of a text's embeddings, for attention to it beside self-attention; y is a `Text` then.
        learn_sigma: predict twice the channels (a variance): the call returns the first half, `project` both.
        num_classes, null_class, remat, dtype, param_dtype, time_scale, attention, rngs: as for DiT. Remat
            wraps each block; "dots" keeps no convolution, so it is near "full" here.

    Raises:
        ValueError: sizes that do not divide, an attention_at that is no resolution here, an unknown remat.
    """

    # how parameters lie on a mesh: see `jdiff.mesh.shardings`
    RULES = (
        (r"(conv_out|to_image/\d+/conv)/kernel", (None, None, "fsdp", None)),
        (r"(conv_in|conv|pyramid/\d+)/kernel", (None, None, None, "fsdp")),
        ("(attention/qkv|cross/q|cross/kv|mlp_in|proj_in)/kernel", ("fsdp", "tensor")),
        ("(attention/out|cross/out|mlp_out|proj_out)/kernel", ("tensor", "fsdp")),
        ("(attention/qkv|mlp_in)/bias", ("tensor",)),
        (r"(modulation|skip|time_in|time_out|pyramid/\d+)/kernel|labels", (None, "fsdp")),
    )

    def __init__(
        self,
        image_size: int,
        channels: int,
        *,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        attention_at: Sequence[int] = (),
        head_width: int | None = 64,
        heads: int | None = None,
        style: str = "adm",
        context: int | None = None,
        learn_sigma: bool = False,
        num_classes: int = 0,
        null_class: bool = True,
        remat: str = "none",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        time_scale: float = 1000.0,
        attention: Attention | None = None,
        rngs: nnx.Rngs,
    ):
        dtype, param_dtype = jnp.dtype(dtype), jnp.dtype(param_dtype)
        self._record(
            "UNet",
            image_size=image_size,
            channels=channels,
            width=width,
            multipliers=tuple(multipliers),
            blocks=blocks,
            attention_at=tuple(attention_at),
            head_width=head_width,
            heads=heads,
            style=style,
            context=context,
            learn_sigma=learn_sigma,
            num_classes=num_classes,
            null_class=null_class,
            remat=remat,
            dtype=dtype.name,
            param_dtype=param_dtype.name,
            time_scale=time_scale,
        )
        if not multipliers or min(width, blocks, *multipliers) < 1 or width % 2:
            raise ValueError(
                f"UNet: {width=}, {blocks=}, {multipliers=}; expected positive integers, an even width, "
                "and one multiplier or more"
            )
        coarsest = 2 ** (len(multipliers) - 1)
        if image_size % coarsest:
            raise ValueError(
                f"UNet: {len(multipliers)} multipliers halve the image {len(multipliers) - 1} times, and "
                f"{coarsest} does not divide image_size {image_size}"
            )
        sizes = [image_size // 2**level for level in range(len(multipliers))]
        if missing := [s for s in attention_at if s not in sizes]:
            raise ValueError(f"UNet: attention_at {missing} is no resolution of this net; it has {sizes}")
        if style not in STYLES or (context and num_classes):
            known = ", ".join(STYLES)
            raise ValueError(f"UNet: {style=}, {context=}, {num_classes=}; styles: {known}; a text or labels, not both")
        self.remat, self.dtype, self.style, self.context = remat, dtype, STYLES[style], context
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        kind = self.style

        def block(c: int, out: int, level: int, attend: bool = False, **how: Any) -> Block:
            count = (heads or out // (head_width or out)) if attend else 0
            if attend and (not count or out % count or (not heads and out % (head_width or out))):
                what = f"heads {heads}" if heads else f"head_width {head_width}"
                raise ValueError(f"UNet: {what} does not divide the {out} channels at size {sizes[level]}")
            told: dict[str, Any] = {"context": context, "style": kind, "attention": attention}
            return Block(c, out, 4 * width, level=level, heads=count, **told, **how, **options)

        def between(c: int, level: int, to: Any) -> Block | Resample:
            if kind.resample == "conv":
                return Resample(c, to=to, level=level, **options)
            return block(c, c, level, to=to)

        widths = [width * m for m in multipliers]
        c, last = width if kind.narrow else widths[0], len(widths) - 1
        self.conditioning = Conditioning(
            width * (1 + kind.fourier),
            4 * width,
            num_classes,
            null_class,
            time_scale=time_scale,
            label_std=1.0,
            endpoint=kind.endpoint,
            fourier=kind.fourier,
            labels_first=kind.labels_first,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.conv_in = Conv(channels, c, (3, 3), kernel_init=xavier, **options)
        down, middle, up, skips = [], [], [], [c]
        for level, out in enumerate(widths):
            if level:
                down.append(between(c, level, "down"))
                skips.append(c)
            for _ in range(blocks):
                down.append(block(c, out, level, sizes[level] in attention_at))
                skips.append(c := out)
        middle = [block(c, c, last, True), block(c, c, last)]
        for level, out in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                attend = sizes[level] in attention_at and (i == blocks or not kind.attend_last)
                up.append(block(c + skips.pop(), out, level, attend))
                c = out
            if level:
                up.append(between(c, level - 1, "up"))
        self.down, self.middle, self.up = nnx.List(down), nnx.List(middle), nnx.List(up)
        out = channels * (1 + learn_sigma)
        take: dict[str, Any] = {  # an image to a resolution's features
            "residual": lambda a, b: Conv(a, b, (3, 3), padding=2, kernel_init=xavier, **options),
            "skip": lambda _, b: Linear(channels, b, kernel_init=xavier, **options),
        }
        pairs = _pyramid(channels, widths) if kind.pyramid != "none" else []
        levels = widths[1:] if kind.pyramid == "skip" else []
        self.pyramid = nnx.List([take[kind.pyramid](a, b) for a, b in pairs]) if pairs else None
        self.to_image = nnx.List([Head(w, out, kind.epsilon, **options) for w in levels]) if levels else None
        self.norm = GroupNorm(c, param_dtype, kind.epsilon)
        self.conv_out = Conv(c, out, (3, 3), kernel_init=zeros, **options)

    @property
    def num_blocks(self) -> int:
        return len(self.down) + len(self.middle) + len(self.up)

    @property
    def attention_heads(self) -> tuple[int, ...]:
        return tuple(block.heads for block in (*self.down, *self.middle, *self.up) if block.heads)

    def embed(self, x: Float[Array, "b height width c"], t: ArrayLike, y: Any = None) -> tuple[State, Told]:
        """The state before the first block, and what the blocks are told."""
        self._check_sample(x)
        text: Text | None = self._text(x, y, self.context) if self.context else None
        label = None if text is not None else self._labels(x, y)
        h = self.conv_in(x.astype(self.dtype))
        times = [pool_time(t, x.shape, 2**level) for level in range(self.down[-1].level + 1)]
        levels = tuple(self.conditioning(time, label) for time in times)
        image = x.astype(self.dtype) if self.pyramid is not None else None
        return State(h, (h,), image), Told(levels, None if text is None else text.tokens.astype(self.dtype))

    def run(
        self,
        state: State,
        c: Told,
        start: int = 0,
        stop: int | None = None,
        *,
        blocks: ArrayLike | None = None,
        perturb: ArrayLike | None = None,
    ) -> State:
        """The state after blocks start .. stop - 1 of those down, in the middle and up.

        blocks: 0 where only the shortcut of a block passes (a convolution that resamples always runs); perturb: over
        the attention layers in their order.
        """
        h, skips, image, output = state
        start, stop = self._span(start, stop)
        mask = None if blocks is None else self._mask(blocks)
        us = None if perturb is None else self._perturbation(perturb, len(h))
        whole = rematerialise(lambda block, h, u: block(h, c.levels[block.level], u, c.text), self.remat, scanned=False)
        attentions = 0
        for i, block in enumerate((*self.down, *self.middle, *self.up)):
            u = us[attentions] if us is not None and block.heads else None
            attentions += bool(block.heads)
            if not start <= i < stop:
                continue
            if i >= len(self.down) + len(self.middle) and block.to != "up":
                h, skips = jnp.concatenate([h, skips[-1]], axis=-1), skips[:-1]
            if block.to == "up" and self.to_image is not None:
                own = self.to_image[block.level](h)
                output = own if output is None else own + resample(output, "up", fir=True)
            if mask is None:
                h = whole(block, h, u)
            else:
                some = lambda h, block=block, u=u: whole(block, h, u)
                h = jax.lax.cond(mask[i], some, block.shortcut, h)
            if block.to == "down" and self.pyramid is not None and image is not None:
                take = self.pyramid[block.level - 1]
                if self.to_image is not None:
                    image = resample(image, "down", fir=True)
                    h = h + take(image)
                else:
                    image = resample(take(image), "down", fir=True, border=0)
                    h = image = (h + image) * 0.5**0.5
            if i < len(self.down):
                skips = (*skips, h)
        return State(h, skips, image, output)

    def project(self, state: State, c: Told) -> Float[Array, "b height width c2"]:
        """Features after the last block to images, in `dtype`; c2 = 2 c channels where learn_sigma is set."""
        last = self.conv_out(jax.nn.silu(self.norm(state.h)))
        return last if state.output is None else last + resample(state.output, "up", fir=True)


def _pyramid(channels: int, widths: Sequence[int]) -> list[tuple[int, int]]:
    """Channels in and out of the convolutions between resolutions: the image's, then of the features before them."""
    return list(zip([channels, *widths], widths[:-1], strict=False))
