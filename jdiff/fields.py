"""Deformation fields instead of noise: DRDM (Zheng et al. 2024, arXiv 2407.07295), which learns to undo deformations.

A field u (batch, h, w, 2) holds displacements in pixels, (row, column): warping reads image(p + u(p)), bilinearly. So

    warp(warp(image, u), v) = warp(image, compose(u, v)),        compose(u, v)(p) = v(p) + u(p + v(p))

up to interpolation, of which the right side has one instead of two. The forward process composes a small random field
with itself n(t) times, t = 0, .., steps; t = 0 is the least deformed.

    process = fields.deformation(std=0.3)
    field, target = process.draw(key, images.shape, t)                   # phi_t, and the part that a network undoes
    found = jdiff.run(process.recovery(network), process.rows(steps), {"image": images, "field": field})[0]
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jdiff import noise
from jdiff.execute import Stepper

Field = Float[Array, "batch h w 2"]
Image = Float[Array, "batch h w c"]


# ------------------------------------------------------------------------------------------------------ operations
def warp(image: Image, u: Float[Array, "batch2 h2 w2 d"], outside: str = "border") -> Image:
    """image(p + u(p)), bilinear. outside: "border", the nearest pixel, or "zero". Exact for u = 0 and linear images.

    ValueError for a field of another size, or an unknown `outside`.
    """
    b, h, w, _ = image.shape
    if u.shape != (b, h, w, 2):
        raise ValueError(f"warp: the field has shape {u.shape} for an image {image.shape}; expected {(b, h, w, 2)}")
    if outside not in ("border", "zero"):
        raise ValueError(f"warp: outside is {outside!r}; expected 'border' or 'zero'")
    if outside == "zero":
        image = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    pad = 1 if outside == "zero" else 0
    size = jnp.array([h, w])
    grid = jnp.stack(jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij"), -1).astype(u.dtype)
    at = jnp.clip(grid + u + pad, 0.0, (size - 1 + 2 * pad).astype(u.dtype))
    low = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, (size - 2 + 2 * pad).astype(jnp.int32))
    f = (at - low.astype(u.dtype))[..., None].astype(image.dtype)  # (b, h, w, 2, 1)
    rows, columns = low[..., 0], low[..., 1]
    corner = lambda i, j: jax.vmap(lambda im, r, c: im[r + i, c + j])(image, rows, columns)
    top = (1 - f[..., 1, :]) * corner(0, 0) + f[..., 1, :] * corner(0, 1)
    bottom = (1 - f[..., 1, :]) * corner(1, 0) + f[..., 1, :] * corner(1, 1)
    return (1 - f[..., 0, :]) * top + f[..., 0, :] * bottom


def compose(u: Field, v: Field) -> Field:
    """The field of warping by u and then by v: v(p) + u(p + v(p)), the border's displacement beyond it."""
    return v + warp(u, v)


def inverse(u: Field, iterations: int = 20) -> Field:
    """v with compose(u, v) = 0, by the fixed point v(p) <- -u(p + v(p)); it converges where |grad u| < 1."""
    return jax.lax.fori_loop(0, iterations, lambda _, v: -warp(u, v), -u)


def jacobian(u: Field) -> Float[Array, "batch h1 w1"]:
    """det(I + grad u) by forward differences, (batch, h - 1, w - 1): below 0 where the warp folds."""
    down = (u[:, 1:] - u[:, :-1])[:, :, :-1]
    right = (u[:, :, 1:] - u[:, :, :-1])[:, :-1]
    return (1 + down[..., 0]) * (1 + right[..., 1]) - down[..., 1] * right[..., 0]


def folded(u: Field) -> Float[Array, " batch"]:
    """Fraction of a field with a negative Jacobian determinant."""
    return jnp.mean(jacobian(u) < 0, (1, 2), dtype=u.dtype)


# --------------------------------------------------------------------------------------------------------- process
def random_velocity(
    key: Array,
    shape: tuple[int, ...],
    std: float,
    sides: tuple[int, ...],
    index: Array | None = None,
    dtype: Any = None,
) -> Field:
    """Sum over control grids of `side` x `side` normal displacements, spread bilinearly over (batch, h, w, ..).

    A grid's displacements have standard deviation std max(sides) / side pixels, coarser ones the larger, as published.
    """
    b, h, w = shape[:3]
    dtype = jnp.float32 if dtype is None else dtype
    total = jnp.zeros((b, h, w, 2), dtype)
    for j, side in enumerate(sides):
        z = noise.normal(jax.random.fold_in(key, j), jax.ShapeDtypeStruct((b, side, side, 2), dtype), index)
        total += jax.image.resize(std * max(sides) / side * z, (b, h, w, 2), "linear")
    return total


class Recovery(NamedTuple):
    """State of the sampler: the deformed image x, its field, and the original, which alone is ever interpolated."""

    x: Image
    field: Field
    image: Image


@dataclass(frozen=True)
class Deformation:
    """The forward process; made by `deformation`."""

    std: float
    sides: tuple[int, ...]
    steps: int
    jitter: float

    def compositions(self, t: Any) -> tuple[Any, Any]:
        """How often the field, and the target, are composed at t: max(1, floor(2 t^1.3 / 3)) and floor(t^0.6)."""
        xp = jnp if isinstance(t, jax.Array) else np
        t = xp.asarray(t, float)
        power = lambda p: xp.power(t, xp.asarray(p, t.dtype))
        n = xp.floor(2.0 * power(1.3) / 3.0).astype(int)
        return xp.maximum(n, 1), xp.floor(power(0.6)).astype(int)

    def draw(
        self,
        key: Array,
        shape: tuple[int, ...],
        t: Integer[Array, " batch"],
        index: Array | None = None,
        dtype: Any = None,
    ) -> tuple[Field, Field]:
        """(field phi_t, target): a random velocity composed with itself n(t) times, and fewer times, which is the part
        that one step undoes. t: (batch,) in 0, .., steps. The field's velocity has `jitter` of another one added.
        """
        velocity = lambda j, std: random_velocity(jax.random.fold_in(key, j), shape, std, self.sides, index, dtype)
        v = velocity(0, self.std)
        v0 = v + warp(velocity(1, self.std * self.jitter), v) if self.jitter else v
        n, m = self.compositions(t)

        def step(j: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
            more = lambda u, w, count: jnp.where((j < count)[:, None, None, None], compose(u, w), u)
            return more(pair[0], v0, n), more(pair[1], v, m)

        most = int(max(np.max(c) for c in self.compositions(np.arange(self.steps + 1))))
        return jax.lax.fori_loop(0, most, step, (jnp.zeros_like(v), jnp.zeros_like(v)))

    def rows(self, start: int | None = None) -> Array:
        """Times start - 1, .., 0 of the recovery; start defaults to `steps`. ValueError beyond it."""
        start = self.steps if start is None else start
        if not 1 <= start <= self.steps:
            raise ValueError(f"recovery: it starts at {start}; expected a step in 1, .., {self.steps}")
        return jnp.arange(start - 1, -1, -1, dtype=jnp.int32)

    def recovery(self, network: Callable[[Image, Array], Field]) -> Stepper:
        """The sampler: field <- compose(field, network(x, t)), x <- warp(the ORIGINAL image, field). Deterministic.

        network(x, t) -> field, t (batch,). It starts from {"image": original, "field": phi}; the state holds x, and
        `field`, which warps masks too. As published the recovery may start later than the deformation stopped.
        """

        def init(key: Array | None, start: dict[str, Array]) -> Recovery:
            image, field = start["image"], start["field"]
            return Recovery(warp(image, field), field, image)

        def step(key: Array | None, state: Recovery, t: Array) -> tuple[Recovery, Field]:
            u = network(state.x, jnp.broadcast_to(t, (len(state.x),)))
            field = compose(state.field, u)
            return Recovery(warp(state.image, field), field, state.image), u

        return Stepper(init, step)


def deformation(
    std: float = 0.1, sides: tuple[int, ...] = (4, 8, 16), steps: int = 80, jitter: float = 0.08
) -> Deformation:
    """The forward process. std: pixels, of the finest control grid's displacements; `steps` 80 is the paper's for heart
    images of 256 x 256. ValueError for std <= 0, or control grids of less than 2 x 2.
    """
    if not std > 0 or not sides or min(sides) < 2 or steps < 1 or jitter < 0:
        raise ValueError(f"deformation: expected std > 0, sides >= 2, steps >= 1, jitter >= 0; got {std=}, {sides=}, "
                         f"{steps=}, {jitter=}")  # fmt: skip
    return Deformation(float(std), tuple(sides), int(steps), float(jitter))


# ---------------------------------------------------------------------------------------------------------- losses
def angle(found: Field, target: Field, epsilon: float = 1e-6) -> Float[Array, " batch"]:
    """Mean cosine between two fields, -1 where they are opposite: DRDM's angular loss, of undone fields."""
    dot = lambda a, b: jnp.sum(a * b, -1)
    return jnp.mean(dot(found, target) / jnp.sqrt(dot(found, found) * dot(target, target) + epsilon), (1, 2))


def magnitude(found: Field, target: Field, epsilon: float = 1e-3) -> Float[Array, " batch"]:
    """Mean of |found + target|^2 / (|target|^2 + epsilon), 0 where they are opposite: DRDM's magnitude loss."""
    square = lambda a: jnp.sum(a * a, -1)
    return jnp.mean(square(found + target) / (square(target) + epsilon), (1, 2))


def roughness(u: Field) -> Float[Array, " batch"]:
    """Mean absolute difference between neighbours, of both components, averaged over both directions."""
    each = [jnp.mean(jnp.abs(d), (1, 2, 3)) for d in (u[:, 1:] - u[:, :-1], u[:, :, 1:] - u[:, :, :-1])]
    return 0.5 * (each[0] + each[1])


def folding(u: Field, as_published: bool = False) -> Float[Array, " batch"]:
    """Mean of max(0, -det(I + grad u)), which is 0 where nothing folds.

    as_published: the official code takes both rows of the determinant along the first axis (the same differences, one
    pixel apart) and leaves out I: what it returns is near 0 whether the field folds or not.
    """
    if not as_published:
        return jnp.mean(jnp.maximum(-jacobian(u), 0.0), (1, 2))
    down = u[:, 1:] - u[:, :-1]
    before, after = (jnp.pad(down, ((0, 0), pad, (0, 0), (0, 0))) for pad in ((1, 0), (0, 1)))
    return jnp.mean(jnp.maximum(before[..., 1] * after[..., 0] - before[..., 0] * after[..., 1], 0.0), (1, 2))


def recovery_loss(
    network: Callable[[Any, Image, Array], Field], process: Deformation, smooth: float = 10.0, fold: float = 2.0
) -> Callable[..., Float[Array, " batch"]]:
    """loss(params, key, images, index=None) -> (batch,): how well network(params, x_t, t) undoes the target.

    Undone means network(x)(p + v(p)) = -v(p): angle + magnitude + smooth (roughness + fold folding), the published
    weights (of fields in image widths; here pixels). t is uniform on 0, .., steps - 1.
    """

    def loss(params: Any, key: Array, images: Image, index: Array | None = None) -> Float[Array, " batch"]:
        index = jnp.arange(len(images), dtype=jnp.int32) if index is None else index
        times = jax.vmap(lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, process.steps))(index)
        field, target = process.draw(jax.random.fold_in(key, 1 << 20), images.shape, times, index, images.dtype)
        u = network(params, warp(images, field), times)
        seen = warp(u, target)
        return angle(seen, target) + magnitude(seen, target) + smooth * (roughness(u) + fold * folding(u))

    return loss
