"""Diffusion over tokens against matrix products, Bayes by enumeration, exact laws and entropies."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jdiff
from jdiff import discrete
from jdiff.data.synthetic import tokens
from jdiff.discrete.draw import clock
from jdiff.experiments import first_hitting

K = 5
F = np.array([-0.3, 0.0, 0.3])
PROCESSES = {
    "absorbing": discrete.absorbing(K),
    "uniform": discrete.uniform(K, lambda t: 1 - (1 - t) ** 2),
    "mask and replace": discrete.mask_and_replace(K),
    "spindle": discrete.spindle(K, F),
}
TABLE = tokens.Table.random(3, 3, seed=5)  # 27 sequences
MASK, N = 3, 20_000


# ------------------------------------------------------------------------------------------------------ the process
@pytest.mark.parametrize("name", PROCESSES)
def test_marginals_are_products_of_one_step_matrices(name):
    p, grid = PROCESSES[name], np.linspace(0, 1, 9)[:-1]
    steps = [p.matrix(s, t) for s, t in itertools.pairwise(grid)]
    for Q in steps:
        assert Q.min() >= 0
        np.testing.assert_allclose(Q.sum(-1), 1, rtol=1e-14)
        assert (Q[..., K, K] == 1).all()
    product = functools.reduce(np.matmul, steps)
    np.testing.assert_allclose(p.matrix(0.0, grid[-1]), product, atol=1e-14)
    x0 = jnp.asarray(np.tile(np.arange(K), (3, 1)).T)  # (K, 3): a column a token of the spindle
    rows = np.asarray(p.marginal(x0, grid[-1]))
    wanted = np.broadcast_to(product, (3, K + 1, K + 1))[:, :K].swapaxes(0, 1)
    np.testing.assert_allclose(rows, wanted, atol=1e-14)
    np.testing.assert_allclose(p.marginal(x0, jnp.float32(grid[-1])), wanted, rtol=3e-6, atol=1e-30)


def test_the_published_schedule_is_ours():
    """VQ-Diffusion's one-step alpha, beta, gamma from its cumulative ones, as its appendix has them (T = 100)."""
    p, T = discrete.mask_and_replace(K, 0.9), 100
    level = np.arange(T) / T
    alphas, gammas = 1 - level, 0.9 * level
    for i in (1, 40, 99):
        a, c = alphas[i] / alphas[i - 1], 1 - (1 - gammas[i]) / (1 - gammas[i - 1])
        b = (1 - a - c) / K
        Q = p.matrix((i - 1) / T, i / T)
        np.testing.assert_allclose([Q[0, 0], Q[0, 1], Q[0, K]], [a + b, b, c], rtol=1e-11)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.2), (0.3, 0.35), (0.1, 0.9), (0.0, 1.0), (0.6, 1.0), (0.5, 0.5)])
def test_posterior_is_bayes_for_any_stride(name, s, t):
    p = PROCESSES[name]
    p = discrete.spindle(K, F[2]) if name == "spindle" else p
    Qs, Qst, Qt = p.matrix(0, s), p.matrix(s, t) if s < t else np.eye(K + 1), p.matrix(0, t)
    mixed = np.random.default_rng(0).dirichlet(np.ones(K))
    for x in range(K + 1):
        possible = [k for k in range(K) if Qt[k, x] > 0]
        if not possible:
            continue
        ps = np.stack([*np.eye(K)[possible], mixed])
        wanted = [Qs[k] * Qst[:, x] / Qt[k, x] for k in possible]
        if len(possible) == K:
            wanted.append(mixed @ np.array(wanted))
        found = np.asarray(p.posterior(jnp.full(len(ps), x), jnp.asarray(ps), s, t))
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-12)
        np.testing.assert_allclose(found[: len(wanted)], wanted, atol=1e-12)
        single = p.posterior(jnp.full(len(ps), x), jnp.asarray(ps, jnp.float32), jnp.float32(s), jnp.float32(t))
        np.testing.assert_allclose(single[: len(wanted)], wanted, atol=2e-6)
        assert single.dtype == jnp.float32


def test_draws_follow_the_marginal_and_the_prior():
    p, n = PROCESSES["spindle"], 40_000
    x0 = jnp.full((n, 3), 2)
    x = np.asarray(p.diffuse(jax.random.key(0), x0, 0.4))
    for i in range(3):
        assert scipy.stats.chisquare(np.bincount(x[:, i], minlength=K + 1), n * p.matrix(0, 0.4)[i, 2]).pvalue > 1e-3
    prior = np.bincount(np.asarray(PROCESSES["mask and replace"].prior(jax.random.key(1), (n,))), minlength=K + 1)
    assert scipy.stats.chisquare(prior, n * np.array([0.02] * K + [0.9])).pvalue > 1e-3
    assert (PROCESSES["absorbing"].prior(jax.random.key(1), (100,)) == K).all()
    assert (PROCESSES["uniform"].prior(jax.random.key(1), (100,)) < K).all()


def test_importance_orders_the_tokens():
    """M2DM: F = 0 is VQ-Diffusion; tokens of negative F keep their value longer at every time."""
    plain, flat = discrete.mask_and_replace(K), discrete.spindle(K, np.zeros(3))
    for t in (0.1, 0.5, 0.8):
        np.testing.assert_allclose(flat.matrix(0, t), np.tile(plain.matrix(0, t), (3, 1, 1)), atol=1e-15)
        keep = PROCESSES["spindle"].levels(t)[0]
        assert keep[0] > keep[1] > keep[2]
        np.testing.assert_allclose(keep, 1 - t - F * np.sin(np.pi * t), rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PROCESSES["absorbing"].check([0, 5]), r"0 to 4 \(5 classes\), got int64 values 0 to 5"),
        (lambda: PROCESSES["absorbing"].check([0, 6], masked=True), r"\[MASK\] last"),
        (lambda: PROCESSES["absorbing"].check([0.5]), "integer tokens"),
        (lambda: PROCESSES["absorbing"].marginal(jnp.array([0, 7]), 0.5), "0 to 4 .* values 0 to 7"),
        (lambda: PROCESSES["absorbing"].diffuse(jax.random.key(0), jnp.array([[-1]]), 0.5), "values -1 to -1"),
        (lambda: discrete.mask_and_replace(K, 1.5), "share in"),
        (lambda: discrete.spindle(K, [0.0, 0.5]), "importance may be too large"),
        (lambda: discrete.absorbing(K, lambda t: 0.9 * t), "to 1 at t = 1"),
        (lambda: discrete.rows(np.ones((3, 2))), "fall from 1 to 0"),
        (lambda: discrete.blocks(10, 4, 2), "divides the length"),
        (lambda: discrete.confident(table_network, MASK, 4, 3), "divides the block"),
        (lambda: discrete.first_hitting(table_network, MASK, 0), "at_once >= 1"),
        (lambda: discrete.masked_loss(table_network, MASK, form="mean"), "'time' or 'count'"),
        (lambda: discrete.PoissonTime(0, lambda t: t), "s_max >= 1"),
        (lambda: tokens.Table(np.ones((2, 2))), "sum 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(Exception, match=message):
        call()


# ------------------------------------------------------------------------------------------------------ exact draws
def test_clocks_have_no_gap_at_zero():
    """The smallest come from all 64 bits; the largest are finite. A float32 -log(U) has none below 6e-8."""
    high, low = jnp.array([0, 0, 1, 2**32 - 1], jnp.uint32), jnp.array([0, 2**31, 0, 0], jnp.uint32)
    found = clock(high, low)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[:3], [2.0**-65, 2.0**-33, 2.0**-32], rtol=1e-6)
    assert 16.6 < found[3] < 16.7


def test_categorical_and_exponential_laws():
    p = 1.0 / np.arange(1, 41) ** 2
    p /= p.sum()
    log_p = jnp.log(jnp.asarray([*p, 0.0], jnp.float32))
    x = discrete.categorical(jax.random.key(0), jnp.broadcast_to(log_p, (60_000, 41)))
    counts = np.bincount(np.asarray(x), minlength=41)
    assert counts[40] == 0
    assert scipy.stats.chisquare(counts[:40], 60_000 * p).pvalue > 1e-3
    e = np.asarray(discrete.exponential(jax.random.key(1), (100_000,)))
    assert scipy.stats.kstest(e, "expon").pvalue > 1e-3


def test_the_law_of_truncated_clocks():
    """The closed form of the Gumbel table against the published draw itself, clocks of 2^-10, in NumPy: TV 0.01."""
    p, n, steps, rng = 1.0 / np.arange(1, 9) ** 2, 20_000, 64, np.random.default_rng(0)
    p /= p.sum()
    x = np.full(n, 8)
    for i in range(steps, 0, -1):
        live = np.flatnonzero(x == 8)
        u = np.maximum(rng.integers(0, 2**10, (len(live), 9)), 0.1) / 2**10
        x[live] = np.argmax(np.append(p / i, 1 - 1 / i) / -np.log(u), 1)
    law = first_hitting.truncated_law(p, steps, 2.0**-10)
    assert 0.5 * np.abs(np.bincount(x, minlength=8) / n - law).sum() < 0.01 < 0.04 < 0.5 * np.abs(law - p).sum()
    np.testing.assert_allclose(first_hitting.truncated_law(p, steps, 1e-12), p, rtol=1e-8)
    losses = [first_hitting.entropy(first_hitting.truncated_law(first_hitting.ZIPF, n, 2.0**-24)) for n in (1, 4096)]
    assert losses[0] - losses[1] > 0.15


# ------------------------------------------------------------------------------------------------------ sources
def test_chain_against_its_table():
    chain = tokens.Chain.random(3, 4, seed=1)
    x = tokens.Table(np.full((3,) * 4, 3.0**-4)).states
    table = tokens.Table(np.exp(chain.log_prob(x)).reshape((3,) * 4))
    np.testing.assert_allclose(chain.entropy, table.entropy, rtol=1e-12)
    likelihood = jnp.asarray(np.random.default_rng(0).random((6, 4, 3)) + 0.01)
    np.testing.assert_allclose(chain.posterior(likelihood), table.posterior(likelihood), rtol=1e-10)
    first = np.einsum("abcd,na,nb,nc,nd->na", table.p, *np.moveaxis(np.asarray(likelihood), 1, 0))
    np.testing.assert_allclose(table.posterior(likelihood)[:, 0], first / first.sum(1, keepdims=True), rtol=1e-10)
    drawn = table.histogram(chain.sample(20_000, seed=2))
    assert scipy.stats.chisquare(drawn, 20_000 * table.p.ravel()).pvalue > 1e-3
    assert scipy.stats.chisquare(table.histogram(table.sample(20_000)), 20_000 * table.p.ravel()).pvalue > 1e-3


# ------------------------------------------------------------------------------------------------------ losses
def mean_and_error(loss, x0):
    values = np.asarray(jax.jit(loss)(None, jax.random.key(0), x0), np.float64)
    return values.mean(), values.std() / np.sqrt(len(values))


@pytest.mark.parametrize("name", ["absorbing", "uniform", "mask and replace"])
def test_vlb_of_one_token_with_the_exact_posterior_is_its_entropy(name):
    """One token: the reverse chain is exact, so the bound is tight at any number of steps."""
    process, p = PROCESSES[name], np.array([0.5, 0.3, 0.1, 0.06, 0.04])
    table = tokens.Table(p)
    apply = lambda params, x, t: jnp.log(table.posterior(process.likelihood(x, t)) + 1e-30)
    x0 = jnp.asarray(table.sample(N))
    mean, error = mean_and_error(discrete.vlb_loss(apply, process, steps=7, auxiliary=0.0), x0)
    assert abs(mean - table.entropy) < 4 * error < 0.15
    if name == "absorbing":  # there the auxiliary term is the mean over t of u(t) times the entropy, times T
        more, _ = mean_and_error(discrete.vlb_loss(apply, process, steps=7, auxiliary=0.5), x0)
        np.testing.assert_allclose(more - mean, 0.5 * 4 * table.entropy, rtol=0.03)


def exact_network(process):
    """The exact network of TABLE under any process, for scalar times: the posterior of all 64 states, looked up."""
    states = jnp.asarray(tokens.Table(np.full((4,) * 3, 4.0**-3)).states)

    def network(x, t):
        table = jnp.log(TABLE.posterior(process.likelihood(states, jnp.float32(t))) + 1e-30)
        return table[x[:, 0] * 16 + x[:, 1] * 4 + x[:, 2]]

    return network


def table_network(x, t):
    """Absorbing diffusion's does not depend on the time."""
    return exact_network(discrete.absorbing(3))(x, 0.5)


@pytest.mark.parametrize(
    ("options", "share"),
    [({}, 1.0), ({"form": "count"}, 1.0), ({"normalise": "realised"}, 3 / 4)],
)
def test_masked_losses_with_the_exact_posterior_are_the_entropy(options, share):
    """In any order the chain rule holds. With t uniform 0 .. 3 masks are equally likely: realised loses 1 / 4."""
    loss = discrete.masked_loss(lambda params, x, t: table_network(x, t), MASK, **options)
    mean, error = mean_and_error(loss, jnp.asarray(TABLE.sample(N)))
    assert abs(mean - share * TABLE.entropy) < 4 * error < 0.15


def test_blocks_of_one_token_are_autoregressive():
    """t = 1, or counts, in blocks of one: each token's cross-entropy given the clean ones before it."""
    chain = tokens.Chain.random(4, 6, seed=0)
    rows = jnp.log(jnp.asarray(np.concatenate([chain.initial[None], chain.transition]), jnp.float32))

    def apply(params, x, t, x0):
        before = jnp.concatenate([jnp.zeros_like(x0[:, :1]), x0[:, :-1] + 1], 1)
        assert x.shape == t.shape
        return rows[before]

    x0 = chain.sample(50)
    for options in ({"form": "count"}, {"time": jnp.ones_like}, {"time": jnp.ones_like, "normalise": "realised"}):
        found = discrete.masked_loss(apply, 4, block=1, **options)(None, jax.random.key(0), jnp.asarray(x0))
        np.testing.assert_allclose(found, -chain.log_prob(x0), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ samplers
def pvalue(x, p=None):
    """Chi-square of sequences against a law over the 27."""
    return scipy.stats.chisquare(TABLE.histogram(x), len(x) * (TABLE.p.ravel() if p is None else p)).pvalue


def tv(x):
    return 0.5 * np.abs(TABLE.histogram(x) / len(x) - TABLE.p.ravel()).sum()


@functools.cache
def run(name, *args, n=N, **options):
    """(samples, evaluations a sample) of a masked sampler; rows: the number of steps."""
    make = {"masked": discrete.masked, "first": discrete.first_hitting, "confident": discrete.confident}[name]
    rows, *rest = args
    stepper = make(table_network, MASK, *rest, **options)
    over = discrete.rows(np.linspace(1, 0, rows + 1)) if name == "masked" else jnp.arange(rows)
    start = jnp.full((n, 3), MASK, jnp.int32)

    def go(key):
        state, info = jdiff.run(stepper, over, start, key)
        return state.x, info.evaluated.sum(0)

    return tuple(map(np.asarray, jax.jit(go)(jax.random.key(7))))


def test_first_hitting_is_the_law_and_the_grid_sampler():
    """Exact with L evaluations, like 100 steps of the grid sampler; two samples and the table, by chi-square."""
    x, evaluations = run("first", 4)  # one row more than is needed
    assert (evaluations == 3).all()
    assert pvalue(x) > 1e-3
    grid, used = run("masked", 100, n=8000)
    assert scipy.stats.chi2_contingency([TABLE.histogram(x), TABLE.histogram(grid)]).pvalue > 1e-3
    assert (used > 50).mean() > 0.5  # the same grid asks the network at all steps until the last token falls
    coarse, _ = run("masked", 2)
    assert pvalue(coarse) < 1e-10  # tokens revealed together are drawn apart
    assert tv(coarse) > 3 * tv(x)


def test_hitting_times_are_order_statistics():
    """The last of 3 falls at the least of 3 uniform times, the first at the largest; Kolmogorov-Smirnov."""
    stepper = discrete.first_hitting(table_network, MASK)
    start = stepper.init(None, jnp.full((3000, 3), MASK))
    key = jax.random.key(3)
    one, _ = jax.jit(stepper.step)(key, start, jnp.int32(0))
    assert scipy.stats.kstest(np.asarray(one.t), lambda t: t**3).pvalue > 1e-3
    state, _ = jdiff.run(stepper, jnp.arange(3), start.x, key)
    assert scipy.stats.kstest(np.asarray(state.t), lambda t: 1 - (1 - t) ** 3).pvalue > 1e-3
    hidden = np.asarray(one.x == MASK)
    assert scipy.stats.chisquare((~hidden).sum(0)).pvalue > 1e-3
    given, _ = jdiff.run(stepper, jnp.arange(2), jnp.tile(jnp.array([[2, MASK, 1]]), (500, 1)), key)
    np.testing.assert_array_equal(np.asarray(given.x)[:, [0, 2]], np.tile([2, 1], (500, 1)))
    assert (given.x != MASK).all()


def test_at_once_is_the_product_of_marginals():
    x, evaluations = run("first", 1, 3)
    marginals = [TABLE.p.sum(tuple(j for j in range(3) if j != i)) for i in range(3)]
    assert (evaluations == 1).all()
    assert pvalue(x, np.einsum("a,b,c->abc", *marginals).ravel()) > 1e-3
    np.testing.assert_array_equal(run("confident", 1, 3, 3)[1], 1)


def test_block_by_block():
    """Blocks of one token are exact in either form; a confident order is not, and a threshold saves evaluations."""
    x, evaluations = run("confident", 3, 1)
    assert pvalue(x) > 1e-3
    assert (evaluations == 3).all()
    stepper = discrete.masked(table_network, MASK)
    over = discrete.rows(discrete.blocks(3, 1, 1))
    assert over.shape == (3, 2, 3)
    state, info = jdiff.run(stepper, over, jnp.full((N, 3), MASK), jax.random.key(0))
    assert pvalue(state.x) > 1e-3
    np.testing.assert_array_equal((np.asarray(info.x) != MASK).all(1), np.tri(3, k=-1, dtype=bool))  # left to right
    x, evaluations = run("confident", 3, 3)
    assert pvalue(x) < 1e-10
    quick = run("confident", 3, 3, threshold=0.25)[1]
    assert quick.mean() < 2.5 < evaluations.mean() == 3


def test_confidence_decides():
    """Of a block the surest draw stays, of blocks the first; above the threshold all."""
    sure = jnp.log(jnp.array([[0.6, 0.4], [0.0001, 0.9999], [0.5, 0.5], [1e-6, 1 - 1e-6]], jnp.float32))
    network = lambda x, t: jnp.broadcast_to(sure, (*x.shape, 2))
    start = jnp.full((5, 4), 2)
    for size, threshold, wanted in ((2, None, [1]), (4, None, [3]), (4, 0.99, [1, 3]), (2, 0.3, [0, 1])):
        stepper = discrete.confident(network, 2, size, threshold=threshold)
        state, _ = stepper.step(jax.random.key(0), stepper.init(None, start), 0)
        np.testing.assert_array_equal(np.asarray(state.x != 2), np.tile(np.isin(np.arange(4), wanted), (5, 1)))


@pytest.mark.parametrize("share", [0.9, 0.0])
def test_ancestral_converges_to_the_law(share):
    """The law of 64 steps, by matrices over all 4^3 states, is within 0.02 (total variation) of the data, of 2 steps
    it is not. Samples of 3 steps follow the law of 3 and not that of 1: what is run is what is multiplied."""
    process = discrete.mask_and_replace(3, share)
    network, states = exact_network(process), list(itertools.product(range(4), repeat=3))
    x, at = jnp.asarray(states), np.asarray(states)

    @jax.jit
    def chances(t, s):
        return process.posterior(x, jax.nn.softmax(network(x, t), -1), s, t)

    def law(steps):
        lone = np.array([*[(1 - share) / 3] * 3, share])
        p = np.prod(lone[at], -1)
        for t, s in discrete.rows(np.linspace(1, 0, steps + 1)):
            reached = (p > 0)[:, None, None]  # without masks in the process, states that have one mean nothing
            each = np.where(reached, np.asarray(chances(t, s), float), 0.0)  # (64, 3, 4)
            p = p @ np.prod([each[:, i][:, at[:, i]] for i in range(3)], 0)
        return p

    distance = lambda p, q: 0.5 * np.abs(p - q).sum()
    data = np.pad(TABLE.p, (0, 1)).ravel()
    assert distance(law(64), data) < 0.02 < 0.05 < distance(law(2), data)
    stepper, rows = discrete.ancestral(network, process), discrete.rows(np.linspace(1, 0, 4))
    start = process.prior(jax.random.key(99), (N, 3))
    found = np.asarray(jax.jit(lambda x, key: jdiff.run(stepper, rows, x, key))(start, jax.random.key(1))[0].x)
    process.check(found)
    found = np.bincount(found @ np.array([16, 4, 1]), minlength=64) / N
    # 0.013 is the mean of the distance of 20,000 true draws over 27 states
    assert distance(found, law(3)) < 0.02 < 0.05 < distance(found, law(1))


# ------------------------------------------------------------------------------------------------------ NeoDiff's times
def test_intrinsic_times_without_spread():
    """s_max = 1 is absorbing diffusion; s_max to infinity gives every token the time t, with variance t / s_max."""
    t = jnp.array([0.1, 0.4, 0.9])
    one = discrete.PoissonTime(1, lambda t: -jnp.log1p(-t), support=40).marginal(t)
    np.testing.assert_allclose(one[:, 0], discrete.absorbing(K).levels(t)[0], rtol=1e-12)
    many = discrete.PoissonTime(10, lambda t: 7.0 * t).marginal(t)
    counts = scipy.stats.poisson(7.0 * np.asarray(t)[:, None])
    np.testing.assert_allclose(many[:, :10], counts.pmf(np.arange(10)), rtol=1e-10)
    np.testing.assert_allclose(many[:, 10], counts.sf(9)[:, 0], rtol=1e-6)
    for s_max in (50, 200):
        law = np.asarray(discrete.PoissonTime(s_max, lambda t, s=s_max: s * t).marginal(jnp.array([0.4])))[0]
        tau = np.arange(s_max + 1) / s_max
        np.testing.assert_allclose([law @ tau, law @ (tau - 0.4) ** 2], [0.4, 0.4 / s_max], rtol=1e-4)


def test_intrinsic_times_with_the_released_spread():
    """Mean and variance against Poisson draws of NumPy, rescaled and cut; tau by the inverse distribution function."""
    time, rng, n = discrete.PoissonTime.released(99), np.random.default_rng(0), 40_000
    for t in (0.2, 0.6):
        rate = 99 * t
        c = np.clip(np.round(rate + rate * (rng.poisson(rate, n) - rate) / np.sqrt(rate)), 0, 99) / 99
        tau = np.asarray(time.tau(jnp.asarray(rng.random(n)), jnp.asarray(t)))
        law, k = np.asarray(time.marginal(jnp.asarray(t))), np.arange(100) / 99
        mean, var = law @ k, law @ k**2 - (law @ k) ** 2
        np.testing.assert_allclose(law.sum(), 1, rtol=1e-12)
        for drawn in (c, tau):
            assert abs(drawn.mean() - mean) < 4 * np.sqrt(var / n)
            assert abs(drawn.var() - var) < 4 * ((drawn - mean) ** 2).std() / np.sqrt(n)
    ranks = time.tau(jnp.linspace(0.0625, 0.9375, 8), jnp.full(8, 0.5))
    assert (jnp.diff(ranks) >= 0).all() and float(ranks[0]) == 0.0 < float(ranks[4]) < float(ranks[7])
