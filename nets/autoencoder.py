"""Autoencoders whose latents diffusion works on: with Gaussian latents (KL) and with a codebook (VQ), of 2112.10752."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .layers import Conv, GroupNorm, Linear, wide, xavier
from .net import Net
from .patches import Size
from .unet_blocks import STYLES, Block, Resample

STYLE = STYLES["autoencoder"]


class Coder(nnx.Module):
    """Encoder or decoder: residual blocks at each resolution, attention in the middle, which is the coarsest.

    widths: of each resolution from the image's own; the decoder has one more block at each than the encoder.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        widths: Sequence[int],
        blocks: int,
        attend: Sequence[bool],
        *,
        decoder: bool,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        block = lambda a, b, level, attend=False: Block(a, b, 0, level=level, heads=int(attend), style=STYLE, **options)
        levels = list(enumerate(zip(widths, attend, strict=True)))
        c, last, layers = (widths[-1] if decoder else widths[0]), len(widths) - 1, []
        self.conv_in = Conv(channels, c, (3, 3), kernel_init=xavier, **options)
        middle = [block(widths[-1], widths[-1], last, True), block(widths[-1], widths[-1], last)]
        for level, (width, here) in reversed(levels) if decoder else levels:
            for _ in range(blocks + decoder):
                layers.append(block(c, width, level, here))
                c = width
            if decoder and level:
                layers.append(Resample(c, to="up", level=level - 1, **options))
            if not decoder and level < last:
                layers.append(Resample(c, to="down", level=level + 1, padded=False, **options))
        self.layers = nnx.List([*middle, *layers] if decoder else [*layers, *middle])
        self.norm = GroupNorm(c, param_dtype, STYLE.epsilon)
        self.conv_out = Conv(c, out, (3, 3), kernel_init=xavier, **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        h = self.conv_in(x)
        for layer in self.layers:
            h = layer(h)
        return self.conv_out(jax.nn.silu(self.norm(h)))


class Autoencoder(Net):
    """What the two autoencoders share: images (b, height, width, channels) to latents, smaller by `factor`, and back.

    Args:
        image_size: height and width, or (height, width); divisible by factor = 2 ** (len(multipliers) - 1). Other
            sizes that it divides may be given to `encode` and `decode`.
        channels: of the images.
        latent_channels: of the latents.
        width, multipliers, blocks: channels of each resolution, and its residual blocks (one more in the decoder).
        attention_at: heights of feature maps where every block is followed by attention, of one head.
        dtype, param_dtype, rngs: as for `UNet`.
    """

    RULES = (
        ("conv_out/kernel", (None, None, "fsdp", None)),
        ("(conv_in|conv)/kernel", (None, None, None, "fsdp")),
        ("attention/qkv/kernel", ("fsdp", "tensor")),
        ("attention/out/kernel", ("tensor", "fsdp")),
        ("attention/qkv/bias", ("tensor",)),
        ("skip/kernel", (None, "fsdp")),
    )

    def _build(self, moments: int, *, rngs: nnx.Rngs, **arguments: Any) -> None:
        """The two coders, `moments` numbers a latent channel coming out of the encoder."""
        name, a = type(self).__name__, arguments
        dtype, param_dtype = jnp.dtype(a["dtype"]), jnp.dtype(a["param_dtype"])
        self._record(name, **{**arguments, "dtype": dtype.name, "param_dtype": param_dtype.name})
        multipliers, size = a["multipliers"], self.size[0]
        self.latent_channels, self.dtype, self.factor = a["latent_channels"], dtype, 2 ** (len(multipliers) - 1)
        if any(n % self.factor for n in self.size):
            raise ValueError(f"{name}: {self.factor} does not divide image_size {self.image_size}")
        sizes = [size // 2**level for level in range(len(multipliers))]
        if missing := [s for s in a["attention_at"] if s not in sizes]:
            raise ValueError(f"{name}: attention_at {missing} is no resolution of this net; it has {sizes}")
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        widths, latent = [a["width"] * m for m in multipliers], a["latent_channels"]
        kind: dict[str, Any] = {"attend": [s in a["attention_at"] for s in sizes], "blocks": a["blocks"], **options}
        self.encoder = Coder(a["channels"], moments * latent, widths, decoder=False, **kind)
        self.decoder = Coder(latent, a["channels"], widths, decoder=True, **kind)
        self.to_latent = Linear(moments * latent, moments * latent, kernel_init=xavier, **options)
        self.from_latent = Linear(latent, latent, kernel_init=xavier, **options)

    def moments(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 m"]:
        """What comes out of the encoder for images x of any size that `factor` divides."""
        if x.shape[-1] != self.channels or any(n % self.factor for n in x.shape[1:3]):
            raise ValueError(
                f"{self.name} takes images of {self.channels} channels whose height and width {self.factor} divides; "
                f"it was given {x.shape}"
            )
        return self.to_latent(self.encoder(x.astype(self.dtype))).astype(wide(x.dtype))

    def decode(self, z: Float[Array, "b h2 w2 z"]) -> Float[Array, "b h w c"]:
        """Latents to images; float64 where z is float64, else float32."""
        return self.decoder(self.from_latent(z.astype(self.dtype))).astype(wide(z.dtype))


class Gaussian(NamedTuple):
    """The encoder's law of a latent, independent in its entries."""

    mean: Float[Array, "b h w z"]
    logvar: Float[Array, "b h w z"]

    def sample(self, key: Array) -> Float[Array, "b h w z"]:
        return self.mean + jnp.exp(self.logvar / 2) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def kl(self) -> Float[Array, "b"]:
        """To the standard normal, in nats a sample."""
        each = jnp.square(self.mean) + jnp.exp(self.logvar) - 1 - self.logvar
        return each.sum(axis=(1, 2, 3)) / 2


class AutoencoderKL(Autoencoder):
    """Stable Diffusion's autoencoder: images to a Gaussian over latents (encode) and back (decode).

    Diffusion works on latents times a constant that gives them unit variance: 0.18215 for Stable Diffusion 1 and 2.
    The arguments are `Autoencoder`'s.
    """

    def __init__(
        self,
        image_size: Size,
        channels: int = 3,
        *,
        latent_channels: int = 4,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        blocks: int = 2,
        attention_at: Sequence[int] = (),
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self._build(
            2, image_size=image_size, channels=channels, latent_channels=latent_channels, width=width,
            multipliers=tuple(multipliers), blocks=blocks, attention_at=tuple(attention_at), dtype=dtype,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def encode(self, x: Float[Array, "b h w c"]) -> Gaussian:
        """The law of the latents of images x, usually in [-1, 1]."""
        mean, logvar = jnp.split(self.moments(x), 2, axis=-1)
        return Gaussian(mean, jnp.clip(logvar, -30.0, 20.0))


class Quantised(NamedTuple):
    """A latent moved to its nearest codes."""

    z: Float[Array, "b h w z"]  # the codes; its gradient goes to the encoder as if nothing had been moved
    codes: Int[Array, "b h w"]
    loss: Float[Array, ""]  # |sg(z) - code|^2 + commitment |z - sg(code)|^2, mean over entries


class VQAutoencoder(Autoencoder):
    """Latent diffusion's autoencoder with a codebook (VQ-VAE, 1711.00937; VQGAN, 2012.09841).

    `encode` gives the continuous latents, on which diffusion works, and `decode` is given them quantised:
    `decode(quantise(z).z)`. codes: rows of the codebook; commitment: of the loss' second term. The other arguments are
    `Autoencoder`'s.
    """

    def __init__(
        self,
        image_size: Size,
        channels: int = 3,
        *,
        codes: int = 8192,
        commitment: float = 0.25,
        latent_channels: int = 3,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 2,
        attention_at: Sequence[int] = (),
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self._build(
            1, image_size=image_size, channels=channels, codes=codes, commitment=commitment,
            latent_channels=latent_channels, width=width, multipliers=tuple(multipliers), blocks=blocks,
            attention_at=tuple(attention_at), dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        self.commitment = commitment
        shape = (codes, latent_channels)
        drawn = jax.random.uniform(rngs.params(), shape, jnp.dtype(param_dtype), -1 / codes, 1 / codes)
        self.codebook = nnx.Param(drawn)

    def encode(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 z"]:
        """The latents of images x, before quantisation."""
        return self.moments(x)

    def quantise(self, z: Float[Array, "b h w z"]) -> Quantised:
        """Each latent moved to the nearest code; the first of equals."""
        book = self.codebook.astype(z.dtype)
        inner = jnp.einsum("bhwz,kz->bhwk", z, book, precision=jax.lax.Precision.HIGHEST)
        codes = jnp.argmin(jnp.square(book).sum(-1) - 2 * inner, axis=-1)
        found, sg = book[codes], jax.lax.stop_gradient
        square = lambda a, b: jnp.square(a - b).mean()
        loss = square(sg(z), found) + self.commitment * square(z, sg(found))
        return Quantised(z + sg(found - z), codes, loss)
