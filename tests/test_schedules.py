"""A time an element: any solver under any schedule against closed forms, streams, and laws of training times."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare, kstest

import jdiff
from jdiff import exact, guidance, losses, process, schedules, solvers, times
from jdiff.schedules import training

F, K, RHO = 4, 6, 0.8
COV = RHO ** np.abs(np.subtract.outer(np.arange(F), np.arange(F)))
VIDEO = exact.gaussian(np.linspace(-0.5, 0.5, F), COV)  # an AR(1) video, a number a frame
P = process.flow()
GRID = times.uniform(P, K)


def noise(n=5, dtype=jnp.float64):
    return P.prior(jax.random.key(0), (n, F), dtype=dtype)


def sample(table, x, key=None):
    return np.asarray(jdiff.sample(VIDEO.denoiser(P), table, x, key))


# Matrices -----------------------------------------------------------------------------------------------------------
def test_matrices_by_hand():
    np.testing.assert_array_equal(schedules.staircase(3, 2, 1), [[0, 0, 0], [1, 0, 0], [2, 1, 0], [2, 2, 1], [2, 2, 2]])
    np.testing.assert_array_equal(schedules.staircase(4, 2, 1, block=2)[1:3], [[1, 1, 0, 0], [2, 2, 1, 1]])
    np.testing.assert_array_equal(schedules.synchronous(2, 3), [[0, 0], [1, 1], [2, 2], [3, 3]])
    np.testing.assert_array_equal(schedules.autoregressive(2, 2), [[0, 0], [1, 0], [2, 0], [2, 1], [2, 2]])
    known = schedules.given(schedules.autoregressive(3, 2), np.array([True, False, False]))
    np.testing.assert_array_equal(known, [[2, 0, 0], [2, 1, 0], [2, 2, 0], [2, 2, 1], [2, 2, 2]])
    M = schedules.staircase(8, 10, 3)
    assert len(M) - 1 == 10 + 3 * 7 and schedules.active(M).sum() == 80 and schedules.active(M).max() == 4
    np.testing.assert_array_equal(schedules.latency(M), 10 + 3 * np.arange(8))


@pytest.mark.parametrize(
    ("M", "match"),
    [
        ([[0, 0], [1, 0], [0, 1]], r"goes from 1 to 0 at call 2, element \[0\]"),
        ([[0, 0], [2, 1], [2, 2]], r"from 0 to 2 at call 1, element \[0\]"),
        ([[0, 0], [1, 0], [2, 1]], r"element \[1\] of the schedule goes from 0 to 1 evaluations; its solver has 2"),
        ([[1, 0], [2, 1], [2, 2]], r"element \[0\] starts after 1 evaluations"),
        ([[0, 0], [0, 0], [1, 1], [2, 2]], r"call 1 of the schedule moves no element"),
        ([0, 1, 2], r"integers of shape"),
        ([[0.0, 0.0], [1.0, 1.0]], r"got float64"),
    ],
)
def test_bad_matrices(M, match):
    with pytest.raises(ValueError, match=match):
        schedules.scheduled(solvers.ddim()(P, times.uniform(P, 2)), np.array(M))


def test_other_bad_input():
    table = solvers.ddim()(P, GRID)
    with pytest.raises(ValueError, match=r"lag is 7; expected 0"):
        schedules.staircase(3, 6, 7)
    with pytest.raises(ValueError, match=r"known is float64 of shape \(4,\)"):
        schedules.given(schedules.synchronous(F, K), np.zeros(F))
    with pytest.raises(ValueError, match="has coefficients an element already"):
        schedules.scheduled(schedules.scheduled(table, schedules.synchronous(F, K)), schedules.synchronous(F, K))
    with pytest.raises(ValueError, match=r"which goes from 0 to 1, and there are 1"):
        schedules.scheduled(table, schedules.synchronous(F, K), which=[0, 0, 0, 1])
    with pytest.raises(ValueError, match=r"end has shape \(3,\); .* each of \(4,\) elements"):
        schedules.scheduled(table, schedules.synchronous(F, K), end=[0.0, 0.0, 0.1])
    with pytest.raises(ValueError, match="do not broadcast"):
        sample(schedules.scheduled(table, schedules.synchronous(F + 1, K)), noise())
    with pytest.raises(ValueError, match="remembers"):
        momentum = guidance.apg(VIDEO.denoiser(P), VIDEO.denoiser(P), 2.0, momentum=-0.5)
        schedules.stream(momentum, table).init(noise(1))


# Sampling -----------------------------------------------------------------------------------------------------------
def alternating(evaluations):
    """Even and odd frames in turn: everyone rests in the middle of its own run."""
    k = np.arange(2 * evaluations + 1)[:, None]
    return (k + 1 - np.arange(F) % 2) // 2


@pytest.mark.parametrize("name", ["unipc", "heun", "dpm_solver_pp", "deis"])
def test_equal_times_are_the_scalar_sampler(name):
    table = solvers.ALL[name]()(P, GRID)
    found = sample(schedules.scheduled(table, schedules.synchronous(F, table.nfe)), noise())
    np.testing.assert_allclose(found, sample(table, noise()), rtol=0, atol=1e-12)


def test_equal_times_are_the_scalar_sampler_to_the_last_bit():
    """Operation by operation: for a network that does not tell one time from a time an element."""
    table = solvers.unipc(2)(P, times.uniform(P, 3))
    model = jdiff.denoiser(lambda x, t: jnp.tanh(x) * (1 - t), P, "velocity")
    both = [table, schedules.scheduled(table, schedules.synchronous(F, table.nfe))]
    with jax.disable_jit():
        a, b = (np.asarray(jdiff.sample(model, T, noise(2, jnp.float32))) for T in both)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["unipc", "heun", "dpm_solver", "bdia", "pndm"])
def test_independent_elements_do_not_see_the_schedule(name):
    """Where frames are independent, each is what its own solver gives, history and all, whenever it runs."""
    model = exact.gaussian(np.linspace(-1, 1, F), np.linspace(0.2, 1.4, F))
    table = solvers.ALL[name]()(P, GRID if name != "pndm" else times.uniform(P, 8))
    run = lambda T: np.asarray(jdiff.sample(model.denoiser(P), T, noise()))
    for M in (schedules.staircase(F, table.nfe, 3), alternating(table.nfe)):
        np.testing.assert_allclose(run(schedules.scheduled(table, M)), run(table), rtol=0, atol=1e-10)


def test_history_polluted_by_rest_is_another_sampler():
    """The mutant: registers that go on while an element rests."""
    model = exact.gaussian(np.linspace(-1, 1, F), np.linspace(0.2, 1.4, F))
    table = solvers.unipc(3)(P, GRID)
    M = alternating(K)
    good = schedules.scheduled(table, M)
    rest = (
        np.broadcast_to(np.diff(M, axis=0)[:, None, None] == 0, good.A.shape)
        & (np.arange(good.registers) > 0)[None, :, None, None]
    )
    broken = good.replace(A=np.where(rest, 0.0, good.A))
    run = lambda T: np.asarray(jdiff.sample(model.denoiser(P), T, noise()))
    assert np.abs(run(broken) - run(table)).max() > 1e-2


def moments(T, n, x=None, seed=0):
    x = P.prior(jax.random.key(seed), (n, F)) if x is None else x
    found = np.asarray(jdiff.sample(VIDEO.denoiser(P), T, x, jax.random.key(seed + 1)), np.float64)
    return found.mean(0), np.cov(found.T)


@pytest.mark.parametrize("lag", [0, 8, 40])
def test_an_ar1_video_has_its_law_under_any_schedule(lag):
    """The exact denoiser of frames at their own levels: mean and covariance of 8,000 videos, 40 evaluations a frame."""
    table = solvers.unipc(2)(P, times.uniform(P, 40))
    mean, cov = moments(schedules.scheduled(table, schedules.staircase(F, 40, lag)), 8000)
    assert np.abs(mean - VIDEO.mean).max() < 4 / np.sqrt(8000)
    assert np.abs(cov - COV).max() < 4 * np.sqrt(2 / 8000)


@pytest.mark.parametrize("known", [[True, False, False, False], [True, False, False, True]])
def test_given_frames_condition_the_others_exactly(known):
    """Image to video, and interpolation: mean and covariance of the rest are the conditional Gaussian's."""
    known = np.array(known)
    M = schedules.given(schedules.synchronous(F, 40), known)
    x = jnp.where(known, 1.3, P.prior(jax.random.key(3), (8000, F)))
    T = schedules.scheduled(solvers.unipc(2)(P, times.uniform(P, 40)), M)
    found = np.asarray(jdiff.sample(VIDEO.denoiser(P), T, x), np.float64)
    np.testing.assert_array_equal(found[:, known], np.float32(1.3))
    a, b = ~known, known
    gain = COV[np.ix_(a, b)] @ np.linalg.inv(COV[np.ix_(b, b)])
    mean = VIDEO.mean[a] + gain @ (1.3 - VIDEO.mean[b])
    cov = COV[np.ix_(a, a)] - gain @ COV[np.ix_(b, a)]
    assert np.abs(found[:, a].mean(0) - mean).max() < 4 * np.sqrt(np.diag(cov).max() / 8000) + 2e-3
    assert np.abs(np.cov(found[:, a].T) - cov).max() < 4 * np.sqrt(2 / 8000) * np.diag(cov).max() + 2e-3


def test_history_with_a_little_noise():
    """SkyReels-V2: known frames noised to t = 0.2, and told so: the law given noisy frames, from the affine sampler."""
    known, t, value = np.array([True, True, False, False]), 0.2, 0.9
    M = schedules.given(schedules.synchronous(F, 40), known)
    T = schedules.scheduled(solvers.unipc(2)(P, times.uniform(P, 40)), M, end=np.where(known, t, 0.0))
    x = np.where(known, value, np.concatenate([np.zeros((1, F)), np.eye(F)[~known]]))
    y = sample(T, jnp.asarray(x))
    np.testing.assert_array_equal(y[:, known], value)
    a, b = ~known, known
    seen = (1 - t) ** 2 * COV[np.ix_(b, b)] + t * t * np.eye(2)
    gain = (1 - t) * COV[np.ix_(a, b)] @ np.linalg.inv(seen)
    np.testing.assert_allclose(y[0, a], VIDEO.mean[a] + gain @ (value - (1 - t) * VIDEO.mean[b]), atol=2e-3)
    matrix = (y[1:, a] - y[0, a]).T
    right = COV[np.ix_(a, a)] - (1 - t) * gain @ COV[np.ix_(b, a)]
    np.testing.assert_allclose(matrix @ matrix.T, right, atol=4e-3)


def test_a_modality_left_as_noise_says_nothing():
    """UniDiffuser's marginals: the given elements are noise, seen at t_max; the others' law is their marginal."""
    known = np.array([True, False, False, True])
    M = schedules.given(schedules.synchronous(F, 40), known)
    T = schedules.scheduled(solvers.unipc(2)(P, times.uniform(P, 40)), M, end=np.where(known, P.t_max, 0.0))
    mean, cov = moments(T, 8000)
    assert np.abs(mean - VIDEO.mean)[~known].max() < 4 / np.sqrt(8000) + 2e-3
    inner = np.ix_(~known, ~known)
    assert np.abs(cov - COV)[inner].max() < 4 * np.sqrt(2 / 8000) and np.abs(cov[0, 1]) < 4 / np.sqrt(8000)


def test_elements_may_start_lower():
    """Holes from pure noise, warped pixels from their own lower level, in one program: each its own solver's sample."""
    model = exact.gaussian(np.zeros(F), np.linspace(0.2, 1.4, F))
    solver, part = solvers.unipc(2), 2
    tables = [solver(P, GRID), solver(P, GRID[part:])]
    which = np.array([0, 1, 1, 0])
    M = np.clip(np.arange(K + 1)[:, None] - part * which, 0, K - part * which)
    found = np.asarray(jdiff.sample(model.denoiser(P), schedules.scheduled(tables, M, which), noise()))
    each = [np.asarray(jdiff.sample(model.denoiser(P), T, noise())) for T in tables]
    np.testing.assert_allclose(found, np.where(which == 0, *each), rtol=0, atol=1e-12)


def test_given_elements_of_a_shorter_solver():
    """A known pixel whose own solver is shorter than the others': done at its own count, and untouched."""
    solver, part = solvers.unipc(2), 2
    tables, which = [solver(P, GRID), solver(P, GRID[part:])], np.array([0, 1, 1, 0])
    M = np.clip(np.arange(K + 1)[:, None] - part * which, 0, K - part * which)
    M = schedules.given(M, np.array([False, True, False, False]))
    np.testing.assert_array_equal(M[0], [0, K - part, 0, 0])
    T = schedules.scheduled(tables, M, which)
    np.testing.assert_array_equal(T.t[:, 1], 0.0)
    np.testing.assert_array_equal(T.A[:, 0, 0, 1], 1.0)
    assert not np.any(T.B[..., 1]) and T.h0[0, 1] == 1


def test_stochastic_solvers_and_frames_along_an_axis():
    """DDPM under a staircase on (frames, h, w, c): every frame keeps the law of its own sampler."""
    table = solvers.ddpm()(P, times.uniform(P, 20))
    T = schedules.along(schedules.scheduled(table, schedules.staircase(3, 20, 5)), 0, rank=4)
    model = jdiff.denoiser(lambda x, t: x * (1 - t) / ((1 - t) ** 2 + t * t), P, "x0")  # N(0, 1), any time
    found = np.asarray(jdiff.sample(model, T, P.prior(jax.random.key(0), (250, 3, 4, 4, 1)), jax.random.key(1)))
    law = exact.gaussian([0.0], 1.0).law(table, np.zeros(1), np.eye(1))[1][0, 0]
    var = found.var((0, 2, 3, 4))
    assert np.abs(var / law - 1).max() < 4 * np.sqrt(2 / 4000), (var, law)


# Streams ------------------------------------------------------------------------------------------------------------
def test_stream_batch_is_sequential_denoising():
    """One call a frame, and each frame as if alone (to 1e-5); ready after K pushes."""
    table, calls = solvers.unipc(2)(P, GRID), []

    def network(x, t):
        calls.append(t.shape)
        return jnp.tanh(x) * (1.0 - t) - x

    model = jdiff.denoiser(network, P, "velocity")
    machine = schedules.stream(model, table)
    z = P.prior(jax.random.key(0), (10, 3))[:, None]
    frames, ready = schedules.streaming.run(machine, z)
    assert calls == [(K, 1)]  # traced once: one call a push, on the whole buffer, a time a row
    np.testing.assert_array_equal(ready, np.arange(1, 11) >= K)
    alone = np.asarray(jdiff.sample(model, table, z[:, 0]))
    np.testing.assert_allclose(np.asarray(frames)[K - 1 :, 0], alone[: 10 - K + 1], rtol=0, atol=1e-5)


def test_stream_of_a_window_of_frames():
    """Along an axis of the sample the buffer is a window: oldest, and cleanest, first."""
    table = solvers.ddim()(P, GRID)
    seen = []

    def network(x, t):
        seen.append(t)
        return -x * jnp.ones_like(t)

    machine = schedules.stream(jdiff.denoiser(network, P, "velocity"), table, axis=1)
    window = machine.init(jnp.zeros((2, 1, 3), jnp.float32))
    window, frame, ready = machine.push(None, window, jnp.ones((2, 1, 3), jnp.float32))
    assert window.registers[0].shape == (2, K, 3) and frame.shape == (2, 1, 3) and not ready
    np.testing.assert_allclose(window.pushes, 1)
    with pytest.raises(ValueError, match=r"length 1 along axis 1; got shape \(2, 2, 3\)"):
        machine.init(jnp.zeros((2, 2, 3)))
    with jax.disable_jit():
        for _ in range(K):
            window, frame, ready = machine.push(None, window, jnp.ones((2, 1, 3), jnp.float32))
    np.testing.assert_allclose(seen[1][:, 0], [P.t_max] * (K - 2) + list(GRID[1::-1]), rtol=1e-6)  # empty: noise
    np.testing.assert_allclose(seen[-1][:, 0], GRID[:-1][::-1], rtol=1e-6)


@pytest.mark.parametrize(("chunk", "micro", "clean"), [(2, 3, 2), (1, 2, 3)])
def test_a_stream_of_chunks_is_its_matrix(chunk, micro, clean):
    """StreamDiT's buffer: as long as it holds the last chunk before (AR(1): no other matters), the chunks are those of
    the staircase with lag = micro and blocks of the chunk, whose later frames are pure noise."""
    table, N = solvers.unipc(2)(P, GRID), K // micro
    frames = 8 + (N - 1) * chunk  # the last of them are only begun by the stream
    law = lambda n: exact.gaussian(np.zeros(n), RHO ** np.abs(np.subtract.outer(np.arange(n), np.arange(n))))
    z = P.prior(jax.random.key(0), (3, frames), dtype=jnp.float64)
    T = schedules.scheduled(table, schedules.staircase(frames, K, micro, chunk))
    whole = np.asarray(jdiff.sample(law(frames).denoiser(P), T, z))
    machine = schedules.stream(
        law((clean + N) * chunk).denoiser(P), table, axis=1, chunk=chunk, micro=micro, clean=clean
    )
    pushes = jnp.moveaxis(z.reshape(3, -1, chunk), 1, 0)
    found, ready = schedules.streaming.run(machine, pushes)
    np.testing.assert_array_equal(ready, np.arange(1, len(pushes) + 1) >= N)
    found = np.moveaxis(np.asarray(found)[N - 1 :], 0, 1).reshape(3, -1)
    np.testing.assert_allclose(found, whole[:, :8], rtol=0, atol=1e-10)


def test_one_chunk_is_the_plain_sampler():
    """N = 1: a push makes all rows of one chunk (StreamDiT's uniform partition)."""
    table = solvers.unipc(2)(P, GRID)
    z = P.prior(jax.random.key(0), (5, F), dtype=jnp.float64)
    machine = schedules.stream(VIDEO.denoiser(P), table, axis=1, chunk=F, micro=K)
    _, found, ready = jax.jit(machine.push)(None, machine.init(z), z)
    np.testing.assert_allclose(found, sample(table, z), rtol=0, atol=1e-12)
    assert ready
    for options in ({"micro": 4}, {"chunk": 0}, {"clean": -1}):
        with pytest.raises(ValueError, match="micro dividing 6 rows"):
            schedules.stream(VIDEO.denoiser(P), table, **options)


def test_stochastic_streams_keep_the_law():
    table = solvers.ddpm()(P, times.uniform(P, 10))
    model = exact.gaussian([0.5], 0.4)
    machine = schedules.stream(model.denoiser(P), table, axis=1)
    lifted = jdiff.denoiser(
        lambda x, t: model.denoiser(P)(x.reshape(-1, 1), jnp.broadcast_to(t, x.shape).reshape(-1, 1)).reshape(x.shape),
        P,
        "x0",
    )
    machine = schedules.stream(lifted, table, axis=1)
    frames, _ = schedules.streaming.run(
        machine, P.prior(jax.random.key(0), (14, 1000, 1)).reshape(14, 1000, 1), jax.random.key(1)
    )
    found = np.asarray(frames)[9:].ravel()
    mean, cov = model.law(table, np.zeros(1), np.eye(1))
    assert abs(found.mean() - mean[0]) < 4 * np.sqrt(cov[0, 0] / 5000)
    assert abs(found.var() / cov[0, 0] - 1) < 4 * np.sqrt(2 / 5000)


# Training times -----------------------------------------------------------------------------------------------------
def drawn(law, n=20_000):
    return np.asarray(jax.jit(jax.vmap(law))(jax.random.split(jax.random.key(0), n)))


def counted(levels):
    return np.array(list(itertools.combinations_with_replacement(range(levels), 3)))


def test_monotone_times_are_uniform_over_sequences():
    """T = 4, F = 3: all 20 non-decreasing sequences alike (chi-square)."""
    level = np.floor(drawn(training.monotone(3, 4)) * 4).astype(int)
    assert (np.diff(level, axis=1) >= 0).all()
    each = counted(4)
    found = [(level == s).all(1).sum() for s in each]
    assert len(each) == 20 and chisquare(found).pvalue > 1e-3


def test_fopp_counts_paths():
    """Through a uniform frame and level, uniform over the sequences: enumerated; pooled histogram as published."""
    level = np.floor(drawn(training.fopp(3, 4)) * 4).astype(int)
    assert (np.diff(level, axis=1) >= 0).all()
    each = counted(4)
    through = lambda f, i: (each[:, f] == i) / (each[:, f] == i).sum()
    p = np.mean([through(f, i) for f in range(3) for i in range(4)], axis=0)
    assert chisquare([(level == s).all(1).sum() for s in each], 20_000 * p).pvalue > 1e-3
    t = drawn(training.fopp(8, 20))
    hist = np.histogram(t, 20, (0, 1))[0] / (t.size / 20)
    assert hist.min() > 0.7 and hist.max() < 1.8  # 0.74 to 1.76
    np.testing.assert_allclose(t.mean(0)[[0, -1]], [0.17, 0.83], atol=0.02)


def test_other_laws():
    shared = drawn(training.grouped([0, 0, 1]), 2000)
    assert (shared[:, 0] == shared[:, 1]).all() and abs(np.corrcoef(shared[:, 0], shared[:, 2])[0, 1]) < 0.1
    assert kstest(shared[:, 2], "uniform").pvalue > 1e-3
    ptss = drawn(training.ptss(3, 0.2), 4000)
    alike = (ptss[:, 0] == ptss[:, 1]).mean()
    assert abs(alike - 0.8) < 4 * 0.4 / np.sqrt(4000) and kstest(ptss[:, 2], "uniform").pvalue > 1e-3
    sfd = drawn(training.semantic_first(np.array([True, False]), 0.3), 4000)
    lead = sfd[:, 1] - sfd[:, 0]
    assert lead.min() >= 0 and lead.max() < 0.3 + 1e-6 and (np.abs(lead - 0.3) < 1e-6).mean() > 0.5
    same = drawn(training.semantic_first(np.array([True, False]), 0.0), 100)
    np.testing.assert_array_equal(same[:, 0], same[:, 1])
    found = drawn(training.buffered(4, (4, 2, 1)), 6000)
    chunks = (np.diff(found, axis=1) > 1e-6).sum(1) + 1
    assert chisquare([(chunks == n).sum() for n in (1, 2, 4)]).pvalue > 1e-3
    for n in (1, 2, 4):
        mine = found[chunks == n]
        np.testing.assert_array_equal(np.floor(mine * n), np.broadcast_to(np.arange(4) * n // 4, mine.shape))
        assert kstest(mine[:, 0] * n, "uniform").pvalue > 1e-3
    for make, match in (
        (functools.partial(training.buffered, 4, (2, 3)), r"divide 4 frames, got \(2, 3\)"),
        (functools.partial(training.buffered, 4, ()), "divide 4 frames"),
        (functools.partial(training.ptss, 3, 1.5), "p is 1.5"),
        (functools.partial(training.monotone, 0, 4), "at least one frame"),
        (functools.partial(training.grouped, [0.5]), "expected integers from 0"),
        (functools.partial(training.semantic_first, np.array([1, 0])), "boolean mask"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def test_the_loss_weighs_each_element_at_its_own_time():
    """Against the sum written out in NumPy; equal times are the scalar loss."""
    x0 = jax.random.normal(jax.random.key(1), (6, F), jnp.float32)
    apply = lambda params, x, t, y: params * x * (1 - t)
    law = training.monotone(F, 10)
    loss = losses.denoising_loss(apply, P, "x0", weighting="flow", elements=law)
    found = np.asarray(loss(0.7, jax.random.key(2), x0))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.key(2), 0), i))(jnp.arange(6))
    t = np.asarray(losses.uniform(P)(jax.vmap(law)(keys)), np.float64)
    eps = np.asarray(P.noise(jax.random.fold_in(jax.random.key(2), 1), x0), np.float64)
    x0 = np.asarray(x0, np.float64)
    x = (1 - t) * x0 + t * eps
    error = (0.7 * x * (1 - t) - x0) / t  # of dx/dt = (x - x0) / t
    np.testing.assert_allclose(found, np.mean(error**2, 1), rtol=1e-4)
    video = jnp.zeros((2, 3, 4, 4, 1), jnp.float32)
    wrong = losses.denoising_loss(apply, P, "x0", elements=training.monotone(5, 10))
    with pytest.raises(ValueError, match=r"times of shape \(5,\), which do not broadcast against .* \(4,\)"):
        wrong(0.7, jax.random.key(2), video[:, 0, 0, :, 0])
    seen = []
    apply = lambda params, x, t, y: seen.append(t.shape) or x
    loss = losses.denoising_loss(apply, P, "x0", elements=training.along(training.ptss(3), 0, rank=4))
    loss(0, jax.random.key(0), video)
    assert seen == [(2, 3, 1, 1, 1)]
