"""What a net is told beside the sample: the time, and a label or a text.

Time and label are embedded in float32 always, since bfloat16 cannot tell 987.17 from 988.49.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .layers import Linear, xavier


class Text(NamedTuple):
    """A text as any encoder gives it: a sequence of embeddings, and one vector for the whole where a net wants it.

    "No text", for guidance, is the encoder's embedding of the empty text.
    """

    tokens: Float[Array, "b m d"]
    pooled: Float[Array, "b p"] | None = None


def sinusoids(t: Float[Array, "*shape"], size: int, max_period: float = 10_000.0) -> Float[Array, "*shape {size}"]:
    """cos then sin of t at size / 2 frequencies from 1 to about 1 / max_period, float32, as in DiT."""
    frequencies = max_period ** -(np.arange(size // 2) / (size // 2))
    angles = t.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Conditioning(nnx.Module):
    """An embedding of the time plus one of the label, in float32.

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
        self.time_in = Linear(frequencies, width, **options, rngs=rngs)
        self.time_out = Linear(width, width, **options, rngs=rngs)
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
