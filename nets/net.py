"""What the nets share: the three parts that a call is made of, their record, and the check of what they are given."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from .conditioning import Text
from .layers import REMAT, wide
from .patches import Size, per_axis, pool_time


def kept(layer: dict[str, PyTree], block: Callable[[PyTree], PyTree], state: PyTree) -> PyTree:
    """block(state), or the state itself where the layer's "keep" (of `Net._each`) is there and false."""
    return jax.lax.cond(layer["keep"], block, lambda state: state, state) if "keep" in layer else block(state)


class Net(nnx.Module):
    """A net is three functions, so that a part of it can be run, looked at, kept and put elsewhere:

        state, c = net.embed(x, t, y)              tokens or feature maps, and what the blocks are told
        state = net.run(state, c, start, stop)     blocks start .. stop - 1 of num_blocks, in the order of evaluation
        output = net.project(state, c)

    `net(x, t, y)` is the three in turn. `net.features(x, t, y, after=(3, 7))` also returns the state after blocks 3
    and 7. Layers are reached through `hooks.intercept` and `hooks.replace`.
    """

    name: str
    image_size: int | tuple[int, ...]
    channels: int
    num_classes: int
    null_class: bool
    patch: Size  # of transformers
    grid: tuple[int, ...]

    def embed(self, x: Array, t: ArrayLike, y: Any = None) -> tuple[PyTree, PyTree]:
        raise NotImplementedError

    def run(
        self,
        state: PyTree,
        c: PyTree,
        start: int = 0,
        stop: int | None = None,
        *,
        blocks: ArrayLike | None = None,
        perturb: ArrayLike | None = None,
    ) -> PyTree:
        raise NotImplementedError

    def project(self, state: PyTree, c: PyTree) -> Array:
        raise NotImplementedError

    def __call__(
        self,
        x: Float[Array, "b *size c"],
        t: ArrayLike,
        y: Any = None,
        blocks: ArrayLike | None = None,
        perturb: ArrayLike | None = None,
    ) -> Float[Array, "b *size c"]:
        """The network's output for samples x at times t with labels y.

        Args:
            x: samples (b, *shape), of the shape that the net was built for.
            t: time of order 1: a scalar, (b,), or any shape that broadcasts against x; a time that varies
                inside a patch is averaged over it, so that a token has one time. Taken as float32.
            y: integer labels, (b,) or a scalar; None is the null label. A label that is no class gives NaN.
                Nets that are told a text take a `Text`.
            blocks: (num_blocks,), 0 where a block is skipped (the identity, or its shortcut, in its place) as in
                AutoDiffusion (2309.10438). An argument of the program: one serves all masks. None runs all.
            perturb: u in [0, 1] a layer and head, (layers, most heads) or with the batch in front: attention maps
                become (1 - u) A + u I, as in SoftPAG (2506.10978). None costs nothing.

        Returns:
            x's shape; float64 where x is float64, else float32, whatever `dtype` is.

        Raises:
            ValueError: a sample, time, label or mask that does not fit, when traced.
        """
        state, c = self.embed(x, t, y)
        return self._finish(self.run(state, c, blocks=blocks, perturb=perturb), c, x)

    def features(
        self, x: Float[Array, "b *size c"], t: ArrayLike, y: Any = None, *, after: Sequence[int], **options: Any
    ) -> tuple[Float[Array, "b *size c"], tuple[PyTree, ...]]:
        """The output of `net(x, t, y, **options)`, and the states after the blocks `after` (ascending indices)."""
        if list(after) != sorted(set(after)) or not all(0 <= i < self.num_blocks for i in after):
            raise ValueError(
                f"{self.name}: features after {list(after)}; expected ascending blocks < {self.num_blocks}"
            )
        state, c = self.embed(x, t, y)
        found, at = [], 0
        for i in after:
            found.append(state := self.run(state, c, at, i + 1, **options))
            at = i + 1
        return self._finish(self.run(state, c, at, **options), c, x), tuple(found)

    def _finish(self, state: PyTree, c: PyTree, x: Array) -> Array:
        """The projection as x's channels: what a net predicts beside them (`learn_sigma`) is `project`'s to tell."""
        return self.project(state, c)[..., : self.channels].astype(wide(x.dtype))

    def _span(self, start: int, stop: int | None) -> tuple[int, int]:
        """(start, stop) with the end filled in; ValueError for blocks that are not there."""
        last = self.num_blocks if stop is None else stop
        if not 0 <= start <= last <= self.num_blocks:
            raise ValueError(f"{self.name}: no blocks {start} to {last}; it has {self.num_blocks}")
        return start, last

    # --- the record
    def _record(self, name: str, **arguments: Any) -> None:
        """Check and keep the constructor's arguments, hashable: they are part of the pytree's structure."""
        size = arguments["image_size"]
        for key, values in {"image_size": per_axis(size, 1), "channels": (arguments["channels"],)}.items():
            if not values or min(values) < 1:
                raise ValueError(f"{name}: {key} is {arguments[key]}; expected a positive integer")
        if arguments.get("num_classes", 0) < 0:
            raise ValueError(f"{name}: num_classes is {arguments['num_classes']}; expected 0 (no labels) or more")
        if arguments.get("remat", "none") not in REMAT:
            raise ValueError(f"{name}: unknown remat {arguments['remat']!r}; expected one of {', '.join(REMAT)}")
        self.name = name
        self.image_size, self.channels = size if isinstance(size, int) else tuple(size), arguments["channels"]
        self.num_classes, self.null_class = arguments.get("num_classes", 0), arguments.get("null_class", False)
        self._arguments = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in arguments.items())

    @property
    def size(self) -> tuple[int, ...]:
        """Pixels an axis: (height, width), or as `image_size` has it."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (*size, channels)."""
        return (*self.size, self.channels)

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

    def _patched(self, patch: Size, *, width: int, heads: int) -> tuple[int, ...]:
        """The pixels of a patch an axis; sets `patch` and `grid`, the patches an axis. ValueError for what does not
        divide."""
        axes = len(self.size)
        patches = per_axis(patch, axes)
        for what, value in {"patch": min(patches), "width": width, "heads": heads}.items():
            if value < 1:
                raise ValueError(f"{self.name}: {what} is {value}; expected a positive integer")
        if len(patches) != axes or any(n % p for n, p in zip(self.size, patches, strict=False)):
            raise ValueError(f"{self.name}: patch {patch} does not divide image_size {self.image_size}")
        if width % heads or width % (2 * axes):
            what = f"by heads {heads} and by {2 * axes} (positions)"
            raise ValueError(f"{self.name}: width {width} must be divisible {what}")
        self.patch = patch if isinstance(patch, int) else tuple(patch)
        self.grid = tuple(n // p for n, p in zip(self.size, patches, strict=True))
        return patches

    # --- what it is given
    def _check_sample(self, x: Array) -> None:
        """ValueError where x is not a batch of the samples that the net was built for."""
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"{self.name} has image_size={self.image_size} and channels={self.channels}, so it takes x "
                f"of shape (batch, {', '.join(map(str, self.shape))}); it was given {x.shape}: build it for the data"
            )

    def _time_a_sample(self, t: ArrayLike, x: Array) -> Float[Array, "b2 1"]:
        """The time as (batch or 1, 1); ValueError where it varies within a sample."""
        time = pool_time(t, x.shape, 1)
        if time.size != len(time):
            raise ValueError(f"{self.name} takes a time a sample, not one of shape {jnp.shape(t)}")
        return time.reshape(-1, 1)

    def _labels(self, x: Array, y: Any) -> Int[Array, "b"] | None:
        """The labels as an array of shape (b,); ValueError where they do not fit."""
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

    def _text(self, x: Array, y: Any, width: int, pooled: int = 0) -> Text:
        """The text, its embeddings of this width and its vector; ValueError where it is missing or does not fit."""
        want = f"Text(tokens ({x.shape[0]}, any, {width})" + (f", pooled ({x.shape[0]}, {pooled}))" if pooled else ")")
        if not isinstance(y, Text):
            raise ValueError(f"{self.name} is told a text: y is {type(y).__name__}; expected {want}")
        shapes = (y.tokens.shape[::2], None if y.pooled is None else y.pooled.shape)
        if shapes[0] != (x.shape[0], width) or (pooled and shapes[1] != (x.shape[0], pooled)):
            raise ValueError(f"{self.name}: the text has tokens {y.tokens.shape}, pooled {shapes[1]}; expected {want}")
        return y

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

    def _each(self, blocks: Any, perturb: Any, batch: int) -> dict[str, Array]:
        """What each block is given beside the state, blocks in front: "keep" and "perturb", where asked for."""
        each: dict[str, Array] = {}
        if blocks is not None:
            each["keep"] = self._mask(blocks)
        if perturb is not None:
            each["perturb"] = self._perturbation(perturb, batch)
        return each

    @property
    def num_blocks(self) -> int:
        """Blocks that `run` counts, and the length of the mask `blocks` that says which of them run."""
        raise NotImplementedError

    def _mask(self, blocks: Any) -> Bool[Array, "num_blocks"]:
        """The mask as an array; ValueError for another length."""
        if np.shape(blocks) != (self.num_blocks,):
            raise ValueError(
                f"{self.name}: blocks has shape {np.shape(blocks)}; expected ({self.num_blocks},), one number a block, "
                "0 for a block that is skipped"
            )
        return jnp.asarray(blocks) != 0
