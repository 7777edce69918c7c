"""The automatic choice of solver and grid, against exact flows that it does not see."""

import collections
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import exact, process, solvers, statistics
from jdiff.experiments import _models

auto = importlib.import_module("jdiff.solvers.auto")  # the module; the name `solvers.auto` is its function
FEW = ("ddim", "unipc(order=2)", "deis(order=3, variable='lam')")
GAUSSIAN = exact.gaussian([0.3, -0.2, 0.1], [0.02**2, 0.2**2, 2.0**2])
MIXTURE = exact.mixture([0.3, 0.3, 0.4], [[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], [0.05**2, 0.1**2, 0.2**2])


def choose(model, p, nfe, n=64, **options):
    x = jnp.asarray(p.prior_std * np.random.default_rng(1).normal(size=(n, model.means.shape[1])))
    options = {"candidates": FEW, "batches": 2, "steps": 128, "measured": False} | options
    return auto.auto(model.denoiser(p), nfe, x, jax.random.key(2), **options)


def true_squares(model, p):
    """On noise of its own, against the closed form or SciPy's DOP853: the mean square error of each sample."""
    x = jnp.asarray(p.prior_std * np.random.default_rng(3).normal(size=(1024, model.means.shape[1])))
    target = _models.flow(model, p, x)
    return lambda table: np.mean((jdiff.sample(model.denoiser(p), table.pad(5, 0), x) - target) ** 2, 1)


@pytest.mark.parametrize(("model", "p"), [(GAUSSIAN, process.edm()), (MIXTURE, process.flow())])
def test_the_choice_is_as_good_as_every_candidate_on_other_noise(model, p, monkeypatch):
    each_of = true_squares(model, p)
    error = lambda table: (np.sqrt(np.mean(each_of(table))), np.sqrt(np.median(each_of(table))))
    score = lambda table: (np.exp(np.log(each_of(table)).mean()) * each_of(table).mean() ** 3) ** 0.125
    untuned, _ = choose(model, p, 6, n=512, tune=0)
    tuned, report = choose(model, p, 6, n=512, tune=2)  # the rms of 64 samples of a mixture says little
    each = [score(table) for table, _ in auto.tables(p, FEW, 6).values()]
    assert len(each) > 25
    assert score(untuned) <= 1.1 * min(each)
    assert score(tuned) <= 1.02 * score(untuned) and report.grid.endswith("tuned")
    np.testing.assert_allclose(error(tuned), report.held_out, rtol=0.35)  # what it says of itself is so
    right = auto.rank
    monkeypatch.setattr(auto, "rank", lambda each: -right(each))  # a choice by the wrong sign is found out
    worst, _ = choose(model, p, 6, tune=0)
    assert score(worst) > 1.1 * min(each)


def test_rank_hears_the_few_that_go_elsewhere_more_than_the_typical_error():
    assert auto.rank(np.array([1.0, 9.0])) == pytest.approx(0.5 * np.log(9.0) + 3.0 * np.log(5.0))
    each = np.random.default_rng(0).chisquare(2, 1000)
    assert auto.rank(each * 100.0) == pytest.approx(auto.rank(each) + 4.0 * np.log(100.0))  # free of scale
    some, more = np.full(100, 1e-4), np.full(100, 4e-4)
    some[:4], more[:1] = 1.0, 1.0  # a typical error of half does not make up for four flips in place of one
    assert auto.rank(more) < auto.rank(some)
    assert auto.rank(np.full(100, 1e-4)) < auto.rank(np.full(100, 4e-4))
    assert auto.rank(np.array([1.0, np.nan])) == np.inf


def test_each_round_of_the_race_adds_batches(monkeypatch):
    right, solve, seen, starts = auto.rank, auto.ends, [], collections.Counter()
    monkeypatch.setattr(auto, "rank", lambda each: seen.append(len(each)) or right(each))
    monkeypatch.setattr(auto, "ends", lambda d, T, x: starts.update([float(x[0, 0])]) or solve(d, T, x))
    _, report = choose(GAUSSIAN, process.edm(), 5, n=8, batches=6, tune=0, steps=128)
    assert sorted(set(seen)) == [8, 32, 48]  # one, four, six batches of eight
    made = auto.tables(process.edm(), FEW, 5)
    assert len(made) <= 64 and seen.count(32) == len(made) and len(report.trials) == 12
    ran = sorted(starts.values())  # on the last batch what is reported alone, and the reference as on all
    assert np.diff(ran[:6]).tolist() == [15, 0, len(made) - 16, 0, 0] and ran[6] > ran[5]


def test_statistics_of_the_model_are_tried_and_make_a_gaussian_nearly_exact():
    """DPM-Solver-v3 is exact on a Gaussian with a diagonal covariance, but for the errors of the statistics."""
    plain, with_them = (choose(GAUSSIAN, process.edm(), 5, tune=0, measured=given)[1] for given in (False, True))
    assert with_them.solver.startswith("dpm_solver_v3") and with_them.held_out[0] < 0.3 * plain.held_out[0]
    backward = jdiff.denoiser(_backward_alone, process.edm(), "x0")
    assert auto.measure(backward, jnp.ones((4, 3)), jax.random.key(0)) == (False, 0)
    assert auto.measure(backward, {"a": jnp.ones((4, 3))}, jax.random.key(0)) == (False, 0)


@jax.custom_vjp
def _backward_alone(x, t):
    return x / (1.0 + t * t)


_backward_alone.defvjp(lambda x, t: (x, t), lambda kept, u: (u, None))


def test_the_reference_converges_to_the_true_flow_and_knows_its_error():
    for p in (process.edm(), process.flow()):
        x = jnp.asarray(p.prior_std * np.random.default_rng(4).normal(size=(64, 3)))
        target, found, gap = GAUSSIAN.flow(p, x, p.t_max, 0.0), [], []
        for n in (64, 128):
            full, (rms, _), spent = auto._reference(GAUSSIAN.denoiser(p), [x], n)
            found.append(float(jnp.sqrt(jnp.mean((full[0] - target) ** 2))))
            gap.append(rms)
            assert spent == n + n // 2
        assert found[1] < found[0] / 7 and all(f < 0.3 * g for f, g in zip(found, gap, strict=True))
        t = auto._fine(p, 64)
        assert t[0] == p.t_max and t[-1] == 0 and t[-2] >= p.t_min * (1 - 1e-9) and (np.diff(t) < 0).all()


def test_one_program_of_any_length_gives_what_sample_gives():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 3)))
    p = process.vp_linear()
    measured = statistics.Statistics(np.linspace(-10, 10, 9), *np.random.default_rng(6).normal(size=(3, 9, 3)) * 0.1)
    before = auto._ends._cache_size()
    for n in (2, 5, 70):
        for solver in (solvers.heun(), solvers.unipc(3), solvers.deis(3, "rho")):
            table = solver(p, jdiff.times.logsnr(p, n))
            plain, padded = jdiff.sample(GAUSSIAN.denoiser(p), table, x), auto.ends(GAUSSIAN.denoiser(p), table, x)
            np.testing.assert_allclose(plain, padded, rtol=1e-11, atol=1e-11)
    assert auto._ends._cache_size() == before + 1
    table = solvers.dpm_solver_v3(measured)(p, jdiff.times.logsnr(p, 5))  # coefficients a dimension, constants
    plain, padded = jdiff.sample(GAUSSIAN.denoiser(p), table, x), auto.ends(GAUSSIAN.denoiser(p), table, x)
    np.testing.assert_allclose(plain, padded, rtol=1e-11, atol=1e-11)


def test_one_program_for_all_candidates_and_the_same_choice_twice():
    p, traced = process.edm(), []

    def count(candidates):
        traced.clear()

        def network(x, t):  # another function each time, so that nothing is left from before
            traced.append(x.shape)
            return x / (1.0 + t * t)

        x = jax.random.normal(jax.random.key(0), (8, 2)) * 80.0
        run = lambda: auto.auto(
            jdiff.denoiser(network, p, "x0"), 5, x, jax.random.key(1), candidates=candidates, batches=1, steps=32
        )
        return run(), len(traced), run

    _, few, _ = count(("unipc(order=3)",))
    (table, report), many, again = count((*FEW, "unipc(order=3)"))
    assert few == many and len(report.trials) >= 12
    table_again, _ = again()
    assert len(traced) == many
    for a, b in zip(jax.tree.leaves(table), jax.tree.leaves(table_again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "NFE 5" in str(report) and report.evaluations > 500 and report.batch == 8


def test_heun_spends_at_most_what_is_given_and_samples_may_be_trees():
    p = process.flow()
    network = jdiff.denoiser(lambda x, t: jax.tree.map(lambda v: v / (1.0 + t), x), p, "x0")
    x = {"a": jnp.ones((4, 2)), "b": jnp.full((4, 1), 0.5)}
    table, report = auto.auto(network, 6, x, jax.random.key(0), candidates=("heun",), batches=1, steps=32)
    assert table.nfe == 5 and report.solver == "heun"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nfe": 0}, "NFE is 0"),
        ({"key": None}, "pass key="),
        ({"x": jnp.zeros((0, 3))}, "no batch"),
        ({"batches": 0}, "batches is 0"),
        ({"candidates": ("ddpm",)}, "ddpm draws noise"),
        ({"candidates": ()}, "no candidate"),
    ],
)
def test_errors(change, message):
    given = {"nfe": 5, "x": jnp.zeros((4, 3)), "key": jax.random.key(0)} | change
    with pytest.raises(ValueError, match=message):
        auto.auto(GAUSSIAN.denoiser(process.edm()), **given)
