"""Convolutional U-Net of ADM (Dhariwal & Nichol, 2105.05233), the heir of DDPM's and DDPM++'s."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from jdiff.mesh import BATCH, constrain

from .conditioning import Conditioning
from .layers import Attention, Conv, GroupNorm, Linear, SelfAttention, modulate, rematerialise, xavier, zeros
from .net import Net
from .patches import pool_time

Resampling = Literal["same", "down", "up"]


def resample(x: Float[Array, "b h w c"], to: Resampling) -> Float[Array, "b h2 w2 c"]:
    """Half the size by averaging 2 x 2 pixels, twice the size by repeating them, or x."""
    if to == "down":
        return reduce(x, "b (h p) (w q) c -> b h w c", "mean", p=2, q=2)
    return repeat(x, "b h w c -> b (h p) (w q) c", p=2, q=2) if to == "up" else x


class Block(nnx.Module):
    """Residual block with a scale-shift norm, resampling inside it, then attention if asked.

        h = Conv(resample(SiLU(GN(x))))
        h = Conv(SiLU(GN(h) (1 + scale) + shift)),  (scale, shift) = Linear(SiLU(c))
        x = skip(resample(x)) + h
        x = x + Attention(GN(x))

    Both branches end in zeros, so only the skip passes when it is built. `level`: halvings of the output.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        cond: int,
        *,
        level: int,
        to: Resampling = "same",
        heads: int = 0,
        attention: Attention | None = None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.level = level
        self.to: Resampling = to
        self.norm_in = GroupNorm(channels, param_dtype)
        self.conv_in = Conv(channels, out, (3, 3), kernel_init=xavier, **options)
        self.modulation = Linear(cond, 2 * out, kernel_init=xavier, **options)
        self.norm_out = GroupNorm(out, param_dtype)
        self.conv_out = Conv(out, out, (3, 3), kernel_init=zeros, **options)
        self.skip = Linear(channels, out, kernel_init=xavier, **options) if out != channels else None
        self.norm_attention = GroupNorm(out, param_dtype) if heads else None
        self.attention = SelfAttention(out, heads, attention=attention, out_init=zeros, **options) if heads else None

    def __call__(
        self, x: Float[Array, "b h w c"], c: Float[Array, "b2 h2 w2 d"], perturb: Array | None = None
    ) -> Float[Array, "b h3 w3 o"]:
        """x: features; c: conditioning a sample (h2 = w2 = 1) or a pixel of the output; perturb: of the attention."""
        h = self.conv_in(resample(jax.nn.silu(self.norm_in(x)), self.to))
        scale, shift = jnp.split(self.modulation(jax.nn.silu(c)), 2, axis=-1)
        h = self.conv_out(jax.nn.silu(modulate(self.norm_out(h), shift, scale)))
        x = constrain(self.shortcut(x) + h, BATCH, None, None, None)
        if self.attention is not None and self.norm_attention is not None:
            tokens = rearrange(self.norm_attention(x), "b h w c -> b (h w) c")
            x = x + self.attention(tokens, perturb).reshape(x.shape)
        return x

    def shortcut(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h3 w3 o"]:
        """What passes beside the branches: x, resampled and with the block's channels."""
        x = resample(x, self.to)
        return x if self.skip is None else self.skip(x)


class UNet(Net):
    """Convolutional U-Net: scale-shift residual blocks, attention at chosen resolutions (2105.05233).

    Down and up sampling are residual blocks; each resolution has `blocks` of them on the way down and one
    more on the way up, which concatenates every feature map of the way down once; the middle has attention.
    No dropout: drawing random numbers does not belong in a pure function of (x, t, y).

    Args:
        image_size: height and width of the (square) images; divisible by 2 ** (len(multipliers) - 1).
        channels: channels of the images.
        width: channels at multiplier 1; an even number.
        multipliers: width of each resolution over `width`, from the image's own resolution to the coarsest.
        blocks: residual blocks a resolution on the way down.
        attention_at: heights of feature maps where every block is followed by attention, such as (16, 8).
        head_width: channels of an attention head; None for one head.
        num_classes, null_class, remat, dtype, param_dtype, time_scale, attention, rngs: as for DiT. Remat
            wraps each block; "dots" keeps no convolution, so it is near "full" here.

    Raises:
        ValueError: sizes that do not divide, an attention_at that is no resolution here, an unknown remat.
    """

    # how parameters lie on a mesh: see `jdiff.mesh.shardings`
    RULES = (
        ("conv_out/kernel", (None, None, "fsdp", None)),
        ("conv_in/kernel", (None, None, None, "fsdp")),
        ("attention/qkv/kernel", ("fsdp", "tensor")),
        ("attention/out/kernel", ("tensor", "fsdp")),
        ("attention/qkv/bias", ("tensor",)),
        ("(modulation|skip|time_in|time_out)/kernel|labels", (None, "fsdp")),
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
        self.remat, self.dtype = remat, dtype
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def block(c: int, out: int, level: int, attend: bool = False, **kind: Any) -> Block:
            if attend and out % (head_width or out):
                raise ValueError(
                    f"UNet: head_width {head_width} does not divide the {out} channels at size {sizes[level]}"
                )
            heads = out // (head_width or out) if attend else 0
            return Block(c, out, 4 * width, level=level, heads=heads, attention=attention, **kind, **options)

        widths = [width * m for m in multipliers]
        c, last = widths[0], len(widths) - 1
        self.conditioning = Conditioning(
            width,
            4 * width,
            num_classes,
            null_class,
            time_scale=time_scale,
            label_std=1.0,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.conv_in = Conv(channels, c, (3, 3), kernel_init=xavier, **options)
        down, middle, up, skips = [], [], [], [c]
        for level, out in enumerate(widths):
            if level:
                down.append(block(c, c, level, to="down"))
                skips.append(c)
            for _ in range(blocks):
                down.append(block(c, out, level, sizes[level] in attention_at))
                skips.append(c := out)
        middle = [block(c, c, last, True), block(c, c, last)]
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                up.append(block(c + skips.pop(), out, level, sizes[level] in attention_at))
                c = out
            if level:
                up.append(block(c, c, level - 1, to="up"))
        self.down, self.middle, self.up = nnx.List(down), nnx.List(middle), nnx.List(up)
        self.norm = GroupNorm(c, param_dtype)
        self.conv_out = Conv(c, channels, (3, 3), kernel_init=zeros, **options)

    @property
    def num_blocks(self) -> int:
        return len(self.down) + len(self.middle) + len(self.up)

    @property
    def attention_heads(self) -> tuple[int, ...]:
        attentions = [block.attention for block in (*self.down, *self.middle, *self.up)]
        return tuple(a.heads for a in attentions if a is not None)

    def embed(
        self, x: Float[Array, "b height width c"], t: ArrayLike, y: ArrayLike | None = None
    ) -> tuple[tuple[Array, tuple[Array, ...]], tuple[Array, ...]]:
        """The state before the first block, (features, skips), and the conditioning of each resolution.

        skips: feature maps of the way down that the way up has not taken yet, the last one on top.
        """
        self._check_sample(x)
        y = self._labels(x, y)
        levels = self.down[-1].level + 1
        h = self.conv_in(x.astype(self.dtype))
        return (h, (h,)), tuple(self.conditioning(pool_time(t, x.shape, 2**level), y) for level in range(levels))

    def run(
        self,
        state: tuple[Array, tuple[Array, ...]],
        c: tuple[Array, ...],
        start: int = 0,
        stop: int | None = None,
        *,
        blocks: ArrayLike | None = None,
        perturb: ArrayLike | None = None,
    ) -> tuple[Array, tuple[Array, ...]]:
        """The state after blocks start .. stop - 1 of those down, in the middle and up.

        blocks: 0 where only the shortcut of a block passes; perturb: over the attention layers in their order.
        """
        h, skips = state
        start, stop = self._span(start, stop)
        mask = None if blocks is None else self._mask(blocks)
        us = None if perturb is None else self._perturbation(perturb, len(h))
        whole = rematerialise(lambda block, h, u: block(h, c[block.level], u), self.remat, scanned=False)
        attentions = 0
        for i, block in enumerate((*self.down, *self.middle, *self.up)):
            u = None if us is None or block.attention is None else us[attentions]
            attentions += block.attention is not None
            if not start <= i < stop:
                continue
            if i >= len(self.down) + len(self.middle) and block.to != "up":
                h, skips = jnp.concatenate([h, skips[-1]], axis=-1), skips[:-1]
            if mask is None:
                h = whole(block, h, u)
            else:
                h = jax.lax.cond(
                    mask[i], lambda h, block=block, u=u: whole(block, h, u), lambda h, block=block: block.shortcut(h), h
                )
            if i < len(self.down):
                skips = (*skips, h)
        return h, skips

    def project(self, state: tuple[Array, tuple[Array, ...]], c: tuple[Array, ...]) -> Float[Array, "b height width c"]:
        """Features after the last block to images, in `dtype`."""
        return self.conv_out(jax.nn.silu(self.norm(state[0])))
