"""MT-Diffusion: without tasks it is DDPM, with them the aggregated chain's posterior; what is known conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import exact, losses, multitask, process, solvers
from jdiff.anchored import Aggregated, Anchored

P = process.vp_discrete(np.linspace(1e-3, 0.2, 20))
KEY = jax.random.key(0)
GRID = np.arange(20, -1, -1) / 20
NOTHING = Anchored(P, Aggregated((0.0,) * 20), guess=0.0)
SOME = Anchored(P, Aggregated(tuple(0.02 * (i + 1) for i in range(20))), guess=0.0)
CODE = jnp.array([[1.0, -1.0], [0.5, 2.0], [0.0, -3.0]])


def label(weight=1.0):
    """Three classes, a code each."""
    near = lambda logits, y: -jax.nn.log_softmax(logits)[jnp.arange(len(y)), y]
    return multitask.Task(lambda params, y: CODE[y], near, lambda logits: jnp.argmax(logits, -1), weight)


def apply(params, z, t, y):
    return jnp.tanh(z) * (1 + t), {"label": z @ jnp.ones((2, 3))}


def test_without_weights_it_is_ddpm():
    z, y = jax.random.normal(KEY, (6, 2)), jnp.array([0, 1, 2, 0, 1, 2])
    plain = losses.denoising_loss(lambda p, x, t, y: apply(p, x, t, y)[0], P, "eps")(None, KEY, z)
    same = multitask.loss(apply, NOTHING, {"label": label(0.0)})(None, KEY, z, {"label": y})
    np.testing.assert_allclose(same, plain, rtol=1e-12)
    den = jdiff.denoiser(lambda x, t: apply(None, x, t, None)[0], P, "eps")
    expected = jdiff.sample(den, solvers.ddpm()(P, GRID), z, KEY)
    chain = multitask.stepper(apply, NOTHING, {"label": label()}, None)
    found = jdiff.run(chain, multitask.rows(NOTHING, GRID, np.float64), z, KEY)[0].x
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_loss_sees_the_aggregated_latent():
    z, y = jax.random.normal(KEY, (5, 2)), jnp.array([0, 1, 2, 0, 1])
    seen = {}

    def spy(params, z_t, t, _):
        seen.update(z=z_t, t=t)
        return jnp.zeros_like(z_t), {"label": jnp.zeros((len(z_t), 3))}

    found = multitask.loss(spy, SOME, {"label": label(0.5)})(None, KEY, z, {"label": y})
    eps = P.noise(jax.random.fold_in(KEY, 1), z)
    t, a = seen["t"], P.alpha(seen["t"])
    np.testing.assert_allclose(seen["z"], a * z + SOME.b(P, t) * CODE[y] + P.sigma(t) * eps, rtol=1e-10)
    np.testing.assert_allclose(found, (np.asarray(eps) ** 2).mean(1) + 0.5 * np.log(3), rtol=1e-10)
    # the weight A_t is the paper's sum, level by level
    r = np.sqrt(1 - np.linspace(1e-3, 0.2, 20))
    A = [sum(0.02 * (s + 1) * np.prod(r[s : i + 1]) for s in range(i + 1)) for i in range(20)]
    np.testing.assert_allclose(SOME.b(P, np.arange(1, 21) / 20), A, rtol=1e-10)


def test_sampling_with_what_is_known_gives_the_clean_law():
    """Exact eps of N(mean, C) around the known code: z_0 comes out as N(mean, C), within 4 standard errors; and a
    network told another code than the one in z_t is wrong by it."""
    law, n = exact.gaussian([0.5, -1.0], [0.6, 0.2]), 20_000
    y = jnp.full(n, 1)
    den = law.denoiser(P)

    def told(code):
        def net(params, z, t, _):
            shifted = z - SOME.b(P, t) * code
            return den(shifted, t, "eps"), {"label": jnp.zeros((len(z), 3))}

        chain = multitask.stepper(net, SOME, {"label": label()}, None, known={"label": y})
        start = SOME.unshift(P.prior(KEY, (n, 2), dtype=jnp.float64), CODE[y], 1.0)
        go = jax.jit(lambda z: jdiff.run(chain, multitask.rows(SOME, GRID, np.float64), z, KEY))
        return go(start)[0]

    right = told(CODE[1])
    mean, cov = law.law(solvers.ddpm()(P, GRID), np.zeros(2), np.eye(2))
    assert (np.abs(right.x.mean(0) - mean) < 4 * np.sqrt(np.diag(cov) / n)).all()
    np.testing.assert_allclose(right.x.var(0), np.diag(cov), rtol=4 * np.sqrt(2 / n))
    assert (right.data["label"] == 1).all()
    assert jnp.abs(told(CODE[2]).x.mean(0) - mean).max() > 0.1


def test_bad_input():
    z = jnp.zeros((2, 2))
    short = label()._replace(encode=lambda params, y: jnp.zeros((2, 3)))
    for call, says in (
        (lambda: multitask.aggregate({"label": label()}, None, {}, z), r"given for \[\], and the tasks are"),
        (lambda: multitask.aggregate({"label": short}, None, {"label": 0}, z), r"anchor has shape \(2, 3\)"),
        (lambda: multitask.stepper(apply, SOME, {"label": label()}, None, {"text": z}), r"\['text'\] are known"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
