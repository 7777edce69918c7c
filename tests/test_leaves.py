"""A time a part of a sample (UniDiffuser, SFD): exact joint Gaussians of two parts, joint, conditional and marginal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import exact, guidance, losses, process, schedules, solvers, times
from jdiff.schedules import training

P = process.flow()
PAIR = process.system({"image": P, "label": P})  # 2 and 1 numbers
MEAN = np.array([0.5, -0.3, 1.0])
ROOT = np.array([[1.0, 0.2, 0.7], [0.0, 0.8, -0.5], [0.3, 0.0, 0.9]])
COV = ROOT @ ROOT.T
LAW = exact.gaussian(MEAN, COV)
I, L = np.arange(2), np.array([2])
KEY = jax.random.key(0)


def split(u):
    return {"image": u[:, :2], "label": u[:, 2:]}


def flat(x):
    return jnp.concatenate([x["image"], x["label"]], -1)


def network(x, t):
    """E[x0 | both parts, each at its own time]."""
    t = PAIR.at(t, x)
    wide = lambda name: jnp.broadcast_to(t[name], x[name].shape)
    return split(LAW.denoiser(P).apply(flat(x), flat({name: wide(name) for name in x}), ())[0])


DEN = jdiff.denoiser(network, PAIR, "x0")
TABLE = solvers.unipc(2)(PAIR, times.uniform(PAIR, 40))


def law(table, known=None, den=DEN):
    """Mean and covariance of the samples, the part `known` at value 1.3: the sampler is affine in its noise."""
    free = np.setdiff1d(np.arange(3), [] if known is None else known)
    x = np.zeros((4, 3))
    if known is not None:
        x[:, known] = 1.3
    x[1 + np.arange(len(free)), free] = 1.0
    y = np.asarray(flat(jdiff.sample(den, table, split(jnp.asarray(x)))))
    matrix = (y[1 : 1 + len(free)] - y[0]).T
    return y[0], matrix @ matrix.T


def test_one_time_is_the_plain_system():
    together = schedules.scheduled(TABLE, schedules.synchronous(2, 40))
    x = PAIR.prior(KEY, {"image": (3, 2), "label": (3, 1)}, dtype=jnp.float64)
    plain = jdiff.sample(DEN, TABLE, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), jdiff.sample(DEN, together, x), plain)


@pytest.mark.parametrize("lag", [0, 12, 40])
def test_the_joint_law_under_any_lead(lag):
    """SFD's order: the first part leads by lag / 40 of the way; D = 0 together, D = 1 one after the other."""
    mean, cov = law(schedules.scheduled(TABLE, schedules.staircase(2, 40, lag)))
    np.testing.assert_allclose(mean, MEAN, atol=2e-3)
    np.testing.assert_allclose(cov, COV, atol=5e-3)


def given(part, end=0.0):
    known = np.array([part == "image", part == "label"])
    M = schedules.given(schedules.synchronous(2, 40), known)
    return schedules.scheduled(TABLE, M, end=np.where(known, end, 0.0))


@pytest.mark.parametrize(("part", "a", "b"), [("label", I, L), ("image", L, I)])
def test_conditional_and_marginal_laws(part, a, b):
    mean, cov = law(given(part), known=b)
    gain = COV[np.ix_(a, b)] @ np.linalg.inv(COV[np.ix_(b, b)])
    np.testing.assert_array_equal(mean[b], 1.3)
    np.testing.assert_allclose(mean[a], MEAN[a] + gain @ (1.3 - MEAN[b]), atol=3e-3)
    np.testing.assert_allclose(cov[np.ix_(a, a)], COV[np.ix_(a, a)] - gain @ COV[np.ix_(b, a)], atol=5e-3)
    mean, cov = law(given(part, P.t_max), known=b)  # told that it is noise
    np.testing.assert_allclose(mean[a], MEAN[a], atol=2e-3)
    np.testing.assert_allclose(cov[np.ix_(a, a)], COV[np.ix_(a, a)], atol=5e-3)


def test_alone_is_the_product_of_the_marginals_and_guides():
    noise = PAIR.prior(jax.random.key(1), {"image": (1, 2), "label": (1, 1)}, dtype=jnp.float64)
    lonely = guidance.alone(DEN, noise)
    x = PAIR.prior(KEY, {"image": (5, 2), "label": (5, 1)}, dtype=jnp.float64)
    t = {"image": jnp.asarray(0.3), "label": jnp.asarray(0.7)}
    own = {
        n: exact.gaussian(MEAN[k], COV[np.ix_(k, k)]).denoiser(P)(x[n], t[n]) for n, k in (("image", I), ("label", L))
    }
    found = lonely(x, t)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), found, own)
    joint = DEN(x, t)
    assert np.abs(found["image"] - joint["image"]).max() > 0.05
    guided = guidance.cfg(DEN, lonely, 3.0)(x, t)
    jax.tree.map(lambda g, a, b: np.testing.assert_allclose(g, 3 * a - 2 * b, atol=1e-9), guided, joint, own)
    same = guidance.cfg(DEN, lonely, 1.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), same(x, t), joint)
    mean, _ = law(given("label"), known=L, den=guidance.cfg(DEN, lonely, 2.0))
    assert np.isfinite(mean).all() and abs(mean[2] - 1.3) < 1e-12
    with pytest.raises(ValueError, match="whose parts have their own times"):
        guidance.alone(LAW.denoiser(P), noise)
    with pytest.raises(ValueError, match=r"given for \['image'\]"):
        guidance.alone(DEN, {"image": noise["image"]})


def test_conversions_and_diffusion_at_a_time_a_part():
    system = process.system({"image": process.vp_cosine(), "label": process.flow()})
    x0 = split(jax.random.normal(KEY, (4, 3), jnp.float64))
    t = {"image": jnp.full((4, 1), 0.2), "label": jnp.asarray(0.6)}
    x, eps = system.diffuse(KEY, x0, t), system.noise(KEY, x0)
    for name, part in system.parts:
        np.testing.assert_allclose(
            x[name], part.alpha(t[name]) * x0[name] + part.sigma(t[name]) * eps[name], atol=1e-12
        )
    back = jdiff.predict.convert(system, x, t, eps, "eps", "x0")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), back, x0)


def test_the_loss_has_a_time_a_part_and_weighs_each_at_its_own():
    """Against NumPy; parts of other ranks; independent times (UniDiffuser), and a lead (SFD)."""
    x0 = {"image": jax.random.normal(KEY, (6, 2, 2), jnp.float32), "label": jnp.ones((6, 3), jnp.float32)}
    seen = {}

    def apply(params, x, t, y):
        seen.update(t)
        return jax.tree.map(lambda v: 0.5 * v, x)

    loss = losses.denoising_loss(apply, PAIR, "x0", weighting="flow", elements=training.grouped([0, 1]))
    found = np.asarray(loss(None, KEY, x0))
    assert seen["image"].shape == (6, 1, 1) and seen["label"].shape == (6, 1)
    eps = PAIR.noise(jax.random.fold_in(KEY, 1), x0)
    total = np.zeros(6)
    for name in x0:
        t, a, e = (np.asarray(v, np.float64) for v in (seen[name], x0[name], eps[name]))
        total += ((0.5 * ((1 - t) * a + t * e) - a) ** 2 / t**2).reshape(6, -1).sum(1)
    np.testing.assert_allclose(found, total / 7, rtol=1e-4)
    assert np.abs(np.corrcoef(np.ravel(seen["image"]), np.ravel(seen["label"]))[0, 1]) < 0.99
    losses.denoising_loss(apply, PAIR, "x0", elements=training.semantic_first(np.array([False, True]), 0.3))(
        None, KEY, x0
    )
    lead = np.ravel(seen["image"]) - np.ravel(seen["label"])
    assert (lead >= 0).all() and lead.max() > 0.2
    with pytest.raises(ValueError, match="the same number"):
        losses.denoising_loss(apply, PAIR, "x0")(None, KEY, x0)


def test_a_matrix_of_other_columns():
    with pytest.raises(ValueError, match=r"a column each of image, label is expected; the matrix has shape \(41, 3\)"):
        schedules.scheduled(TABLE, schedules.synchronous(3, 40))
