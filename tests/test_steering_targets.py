"""Steering beyond the core: guided proposals, draws of x0, tokens, particles over eight devices."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import discrete, exact, process, solvers, steering, times

P = process.vp_linear()
MODEL = exact.gaussian([0.4, -0.3], [[0.5, 0.2], [0.2, 0.3]])
C = np.array([1.0, -0.5])
LAM = 2.0
TABLE = solvers.ddpm()(P, times.logsnr(P, 12))
DENOISER = MODEL.denoiser(P)


def linear(x):
    return x @ jnp.asarray(C, x.dtype)


def tilted():
    """The law of the 12-step sampler from the prior, under exp(lambda c x): Gaussian, in closed form."""
    mean, cov = MODEL.law(TABLE, mean=np.zeros(2), cov=np.eye(2))
    return mean + LAM * cov @ C, LAM * C @ mean + 0.5 * LAM**2 * C @ cov @ C


def estimates(groups=16, n=500, seed=0, lam=LAM, draws=None, **options):
    """Weighted mean (groups, 2) and Z over the exact of each group, and the last weights' effective size."""
    x = P.prior(jax.random.key(seed), (groups * n, 2))
    potential = steering.fk(linear, lam, draws=draws)
    options = {"at": (4, 8), "final": False, **options}
    out = steering.sample(DENOISER, TABLE, x, jax.random.key(seed + 1), potential, groups=groups, **options)
    w = np.asarray(jax.nn.softmax(out.log_w, -1), np.float64)
    x = np.asarray(out.x, np.float64).reshape(groups, n, 2)
    return (w[..., None] * x).sum(1), np.exp(np.asarray(out.log_z) - tilted()[1]), np.asarray(out.info.ess[-1]).mean()


def check(means, z):
    for got, want in ((means, tilted()[0]), (z, 1.0)):
        error = got.std(0, ddof=1) / np.sqrt(len(got))
        assert np.all(np.abs(got.mean(0) - want) < 3.5 * error + 0.01), (got.mean(0), want, error)


def test_guided_proposals_keep_the_target_and_raise_the_effective_size():
    """TDS: the gradient moves particles towards the reward, the weights take it back; nothing to weigh but noise."""
    means, z, size = estimates(proposal=steering.guided(linear, LAM))
    check(means, z)
    assert size > 1.15 * estimates()[2]


def test_a_guided_proposal_alone_is_another_law():
    """Unweighted, its mean follows a recursion in closed form; weighted, it is the solver's own again."""
    x = P.prior(jax.random.key(0), (4000, 2))
    out = steering.sample(DENOISER, TABLE, x, jax.random.key(1), proposal=steering.guided(linear, LAM), final=False)
    base, cov = MODEL.law(TABLE, mean=np.zeros(2), cov=np.eye(2))
    weight = np.asarray(jax.nn.softmax(out.log_w[0]))[:, None]
    np.testing.assert_allclose((weight * np.asarray(out.x)).sum(0), base, atol=0.06)
    m, data = np.zeros(2), MODEL.cov
    for k in range(TABLE.nfe):
        t, (A, B, C_) = TABLE.t[k], (v[k, 0, 0] for v in (TABLE.A, TABLE.B, TABLE.C))
        a, s = P.alpha(t), P.sigma(t)
        gain = a * data @ np.linalg.inv(a * a * data + s * s * np.eye(2))
        m = A * m + B * (MODEL.mean + gain @ (m - a * MODEL.mean)) + C_**2 * LAM * gain @ C
    assert np.abs(m - base).max() > 0.15
    np.testing.assert_allclose(np.asarray(out.x).mean(0), m, atol=4 * np.sqrt(cov.max() / 4000))


def test_rewards_of_posterior_draws():
    """Intermediate rewards from four short chains a particle; a schedule of lambda ends at the target's."""
    draws = steering.posterior_draws(DENOISER, TABLE, solvers.ddpm(), m=4, steps=3)
    check(*estimates(groups=12, n=400, draws=draws, lam=np.linspace(0.5, LAM, TABLE.nfe))[:2])


def test_the_reward_of_several_draws_is_their_mean_weight():
    """log mean exp(lambda r) over the draws, by NumPy; and of the potentials after two looks."""
    x0 = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    after = types.SimpleNamespace(x=jnp.zeros((5, 2), jnp.float32))
    step = steering.Step(1, None, None, None, after, jnp.asarray(True), jnp.asarray(False))
    now = np.log(np.mean(np.exp(LAM * (x0 @ C)), 0))
    for kind, second in (("difference", 0 * now), ("max", now), ("sum", 2 * now)):
        init, weigh = steering.fk(linear, LAM, kind, draws=lambda key, step: jnp.asarray(x0))
        increment, memory = weigh(jax.random.key(0), step, init(jnp.zeros((5, 2), jnp.float32)))
        np.testing.assert_allclose(increment, now, rtol=1e-5)
        np.testing.assert_allclose(weigh(jax.random.key(0), step, memory)[0], second, rtol=1e-5, atol=1e-5)


def test_best_of_n():
    x = jnp.asarray([[0.0, 0], [3, 0], [1, 0], [2, 0]])
    np.testing.assert_array_equal(steering.best(linear, x, groups=2), [[3, 0], [2, 0]])


def test_lineage_follows_ancestors_back():
    x = P.prior(jax.random.key(0), (40, 2))
    out = steering.sample(DENOISER, TABLE, x, jax.random.key(1), steering.fk(linear, LAM), groups=2, threshold=1.0)
    ancestors, lineage = np.asarray(out.info.ancestors), np.asarray(out.lineage())
    assert lineage.shape == (13, 2, 20)
    here = np.tile(np.arange(20), (2, 1))
    for k in reversed(range(12)):
        np.testing.assert_array_equal(lineage[k + 1], here)
        here = np.take_along_axis(ancestors[k], here, 1)
    np.testing.assert_array_equal(lineage[0], here)
    np.testing.assert_array_equal(lineage[0], out.state.eve)
    counts = [len(np.unique(a)) / 20 for a in ancestors[:, 0]]
    np.testing.assert_allclose(out.info.acceptance[:, 0], counts, rtol=1e-6)


@pytest.mark.parametrize(("scheme", "low", "high"), [("multinomial", 0.85, 1.35), ("systematic", 0.75, 1.4)])
def test_standard_error_of_the_normaliser(scheme, low, high):
    """The estimate from one run agrees with the spread of Z over 200 groups."""
    x = P.prior(jax.random.key(0), (200 * 100, 2))
    out = steering.sample(
        DENOISER, TABLE, x, jax.random.key(1), steering.fk(linear, 1.0), groups=200, scheme=scheme, at=(6, 8),
        threshold=1.0, final=False,
    )  # fmt: skip
    spread = np.exp(np.asarray(out.log_z)).std() / np.exp(np.asarray(out.log_z)).mean()
    assert low < np.sqrt(np.mean(np.asarray(out.log_z_error) ** 2)) / spread < high


# ---------------------------------------------------------------------------------------------------------- tokens
L, V, MASK = 3, 3, 3
TABLE_P = np.random.default_rng(5).dirichlet(np.full(V**L, 0.6)).reshape((V,) * L)
TABLE_R = np.random.default_rng(6).normal(size=(V,) * L)


def posterior(tokens, t):
    """log p(token | the revealed ones) of the tabulated law, exactly."""
    states = jnp.asarray(list(itertools.product(range(V), repeat=L)), jnp.int32)
    fits = ((tokens[:, None] == MASK) | (tokens[:, None] == states)).all(-1)
    joint = jnp.where(fits, jnp.asarray(TABLE_P.ravel(), jnp.float32), 0.0)
    one_hot = jax.nn.one_hot(states, V, dtype=jnp.float32)
    return jnp.log(jnp.einsum("bs,slv->blv", joint, one_hot) + 1e-30)


def histogram(x):
    return np.bincount(np.ravel_multi_index(np.asarray(x).T, (V,) * L), minlength=V**L) / len(x)


def test_tokens_unsteered_and_steered():
    """Masked diffusion with the exact posterior gives the law, and FK steering its tilted law; TV by counting."""
    rows, x = discrete.rows(np.linspace(1, 0, 25)), jnp.full((30_000, L), MASK, jnp.int32)
    stepper = discrete.masked(posterior, MASK)
    reward = lambda x: jnp.asarray(TABLE_R, jnp.float32)[x[:, 0], x[:, 1], x[:, 2]]
    go = jax.jit(lambda key, lam: steering.run(
        stepper, rows, x, key, steering.fk(reward, lam, draws=discrete.draws(MASK, 4)), at=(6, 12, 18)
    ))  # fmt: skip
    plain, out = go(jax.random.key(0), 0.0), go(jax.random.key(1), LAM)
    goal = TABLE_P * np.exp(LAM * TABLE_R)
    assert 0.5 * np.abs(histogram(plain.x) - TABLE_P.ravel()).sum() < 0.03
    assert 0.5 * np.abs(histogram(out.x) - goal.ravel() / goal.sum()).sum() < 0.03
    assert 0.5 * np.abs(histogram(plain.x) - goal.ravel() / goal.sum()).sum() > 0.2
    np.testing.assert_allclose(out.log_z[0], np.log(goal.sum()), atol=0.05)


def test_token_times_are_checked():
    with pytest.raises(ValueError, match="fall from 1 to 0"):
        discrete.rows([1.0, 0.5, 0.6, 0.0])


# ---------------------------------------------------------------------------------------------------------- a mesh
def test_eight_devices_equal_one_and_only_surplus_travels():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    table = solvers.ddpm()(P, times.logsnr(P, 4))
    x = P.prior(jax.random.key(0), (64, 2))
    run = lambda **options: steering.sample(
        DENOISER, table, x, jax.random.key(1), steering.fk(linear, LAM), groups=2, threshold=1.0, **options
    )
    over, one = run(mesh=mesh), run(shards=4)
    assert len(over.x.sharding.device_set) == 8
    np.testing.assert_array_equal(over.info.ancestors, one.info.ancestors)
    np.testing.assert_allclose(over.x, one.x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(over.log_z, one.log_z, atol=1e-5)
    crossed, size = steering.traffic(over.info.ancestors, 8, over.state.inner)
    ancestors = np.asarray(over.info.ancestors) + np.array([0, 32])[:, None]
    children = [np.bincount(a.ravel() // 8, minlength=8) for a in ancestors]
    np.testing.assert_array_equal(crossed, [np.maximum(c - 8, 0).sum() for c in children])
    assert crossed.sum() > 0 and size == 8
    with pytest.raises(ValueError, match="60 particles in 1 groups on 8 devices"):
        steering.sample(DENOISER, table, x[:60], jax.random.key(1), mesh=mesh)


# ------------------------------------------------------------------------------------------------------- bad input
def test_a_host_reward_keeps_its_own_message():
    def broken(x):
        raise RuntimeError("the judge is out")

    x = P.prior(jax.random.key(0), (8, 2))
    with pytest.raises(Exception, match="the judge is out"):
        jax.block_until_ready(
            steering.sample(DENOISER, TABLE, x, jax.random.key(1), steering.fk(steering.host_reward(broken)))
        )
    wrong = steering.fk(steering.host_reward(lambda x: np.zeros((8, 2))))
    with pytest.raises(Exception, match=r"returned shape \(8, 2\) for 8 particles"):
        jax.block_until_ready(steering.sample(DENOISER, TABLE, x, jax.random.key(1), wrong))


def test_bad_input():
    x, key = P.prior(jax.random.key(0), (8, 2)), jax.random.key(1)
    with pytest.raises(ValueError, match="strength is inf"):
        steering.fk(linear, np.inf)
    with pytest.raises(ValueError, match=r"share is 0; expected .* in \(0, 1\]"):
        steering.sample(DENOISER, TABLE, x, key, share=0)
    with pytest.raises(ValueError, match="m is 0"):
        steering.posterior_draws(DENOISER, TABLE, solvers.ddpm(), m=0)
    hard = steering.fk(lambda x: jnp.where(jnp.arange(8) == 5, -jnp.inf, 0.0))  # a hard constraint is no reward
    with pytest.raises(FloatingPointError, match="particle 5 of group 0 got the log-weight nan; a reward"):
        steering.sample(DENOISER, TABLE, x, key, hard)
    zero = steering.Potential(lambda x: (), lambda key, step, memory: (jnp.full(8, -jnp.inf), memory))
    with pytest.raises(FloatingPointError, match=r"at step 1 of 12 .* all weights of group 0 are zero"):
        steering.sample(DENOISER, TABLE, x, key, zero)
