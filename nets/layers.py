"""Parts that every net uses, written once: conditioning on time and label, patches, norms, attention, remat.

Shapes: b batch, h w pixels, n tokens, d width. Nets compute in `dtype` (float32 or bfloat16) and keep their
parameters in `param_dtype`; time and label are embedded in float32 always, since bfloat16 cannot tell 987.17
from 988.49.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jdiff.mesh import BATCH, constrain

Attention = Callable[[Array, Array, Array], Array]
"""(q, k, v), each (b, n, heads, head width) -> the same shape."""

xavier = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros_init()

REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # Outputs of linear layers are kept; attention logits (a dot with batch axes) and all else are not.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""Rematerialisation by name: which values of a block the backward pass keeps rather than computes again."""


def wide(dtype: DTypeLike) -> np.dtype:
    """float64 for float64, else float32: what statistics are computed in and what a net returns."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def rematerialise(fn: Callable[..., Any], remat: str, *, scanned: bool) -> Callable[..., Any]:
    """`fn` under the policy REMAT[remat]; values and gradients do not change, memory and time do.

    scanned: fn is the body of a scan, where CSE cannot undo the recomputation and no barrier is needed.
    """
    if (policy := REMAT[remat]) is None:
        return fn
    return jax.checkpoint(fn, policy=policy, prevent_cse=not scanned)


# --- time and label
def sinusoids(t: Float[Array, "*shape"], size: int, max_period: float = 10_000.0) -> Float[Array, "*shape {size}"]:
    """cos then sin of t at size / 2 frequencies from 1 to about 1 / max_period, float32, as in DiT."""
    frequencies = max_period ** -(np.arange(size // 2) / (size // 2))
    angles = t.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def pool_time(t: Any, shape: tuple[int, ...], patch: int) -> Float[Array, "b h w"]:
    """A time a patch: the mean of t over patches of `patch` x `patch` pixels of an image batch of this shape.

    t is a scalar, (b,), or anything that broadcasts against shape = (b, h, w, c). A time that does not vary
    in space stays (b or 1, 1, 1), so that conditioning costs one row a sample. float32.
    """
    t = jnp.asarray(t)
    if not jnp.issubdtype(t.dtype, jnp.floating):
        raise ValueError(f"the time is {t.dtype}; a net takes a float time of order 1 (its time_scale multiplies it)")
    t = t.astype(jnp.float32)
    full = t[:, None, None, None] if t.ndim == 1 else t.reshape((1,) * (4 - t.ndim) + t.shape)
    if full.ndim != 4 or any(n not in (1, m) for n, m in zip(full.shape, shape, strict=True)):
        raise ValueError(
            f"a time of shape {t.shape} fits no sample of shape {tuple(shape)}: give (), ({shape[0]},), or a "
            f"shape that broadcasts against the sample, such as {(shape[0], 1, 1, 1)} or {(*shape[:3], 1)}"
        )
    t = full.mean(axis=-1)
    if t.shape[1:] == (1, 1):
        return t
    t = jnp.broadcast_to(t, (t.shape[0], *shape[1:3]))
    return reduce(t, "b (h p) (w q) -> b h w", "mean", p=patch, q=patch)


class Conditioning(nnx.Module):
    """What a net is told: an embedding of the time plus one of the label, in float32.

    Time: sinusoids of time_scale * t, then Linear, SiLU, Linear. Label: a row of a table of num_classes rows,
    and one more at index num_classes for "no label" where null_class is set (2207.12598).
    """

    def __init__(
        self,
        frequencies: int,
        width: int,
        num_classes: int,
        null_class: bool,
        *,
        time_scale: float,
        time_init: nnx.Initializer = xavier,
        label_std: float,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        # Highest precision: these products are tiny, and bfloat16 or TF32 passes blur neighbouring times.
        options: dict[str, Any] = {
            "kernel_init": time_init,
            "dtype": jnp.float32,
            "param_dtype": param_dtype,
            "precision": jax.lax.Precision.HIGHEST,
        }
        self.frequencies, self.time_scale = frequencies, time_scale
        self.time_in = nnx.Linear(frequencies, width, **options, rngs=rngs)
        self.time_out = nnx.Linear(width, width, **options, rngs=rngs)
        if num_classes:
            shape = (num_classes + null_class, width)
            self.labels = nnx.Param(label_std * jax.random.normal(rngs.params(), shape, jnp.dtype(param_dtype)))

    def __call__(self, t: Float[Array, "b1 *shape"], y: Int[Array, "b"] | None) -> Float[Array, "b2 *shape d"]:
        """t of shape (b or 1, ...) and labels (b,), or None for a net without classes -> (b or 1, ..., d)."""
        c = sinusoids(self.time_scale * t.astype(jnp.float32), self.frequencies)
        c = self.time_out(jax.nn.silu(self.time_in(c)))
        if y is None:
            return c
        rows = self.labels.shape[0]
        # A label that is no row, a negative one too, becomes NaN: traced labels cannot raise.
        label = jnp.take(self.labels[...], jnp.where(y < 0, rows, y), axis=0, mode="fill")
        return c + label.astype(jnp.float32).reshape(-1, *(1,) * (t.ndim - 1), label.shape[-1])


class Net(nnx.Module):
    """What the nets share: their record (`config`), their null label, the check of what they are given."""

    name: str
    image_size: int
    channels: int
    num_classes: int
    null_class: bool

    def _record(self, name: str, **arguments: Any) -> None:
        """Check and keep the constructor's arguments, hashable: they are part of the pytree's structure."""
        for key in ("image_size", "channels"):
            if arguments[key] < 1:
                raise ValueError(f"{name}: {key} is {arguments[key]}; expected a positive integer")
        if arguments["num_classes"] < 0:
            raise ValueError(f"{name}: num_classes is {arguments['num_classes']}; expected 0 (no labels) or more")
        if arguments["remat"] not in REMAT:
            raise ValueError(f"{name}: unknown remat {arguments['remat']!r}; expected one of {', '.join(REMAT)}")
        self.name = name
        self.image_size, self.channels = arguments["image_size"], arguments["channels"]
        self.num_classes, self.null_class = arguments["num_classes"], arguments["null_class"]
        self._arguments = tuple(arguments.items())

    @property
    def config(self) -> dict[str, Any]:
        """The net's name and constructor arguments, as JSON holds them: `build(**config, rngs=rngs)`.

        The attention function is not in it: it says how the same function of the parameters is computed.
        """
        arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in self._arguments}
        return {"name": self.name, **arguments}

    @property
    def null_label(self) -> int:
        """The label that means "no label": num_classes. ValueError where the net has none."""
        if not (self.num_classes and self.null_class):
            raise ValueError(
                f"guidance needs a null class, and {self.name} has num_classes={self.num_classes} and "
                f"null_class={self.null_class}: build with null_class=True, and drop labels in training"
            )
        return self.num_classes

    def _check(self, x: Array, y: Any) -> Int[Array, "b"] | None:
        """The labels as an array of shape (b,); ValueError where the image or the labels do not fit."""
        built = (self.image_size, self.image_size, self.channels)
        if x.ndim != 4 or x.shape[1:] != built:
            raise ValueError(
                f"{self.name} has image_size={self.image_size} and channels={self.channels}, so it takes x "
                f"of shape (batch, {', '.join(map(str, built))}); it was given {x.shape}: build it for the data"
            )
        if not self.num_classes:
            if y is not None:
                raise ValueError(f"{self.name} was built with num_classes=0 and takes no labels, but y was given")
            return None
        if y is None and not self.null_class:
            raise ValueError(f"{self.name} has no null class, so it needs labels y; null_class=True lets one omit them")
        y = jnp.asarray(self.null_label if y is None else y)
        if not jnp.issubdtype(y.dtype, jnp.integer) or y.shape not in ((), (x.shape[0],)):
            raise ValueError(
                f"labels y are {y.dtype} of shape {y.shape}; expected integers of shape ({x.shape[0]},) or ()"
            )
        return jnp.broadcast_to(y, (x.shape[0],))

    @property
    def attention_heads(self) -> tuple[int, ...]:
        """Heads of each attention layer, in the order of evaluation: what `perturb` has numbers for."""
        raise NotImplementedError

    def _perturbation(self, perturb: Any, batch: int) -> Float[Array, "layers b2 heads"]:
        """perturb as (layers, batch or 1, heads); ValueError for another shape."""
        layers, heads = len(self.attention_heads), max(self.attention_heads, default=0)
        u = jnp.asarray(perturb)
        u = u[None] if u.ndim == 2 else u
        if u.ndim != 3 or u.shape[0] not in (1, batch) or u.shape[1:] != (layers, heads):
            raise ValueError(
                f"{self.name}: perturb has shape {np.shape(perturb)}; expected ({layers}, {heads}), a number a layer "
                f"and head, or ({batch}, {layers}, {heads})"
            )
        return u.swapaxes(0, 1)

    @property
    def num_blocks(self) -> int:
        """Length of the mask `blocks` that says which residual blocks run."""
        raise NotImplementedError

    def _mask(self, blocks: Any) -> Bool[Array, "num_blocks"]:
        """The mask as an array; ValueError for another length."""
        if np.shape(blocks) != (self.num_blocks,):
            raise ValueError(
                f"{self.name}: blocks has shape {np.shape(blocks)}; expected ({self.num_blocks},), one number a block, "
                "0 for a block that is skipped"
            )
        return jnp.asarray(blocks) != 0


# --- tokens
def patchify(x: Float[Array, "b height width c"], patch: int) -> Float[Array, "b n ppc"]:
    """Images to tokens, row by row; a token is (patch, patch, c) flattened."""
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(x: Float[Array, "b n ppc"], patch: int) -> Float[Array, "b height width c"]:
    """The inverse of patchify, for square images."""
    side = math.isqrt(x.shape[1])
    return rearrange(x, "b (h w) (p q c) -> b (h p) (w q) c", h=side, p=patch, q=patch)


def positions(side: int, width: int) -> Float[np.ndarray, "n d"]:
    """Fixed 2-D sine and cosine positions (MAE 2111.06377) in float64; width is divisible by 4.

    Half the width tells the column, the other half the row; sines before cosines, as DiT's weights want.
    """
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    angles = np.arange(side)[:, None] * frequencies
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    row, column = np.divmod(np.arange(side**2), side)
    return np.concatenate([line[column], line[row]], axis=-1)


def layer_norm(x: Float[Array, "*shape d"], epsilon: float = 1e-6) -> Float[Array, "*shape d"]:
    """Normalise the last axis, without parameters; statistics in float32 or better, result in x's dtype."""
    h = x.astype(wide(x.dtype))
    centred = h - h.mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    return (centred * scale).astype(x.dtype)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x (1 + scale) + shift, the conditioning of adaLN and of scale-shift norms."""
    return x * (1 + scale) + shift


def dot_product_attention(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    """The default attention: softmax(q k' / sqrt(d)) v, with logits and softmax in float32 or better.

    The same function as jax.nn.dot_product_attention, which may be given in its place; that one takes its softmax
    in float32 for float64 too, and under strict promotion its gradient refuses bfloat16.
    """
    kind = wide(q.dtype)
    logits = jnp.einsum("bnhd,bmhd->bhnm", q.astype(kind), k.astype(kind)) / math.sqrt(q.shape[-1])
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)


class Linear(nnx.Linear):
    """nnx.Linear over all leading axes at once: as one matrix product, whose gradient a CPU takes twice as fast."""

    def __call__(self, inputs: Float[Array, "*lead d"], out_sharding: Any = None) -> Float[Array, "*lead k"]:
        rows = inputs.reshape(-1, inputs.shape[-1])
        return super().__call__(rows, out_sharding).reshape(*inputs.shape[:-1], self.out_features)


class GroupNorm(nnx.Module):
    """Normalise (b, h, w, c) in 32 groups of channels, or in fewer so that a group has 4 channels or more."""

    def __init__(self, channels: int, param_dtype: DTypeLike):
        self.groups = next(g for g in range(min(32, max(channels // 4, 1)), 0, -1) if channels % g == 0)
        self.scale = nnx.Param(jnp.ones(channels, jnp.dtype(param_dtype)))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.dtype(param_dtype)))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Statistics over a group's pixels and channels in float32 or better; the result has x's dtype."""
        kind = wide(x.dtype)
        h = rearrange(x.astype(kind), "b h w (g c) -> b h w g c", g=self.groups)
        h = h - h.mean(axis=(1, 2, 4), keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(axis=(1, 2, 4), keepdims=True) + 1e-5)
        return (h.reshape(x.shape) * self.scale.astype(kind) + self.bias.astype(kind)).astype(x.dtype)


class SelfAttention(nnx.Module):
    """Multi-head self-attention over tokens: (b, n, d) -> (b, n, d)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        attention: Attention | None = None,
        out_init: nnx.Initializer = xavier,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.heads = heads
        self.attention = attention or dot_product_attention
        self.qkv = Linear(width, 3 * width, kernel_init=xavier, **options)
        self.out = Linear(width, width, kernel_init=out_init, **options)

    def __call__(self, x: Float[Array, "b n d"], perturb: Float[Array, "b2 heads"] | None = None) -> Array:
        """perturb: u a head, a sample (or 1 for all): attention maps become (1 - u) A + u I (2506.10978)."""
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b n heads d", three=3, heads=self.heads)
        q, k, v = (constrain(a, BATCH, None, "tensor", None) for a in (q, k, v))
        h = self.attention(q, k, v)
        if perturb is not None:  # any attention function: (1 - u) A v + u v
            u = perturb[:, None, : self.heads, None].astype(h.dtype)
            h = (1 - u) * h + u * v
        return self.out(rearrange(h, "b n heads d -> b n (heads d)"))
