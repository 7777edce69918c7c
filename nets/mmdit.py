"""MM-DiT (Esser et al., 2403.03206): image and text as two streams with weights of their own, and one attention."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PyTree

from jdiff.mesh import BATCH, constrain

from .conditioning import Conditioning, Text
from .layers import (
    Attention,
    Linear,
    SelfAttention,
    by_column,
    layer_norm,
    modulate,
    perturbed,
    rematerialise,
    xavier,
    zeros,
)
from .net import Net, kept
from .patches import Size, patchify, positions, unpatchify


def _cut(tree: PyTree, a: int, b: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[a:b], tree)


class Stream(nnx.Module):
    """One stream's half of a block: adaLN-Zero around the shared attention, and its own MLP.

    last: the stream gives keys and values and is then dropped, as the text is in the last block. dual: a second
    attention, among the stream's own tokens, beside the shared one.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, *, qk_norm: bool, last: bool = False, dual: bool = False,
        attention: Attention | None = None, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs,
    ):  # fmt: skip
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        hidden = int(width * mlp_ratio)
        self.parts = 2 if last else 9 if dual else 6
        self.modulation = Linear(width, self.parts * width, kernel_init=zeros, **options)
        self.attention = SelfAttention(width, heads, qk_norm=qk_norm, **options)
        if last:
            del self.attention.out
        self.attention2 = SelfAttention(width, heads, attention=attention, qk_norm=qk_norm, **options) if dual else None
        options["kernel_init"] = xavier
        self.mlp_in = None if last else Linear(width, hidden, **options)
        self.mlp_out = None if last else Linear(hidden, width, **options)

    def heads_of(self, x: Float[Array, "b n d"], c: Float[Array, "b 1 d"]) -> tuple[tuple[Array, ...], list[Array]]:
        """Queries, keys and values of the stream, and what is left of its modulation."""
        shift, scale, *rest = jnp.split(by_column(self.modulation, jax.nn.silu(c)), self.parts, axis=-1)
        return self.attention.heads_of(modulate(layer_norm(x), shift, scale)), rest

    def add(
        self, x: Float[Array, "b n d"], h: Float[Array, "b n d"], rest: list[Array], perturb: Array | None = None
    ) -> Float[Array, "b n d"]:
        """x with its part h of the attention's result, its own attention, if any, and then its MLP added.

        perturb: of its own attention.
        """
        if self.mlp_in is None or self.mlp_out is None:
            return x
        gate1, shift, scale, gate2, *own = rest
        added = gate1 * self.attention.out(h)
        if self.attention2 is not None:
            shift2, scale2, gate3 = own
            added = added + gate3 * self.attention2(modulate(layer_norm(x), shift2, scale2), perturb)
        x = x + added
        hidden = jax.nn.gelu(self.mlp_in(modulate(layer_norm(x), shift, scale)), approximate=True)
        return constrain(x + gate2 * self.mlp_out(constrain(hidden, BATCH, None, "tensor")), BATCH, None, None)


class State(NamedTuple):
    """The two streams' tokens."""

    image: Float[Array, "b n d"]
    text: Float[Array, "b m d"]


class Block(nnx.Module):
    """Both streams through one attention over all of their tokens; dual: and the image through one of its own."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, *, attention: Attention | None, last: bool = False,
        dual: bool = False, **kind: Any,
    ):  # fmt: skip
        self.dual = dual
        self.image = Stream(width, heads, mlp_ratio, dual=dual, attention=attention, **kind)
        self.text = Stream(width, heads, mlp_ratio, last=last, **kind)
        self.attention = attention or self.image.attention.attention

    def __call__(self, state: State, c: Float[Array, "b 1 d"], perturb: Array | None = None) -> State:
        """perturb: u a head, (b or 1, heads); with dual, (2, b or 1, heads), of the shared attention and the own."""
        shared, own = perturb if self.dual and perturb is not None else (perturb, None)
        (q1, k1, v1), rest1 = self.image.heads_of(state.image, c)
        (q2, k2, v2), rest2 = self.text.heads_of(state.text, c)
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in ((q1, q2), (k1, k2), (v1, v2)))
        h = perturbed(self.attention(q, k, v), v, shared)
        h = h.reshape(*h.shape[:2], -1)
        n = state.image.shape[1]
        return State(self.image.add(state.image, h[:, :n], rest1, own), self.text.add(state.text, h[:, n:], rest2))


class MMDiT(Net):
    """MM-DiT: patches and a text's embeddings as two streams; blocks scanned but for the last, which drops the text.

    y is a `Text`: embeddings of any number and of width `context`, and one vector of width `pooled`, which is added to
    the time. The time is one a sample. Positions are fixed: `patches.positions`, or the middle of a table.

    Args:
        image_size, channels, patch, width, depth, heads, mlp_ratio, remat, dtype, param_dtype, time_scale, attention,
            rngs: as for DiT; depth counts the last block.
        context, pooled: widths of the text's embeddings and of its vector.
        qk_norm: see `SelfAttention`; each stream has its own (Stable Diffusion 3.5).
        dual: so many of the first blocks have a second attention, of the image's tokens among themselves, beside the
            shared one (Stable Diffusion 3.5 medium: 13). `perturb` has a row for each: shared and own, block by block.
        positions_table: patches an axis of a square table of positions that the net holds, untrained, and of which it
            takes the middle for its image_size, as Stable Diffusion 3's weights have it; None computes them.

    Raises:
        ValueError: sizes that do not divide, an unknown remat, or a table that is smaller than the grid.
    """

    RULES = (
        ("(attention2?/qkv|mlp_in)/kernel", ("fsdp", "tensor")),
        ("(attention2?/out|mlp_out)/kernel", ("tensor", "fsdp")),
        ("(attention2?/qkv|mlp_in)/bias", ("tensor",)),
        ("out/kernel", ("fsdp", None)),
        ("(patches|text_in|pooled_in|pooled_out|modulation|time_in|time_out)/kernel|table", (None, "fsdp")),
    )

    def __init__(
        self,
        image_size: Size,
        channels: int,
        *,
        patch: Size,
        width: int,
        depth: int,
        heads: int,
        context: int,
        pooled: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        dual: int = 0,
        positions_table: int | None = None,
        remat: str = "none",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        time_scale: float = 1000.0,
        attention: Attention | None = None,
        rngs: nnx.Rngs,
    ):
        dtype, param_dtype = jnp.dtype(dtype), jnp.dtype(param_dtype)
        self._record(
            "MMDiT",
            image_size=image_size,
            channels=channels,
            patch=patch,
            width=width,
            depth=depth,
            heads=heads,
            context=context,
            pooled=pooled,
            mlp_ratio=mlp_ratio,
            qk_norm=qk_norm,
            dual=dual,
            positions_table=positions_table,
            remat=remat,
            dtype=dtype.name,
            param_dtype=param_dtype.name,
            time_scale=time_scale,
        )
        if min(context, pooled) < 1 or depth < 2:
            raise ValueError(
                f"MMDiT: {depth=}, {context=}, {pooled=}; expected a depth of 2 or more, and positive integers"
            )
        if not 0 <= dual < depth - 1:
            raise ValueError(f"MMDiT: {dual=} of {depth=} blocks; expected 0 to {depth - 2} of the first ones")
        patches = self._patched(patch, width=width, heads=heads)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.width, self.depth, self.heads, self.dtype, self.remat = width, depth, heads, dtype, remat
        self.context, self.pooled, self.qk_norm, self.dual = context, pooled, qk_norm, dual
        self.side = positions_table
        if positions_table is not None and (len(self.grid) != 2 or max(self.grid) > positions_table):
            raise ValueError(f"MMDiT: a table of {positions_table} x {positions_table} holds no grid {self.grid}")
        linear = lambda a, b, **how: Linear(a, b, **{"kernel_init": xavier, **options, **how}, rngs=rngs)
        self.conditioning = Conditioning(
            256, width, 0, False, time_scale=time_scale, time_init=nnx.initializers.normal(0.02), label_std=0.02,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        self.pooled_in = linear(pooled, width, dtype=jnp.float32)
        self.pooled_out = linear(width, width, dtype=jnp.float32)
        self.patches = linear(math.prod(patches) * channels, width)
        self.text_in = linear(context, width)
        self.table = None if positions_table is None else nnx.Param(self._table(positions_table).astype(param_dtype))
        kind: dict[str, Any] = {"attention": attention, "qk_norm": qk_norm, **options}
        block = lambda dual: lambda key: Block(width, heads, mlp_ratio, dual=dual, **kind, rngs=nnx.Rngs(key))
        self.dual_blocks = jax.vmap(block(True))(jax.random.split(rngs.params(), dual)) if dual else None
        self.blocks = jax.vmap(block(False))(jax.random.split(rngs.params(), depth - 1 - dual))
        self.last = Block(width, heads, mlp_ratio, last=True, **kind, rngs=rngs)
        self.modulation = linear(width, 2 * width, kernel_init=zeros)
        self.out = linear(width, math.prod(patches) * channels, kernel_init=zeros)

    def _table(self, side: int) -> Float[Array, "n d"]:
        """2403.03206, section 5.3.2: the image, in the middle, is 16 places high and wide whatever its size.

        Put together by the program, not on the host: of Stable Diffusion 3.5 it is 226 million numbers.
        """
        axes = [positions((side,), self.width // 2, offsets=[-((side - n) // 2)], scale=n / 16) for n in self.grid]
        row, column = (jnp.asarray(a, jnp.float32) for a in axes)
        shape = side, side, self.width // 2
        both = jnp.broadcast_to(column, shape), jnp.broadcast_to(row[:, None], shape)
        return jnp.concatenate(both, axis=-1).reshape(side * side, self.width)

    @property
    def num_blocks(self) -> int:
        return self.depth

    @property
    def attention_heads(self) -> tuple[int, ...]:
        return (self.heads,) * (self.depth + self.dual)

    def positions(self) -> Float[Array, "n d"]:
        """What is added to the patches: a constant, or the middle of the table."""
        if self.table is None or self.side is None:
            return jnp.asarray(positions(self.grid, self.width), self.dtype)
        table = jax.lax.stop_gradient(self.table[...]).reshape(self.side, self.side, self.width)
        (h, w), (top, left) = self.grid, ((self.side - n) // 2 for n in self.grid)
        return table[top : top + h, left : left + w].reshape(h * w, self.width)

    def embed(self, x: Float[Array, "b *size c"], t: ArrayLike, y: Any = None) -> tuple[State, Float[Array, "b 1 d"]]:
        """The two streams before the first block, and float32 conditioning a sample."""
        self._check_sample(x)
        text: Text = self._text(x, y, self.context, self.pooled)
        time = self._time_a_sample(t, x)
        assert text.pooled is not None  # _text has seen to it
        vector = self.pooled_out(jax.nn.silu(self.pooled_in(text.pooled.astype(jnp.float32))))
        c = self.conditioning(time, None) + vector[:, None]
        h = self.patches(patchify(x.astype(self.dtype), self.patch))
        h = h + self.positions().astype(self.dtype)
        return State(constrain(h, BATCH, None, None), self.text_in(text.tokens.astype(self.dtype))), c

    def run(
        self,
        state: State,
        c: Float[Array, "b 1 d"],
        start: int = 0,
        stop: int | None = None,
        *,
        blocks: ArrayLike | None = None,
        perturb: ArrayLike | None = None,
    ) -> State:
        """Both streams after blocks start .. stop - 1; the last one leaves the text as it is. The rest: as for DiT."""
        start, stop = self._span(start, stop)
        each = self._each(blocks, perturb, len(state.image))

        def step(state: State, layer: dict[str, PyTree]) -> tuple[State, None]:
            return kept(layer, lambda state: layer["block"](state, c, layer.get("perturb")), state), None

        step = rematerialise(step, self.remat, scanned=True)
        for stack, first, end in ((self.dual_blocks, 0, self.dual), (self.blocks, self.dual, self.depth - 1)):
            a, b = max(start, first), min(stop, end)
            if a < b:
                layers = _cut(stack, a - first, b - first)
                state, _ = jax.lax.scan(step, state, {"block": layers, **self._of(each, a, b)})
        if start < self.depth == stop:
            state, _ = step(state, {"block": self.last, **{k: v[-1] for k, v in each.items()}})
        return state

    def _of(self, each: dict[str, Array], a: int, b: int) -> dict[str, Array]:
        """What `_each` gives, for blocks a .. b - 1, all of them with a second attention or none."""
        found = _cut(each, a, b)
        if (u := each.get("perturb")) is not None:
            both = u[: 2 * self.dual].reshape(self.dual, 2, *u.shape[1:])
            found["perturb"] = both[a:b] if b <= self.dual else u[self.dual + a : self.dual + b]
        return found

    def project(self, state: State, c: Float[Array, "b 1 d"]) -> Float[Array, "b *size c"]:
        """Image tokens after the last block to samples, in `dtype`."""
        shift, scale = jnp.split(by_column(self.modulation, jax.nn.silu(c)), 2, axis=-1)
        return unpatchify(self.out(modulate(layer_norm(state.image), shift, scale)), self.patch, self.grid)
