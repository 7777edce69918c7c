"""Sequential Monte Carlo against closed forms: tilted Gaussians, normalising constants, offspring counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import exact, execute, process, solvers, steering, times
from jdiff.steering import resampling

P = process.vp_linear()
MODEL = exact.gaussian([0.4, -0.3], [[0.5, 0.2], [0.2, 0.3]])
C = np.array([1.0, -0.5])
TABLE = solvers.ddpm()(P, times.logsnr(P, 40))
LAM = 1.3


def linear(x):
    return x @ jnp.asarray(C, x.dtype)


def tilted():
    """Law of the 40-step sampler under exp(lambda c x): its own law is a Gaussian in closed form, and so is this."""
    mean, cov = MODEL.law(TABLE, mean=np.zeros(2), cov=np.eye(2))
    return mean + LAM * cov @ C, cov, LAM * C @ mean + 0.5 * LAM**2 * C @ cov @ C


def run(kind, n=20_000, seed=0, groups=1, **options):
    x = P.prior(jax.random.key(seed), (groups * n, 2))
    potential = steering.fk(linear, LAM, kind)
    return steering.sample(MODEL.denoiser(P), TABLE, x, jax.random.key(seed + 1), potential, groups=groups, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("difference", {}),
        ("difference", {"threshold": 1.0, "scheme": "multinomial"}),
        ("difference", {"scheme": "residual", "final": False}),
        ("difference", {"scheme": "stratified"}),
        ("max", {"at": (20, 30)}),
        ("sum", {"at": (20, 30)}),
        ("last", {}),
    ],
)
def test_the_tilted_gaussian_and_its_constant(kind, options):
    """Over 24 groups of 2,000: mean, covariance and log Z within 3.5 standard errors of the closed form."""
    mean, cov, log_z = tilted()
    out = run(kind, 2000, groups=24, **options)
    w = np.asarray(jax.nn.softmax(out.log_w, -1), np.float64)[..., None]
    x = np.asarray(out.x, np.float64).reshape(24, -1, 2)
    means = (w * x).sum(1)
    second = np.einsum("gni,gnj->gij", w * (x - mean), x - mean)
    z = np.exp(np.asarray(out.log_z) - log_z)
    for got, want in ((means, mean), (second, cov), (z, 1.0)):  # the estimate of Z is unbiased, that of log Z is not
        error = got.std(0, ddof=1) / np.sqrt(24)
        assert np.all(np.abs(got.mean(0) - want) < 3.5 * error + 0.01), (got.mean(0), want, error)


def test_lambda_zero_changes_nothing():
    x = P.prior(jax.random.key(0), (64, 2))
    args = MODEL.denoiser(P), TABLE, x, jax.random.key(1)
    out = steering.sample(*args, steering.fk(linear, 0.0))
    np.testing.assert_allclose(out.x, jdiff.sample(*args), rtol=0, atol=2e-6)  # two programs: fused differently
    with jax.disable_jit():  # operation by operation: to the last bit
        few = MODEL.denoiser(P), solvers.ddpm()(P, times.logsnr(P, 2)), x, jax.random.key(1)
        np.testing.assert_array_equal(steering.sample(*few, steering.fk(linear, 0.0)).x, jdiff.sample(*few))
    np.testing.assert_array_equal(out.info.ancestors, np.broadcast_to(np.arange(64), (40, 1, 64)))  # nobody moved
    np.testing.assert_array_equal(out.log_w, 0)
    assert not np.asarray(out.info.resampled).any() and out.log_z[0] == 0


@pytest.mark.parametrize("kind", ["difference", "max", "sum", "last"])
def test_weights_telescope(kind):
    """Weighed on the way but never resampled, each particle ends with exp(lambda r(x0)), whatever the potential."""
    out = run(kind, 50, at=(10, 20, 30), threshold=1e-6, final=False)
    assert not np.asarray(out.info.resampled).any()
    assert (np.abs(np.asarray(out.info.increment)[[9, 19, 29]]).max(-1) > 0.1).all() == (kind != "last")
    np.testing.assert_allclose(out.log_w[0], LAM * linear(out.x), rtol=2e-4, atol=2e-4)


def test_dropping_weights_is_wrong():
    """The published adaptive form, which forgets the weights of steps that did not resample, misses the target."""
    mean, _, _ = tilted()

    def forgetful(x_init, weigh):
        def step(key, step, memory):
            increment, memory = weigh(key, step, memory)
            return jnp.where((step.k % 4 == 0) | step.last, increment, 0.0), memory

        return steering.Potential(x_init, step)

    right = steering.fk(linear, LAM)
    x = P.prior(jax.random.key(0), (20_000, 2))
    out = steering.sample(MODEL.denoiser(P), TABLE, x, jax.random.key(1), forgetful(*right), threshold=1.0)
    assert np.abs(np.asarray(out.x.mean(0)) - mean).max() > 0.05


def test_groups_are_independent():
    """A group's particles come from its own group alone."""
    out = run("difference", 30, groups=4, threshold=1.0)
    ancestors = np.asarray(out.info.ancestors)
    assert ancestors.shape == (40, 4, 30) and ancestors.max() < 30 and np.asarray(out.info.resampled)[:-1].all()


@pytest.mark.parametrize("name", ["unipc", "dpm_solver_pp"])
def test_gathering_commutes_with_stepping(name):
    """step(gather(state)) = gather(step(state)); gathering the sample without its history is another thing."""
    table = solvers.ALL[name]()(P, times.logsnr(P, 6))
    den = MODEL.denoiser(P)
    init, step = execute.stepper(den, jnp.asarray(table.h0), jnp.asarray(table.c0))
    rows = execute.rows(table, jnp.float64)
    row = lambda k: jax.tree.map(lambda a: a[k], rows)
    state = init(None, P.prior(jax.random.key(3), (8, 2), dtype=jnp.float64))
    for k in range(3):
        state, _ = step(None, state, row(k))
    chosen = jnp.asarray([[5, 5, 1, 0, 7, 2, 2, 2]])
    one = steering.gather(step(None, state, row(3))[0], chosen)
    other = step(None, steering.gather(state, chosen), row(3))[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), one, other)
    broken = state._replace(registers=(steering.gather(state.x, chosen), *state.registers[1:]))
    assert np.abs(step(None, broken, row(3))[0].x - one.x).max() > 1e-2


def test_offspring_counts_are_unbiased_and_their_variances_ordered():
    log_w = jnp.asarray(np.random.default_rng(0).normal(size=24), jnp.float32)
    w = jax.nn.softmax(log_w)
    expected = 24 * np.asarray(w)
    spread = {}
    for name, scheme in resampling.SCHEMES.items():
        draw = jax.jit(jax.vmap(lambda key, scheme=scheme: scheme(key, w)))
        chosen = np.asarray(draw(jax.random.split(jax.random.key(1), 4000)))
        counts = np.stack([(chosen == i).sum(1) for i in range(24)], 1)
        assert (counts.sum(1) == 24).all()
        error = counts.std(0, ddof=1) / np.sqrt(4000)
        assert np.all(np.abs(counts.mean(0) - expected) < 4.5 * error + 1e-3), name
        spread[name] = counts.var(0).sum()
        if name == "systematic":
            assert np.all((counts >= np.floor(expected - 1e-4)) & (counts <= np.ceil(expected + 1e-4)))
    assert spread["systematic"] < spread["residual"] < spread["multinomial"]
    assert spread["stratified"] < spread["multinomial"]


def test_partial_resampling_is_unbiased_and_copies_less():
    """The expected weight at each particle after resampling is its weight before; half of the slots are untouched."""
    log_w = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16)), jnp.float32)
    w = np.exp(np.asarray(log_w[0], np.float64))
    draw = jax.jit(jax.vmap(lambda key: resampling.resample(key, log_w, share=0.5)))
    chosen, after = (np.asarray(a)[:, 0] for a in draw(jax.random.split(jax.random.key(1), 4000)))
    after = after.astype(np.float64)
    np.testing.assert_allclose(np.exp(after).sum(1), w.sum(), rtol=1e-5)
    mass = np.stack([np.where(chosen == i, np.exp(after), 0.0).sum(1) for i in range(16)], 1)
    error = mass.std(0, ddof=1) / np.sqrt(4000)
    assert np.all(np.abs(mass.mean(0) - w) < 4.5 * error + 1e-5)
    untouched = np.argsort(np.asarray(log_w[0]))[4:12]
    np.testing.assert_array_equal(chosen[:, untouched], np.broadcast_to(untouched, (4000, 8)))
    np.testing.assert_allclose(after[:, untouched], np.broadcast_to(log_w[0, untouched], (4000, 8)))


@pytest.mark.parametrize("shards", [1, 4])
def test_survivors_keep_their_slots_and_only_surplus_travels(shards):
    rng, size = np.random.default_rng(3), 16 // shards
    arrange = jax.jit(lambda a: resampling.in_place(a, shards))
    for _ in range(40):
        ancestors = rng.integers(0, 16, 16) if rng.random() < 0.5 else rng.choice(3, 16) + rng.integers(0, 12)
        placed = np.asarray(arrange(jnp.asarray(ancestors, jnp.int32)))
        np.testing.assert_array_equal(np.sort(placed), np.sort(ancestors))
        assert all(placed[i] == i for i in ancestors)
        children = np.bincount(ancestors // size, minlength=shards)
        assert (placed // size != np.arange(16) // size).sum() == np.maximum(children - size, 0).sum()


def test_effective_sample_size():
    np.testing.assert_allclose(resampling.ess(jnp.zeros((2, 10))), 10.0, rtol=1e-6)
    np.testing.assert_allclose(resampling.ess(jnp.asarray([0.0, -jnp.inf, -jnp.inf])), 1.0)


def test_plain_python_reward():
    plain = run("difference", 200)
    host = steering.fk(steering.host_reward(lambda x: (np.asarray(x) @ C).astype(np.float32)), LAM)
    x = P.prior(jax.random.key(0), (200, 2))
    out = steering.sample(MODEL.denoiser(P), TABLE, x, jax.random.key(1), host)
    np.testing.assert_allclose(out.x, plain.x, rtol=1e-4, atol=1e-4)


def test_bad_input():
    x, key, den = P.prior(jax.random.key(0), (8, 2)), jax.random.key(1), MODEL.denoiser(P)
    go = lambda potential, x=x, **options: steering.sample(den, TABLE, x, key, potential, **options)
    good = steering.fk(linear)
    with pytest.raises(ValueError, match=r"threshold is 0; expected a share .* in \(0, 1\]"):
        go(good, threshold=0)
    with pytest.raises(ValueError, match="scheme is 'best'"):
        go(good, scheme="best")
    with pytest.raises(ValueError, match="8 particles in 3 groups"):
        go(good, groups=3)
    with pytest.raises(ValueError, match="at least two"):
        go(good, groups=8)
    with pytest.raises(ValueError, match="between 1 and 40"):
        go(good, at=(0, 5))
    with pytest.raises(ValueError, match=r"returned shape \(8, 2\) for 8 particles; expected \(8,\)"):
        go(steering.fk(lambda x: x))
    with pytest.raises(ValueError, match="potential is 'best'"):
        steering.fk(linear, potential="best")
    with pytest.raises(FloatingPointError, match=r"at step 1 of 40 .* particle 0 of group 0 got the log-weight nan"):
        go(steering.fk(lambda x: x[:, 0] * jnp.nan))
