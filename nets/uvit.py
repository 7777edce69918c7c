"""U-ViT (Bao et al., 2209.12152): a transformer with long skips, for which time and label are tokens like the rest."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PyTree

from jdiff.mesh import BATCH, constrain

from .conditioning import Text, rows_of, sinusoids
from .layers import Attention, Conv, LayerNorm, Linear, SelfAttention, rematerialise, xavier
from .net import Net, kept
from .patches import patchify, unpatchify


class Block(nnx.Module):
    """A transformer block after layer norms; skip: one that first joins its tokens with those of the way down.

    x = Linear([x, skip]);  x = x + Attention(LN(x));  x = x + MLP(LN(x))
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        *,
        skip: bool,
        attention: Attention | None = None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        hidden = int(width * mlp_ratio)
        self.skip = Linear(2 * width, width, kernel_init=xavier, **options) if skip else None
        self.norm_attention = LayerNorm(width, param_dtype)
        self.attention = SelfAttention(width, heads, attention=attention, bias=False, **options)
        self.norm_mlp = LayerNorm(width, param_dtype)
        self.mlp_in = Linear(width, hidden, kernel_init=xavier, **options)
        self.mlp_out = Linear(hidden, width, kernel_init=xavier, **options)

    def __call__(
        self, x: Float[Array, "b n d"], skip: Float[Array, "b n d"] | None = None, perturb: Array | None = None
    ) -> Float[Array, "b n d"]:
        if self.skip is not None and skip is not None:
            x = self.skip(jnp.concatenate([x, skip], axis=-1))
        x = x + self.attention(self.norm_attention(x), perturb)
        hidden = jax.nn.gelu(self.mlp_in(self.norm_mlp(x)), approximate=False)
        return constrain(x + self.mlp_out(constrain(hidden, BATCH, None, "tensor")), BATCH, None, None)


class State(NamedTuple):
    """Tokens, and those of the way down that the way up has not taken yet, the last one on top."""

    h: Float[Array, "b n d"]
    skips: Float[Array, "k b n d"]


class UViT(Net):
    """U-ViT: depth / 2 blocks down, one in the middle, depth / 2 up that take the tokens of the way down.

    Tokens: a label or a text if there is one, the time, the patches; learned positions; a convolution at the end. The
    blocks of each way are stacked and run by one `lax.scan`. The time is one a sample.

    Args:
        image_size, channels, patch, width, heads, mlp_ratio, remat, dtype, param_dtype, attention, rngs: as for DiT.
        depth: number of blocks beside the middle one; even.
        num_classes, null_class: labels, and one more for "no label"; 0 for none.
        context, context_length: width and number of a text's embeddings, where y is a `Text`.
        time_scale: multiplies the time before the sinusoids, which expect 0 to 1000.

    Raises:
        ValueError: sizes that do not divide, an odd depth, an unknown remat; labels and a text.
    """

    RULES = (
        ("(attention/qkv|mlp_in)/kernel", ("fsdp", "tensor")),
        ("(attention/out|mlp_out)/kernel", ("tensor", "fsdp")),
        ("mlp_in/bias", ("tensor",)),
        ("out/kernel", ("fsdp", None)),
        ("(patches|skip|text)/kernel|labels|positions", (None, "fsdp")),
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
        context: int | None = None,
        context_length: int = 77,
        remat: str = "none",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        time_scale: float = 1000.0,
        attention: Attention | None = None,
        rngs: nnx.Rngs,
    ):
        dtype, param_dtype = jnp.dtype(dtype), jnp.dtype(param_dtype)
        self._record(
            "UViT",
            image_size=image_size,
            channels=channels,
            patch=patch,
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
            null_class=null_class,
            context=context,
            context_length=context_length,
            remat=remat,
            dtype=dtype.name,
            param_dtype=param_dtype.name,
            time_scale=time_scale,
        )
        if depth < 2 or depth % 2:
            raise ValueError(f"UViT: depth is {depth}; expected an even number, half of it down and half up")
        self._patched(patch, width=width, heads=heads)
        if context and num_classes:
            raise ValueError(f"UViT: {context=} and {num_classes=}; it is told a text or labels, not both")
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.width, self.depth, self.heads, self.dtype = width, depth, heads, dtype
        self.remat, self.time_scale, self.context, self.context_length = remat, time_scale, context, context_length
        self.extras = 1 + (context_length if context else num_classes > 0)
        drawn = lambda *shape: nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, param_dtype))
        self.patches = Linear(patch * patch * channels, width, kernel_init=xavier, **options, rngs=rngs)
        self.labels = drawn(num_classes + null_class, width) if num_classes else None
        self.text = Linear(context, width, kernel_init=xavier, **options, rngs=rngs) if context else None
        self.positions = drawn(self.extras + self.grid[0] * self.grid[1], width)
        kind: dict[str, Any] = {"attention": attention, **options}
        block = lambda skip: lambda key: Block(width, heads, mlp_ratio, skip=skip, **kind, rngs=nnx.Rngs(key))
        self.down = jax.vmap(block(False))(jax.random.split(rngs.params(), depth // 2))
        self.middle = block(False)(rngs.params())
        self.up = jax.vmap(block(True))(jax.random.split(rngs.params(), depth // 2))
        self.norm = LayerNorm(width, param_dtype)
        self.out = Linear(width, patch * patch * channels, kernel_init=xavier, **options, rngs=rngs)
        self.smooth = Conv(channels, channels, (3, 3), kernel_init=xavier, **options, rngs=rngs)

    @property
    def num_blocks(self) -> int:
        return self.depth + 1

    @property
    def attention_heads(self) -> tuple[int, ...]:
        return (self.heads,) * self.num_blocks

    def embed(self, x: Float[Array, "b h w c"], t: ArrayLike, y: Any = None) -> tuple[State, tuple[()]]:
        """The state before the first block; nothing is told beside it."""
        self._check_sample(x)
        time = sinusoids(self.time_scale * self._time_a_sample(t, x), self.width)
        tokens = [jnp.broadcast_to(time, (len(x), 1, self.width)), self.patches(patchify(x, self.patch))]
        if self.text is not None:
            text: Text = self._text(x, y, self.context or 0)
            if text.tokens.shape[1] != self.context_length:
                raise ValueError(f"UViT has positions for {self.context_length} embeddings; got {text.tokens.shape}")
            tokens.insert(0, self.text(text.tokens))
        elif (label := self._labels(x, y)) is not None and self.labels is not None:
            tokens.insert(0, rows_of(self.labels[...], label)[:, None])
        h = jnp.concatenate([token.astype(self.dtype) for token in tokens], axis=1)
        h = constrain(h + self.positions.astype(self.dtype), BATCH, None, None)
        return State(h, jnp.zeros((0, *h.shape), h.dtype)), ()

    def run(
        self,
        state: State,
        c: tuple[()],
        start: int = 0,
        stop: int | None = None,
        *,
        blocks: ArrayLike | None = None,
        perturb: ArrayLike | None = None,
    ) -> State:
        """The state after blocks start .. stop - 1 of those down, in the middle and up. blocks, perturb: as for DiT."""
        start, stop = self._span(start, stop)
        each = self._each(blocks, perturb, len(state.h))

        def step(h: Array, layer: dict[str, PyTree]) -> tuple[Array, Array]:
            h = kept(layer, lambda h: layer["block"](h, layer.get("skip"), layer.get("perturb")), h)
            return h, h

        step = rematerialise(step, self.remat, scanned=True)
        h, skips = state
        half = self.depth // 2
        cut = lambda tree, a, b: jax.tree.map(lambda leaf: leaf[a:b], tree)
        a, b = min(start, half), min(stop, half)
        if a < b:
            h, new = jax.lax.scan(step, h, {"block": cut(self.down, a, b), **cut(each, a, b)})
            skips = jnp.concatenate([skips, new])
        if start <= half < stop:
            h, _ = step(h, {"block": self.middle, **{k: v[half] for k, v in each.items()}})
        a, b = max(start, half + 1), max(stop, half + 1)
        if a < b:
            layers = {"block": cut(self.up, a - half - 1, b - half - 1), **cut(each, a, b)}
            h, _ = jax.lax.scan(lambda h, v: (step(h, v)[0], None), h, {**layers, "skip": skips[::-1][: b - a]})
            skips = skips[: len(skips) - (b - a)]
        return State(h, skips)

    def project(self, state: State, c: tuple[()]) -> Float[Array, "b h w c"]:
        """Tokens after the last block to images, in `dtype`."""
        h = self.out(self.norm(state.h[:, self.extras :]))
        return self.smooth(unpatchify(h, self.patch, self.grid))
