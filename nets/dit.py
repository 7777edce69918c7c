"""Diffusion transformer with adaLN-Zero (Peebles & Xie, 2212.09748)."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from jdiff.mesh import BATCH, constrain

from .layers import (
    Attention,
    Conditioning,
    Linear,
    Net,
    SelfAttention,
    layer_norm,
    modulate,
    patchify,
    pool_time,
    positions,
    rematerialise,
    unpatchify,
    wide,
    xavier,
    zeros,
)


class Block(nnx.Module):
    """One transformer block with adaLN-Zero: the identity when it is built.

    s1, k1, g1, s2, k2, g2 = Linear(SiLU(c))
    x = x + g1 Attention(LN(x) (1 + k1) + s1)
    x = x + g2 MLP(LN(x) (1 + k2) + s2)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        *,
        attention: Attention | None = None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        hidden = int(width * mlp_ratio)
        self.modulation = Linear(width, 6 * width, kernel_init=zeros, **options)
        self.attention = SelfAttention(width, heads, attention=attention, **options)
        self.mlp_in = Linear(width, hidden, kernel_init=xavier, **options)
        self.mlp_out = Linear(hidden, width, kernel_init=xavier, **options)

    def __call__(
        self, x: Float[Array, "b n d"], c: Float[Array, "b2 n2 d"], perturb: Array | None = None
    ) -> Float[Array, "b n d"]:
        """x: tokens; c: conditioning a sample (n2 = 1) or a token (n2 = n); perturb: see `SelfAttention`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(jax.nn.silu(c)), 6, axis=-1)
        x = x + gate1 * self.attention(modulate(layer_norm(x), shift1, scale1), perturb)
        hidden = jax.nn.gelu(self.mlp_in(modulate(layer_norm(x), shift2, scale2)), approximate=True)
        hidden = constrain(hidden, BATCH, "sequence", "tensor")
        return constrain(x + gate2 * self.mlp_out(hidden), BATCH, "sequence", None)


class DiT(Net):
    """Diffusion transformer: patches as tokens, adaLN-Zero blocks scanned, labels with a null class.

    After 2212.09748; unlike the released net it predicts no variance: the output has the image's channels.
    The blocks' parameters are stacked on a leading axis of length depth and run by one `lax.scan`, so the
    time to compile does not grow with depth.

    Args:
        image_size: height and width of the (square) images; divisible by patch.
        channels: channels of the images.
        patch: side of a patch in pixels.
        width: width of a token; divisible by heads and by 4.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: hidden width of the MLPs over width.
        num_classes: number of labels; 0 for an unconditional net, which takes no y.
        null_class: one more label, `null_label` = num_classes, for "no label".
        remat: "none", "full" or "dots"; see `layers.REMAT`.
        unroll: blocks a turn of the loop over them. A CPU takes the gradient of a loop several times slower than
            that of straight code: give depth for a small net there, and pay in time to compile.
        dtype: of activations; float32 or bfloat16.
        param_dtype: of parameters; float32 or bfloat16.
        time_scale: multiplies the time before the sinusoids, which expect 0 to 1000.
        attention: a function (q, k, v) of (b, n, heads, width / heads) arrays in place of jax's.
        rngs: source of the initial parameters; not kept.

    Raises:
        ValueError: sizes that do not divide, or an unknown remat.
    """

    # how parameters lie on a mesh: see `jdiff.mesh.shardings`
    RULES = (
        ("(attention/qkv|mlp_in)/kernel", ("fsdp", "tensor")),
        ("(attention/out|mlp_out)/kernel", ("tensor", "fsdp")),
        ("(attention/qkv|mlp_in)/bias", ("tensor",)),
        ("out/kernel", ("fsdp", None)),
        ("(patches|modulation|time_in|time_out)/kernel|labels", (None, "fsdp")),
    )

    def __init__(
        self,
        image_size: int,
        channels: int,
        *,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        null_class: bool = True,
        remat: str = "none",
        unroll: int = 1,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        time_scale: float = 1000.0,
        attention: Attention | None = None,
        rngs: nnx.Rngs,
    ):
        dtype, param_dtype = jnp.dtype(dtype), jnp.dtype(param_dtype)
        self._record(
            "DiT",
            image_size=image_size,
            channels=channels,
            patch=patch,
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
            null_class=null_class,
            remat=remat,
            unroll=unroll,
            dtype=dtype.name,
            param_dtype=param_dtype.name,
            time_scale=time_scale,
        )
        for what, value in {"patch": patch, "width": width, "depth": depth, "heads": heads, "unroll": unroll}.items():
            if value < 1:
                raise ValueError(f"DiT: {what} is {value}; expected a positive integer")
        if image_size % patch:
            raise ValueError(f"DiT: patch {patch} does not divide image_size {image_size}")
        if width % heads or width % 4:
            raise ValueError(f"DiT: width {width} must be divisible by heads {heads} and by 4 (positions)")
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        pixels = patch * patch * channels
        self.patch, self.width, self.depth, self.remat, self.unroll, self.dtype = (
            patch,
            width,
            depth,
            remat,
            unroll,
            dtype,
        )
        self.conditioning = Conditioning(
            256,
            width,
            num_classes,
            null_class,
            time_scale=time_scale,
            time_init=nnx.initializers.normal(0.02),
            label_std=0.02,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.patches = Linear(pixels, width, kernel_init=xavier, **options, rngs=rngs)

        def block(key: Array) -> Block:
            return Block(width, heads, mlp_ratio, attention=attention, **options, rngs=nnx.Rngs(key))

        self.blocks = jax.vmap(block)(jax.random.split(rngs.params(), depth))
        self.modulation = Linear(width, 2 * width, kernel_init=zeros, **options, rngs=rngs)
        self.out = Linear(width, pixels, kernel_init=zeros, **options, rngs=rngs)

    @property
    def num_blocks(self) -> int:
        return self.depth

    @property
    def attention_heads(self) -> tuple[int, ...]:
        return (self.blocks.attention.heads,) * self.depth

    def __call__(
        self,
        x: Float[Array, "b height width c"],
        t: ArrayLike,
        y: ArrayLike | None = None,
        blocks: ArrayLike | None = None,
        perturb: ArrayLike | None = None,
    ) -> Float[Array, "b height width c"]:
        """The network's output for images x at times t with labels y.

        Args:
            x: images (b, image_size, image_size, channels).
            t: time of order 1: a scalar, (b,), or any shape that broadcasts against x; a time that varies
                inside a patch is averaged over it, so that a token has one time. Taken as float32.
            y: integer labels, (b,) or a scalar; None is the null label. A label that is no class gives NaN.
            blocks: (num_blocks,), 0 where a block is skipped (the identity in its place, at no cost) as in
                AutoDiffusion (2309.10438). An argument of the program: one serves all masks. None runs all.
            perturb: u in [0, 1] a layer and head, (depth, heads) or (b, depth, heads): attention maps become
                (1 - u) A + u I, as in SoftPAG (2506.10978). None costs nothing.

        Returns:
            x's shape; float64 where x is float64, else float32, whatever `dtype` is.

        Raises:
            ValueError: an image, time, label or mask that does not fit, when traced.
        """
        h, c = self.embed(x, t, y)
        step = rematerialise(lambda h, layer: (layer[0](h, c, *layer[1:]), None), self.remat, scanned=True)
        layers = (self.blocks,) if perturb is None else (self.blocks, self._perturbation(perturb, x.shape[0]))
        if blocks is None:
            h, _ = jax.lax.scan(step, h, layers, unroll=self.unroll)
        else:
            masked = lambda h, kept: jax.lax.cond(kept[0], lambda h: step(h, kept[1]), lambda h: (h, None), h)
            h, _ = jax.lax.scan(masked, h, (self._mask(blocks), layers), unroll=self.unroll)
        return self.project(h, c).astype(wide(x.dtype))

    def embed(
        self, x: Float[Array, "b height width c"], t: ArrayLike, y: ArrayLike | None = None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b2 n2 d"]]:
        """What goes into the blocks: tokens in `dtype`, and float32 conditioning a sample or a token."""
        y = self._check(x, y)
        time = rearrange(pool_time(t, x.shape, self.patch), "b h w -> b (h w)")
        # A constant of the program, made on the host: no parameter, and nothing for an optimizer to move.
        table = jnp.asarray(positions(self.image_size // self.patch, self.width), self.dtype)
        h = self.patches(patchify(x.astype(self.dtype), self.patch)) + table
        return constrain(h, BATCH, "sequence", None), self.conditioning(time, y)

    def project(self, h: Float[Array, "b n d"], c: Float[Array, "b2 n2 d"]) -> Float[Array, "b height width c"]:
        """Tokens after the last block to an image, in `dtype`."""
        shift, scale = jnp.split(self.modulation(jax.nn.silu(c)), 2, axis=-1)
        return unpatchify(self.out(modulate(layer_norm(h), shift, scale)), self.patch)
