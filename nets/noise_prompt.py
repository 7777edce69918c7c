"""The noise-prompt network of Golden Noise (Zhou et al. 2024, 2411.09502), in small: a noise to a better one."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .layers import Linear, xavier, zeros


class NoisePromptNet(nnx.Module):
    """x' = a U diag(S + MLP(S, y)) V + b R(x, y), U S V the singular values of each channel: the identity when built.

    The paper's two branches without its pretrained parts: an MLP moves the singular values, two convolutions with a
    norm that the label scales and shifts (its AdaGroupNorm) add what is not in the noise's own directions.

    Args:
        image_size, channels: of the noise, (batch, image_size, image_size, channels).
        num_classes: labels; 0 for none.
        width: hidden width of both branches.
        rngs: source of the initial parameters.
    """

    def __init__(self, image_size: int, channels: int, *, num_classes: int = 0, width: int = 64, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": rngs}
        self.num_classes = num_classes
        self.labels = nnx.Param(jax.random.normal(rngs.params(), (max(num_classes, 1), width), jnp.float32))
        self.values_in = Linear(image_size + width, width, kernel_init=xavier, **options)
        self.values_out = Linear(width, image_size, kernel_init=zeros, **options)
        self.conv_in = nnx.Conv(channels, width, (3, 3), kernel_init=xavier, **options)
        self.modulation = Linear(width, 2 * width, kernel_init=zeros, **options)
        self.conv_out = nnx.Conv(width, channels, (3, 3), kernel_init=zeros, **options)
        self.mix = nnx.Param(jnp.ones(2, jnp.float32))

    def __call__(self, x: Float[Array, "b n n c"], y: Int[Array, "b"] | None = None) -> Float[Array, "b n n c"]:
        """The noise to start from in place of x, under the labels y."""
        if (y is None) != (self.num_classes == 0):
            given = "none were" if y is None else "some were"
            raise ValueError(f"NoisePromptNet has num_classes={self.num_classes} labels, and {given} given")
        told = self.labels[...][jnp.zeros(len(x), jnp.int32) if y is None else y]  # (b, width)
        U, S, V = jnp.linalg.svd(jnp.moveaxis(x, -1, 1), full_matrices=False)
        each = jnp.broadcast_to(told[:, None], (*S.shape[:-1], told.shape[-1]))
        S = S + self.values_out(jax.nn.silu(self.values_in(jnp.concatenate([S, each], axis=-1))))
        spectral = jnp.moveaxis((U * S[..., None, :]) @ V, 1, -1)
        scale, shift = jnp.split(self.modulation(told)[:, None, None], 2, axis=-1)
        h = jax.nn.silu(self.conv_in(x) * (1 + scale) + shift)
        a, b = self.mix[...]
        return a * spectral + b * self.conv_out(h)
