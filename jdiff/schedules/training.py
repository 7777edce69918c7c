"""Laws of times an element to train with: functions of a key, for `losses.denoising_loss(.., elements=law)`.

A law returns numbers in (0, 1), one an element, shaped to broadcast against one sample; the loss's time sampler maps
them to times, 0 to data and 1 to noise. A sample's times depend on the key and on its global index alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdiff import noise

Law = Callable[[Array], Float[Array, "*elements"]]


def along(law: Law, axis: int, rank: int) -> Law:
    """A law of one element axis, laid along `axis` of samples with `rank` axes (without the batch)."""
    if not -rank <= axis < rank:
        raise ValueError(f"along: axis {axis} is none of a sample's {rank}")
    return lambda key: law(key).reshape(-1, *[1] * (rank - 1 - axis % rank))


def grouped(groups: Any) -> Law:
    """Independent times of groups of elements: groups (*elements) integers, elements of one number share a time.

    arange(frames) is diffusion forcing (Chen et al. 2024, arXiv 2407.01392); zeros, one time for all; a number a
    modality, UniDiffuser (Bao et al. 2023, arXiv 2303.06555). ValueError for what are no integers from 0.
    """
    groups = np.asarray(groups)
    if not np.issubdtype(groups.dtype, np.integer) or groups.min() < 0:
        raise ValueError(f"grouped: expected integers from 0, a group an element; got {groups.dtype}, {groups.min()}")
    n, index = int(groups.max()) + 1, jnp.asarray(groups)
    return lambda key: _uniform(key, (n,))[index]


def ptss(frames: int, p: float = 0.2) -> Law:
    """FVDM (Liu et al. 2024, arXiv 2410.03160): independent times with probability p, else one for all."""
    if not 0 <= p <= 1:
        raise ValueError(f"ptss: p is {p}; expected a probability")

    def law(key: Array) -> Array:
        which, each, one = jax.random.split(key, 3)
        return jnp.where(_uniform(which, ()) < p, _uniform(each, (frames,)), _uniform(one, ()))

    return law


def monotone(frames: int, levels: int) -> Law:
    """Uniform over all C(levels + frames - 1, frames) non-decreasing sequences of `levels` levels (SkyReels-V2).

    By stars and bars: sorted choices of `frames` places out of levels + frames - 1, less 0, 1, 2, .. Level i stands for
    the number (i + u) / levels, one u for all frames: ties stay ties.
    """
    _counts(frames, levels)

    def law(key: Array) -> Array:
        places, within = jax.random.split(key)
        chosen = jnp.sort(jax.random.permutation(places, levels + frames - 1)[:frames])
        return _number(chosen - jnp.arange(frames), levels, within)

    return law


def fopp(frames: int, levels: int) -> Law:
    """AR-Diffusion's FoPP (Sun et al. 2025, arXiv 2503.07418): one frame's level uniform, the rest by counting paths.

    A frame f and its level are uniform; then each next frame has a level drawn by the number of non-decreasing
    completions behind it, and each previous one by those before it: uniform over the sequences through (f, level). That
    is another law than `monotone`: with 3 frames and 4 levels 0.61 to 2.25 times as much on a sequence.
    """
    _counts(frames, levels)
    ahead = np.ones((frames, levels))  # ahead[j, i]: completions of frames j + 1 .. from level i of frame j
    for j in range(frames - 2, -1, -1):
        ahead[j] = np.cumsum(ahead[j + 1][::-1])[::-1]
    behind = ahead[::-1, ::-1]
    tables = [jnp.asarray(np.log(v), jnp.float32) for v in (ahead, behind)]

    def law(key: Array) -> Array:
        first, level, walk, within = jax.random.split(key, 4)
        f = jax.random.randint(first, (), 0, frames, jnp.int32)
        start = jax.random.randint(level, (), 0, levels, jnp.int32)
        at = jnp.arange(levels, dtype=jnp.int32)

        def draw(key: Array, table: Array, allowed: Array) -> Array:
            return jax.random.categorical(key, jnp.where(allowed, table, -jnp.inf)).astype(jnp.int32)

        def up(now: Array, j: Array) -> tuple[Array, Array]:
            now = jnp.where(j > f, draw(jax.random.fold_in(walk, j), tables[0][j], at >= now), start)
            return now, now

        def down(now: Array, j: Array) -> tuple[Array, Array]:
            now = jnp.where(j < f, draw(jax.random.fold_in(walk, j), tables[1][j], at <= now), start)
            return now, now

        order = jnp.arange(frames, dtype=jnp.int32)
        _, later = jax.lax.scan(up, start, order)
        _, earlier = jax.lax.scan(down, start, order, reverse=True)
        return _number(jnp.where(order >= f, later, earlier), levels, within)

    return law


def buffered(frames: int, chunks: Sequence[int]) -> Law:
    """StreamDiT (Kodaira et al. 2025, arXiv 2507.03745): buffers in chunks, each within its own segment of noise.

    A chunk length c of `chunks` is drawn; of the N = frames / c chunks, number i has the time (i + u) / N, one u for
    all. So c = frames is one time for all, and c = 1 what a stream of single frames shows. ValueError for a chunk that
    does not divide the frames.
    """
    if min(chunks, default=0) < 1 or any(frames % c for c in chunks):
        raise ValueError(f"buffered: expected chunk lengths that divide {frames} frames, got {chunks}")
    sizes = np.asarray(chunks)
    segment, number = (jnp.asarray(v, jnp.float32) for v in (np.arange(frames) // sizes[:, None], frames // sizes))

    def law(key: Array) -> Array:
        which, offset = jax.random.split(key)
        k = jax.random.randint(which, (), 0, len(sizes), jnp.int32)
        return (segment[k] + _uniform(offset, ())) / number[k]

    return law


def semantic_first(semantic: Any, offset: float = 0.3, mean: float = 0.0, std: float = 1.0) -> Law:
    """SFD (Pan et al. 2025): semantic elements are ahead of the others by `offset` on the way to data.

    With u logit-normal, the paper's times (1 is data) are min(1, u (1 + D)) for the semantic part and max(0, u (1 + D)
    - D) for the texture; here 1 less those. semantic: boolean, shaped like the elements. D = 0: one time for all.
    """
    semantic = np.asarray(semantic)
    if semantic.dtype != bool or not 0 <= offset <= 1 or not std > 0:
        raise ValueError(
            f"semantic_first: expected a boolean mask, 0 <= offset <= 1, std > 0; got {semantic.dtype}, {offset=}"
        )
    mask = jnp.asarray(semantic)

    def law(key: Array) -> Array:
        u = jax.nn.sigmoid(mean + std * jax.random.normal(key, (), jnp.float32))
        ahead = u * (1 + offset)
        t = 1.0 - jnp.where(mask, jnp.minimum(1.0, ahead), jnp.maximum(0.0, ahead - offset))
        return jnp.clip(t, 2.0**-24, 1.0 - 2.0**-24)

    return law


def _counts(frames: int, levels: int) -> None:
    if frames < 1 or levels < 2:
        raise ValueError(f"expected at least one frame and two levels, got {frames=}, {levels=}")


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    return noise.fraction(jax.random.bits(key, shape, jnp.uint32))


def _number(level: Array, levels: int, key: Array) -> Array:
    return (level.astype(jnp.float32) + _uniform(key, ())) / levels
