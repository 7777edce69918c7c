"""Starts: optimal transport against quantiles and hyperplanes, the searched start and one more step on Gaussians."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jdiff
from jdiff import exact, process, solvers, starts, times

# Semi-discrete optimal transport ----------------------------------------------------------------------------------


@functools.cache
def line(source="normal"):
    """Five points on a line with weights of their own."""
    y, nu = jnp.array([[0.3], [-1.2], [2.0], [0.9], [-0.1]]), jnp.array([0.1, 0.3, 0.15, 0.2, 0.25])
    return y, nu, starts.semidiscrete_ot(jax.random.key(0), y, nu, draws=4096, source=source, learning_rate=0.05)


def masses_on_a_line(y, h):
    """Exact: cell i of sorted points lies between (h_i - h_j) / (y_j - y_i) of its neighbours."""
    order = np.argsort(y)
    edges = -np.diff(h[order]) / np.diff(y[order])
    mass = np.diff(scipy.stats.norm.cdf(np.concatenate([[-np.inf], edges, [np.inf]])))
    return mass[np.argsort(order)]


def test_in_one_dimension_cells_are_quantile_intervals():
    y, nu, ot = line()
    y, nu, h = np.asarray(y[:, 0]), np.asarray(nu), np.asarray(ot.h)
    np.testing.assert_allclose(masses_on_a_line(y, h), nu, rtol=0.01)
    assert abs(h.mean()) < 1e-12
    np.testing.assert_allclose(ot.mass, masses_on_a_line(y, h), atol=4 * np.sqrt(0.25 / (16 * 4096)))
    x = np.linspace(-3, 3, 400)
    order = np.argsort(y)
    quantile = y[order][np.searchsorted(np.cumsum(nu[order])[:-1], scipy.stats.norm.cdf(x))]
    assert np.mean(np.asarray(ot(jnp.asarray(x[:, None])))[:, 0] == quantile) > 0.985  # but for x beside an edge
    centre = lambda p, q: (
        (scipy.stats.norm.pdf(scipy.stats.norm.ppf(p)) - scipy.stats.norm.pdf(scipy.stats.norm.ppf(q))) / (q - p)
    )
    cum = np.concatenate([[0], np.cumsum(nu[order])])
    want = np.array([centre(cum[i], cum[i + 1]) for i in range(5)])[np.argsort(order)]
    np.testing.assert_allclose(ot.centres[:, 0], want, atol=0.03)


def test_mutants_of_the_potential_fail():
    y, nu, _ = line()
    off = lambda h: np.abs(masses_on_a_line(np.asarray(y[:, 0]), np.asarray(h)) / np.asarray(nu) - 1).max()
    assert off(line("uniform")[2].h) > 0.2  # the official code's source
    uphill = starts.semidiscrete_ot(jax.random.key(0), y, nu, draws=4096, learning_rate=-0.05)
    assert (uphill.mass == 0).sum() >= 2  # cells die
    assert off(jnp.zeros(5)) > 0.2


def test_two_points_are_parted_by_the_analytic_hyperplane():
    """The first cell is <x, y1 - y2> > h2 - h1, and <x, y1 - y2> is N(0, |y1 - y2|^2)."""
    y = jnp.array([[1.0, 2.0, -1.0], [0.0, 0.5, 1.0]])
    for w in (0.5, 0.2):
        ot = starts.semidiscrete_ot(jax.random.key(1), y, jnp.array([w, 1 - w]), draws=4096)
        want = float(jnp.linalg.norm(y[0] - y[1])) * scipy.stats.norm.ppf(1 - w)
        np.testing.assert_allclose(ot.h[1] - ot.h[0], want, atol=0.03)


def test_the_histogram_is_the_gradient_of_a_convex_energy():
    """E max(<x, y> + h) - <nu, h> on fixed draws: central differences give mass - nu."""
    y, nu, ot = line()
    x = jax.random.normal(jax.random.key(5), (200000, 1), jnp.float64)
    heights = lambda h: x @ y.T + h
    energy = lambda h: float(jnp.mean(jnp.max(heights(h), -1)) - nu @ h)
    h = ot.h + jnp.array([0.2, -0.1, 0.3, 0.0, -0.4])
    mass = np.bincount(np.asarray(jnp.argmax(heights(h), -1)), minlength=5) / len(x)
    step = 1e-3 * jnp.eye(5)
    slope = [(energy(h + s) - energy(h - s)) / 2e-3 for s in step]
    np.testing.assert_allclose(slope, mass - np.asarray(nu), atol=2e-3)
    assert energy(ot.h) < energy(h) and energy(0.5 * (h + ot.h)) < 0.5 * (energy(h) + energy(ot.h))


def test_interpolation_stays_inside_a_mode():
    """Two clusters: neighbours of one cluster mix, the sharp edge between the clusters is never crossed."""
    rng = np.random.default_rng(0)
    y = jnp.asarray(np.concatenate([c + 0.05 * rng.normal(size=(6, 2)) for c in ([2.0, 0.0], [-2.0, 0.0])]))
    ot = starts.semidiscrete_ot(jax.random.key(0), y, steps=300, draws=2048)
    x = jax.random.normal(jax.random.key(1), (500, 2), jnp.float64)
    np.testing.assert_allclose(ot.interpolate(x, 3, 0.0), ot(x), atol=1e-12)
    np.testing.assert_allclose(ot.interpolate(x, 1, np.pi), ot(x), atol=1e-12)
    gap = lambda z: np.abs(np.asarray(z)[:, 0]).min()
    assert gap(ot.interpolate(x, 12, 0.2)) > 1.7 and np.abs(ot.interpolate(x, 12, 0.2) - ot(x)).max() > 0.01
    assert gap(ot.interpolate(x, 12, np.pi)) < 1.0  # without the threshold: mode mixture


def test_expressway():
    """Targets at t_mid, then the solver from t_mid; images keep their shape."""
    p, model = process.edm(), exact.gaussian([1.0, -1.0], 0.04)
    y = p.diffuse(jax.random.key(0), model.sample(jax.random.key(1), 16), 0.5)
    ot = starts.semidiscrete_ot(jax.random.key(2), y, steps=20)
    T = solvers.ddim()(p, times.karras(p, 3, start=0.5))
    x = jax.random.normal(jax.random.key(3), (7, 2), jnp.float32)
    got = starts.expressway(model.denoiser(p), T, ot, x)
    np.testing.assert_array_equal(got, jdiff.sample(model.denoiser(p), T, ot(x)))
    images = dataclasses.replace(ot, targets=y.reshape(16, 1, 2, 1))
    np.testing.assert_array_equal(images(x.reshape(7, 1, 2, 1)), ot(x).reshape(7, 1, 2, 1))


# The searched start -----------------------------------------------------------------------------------------------

P = process.vp_linear()
NOISE = exact.gaussian(np.zeros(3), [0.5, 0.2, 0.05])  # the law of x given y, about its mean


def restore(x_T, y):
    """The exact flow of N(W y, C): affine in x_T."""
    return y + NOISE.flow(P, x_T, 1.0, 0.0)


def references(key, n):
    mean = jax.random.normal(jax.random.fold_in(key, 1), (n, 3), jnp.float64)
    return mean, mean + NOISE.sample(key, n, jnp.float64)


def test_the_best_shared_start_is_the_minimum_norm_one():
    """E|x - h(x_T, y)|^2 = E|x - E[x|y]|^2 + |L x_T|^2: zero is the best start of all, and draws rank by |L x_T|."""
    search = lambda key, n, k: starts.search_start(jax.random.key(9), restore, *references(key, n), (3,), candidates=k)
    found = search(jax.random.key(0), 4000, 60)
    size = np.mean(np.asarray(NOISE.flow(P, found.candidates, 1.0, 0.0)) ** 2, -1)
    floor = NOISE.eigenvalues.mean()
    np.testing.assert_allclose(found.scores, floor + size, rtol=0.15)
    assert scipy.stats.spearmanr(found.scores, size).statistic > 0.98
    assert (
        size[int(np.argmin(found.scores))]
        < np.quantile(size, 0.05)
        < np.mean(size)
        < size[int(np.argmax(found.scores))]
    )
    np.testing.assert_array_equal(found.start, found.candidates[int(np.argmin(found.scores))])
    y, x = references(jax.random.key(0), 4000)
    assert np.mean((restore(jnp.zeros((4000, 3)), y) - x) ** 2) < found.scores.min()
    fewer = search(jax.random.key(0), 4000, 10)  # more draws keep the first ones
    np.testing.assert_allclose(fewer.scores, found.scores[:10], rtol=1e-12)


def test_ranks_agree_between_disjoint_references():
    rank = lambda n: scipy.stats.spearmanr(*(
        starts.search_start(jax.random.key(9), restore, *references(jax.random.key(s), n), (3,), candidates=40).scores
        for s in (1, 2)
    )).statistic  # fmt: skip
    few, many = rank(4), rank(4000)
    assert many > 0.98 and many > few


def test_chunks_and_metric_do_not_matter_to_the_rest():
    y, x = references(jax.random.key(3), 20)
    find = lambda **o: starts.search_start(jax.random.key(9), restore, y, x, (3,), candidates=10, **o).scores
    np.testing.assert_allclose(find(chunk=3), find(chunk=10), rtol=1e-12)
    worst = lambda a, b: jnp.max(jnp.abs(a - b), -1)
    z = starts.search_start(jax.random.key(9), restore, y, x, (3,), candidates=10).candidates[4]
    want = np.mean(np.abs(restore(jnp.broadcast_to(z, (20, 3)), y) - x).max(-1))
    np.testing.assert_allclose(find(metric=worst)[4], want, rtol=1e-10)
    np.testing.assert_allclose(find(std=0.0), np.mean((y - x) ** 2), rtol=1e-10)


# One more step ----------------------------------------------------------------------------------------------------

FLAWED = process.vp_discrete(np.linspace(1e-4, 5e-3, 1000))  # alpha_bar_T = 0.078
BRIGHT = exact.gaussian([0.8, -0.3], [0.04, 0.3])


@pytest.mark.parametrize("fresh", [1.0, 0.4, 0.0])
def test_one_more_step_has_the_exact_mean(fresh):
    """x_T is N(alpha_T m, sigma_T^2), and the flow then ends at the data's mean; without the step it is biased."""
    psi = lambda x: -jnp.asarray(BRIGHT.mean, x.dtype) + 0.0 * x  # v = -x0 at alpha = 0; x says nothing about x0
    x = jax.random.normal(jax.random.key(0), (40000, 2), jnp.float64)
    x_T = starts.one_more_step(jax.random.key(1), psi, FLAWED, x, fresh=fresh)
    a, s, root = FLAWED.alpha(1.0), FLAWED.sigma(1.0), np.sqrt(40000)
    np.testing.assert_allclose(x_T.mean(0), a * BRIGHT.mean, atol=4 / root)
    np.testing.assert_allclose(x_T.std(0), s, atol=3 / root)
    c = fresh * s
    np.testing.assert_allclose(np.mean(np.asarray(x * x_T), 0), np.sqrt(s**2 - c**2), atol=5 / root)
    std = np.sqrt(np.diag(BRIGHT.cov))
    gain = std / np.sqrt(a**2 * std**2 + s**2)  # of the exact flow
    np.testing.assert_allclose(BRIGHT.flow(FLAWED, x_T, 1.0, 0.0).mean(0), BRIGHT.mean, atol=4 / root)
    plain = np.asarray(BRIGHT.flow(FLAWED, x, 1.0, 0.0).mean(0))
    np.testing.assert_allclose(plain, BRIGHT.mean - a * BRIGHT.mean * gain, atol=4 / root)
    wrong = starts.one_more_step(jax.random.key(1), lambda x: -psi(x), FLAWED, x, fresh=fresh)  # the sign of v
    assert np.abs(BRIGHT.flow(FLAWED, wrong, 1.0, 0.0).mean(0) - BRIGHT.mean).max() > 0.05


def test_one_more_step_as_published_and_in_the_limit():
    x = jnp.zeros((40000, 1), jnp.float64)
    std = lambda **o: float(starts.one_more_step(jax.random.key(0), jnp.zeros_like, FLAWED, x, **o).std())
    s = float(FLAWED.sigma(1.0))
    assert std() == pytest.approx(s, abs=0.012) and std(as_published=True) == pytest.approx(s * std(), rel=1e-9)
    zero = process.zero_terminal_snr(np.linspace(1e-4, 2e-2, 1000))  # nothing to repair: x itself
    x = jax.random.normal(jax.random.key(1), (5, 2), jnp.float64)
    np.testing.assert_allclose(starts.one_more_step(jax.random.key(0), lambda x: 3 + 0 * x, zero, x, fresh=0.0), x)


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: starts.semidiscrete_ot(jax.random.key(0), jnp.ones((1, 2))), "1 targets .* at least two"),
        (lambda: starts.semidiscrete_ot(jax.random.key(0), jnp.ones((2, 2)), jnp.ones(2)), r"sum to 2; expected"),
        (lambda: starts.semidiscrete_ot(jax.random.key(0), jnp.ones((2, 2)), source="gauss"), "'normal' or 'uniform'"),
        (lambda: line()[2].interpolate(jnp.ones((1, 1)), 6, 0.1), "k is 6; expected 1 to 5"),
        (lambda: starts.one_more_step(jax.random.key(0), jnp.zeros_like, FLAWED, jnp.ones(2), fresh=2), "fresh is 2"),
        (
            lambda: starts.search_start(jax.random.key(0), restore, 0, jnp.ones((1, 3)), (3,), candidates=0),
            "at least 1",
        ),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
