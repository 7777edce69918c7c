"""Parts that every net uses, written once: products with a hook, norms, attention, rematerialisation.

Shapes: b batch, h w pixels, n tokens, d width. Nets compute in `dtype` (float32 or bfloat16) and keep their
parameters in `param_dtype`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jdiff.mesh import BATCH, columns_split, constrain, rows_split

from .rope import Rotations, rotate

Attention = Callable[[Array, Array, Array], Array]
"""(q, k, v), each (b, n, heads, head width) -> q's shape."""

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


# --- products: what `hooks.intercept` takes over
class Linear(nnx.Linear):
    """nnx.Linear over all leading axes at once: as one matrix product, whose gradient a CPU takes twice as fast."""

    hook: tuple[str, Callable[[str, Any, Array], Array]] | None = None

    def __call__(self, inputs: Float[Array, "*lead d"], out_sharding: Any = None) -> Float[Array, "*lead k"]:
        return self.product(inputs) if self.hook is None else self.hook[1](self.hook[0], self, inputs)

    def product(self, inputs: Float[Array, "*lead d"]) -> Float[Array, "*lead k"]:
        rows = inputs.reshape(-1, inputs.shape[-1])
        return super().__call__(rows).reshape(*inputs.shape[:-1], self.out_features)


class Conv(nnx.Conv):
    """nnx.Conv with the hook of `Linear`."""

    hook: tuple[str, Callable[[str, Any, Array], Array]] | None = None

    def __call__(self, inputs: Float[Array, "b *size c"], out_sharding: Any = None) -> Float[Array, "b *size2 k"]:
        return self.product(inputs) if self.hook is None else self.hook[1](self.hook[0], self, inputs)

    def product(self, inputs: Float[Array, "b *size c"]) -> Float[Array, "b *size2 k"]:
        return super().__call__(inputs)


# --- norms
def layer_norm(x: Float[Array, "*shape d"], epsilon: float = 1e-6) -> Float[Array, "*shape d"]:
    """Normalise the last axis, without parameters; statistics in float32 or better, result in x's dtype."""
    h = x.astype(wide(x.dtype))
    centred = h - h.mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    return (centred * scale).astype(x.dtype)


def rms_norm(x: Float[Array, "*shape d"], epsilon: float = 1e-6) -> Float[Array, "*shape d"]:
    """Divide the last axis by its root mean square; as `layer_norm` otherwise."""
    h = x.astype(wide(x.dtype))
    return (h * jax.lax.rsqrt(jnp.square(h).mean(axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


NORMS = {"layer": layer_norm, "rms": rms_norm}
"""Norms of the last axis by name, without parameters."""


class RMSNorm(nnx.Module):
    """rms_norm with a learned scale a channel."""

    def __init__(self, width: int, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(width, jnp.dtype(param_dtype)))

    def __call__(self, x: Float[Array, "*shape d"]) -> Float[Array, "*shape d"]:
        return rms_norm(x) * self.scale.astype(x.dtype)


class LayerNorm(nnx.Module):
    """layer_norm with a learned scale and bias a channel."""

    def __init__(self, width: int, param_dtype: DTypeLike, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width, jnp.dtype(param_dtype)))
        self.bias = nnx.Param(jnp.zeros(width, jnp.dtype(param_dtype)))

    def __call__(self, x: Float[Array, "*shape d"]) -> Float[Array, "*shape d"]:
        return layer_norm(x, self.epsilon) * self.scale.astype(x.dtype) + self.bias.astype(x.dtype)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x (1 + scale) + shift, the conditioning of adaLN and of scale-shift norms."""
    return x * (1 + scale) + shift


def by_column(linear: Callable[[Array], Array], c: Float[Array, "b n d"]) -> Float[Array, "b n k"]:
    """linear(c). Where a row is a sample's (n = 1), every device of a mesh takes its columns of the kernel for all rows
    of its fsdp group: rows are few, so they are sent around; a large kernel and its gradient stay where they lie.
    """
    if c.shape[1] != 1:  # a row a token: the kernel is the smaller one
        return linear(c)
    columns = constrain(linear(constrain(c, "data", None, None)), "data", None, "fsdp")
    return constrain(columns, BATCH, None, None)


class GroupNorm(nnx.Module):
    """Normalise (b, h, w, c) in 32 groups of channels, or in fewer so that a group has 4 channels or more."""

    def __init__(self, channels: int, param_dtype: DTypeLike, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.groups = next(g for g in range(min(32, max(channels // 4, 1)), 0, -1) if channels % g == 0)
        self.scale = nnx.Param(jnp.ones(channels, jnp.dtype(param_dtype)))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.dtype(param_dtype)))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Statistics over a group's pixels and channels in float32 or better; the result has x's dtype."""
        kind = wide(x.dtype)
        h = rearrange(x.astype(kind), "b h w (g c) -> b h w g c", g=self.groups)
        h = h - h.mean(axis=(1, 2, 4), keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(axis=(1, 2, 4), keepdims=True) + self.epsilon)
        return (h.reshape(x.shape) * self.scale.astype(kind) + self.bias.astype(kind)).astype(x.dtype)


# --- attention
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


def perturbed(
    h: Float[Array, "b n h d"], v: Float[Array, "b n h d"], u: Float[Array, "b2 most"] | None
) -> Float[Array, "b n h d"]:
    """Self-attention's result h = A v as if its maps were (1 - u) A + u I, u a head: of any attention function."""
    if u is None:
        return h
    u = u[:, None, : h.shape[2], None].astype(h.dtype)
    return (1 - u) * h + u * v


class SelfAttention(nnx.Module):
    """Multi-head self-attention over tokens: (b, n, d) -> (b, n, d).

    qk_norm: an RMS norm of each head's queries and keys with a learned scale (2302.05442), before any rotation.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        attention: Attention | None = None,
        qk_norm: bool = False,
        bias: bool = True,
        out_init: nnx.Initializer = xavier,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.heads = heads
        self.attention = attention or dot_product_attention
        self.qkv = Linear(width, 3 * width, kernel_init=xavier, use_bias=bias, dot_general=rows_split, **options)
        self.out = Linear(width, width, kernel_init=out_init, dot_general=columns_split, **options)
        self.norm_q = RMSNorm(width // heads, param_dtype) if qk_norm else None
        self.norm_k = RMSNorm(width // heads, param_dtype) if qk_norm else None

    def __call__(
        self,
        x: Float[Array, "b n d"],
        perturb: Float[Array, "b2 heads"] | None = None,
        rotations: Rotations | None = None,
    ) -> Float[Array, "b n d"]:
        """perturb: u a head, a sample (or 1 for all): attention maps become (1 - u) A + u I (2506.10978).

        rotations: of the tokens, for rotary positions.
        """
        q, k, v = self.heads_of(x, rotations)
        h = perturbed(self.attention(q, k, v), v, perturb)
        # else TPU's compiler makes one convolution of product and split into heads, with the heads as its window, and
        # takes 58 to 62 processor seconds for the training step of DiT-XL/2 in place of 52
        return self.out(jax.lax.optimization_barrier(rearrange(h, "b n heads d -> b n (heads d)")))

    def heads_of(self, x: Float[Array, "b n d"], rotations: Rotations | None = None) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each (b, n, heads, d / heads), as attention takes them."""
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b n heads d", three=3, heads=self.heads)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        if rotations is not None:
            q, k = rotate(q, rotations), rotate(k, rotations)
        tokens = getattr(getattr(self.attention, "func", self.attention), "tokens", None)  # kernels.ring: "sequence"
        q, k, v = (constrain(a, BATCH, tokens, "tensor", None) for a in (q, k, v))
        return q, k, v


class CrossAttention(nnx.Module):
    """Multi-head attention of tokens (b, n, d) to a sequence of embeddings (b, m, context) -> (b, n, d)."""

    def __init__(
        self,
        width: int,
        context: int,
        heads: int,
        *,
        attention: Attention | None = None,
        bias: bool = True,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"kernel_init": xavier, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.heads = heads
        self.attention = attention or dot_product_attention
        self.q = Linear(width, width, use_bias=bias, **options)
        self.kv = Linear(context, 2 * width, use_bias=bias, **options)
        self.out = Linear(width, width, **options)

    def __call__(self, x: Float[Array, "b n d"], context: Float[Array, "b m e"]) -> Float[Array, "b n d"]:
        q = rearrange(self.q(x), "b n (heads d) -> b n heads d", heads=self.heads)
        k, v = rearrange(self.kv(context), "b m (two heads d) -> two b m heads d", two=2, heads=self.heads)
        q, k, v = (constrain(a, BATCH, None, "tensor", None) for a in (q, k, v))
        return self.out(rearrange(self.attention(q, k, v), "b n heads d -> b n (heads d)"))
