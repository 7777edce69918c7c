"""Blocks of convolutional U-Nets and autoencoders: residual blocks in the styles of their families, resampling."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce, repeat
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jdiff.mesh import BATCH, constrain

from .layers import (
    Attention,
    Conv,
    CrossAttention,
    GroupNorm,
    LayerNorm,
    Linear,
    SelfAttention,
    modulate,
    xavier,
    zeros,
)

Resampling = Literal["same", "down", "up"]


class Style(NamedTuple):
    """What tells the families of U-Nets apart."""

    scale_shift: bool = True  # the conditioning scales and shifts after the second norm; else it is added before it
    skip_scale: float = 1.0  # of the sum of branch and shortcut
    epsilon: float = 1e-5  # of group norms
    fir: bool = False  # resample with the filter [1, 3, 3, 1]; else average and repeat
    project: bool = False  # a 1 x 1 convolution in every shortcut that resamples
    resample: Literal["block", "conv"] = "block"  # residual blocks, or single 3 x 3 convolutions
    attend_last: bool = False  # on the way up, attention after the last block of a resolution only
    narrow: bool = False  # the first convolution has `width` channels, whatever the first multiplier
    pyramid: Literal["none", "residual", "skip"] = "none"  # the image at each resolution beside the features: `UNet`
    labels_first: bool = False  # labels are added to the sinusoids; else to the embedded time
    endpoint: bool = False  # the slowest sinusoid is exactly 1 / 10,000
    fourier: bool = False  # random frequencies, twice as many, in place of sinusoids


SONG = Style(False, math.sqrt(0.5), 1e-6, project=True, attend_last=True, narrow=True, labels_first=True, endpoint=True)
STYLES = {
    "adm": Style(),
    "ddpm++": SONG,
    "ncsn++": SONG._replace(fir=True, pyramid="residual", fourier=True),
    "ncsn++-skip": SONG._replace(fir=True, pyramid="skip", fourier=True),
    "ldm": Style(scale_shift=False, resample="conv"),
    "autoencoder": Style(scale_shift=False, epsilon=1e-6, resample="conv"),
}
"""By name: ADM (2105.05233), score SDE's DDPM++ and NCSN++ as in EDM (2206.00364), score SDE's for large images
(2011.13456), latent diffusion (2112.10752)."""


def resample(
    x: Float[Array, "b h w c"], to: Resampling, fir: bool = False, border: int = 1
) -> Float[Array, "b h2 w2 c"]:
    """Half the size by averaging 2 x 2 pixels, twice the size by repeating them, or x.

    fir: by the filter [1, 3, 3, 1] along each axis; zeros stand outside of x, `border` of them before halving.
    """
    if to == "same":
        return x
    if fir:
        line = np.asarray([1, 3, 3, 1]) / 8
        kernel = np.outer(line, line) * (4 if to == "up" else 1)
        kernel = jnp.asarray(np.broadcast_to(kernel[:, :, None, None], (4, 4, 1, x.shape[-1])), x.dtype)
        down = to == "down"
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2) if down else (1, 1), [(border, border)] * 2 if down else [(2, 2)] * 2,
            lhs_dilation=(1, 1) if down else (2, 2), dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )  # fmt: skip
    if to == "down":
        return reduce(x, "b (h p) (w q) c -> b h w c", "mean", p=2, q=2)
    return repeat(x, "b h w c -> b (h p) (w q) c", p=2, q=2)


class Block(nnx.Module):
    """Residual block, resampling inside it, then attention if asked.

        h = Conv(resample(SiLU(GN(x))))
        h = Conv(SiLU(GN(h) (1 + scale) + shift)),  (scale, shift) = Linear(SiLU(c))      or Conv(SiLU(GN(h + shift)))
        x = s (skip(resample(x)) + h),  s = style.skip_scale
        x = s (x + Attention(GN(x)))                                                     or Transformer(x, text)

    Both branches end in zeros, so only the skip passes when it is built. `level`: halvings of the output. cond: width
    of c, 0 for a block that is told nothing. context: width of a text's embeddings, for a `Transformer`.
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
        context: int | None = None,
        style: Style = STYLES["adm"],
        attention: Attention | None = None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.level, self.style = level, style
        self.to: Resampling = to
        skip = out != channels or (style.project and to != "same")
        self.norm_in = GroupNorm(channels, param_dtype, style.epsilon)
        self.conv_in = Conv(channels, out, (3, 3), kernel_init=xavier, **options)
        self.modulation = Linear(cond, out * (1 + style.scale_shift), kernel_init=xavier, **options) if cond else None
        self.norm_out = GroupNorm(out, param_dtype, style.epsilon)
        self.conv_out = Conv(out, out, (3, 3), kernel_init=zeros, **options)
        self.skip = Linear(channels, out, kernel_init=xavier, **options) if skip else None
        plain, text = bool(heads and context is None), bool(heads and context is not None)
        self.norm_attention = GroupNorm(out, param_dtype, style.epsilon) if plain else None
        self.attention = SelfAttention(out, heads, attention=attention, out_init=zeros, **options) if plain else None
        self.transformer = Transformer(out, heads, context or 0, attention=attention, **options) if text else None

    @property
    def heads(self) -> int:
        """Of its self-attention; 0 without one."""
        attention = self.attention if self.transformer is None else self.transformer.attention
        return 0 if attention is None else attention.heads

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        c: Float[Array, "b2 h2 w2 d"] | None = None,
        perturb: Array | None = None,
        text: Float[Array, "b m e"] | None = None,
    ) -> Float[Array, "b h3 w3 o"]:
        """x: features; c: conditioning a sample (h2 = w2 = 1) or a pixel of the output; perturb: of the attention."""
        h = self.conv_in(resample(jax.nn.silu(self.norm_in(x)), self.to, self.style.fir))
        told = 0.0 if self.modulation is None or c is None else self.modulation(jax.nn.silu(c))
        if self.style.scale_shift:
            scale, shift = jnp.split(told, 2, axis=-1)
            h = modulate(self.norm_out(h), shift, scale)
        else:
            h = self.norm_out(h + told)
        h = self.conv_out(jax.nn.silu(h))
        x = constrain((self.shortcut(x) + h) * self.style.skip_scale, BATCH, None, None, None)
        if self.attention is not None and self.norm_attention is not None:
            tokens = rearrange(self.norm_attention(x), "b h w c -> b (h w) c")
            x = (x + self.attention(tokens, perturb).reshape(x.shape)) * self.style.skip_scale
        return x if self.transformer is None or text is None else self.transformer(x, text, perturb)

    def shortcut(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h3 w3 o"]:
        """What passes beside the branches: x, resampled and with the block's channels."""
        x = resample(x, self.to, self.style.fir)
        return x if self.skip is None else self.skip(x)


class Resample(nnx.Module):
    """A 3 x 3 convolution that halves the size with stride 2, or follows a repetition of pixels (2112.10752).

    padded: one row and column of zeros on every side before the stride, as in a U-Net; else after the last ones only,
    as in the autoencoder.
    """

    heads = 0

    def __init__(
        self, channels: int, *, to: Resampling, level: int, padded: bool = True,
        dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.to: Resampling = to
        self.level = level
        down: dict[str, Any] = {"strides": 2, "padding": ((1, 1), (1, 1)) if padded else ((0, 1), (0, 1))}
        kind: dict[str, Any] = down if to == "down" else {}
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = Conv(channels, channels, (3, 3), kernel_init=xavier, **kind, **options)

    def __call__(self, x: Float[Array, "b h w c"], *_: Any) -> Float[Array, "b h2 w2 c"]:
        return self.conv(resample(x, "up") if self.to == "up" else x)

    shortcut = __call__


class Transformer(nnx.Module):
    """Latent diffusion's transformer over pixels that are told a text (2112.10752, appendix E.2.1), added to x.

    Self-attention, cross-attention to the text, and a gated MLP (GEGLU), each after a layer norm.
    """

    def __init__(
        self, width: int, heads: int, context: int, *, attention: Attention | None = None,
        dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs,
    ):  # fmt: skip
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kind: dict[str, Any] = {"attention": attention, "bias": False}
        self.norm = GroupNorm(width, param_dtype, 1e-6)
        self.proj_in = Linear(width, width, kernel_init=xavier, **options)
        self.norm_attention = LayerNorm(width, param_dtype)
        self.attention = SelfAttention(width, heads, **kind, **options)
        self.norm_cross = LayerNorm(width, param_dtype)
        self.cross = CrossAttention(width, context, heads, **kind, **options)
        self.norm_mlp = LayerNorm(width, param_dtype)
        self.mlp_in = Linear(width, 8 * width, kernel_init=xavier, **options)
        self.mlp_out = Linear(4 * width, width, kernel_init=xavier, **options)
        self.proj_out = Linear(width, width, kernel_init=zeros, **options)

    def __call__(
        self, x: Float[Array, "b h w c"], text: Float[Array, "b m e"], perturb: Array | None = None
    ) -> Float[Array, "b h w c"]:
        h = self.proj_in(rearrange(self.norm(x), "b h w c -> b (h w) c"))
        h = h + self.attention(self.norm_attention(h), perturb)
        h = h + self.cross(self.norm_cross(h), text)
        value, gate = jnp.split(self.mlp_in(self.norm_mlp(h)), 2, axis=-1)
        h = h + self.mlp_out(value * jax.nn.gelu(gate, approximate=False))
        return x + self.proj_out(h).reshape(x.shape)
