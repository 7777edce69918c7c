"""Deformation fields: exact warps, compositions, Jacobians by SciPy and by hand, DRDM's process and sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import jdiff
from jdiff import fields

KEY = jax.random.key(0)
SIZE = 16


def smooth(std=0.15, n=3, key=KEY):
    return fields.random_velocity(key, (n, SIZE, SIZE, 1), std, (4, 8), dtype=jnp.float64)


def test_warp_against_scipy_and_on_linear_images():
    image = jax.random.normal(KEY, (2, 9, 12, 2))
    u = 3 * jax.random.normal(jax.random.key(1), (2, 9, 12, 2))
    grid = np.stack(np.meshgrid(np.arange(9), np.arange(12), indexing="ij"))
    for outside, mode in (("border", "nearest"), ("zero", "constant")):
        found = fields.warp(image, u, outside)
        for b in range(2):
            for c in range(2):
                at = grid + np.moveaxis(np.asarray(u[b]), -1, 0)
                if outside == "zero":  # SciPy's constant mode drops to 0 at the edge; ours within one pixel of it
                    padded, at = np.pad(np.asarray(image[b, ..., c]), 1), np.clip(at + 1, 0, [[[10]], [[13]]])
                    expected = ndimage.map_coordinates(padded, at, order=1)
                else:
                    expected = ndimage.map_coordinates(np.asarray(image[b, ..., c]), at, order=1, mode=mode)
                np.testing.assert_allclose(found[b, ..., c], expected, atol=1e-12)
    assert (fields.warp(image, jnp.zeros_like(u)) == image).all()
    plane = jnp.broadcast_to((2.0 * grid[0] - 0.7 * grid[1])[None, ..., None], (2, 9, 12, 1))
    u = 0.4 * jnp.sin(u)
    inner = np.s_[:, 1:-1, 1:-1]
    expected = plane + 2.0 * u[..., :1] - 0.7 * u[..., 1:]
    np.testing.assert_allclose(fields.warp(plane, u)[inner], expected[inner], atol=1e-12)


def test_compositions():
    move = lambda a, b: jnp.broadcast_to(jnp.array([a, b]), (1, SIZE, SIZE, 2))
    np.testing.assert_allclose(fields.compose(move(1.5, -2.0), move(0.25, 3.0)), move(1.75, 1.0), atol=1e-12)
    u, v = smooth(), smooth(key=jax.random.key(2))
    still = jnp.zeros_like(u)
    assert (fields.compose(u, still) == u).all() and (fields.compose(still, u) == u).all()
    assert jnp.abs(fields.compose(u, fields.inverse(u))).max() < 1e-6
    small = 0.5 * u  # from the other side: within the interpolation's error
    assert jnp.abs(fields.compose(fields.inverse(small), small))[:, 3:-3, 3:-3].max() < 0.05
    # two warps are one warp by the composition: exact where the image is linear, away from the border
    plane = jnp.broadcast_to(jnp.arange(SIZE, dtype=jnp.float64)[None, :, None, None], (3, SIZE, SIZE, 1))
    twice = fields.warp(fields.warp(plane, u), v)
    once = fields.warp(plane, fields.compose(u, v))
    np.testing.assert_allclose(twice[:, 4:-4, 4:-4], once[:, 4:-4, 4:-4], atol=1e-10)
    assert jnp.abs(twice - fields.warp(plane, fields.compose(v, u)))[:, 4:-4, 4:-4].max() > 1e-3  # order matters


def test_jacobians_and_the_folding_penalty():
    i, j = np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij")
    M = np.array([[0.3, -0.2], [0.5, 0.1]])  # displacement M p: det(I + M)
    u = jnp.asarray(np.stack([M[0, 0] * i + M[0, 1] * j, M[1, 0] * i + M[1, 1] * j], -1))[None]
    np.testing.assert_allclose(fields.jacobian(u), np.linalg.det(np.eye(2) + M), rtol=1e-12)
    mirror = jnp.asarray(np.stack([-2.0 * i, 0.0 * j], -1))[None]
    assert fields.folded(mirror)[0] == 1 and fields.folded(u)[0] == 0
    assert fields.folding(mirror)[0] == 1 and fields.folding(u)[0] == 0
    assert fields.folding(mirror, as_published=True)[0] == 0  # docs/differences.md


def test_the_forward_process():
    process = fields.deformation(std=0.1, sides=(4, 8), steps=20, jitter=0.0)
    n, m = process.compositions(np.arange(21))
    t = np.arange(21)
    np.testing.assert_array_equal(n, [max(1, int(np.floor(2 * s**1.3 / 3))) for s in t])
    np.testing.assert_array_equal(m, [int(np.floor(s**0.6 + 1e-12)) for s in t])
    field, target = process.draw(KEY, (4, SIZE, SIZE, 1), jnp.array([0, 3, 10, 20], jnp.int32), dtype=jnp.float64)
    v = fields.random_velocity(jax.random.fold_in(KEY, 0), (4, SIZE, SIZE, 1), 0.1, (4, 8), dtype=jnp.float64)
    for b, s in enumerate((0, 3, 10, 20)):
        for found, count in ((field, n[s]), (target, m[s])):
            phi = jnp.zeros_like(v[:1])
            for _ in range(count):
                phi = v[b : b + 1] + fields.warp(phi, v[b : b + 1])
            np.testing.assert_allclose(found[b : b + 1], phi, atol=1e-10)
    assert (target[0] == 0).all()
    part, _ = process.draw(KEY, (1, SIZE, SIZE, 1), jnp.array([10], jnp.int32), jnp.array([2]), dtype=jnp.float64)
    np.testing.assert_allclose(part[0], field[2], atol=1e-12)  # by key and global index
    z = smooth(0.2, n=2000)  # constant parts apart, a control grid's own variance: sides 4 and 8, twice as far for 4
    assert abs(float(z[:, 0, 0].var()) / (0.2**2 * (1 + 4)) - 1) < 0.1


def test_recovery_undoes_a_deformation_that_is_known():
    """A network that knows the field: the inverse in one step, then nothing. The original alone is interpolated."""
    process = fields.deformation(std=0.1, sides=(4, 8), steps=10)
    image = jax.random.normal(KEY, (2, SIZE, SIZE, 1))
    u = smooth(n=2)
    back = fields.inverse(u, 40)
    know = lambda x, t: jnp.where((t == 3)[:, None, None, None], back, 0.0)
    start = {"image": image, "field": u}
    state, steps = jdiff.run(process.recovery(know), process.rows(4), start)
    np.testing.assert_allclose(state.x, image, atol=1e-5)
    assert jnp.abs(state.field).max() < 1e-5 and len(steps) == 4
    still, _ = jdiff.run(process.recovery(lambda x, t: jnp.zeros_like(u)), process.rows(), start)
    np.testing.assert_allclose(still.x, fields.warp(image, u), atol=1e-12)  # ten steps of nothing blur nothing
    assert list(process.rows()) == list(range(9, -1, -1))


@pytest.mark.long
def test_losses_are_least_where_the_target_is_undone():
    process = fields.deformation(std=0.15, sides=(4, 8), steps=12, jitter=0.0)
    v = smooth(0.2)
    opposite = -v
    np.testing.assert_allclose(fields.magnitude(opposite, v), 0, atol=1e-12)
    assert (fields.angle(opposite, v) < -0.98).all() and (fields.angle(v, v) > 0.98).all()
    np.testing.assert_allclose(fields.magnitude(v, v), 4, rtol=0.1)
    i = np.arange(SIZE) * np.ones((SIZE, SIZE))
    ramp = jnp.asarray(np.stack([0.5 * i, 0.0 * i], -1))[None]
    np.testing.assert_allclose(fields.roughness(ramp), 0.5 * 0.25)
    images = jax.random.normal(KEY, (4, SIZE, SIZE, 1))
    wrong = fields.recovery_loss(lambda p, x, t: jnp.zeros((*x.shape[:3], 2)), process, 0.0)(None, KEY, images)
    times = jax.vmap(lambda i: jax.random.randint(jax.random.fold_in(KEY, i), (), 0, 12))(
        jnp.arange(4, dtype=jnp.int32)
    )
    _, target = process.draw(jax.random.fold_in(KEY, 1 << 20), images.shape, times, dtype=jnp.float64)
    right = fields.recovery_loss(lambda p, x, t: fields.inverse(target), process, 0.0)(None, KEY, images)
    np.testing.assert_allclose(wrong, fields.magnitude(0 * target, target), rtol=1e-9)
    assert ((right < -0.9) | (times == 0)).all() and ((wrong > 0.9) | (times == 0)).all()


def test_bad_input():
    image = jnp.zeros((1, 8, 8, 1))
    for call, says in (
        (lambda: fields.warp(image, jnp.zeros((1, 8, 9, 2))), r"field has shape \(1, 8, 9, 2\) for an image"),
        (lambda: fields.warp(image, jnp.zeros((1, 8, 8, 2)), "wrap"), "outside is 'wrap'"),
        (lambda: fields.deformation(std=0.0), "std > 0"),
        (lambda: fields.deformation(sides=(1, 4)), "sides >= 2"),
        (lambda: fields.deformation(steps=10).rows(11), r"starts at 11; expected a step in 1, .., 10"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
