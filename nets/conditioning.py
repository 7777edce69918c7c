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


def sinusoids(
    t: Float[Array, "*shape"], size: int, max_period: float = 10_000.0, endpoint: bool = False
) -> Float[Array, "*shape {size}"]:
    """cos then sin of t at size / 2 frequencies from 1 to about 1 / max_period (endpoint: exactly), float32."""
    frequencies = max_period ** -(np.arange(size // 2) / (size // 2 - endpoint))
    angles = t.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rows_of(table: Float[Array, "rows d"], y: Int[Array, "b"]) -> Float[Array, "b d"]:
    """Rows of a table of labels. A label that is no row, a negative one too, becomes NaN: traced ones cannot raise."""
    return jnp.take(table, jnp.where(y < 0, len(table), y), axis=0, mode="fill")


class Conditioning(nnx.Module):
    """An embedding of the time plus one of the label, in float32.

    Time: sinusoids of time_scale * t, then Linear, SiLU, Linear. Label: a row of a table of num_classes rows,
    and one more at index num_classes for "no label" where null_class is set (2207.12598).

    endpoint: see `sinusoids`. fourier: cosines and sines of 2 pi f t in their place, f drawn from N(0, 16^2) once and
    not trained (2006.10739). labels_first: the label is added to the sinusoids, before the two layers.
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
        endpoint: bool = False,
        fourier: bool = False,
        labels_first: bool = False,
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
        self.frequencies, self.time_scale, self.endpoint, self.labels_first = (
            frequencies,
            time_scale,
            endpoint,
            labels_first,
        )
        self.time_in = Linear(frequencies, width, **options, rngs=rngs)
        self.time_out = Linear(width, width, **options, rngs=rngs)
        if num_classes:
            shape = (num_classes + null_class, frequencies if labels_first else width)
            self.labels = nnx.Param(label_std * jax.random.normal(rngs.params(), shape, jnp.dtype(param_dtype)))
        drawn = lambda: 16 * jax.random.normal(rngs.params(), (frequencies // 2,), jnp.dtype(param_dtype))
        self.fourier = nnx.Param(drawn()) if fourier else None

    def __call__(self, t: Float[Array, "b1 *shape"], y: Int[Array, "b"] | None) -> Float[Array, "b2 *shape d"]:
        """t of shape (b or 1, ...) and labels (b,), or None for a net without classes -> (b or 1, ..., d)."""
        c, told = self.waves(self.time_scale * t.astype(jnp.float32)), 0.0
        if y is not None:
            label = rows_of(self.labels[...], y)
            told = label.astype(jnp.float32).reshape(-1, *(1,) * (t.ndim - 1), label.shape[-1])
        if self.labels_first:
            return self.time_out(jax.nn.silu(self.time_in(c + told)))
        return self.time_out(jax.nn.silu(self.time_in(c))) + told

    def waves(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape f"]:
        """Cosines, then sines, of the time."""
        if self.fourier is None:
            return sinusoids(t, self.frequencies, endpoint=self.endpoint)
        angles = 2 * np.pi * t[..., None] * jax.lax.stop_gradient(self.fourier.astype(jnp.float32))
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
