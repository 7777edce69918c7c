"""Diffusion transformers with adaLN-Zero: DiT (Peebles & Xie, 2212.09748), SiT (2401.08740), and what came after."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PyTree

from jdiff.mesh import BATCH, columns_split, constrain, rows_split

from .conditioning import Conditioning
from .layers import NORMS, Attention, Linear, RMSNorm, SelfAttention, by_column, modulate, rematerialise, xavier, zeros
from .net import Net, kept
from .patches import Size, patchify, pool_time, positions, unpatchify
from .rope import Rotations, rotations


class Block(nnx.Module):
    """One transformer block with adaLN-Zero: the identity when it is built.

    s1, k1, g1, s2, k2, g2 = Linear(SiLU(c))
    x = x + g1 Attention(LN(x) (1 + k1) + s1)
    x = x + g2 MLP(LN(x) (1 + k2) + s2)

    norm: "layer" or "rms" in place of LN. sandwich: an RMS norm with a learned scale after attention and MLP as well,
    before the gates (Lumina-Next, 2406.18583). qk_norm: see `SelfAttention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        *,
        attention: Attention | None = None,
        norm: str = "layer",
        qk_norm: bool = False,
        sandwich: bool = False,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        hidden = int(width * mlp_ratio)
        self.norm = NORMS[norm]
        self.modulation = Linear(width, 6 * width, kernel_init=zeros, **options)
        self.attention = SelfAttention(width, heads, attention=attention, qk_norm=qk_norm, **options)
        self.mlp_in = Linear(width, hidden, kernel_init=xavier, dot_general=rows_split, **options)
        self.mlp_out = Linear(hidden, width, kernel_init=xavier, dot_general=columns_split, **options)
        self.norm_attention = RMSNorm(width, param_dtype) if sandwich else None
        self.norm_mlp = RMSNorm(width, param_dtype) if sandwich else None

    def __call__(
        self,
        x: Float[Array, "b n d"],
        c: Float[Array, "b2 n2 d"],
        perturb: Array | None = None,
        rotations: Rotations | None = None,
    ) -> Float[Array, "b n d"]:
        """x: tokens; c: conditioning a sample (n2 = 1) or a token (n2 = n); the rest: see `SelfAttention`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(by_column(self.modulation, jax.nn.silu(c)), 6, axis=-1)
        h = self.attention(modulate(self.norm(x), shift1, scale1), perturb, rotations)
        x = x + gate1 * (h if self.norm_attention is None else self.norm_attention(h))
        hidden = jax.nn.gelu(self.mlp_in(modulate(self.norm(x), shift2, scale2)), approximate=True)
        h = self.mlp_out(constrain(hidden, BATCH, "sequence", "tensor"))
        return constrain(x + gate2 * (h if self.norm_mlp is None else self.norm_mlp(h)), BATCH, "sequence", None)


class DiT(Net):
    """Diffusion transformer: patches as tokens, adaLN-Zero blocks scanned, labels with a null class.

    After 2212.09748. The blocks' parameters are stacked on a leading axis of length depth and run by one `lax.scan`,
    so the time to compile does not grow with depth.

    Args:
        image_size: height and width of square images, or the pixels of each axis: (height, width),
            (frames, height, width), (length,); divisible by patch.
        channels: channels of the images.
        patch: side of a patch in pixels, or one a axis.
        width: width of a token; divisible by heads, and by 2 for each axis of the images.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: hidden width of the MLPs over width.
        num_classes: number of labels; 0 for an unconditional net, which takes no y.
        null_class: one more label, `null_label` = num_classes, for "no label".
        learn_sigma: predict twice the channels, as the released DiT (a variance) and SiT (nothing that is used). The
            call returns the first half; `project` returns both.
        positions: "sincos", fixed and added to the tokens, or "rope", rotary in every attention (`jdiff.nets.rope`).
        rope_scale: how many times longer than in training the axes are: one, or one an axis. Fixed positions are
            taken between those of training; rotary ones are slowed.
        rope_target: which channels of rotary positions keep their frequency then; see `rope.frequencies`.
        norm: "layer" or "rms".
        qk_norm, sandwich: RMS norms of queries and keys, and after each branch; see `Block`.
        remat: "none", "full" or "dots"; see `layers.REMAT`.
        unroll: blocks a turn of the loop over them. A CPU takes the gradient of a loop several times slower than
            that of straight code: give depth for a small net there, and pay in time to compile.
        dtype: of activations; float32 or bfloat16.
        param_dtype: of parameters; float32 or bfloat16.
        time_scale: multiplies the time before the sinusoids, which expect 0 to 1000.
        attention: a function (q, k, v) of (b, n, heads, width / heads) arrays in place of jax's.
        rngs: source of the initial parameters; not kept.

    Raises:
        ValueError: sizes that do not divide, or an unknown remat, norm or kind of positions.
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
        image_size: Size,
        channels: int,
        *,
        patch: Size,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        null_class: bool = True,
        learn_sigma: bool = False,
        positions: Literal["sincos", "rope"] = "sincos",
        rope_scale: float | Sequence[float] = 1.0,
        rope_target: float | None = None,
        norm: Literal["layer", "rms"] = "layer",
        qk_norm: bool = False,
        sandwich: bool = False,
        remat: str = "none",
        unroll: int = 1,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        time_scale: float = 1000.0,
        attention: Attention | None = None,
        rngs: nnx.Rngs,
    ):
        dtype, param_dtype = jnp.dtype(dtype), jnp.dtype(param_dtype)
        name = type(self).__name__
        self._record(
            name,
            image_size=image_size,
            channels=channels,
            patch=patch,
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
            null_class=null_class,
            learn_sigma=learn_sigma,
            positions=positions,
            rope_scale=rope_scale,
            rope_target=rope_target,
            norm=norm,
            qk_norm=qk_norm,
            sandwich=sandwich,
            remat=remat,
            unroll=unroll,
            dtype=dtype.name,
            param_dtype=param_dtype.name,
            time_scale=time_scale,
        )
        for what, value in {"depth": depth, "unroll": unroll}.items():
            if value < 1:
                raise ValueError(f"{name}: {what} is {value}; expected a positive integer")
        patches = self._patched(patch, width=width, heads=heads)
        for what, value, known in (("positions", positions, ("sincos", "rope")), ("norm", norm, tuple(NORMS))):
            if value not in known:
                raise ValueError(f"{name}: unknown {what} {value!r}; expected one of {', '.join(known)}")
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        pixels = math.prod(patches) * channels
        self.width, self.depth, self.heads, self.dtype, self.remat, self.unroll = (
            width,
            depth,
            heads,
            dtype,
            remat,
            unroll,
        )
        self.positions = positions
        self.rope = (rope_scale if isinstance(rope_scale, int | float) else tuple(rope_scale), rope_target)
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
        kind: dict[str, Any] = {"attention": attention, "norm": norm, "qk_norm": qk_norm, "sandwich": sandwich}

        def block(key: Array) -> Block:
            return Block(width, heads, mlp_ratio, **kind, **options, rngs=nnx.Rngs(key))

        self.blocks = jax.vmap(block)(jax.random.split(rngs.params(), depth))
        self.norm = NORMS[norm]
        self.modulation = Linear(width, 2 * width, kernel_init=zeros, **options, rngs=rngs)
        self.out = Linear(width, pixels * (1 + learn_sigma), kernel_init=zeros, **options, rngs=rngs)

    @property
    def num_blocks(self) -> int:
        return self.depth

    @property
    def attention_heads(self) -> tuple[int, ...]:
        return (self.heads,) * self.depth

    def rotations(self, scale: ArrayLike | None = None, target: ArrayLike | None = None) -> Rotations | None:
        """The tokens' rotations for positions "rope", else None; scale and target in place of the net's own."""
        if self.positions != "rope":
            return None
        own_scale, own_target = self.rope
        head = self.width // self.heads
        return rotations(
            self.grid,
            head,
            scale=own_scale if scale is None else scale,
            target=own_target if target is None else target,
        )

    def embed(
        self, x: Float[Array, "b *size c"], t: ArrayLike, y: ArrayLike | None = None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b2 n2 d"]]:
        """What goes into the blocks: tokens in `dtype`, and float32 conditioning a sample or a token."""
        self._check_sample(x)
        return self._embedded(x, pool_time(t, x.shape, self.patch), y)

    def _embedded(self, x: Array, time: Array, y: ArrayLike | None) -> tuple[Array, Array]:
        """`embed` once the time is a sample's or a patch's."""
        y = self._labels(x, y)
        h = self.patches(patchify(x.astype(self.dtype), self.patch))
        if self.positions == "sincos":
            # A constant of the program, made on the host: no parameter, and nothing for an optimizer to move.
            h = h + jnp.asarray(positions(self.grid, self.width, scale=self.rope[0]), self.dtype)
        return constrain(h, BATCH, "sequence", None), self.conditioning(time.reshape(len(time), -1), y)

    def run(
        self,
        state: Float[Array, "b n d"],
        c: Float[Array, "b2 n2 d"],
        start: int = 0,
        stop: int | None = None,
        *,
        blocks: ArrayLike | None = None,
        perturb: ArrayLike | None = None,
        rotations: Rotations | None = None,
    ) -> Float[Array, "b n d"]:
        """Tokens after blocks start .. stop - 1, one scan over them.

        blocks, perturb: as for the whole net, of its whole depth. rotations: in place of the net's own, such as those
        of a part of the tokens, or Lumina-Next's of this time.
        """
        start, stop = self._span(start, stop)
        turn = self.rotations() if rotations is None else rotations

        def step(h: Array, layer: dict[str, PyTree]) -> tuple[Array, None]:
            return kept(layer, lambda h: layer["block"](h, c, layer.get("perturb"), turn), h), None

        step = rematerialise(step, self.remat, scanned=True)
        layers = {"block": self.blocks, **self._each(blocks, perturb, len(state))}
        if (start, stop) != (0, self.depth):
            layers = jax.tree.map(lambda a: a[start:stop], layers)
        return jax.lax.scan(step, state, layers, unroll=self.unroll)[0]

    def project(self, state: Float[Array, "b n d"], c: Float[Array, "b2 n2 d"]) -> Float[Array, "b *size c2"]:
        """Tokens after the last block to samples, in `dtype`; c2 = 2 c channels where learn_sigma is set."""
        shift, scale = jnp.split(by_column(self.modulation, jax.nn.silu(c)), 2, axis=-1)
        return unpatchify(self.out(modulate(self.norm(state), shift, scale)), self.patch, self.grid)


class SiT(DiT):
    """DiT as SiT has it (2401.08740): time as it is, not times 1000, and twice the channels, half of them dropped.

    The released nets have t = 1 at the data and predict the velocity towards it: `-net(x, 1 - t, y)` is the velocity
    of `process.flow()`. A net that jdiff trains has jdiff's time and sign.
    """

    def __init__(
        self, image_size: Size, channels: int, *, learn_sigma: bool = True, time_scale: float = 1.0, **options: Any
    ):
        super().__init__(image_size, channels, learn_sigma=learn_sigma, time_scale=time_scale, **options)
