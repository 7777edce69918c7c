"""Systems of processes, graphs, and GDSS's S4 solver: against single processes, closed-form laws, NumPy by hand."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import exact, graphs, losses, process, solvers, times
from jdiff.experiments._graphs import JointGaussian
from jdiff.solvers import markov, splitting

MODEL = JointGaussian.random()
SYSTEM = graphs.system(process.vp_linear(), process.ve(0.1, 1.0))
KEY = jax.random.key(0)
FLAGS = np.array([[1, 1, 1], [1, 1, 0]])


def graph(batch, key=KEY, dtype=jnp.float64):
    return SYSTEM.prior(key, graphs.shapes(batch, MODEL.n, MODEL.f), dtype=dtype)


# -------------------------------------------------------------------------------------------------------- systems
@pytest.mark.parametrize("solver", ["dpm_solver_pp(order=2)", "heun", "unipc"])
def test_parts_that_do_not_see_each_other_run_as_they_would_alone(solver):
    """A table a part in one scan: each part equals jdiff.sample of its own process, network and table."""
    pair = process.system({"a": process.vp_cosine(), "b": process.ve(0.1, 2.0)})
    laws = {"a": exact.gaussian([1.0, -1.0], [0.5, 2.0]), "b": exact.gaussian([0.3], 1.5)}
    alone = {name: laws[name].denoiser(part) for name, part in pair.parts}
    both = jdiff.denoiser(lambda x, t: {n: alone[n].apply(x[n], t, ())[0] for n in x}, pair, "x0")
    grid = np.append(np.linspace(0.98, 0.02, 8), 0.0)
    x = pair.prior(KEY, {"a": (5, 2), "b": (5, 1)}, dtype=jnp.float64)
    found = jdiff.sample(both, solvers.parse(solver)(pair, grid), x)
    for name, part in pair.parts:
        expected = jdiff.sample(alone[name], solvers.parse(solver)(part, grid), x[name])
        np.testing.assert_allclose(found[name], expected, rtol=1e-10, atol=1e-12)


def test_conversions_and_losses_use_each_parts_own_schedule():
    system, x0, t = SYSTEM, MODEL.graph(jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)))), 0.3
    eps = system.noise(KEY, x0)
    x = system.mix(x0, eps, t)
    for name, part in system.parts:
        np.testing.assert_allclose(x[name], part.alpha(t) * x0[name] + part.sigma(t) * eps[name], rtol=1e-12)
    score = jdiff.predict.convert(system, x, t, eps, "eps", "score")
    np.testing.assert_allclose(score["adj"], -eps["adj"] / process.ve(0.1, 1.0).sigma(t), rtol=1e-12)
    for kind in jdiff.predict.KINDS:
        out = jdiff.predict.convert(system, x, t, x0, "x0", kind)
        back = jdiff.predict.convert(system, x, t, out, kind, "x0")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), back, x0)
    at = jnp.full(4, t)
    zero = losses.denoising_loss(lambda p, x, t, y: x0, system, "x0", time=lambda u: at)(None, KEY, x0)
    np.testing.assert_allclose(zero, 0.0, atol=1e-20)
    far = losses.denoising_loss(lambda p, x, t, y: jax.tree.map(jnp.zeros_like, x), system, "score", time=lambda u: at)
    z = system.noise(jax.random.fold_in(KEY, 1), x0)
    sums = [np.sum((np.asarray(z[n]).reshape(4, -1) / system.part(n).sigma(t)) ** 2, 1) for n in ("x", "adj")]
    np.testing.assert_allclose(far(None, KEY, x0), sum(sums) / 15, rtol=1e-9)


def test_noise_of_graphs_is_mirrored_and_keeps_off_padding():
    like = graphs.masked(graph(20_000), np.tile(FLAGS, (10_000, 1)))
    z = jax.tree.map(np.asarray, SYSTEM.noise(KEY, like))
    assert (z["adj"] == z["adj"].swapaxes(1, 2)).all() and (np.diagonal(z["adj"], axis1=1, axis2=2) == 0).all()
    assert (z["x"][1::2, 2] == 0).all() and (z["adj"][1::2, 2] == 0).all() and (z["adj"][:, :2, :2] != 0).any()
    full = np.asarray(MODEL.flat(z)[::2])  # nine independent standard normals
    assert np.abs(np.cov(full.T) - np.eye(9)).max() < 4 * np.sqrt(2 / 10_000)
    assert (SYSTEM.diffuse(KEY, like, 0.4)["adj"][1::2, 2] == 0).all()


@functools.cache
def samplers():
    """Chains of SDE steps on the exact coupled denoiser."""
    den, grid = MODEL.denoiser(SYSTEM), np.linspace(1.0, 0.01, 21)
    table = solvers.euler_maruyama()(SYSTEM, grid)
    chain = functools.partial(markov.langevin_corrector, den, table, 0.1, dtype=np.float64)
    return {
        "euler_maruyama": markov.Chain(
            jdiff.stepper(den, *map(jnp.asarray, (table.h0, table.c0))), jdiff.rows(table, np.float64), 20
        ),
        "predictor_corrector": chain(norms="sample"),
        "s4": splitting.s4(den, grid, 0.1, norms="sample", dtype=np.float64),
    }


@pytest.mark.parametrize("name", ["euler_maruyama", "predictor_corrector", "s4"])
def test_samples_stay_graphs_at_every_step(name):
    """Symmetric, no loops, zero on padding, exactly; the network here moves padding unless it is masked."""
    chain = samplers()[name]
    start = graphs.masked(graph(2), FLAGS)
    inner = chain.stepper.step

    def step(key, state, row):
        state, _ = inner(key, state, row)
        kept = graphs.masked(state.x, FLAGS)  # the exact denoiser knows no padding
        return state._replace(registers=(kept, *state.registers[1:])), kept

    _, path = jax.jit(lambda x, key: jdiff.run(jdiff.Stepper(chain.stepper.init, step), chain.rows, x, key))(start, KEY)
    adj = np.asarray(path["adj"])
    assert (adj == adj.swapaxes(-1, -2)).all() and (np.diagonal(adj, axis1=-2, axis2=-1) == 0).all()
    assert (adj[:, 1, 2] == 0).all() and (adj[:, 0] != 0).any() and np.isfinite(adj).all()


# ------------------------------------------------------------------------------------------------------------- S4
@pytest.mark.parametrize("as_published", [False, True])
def test_s4_step_by_hand(as_published):
    """One step with the noises that it draws, in NumPy, by the formulas of GDSS's algorithm 1 and its official code."""
    t, end, snr, T = 0.7, 0.6, 0.2, 0.8
    x = graph(3)
    chain = splitting.s4(
        MODEL.denoiser(SYSTEM),
        [t, end, 0.5],
        snr,
        temperature=T,
        norms="batch",
        as_published=as_published,
        dtype=np.float64,
    )
    row = jax.tree.map(lambda v: v[0], chain.rows)
    key = jax.random.key(5)
    found, _ = chain.stepper.step(key, chain.stepper.init(None, x), row)
    mean, cov = MODEL.noised(SYSTEM, t)
    score = MODEL.graph(-(MODEL.flat(x) - mean) @ np.linalg.inv(cov))
    draw = lambda j: SYSTEM.noise(jax.random.fold_in(key, j), x)
    z = [draw(markov.CORRECTOR), draw(0), draw(1)]
    beta = lambda t: 0.1 + 19.9 * t
    integral = lambda a, b: 0.1 * (b - a) + 19.9 * (b * b - a * a) / 2
    for name in ("x", "adj"):
        u, s, n = (np.asarray(v[name]) for v in (x, score, z[0]))
        norm = lambda v: np.linalg.norm(v.reshape(3, -1), axis=1).mean()
        alpha = np.exp(-integral(end, t)) if name == "x" else 1.0
        e = 2 * alpha * (snr * norm(n) / norm(s)) ** 2
        u = u + e * s + np.sqrt(2 * e) * T * n
        for half, (a, b) in enumerate([(end + 0.05, t), (end, end + 0.05)]):
            B = integral(a, b)
            if name == "x":
                u, var = np.exp(B / 2) * u, (1 - np.exp(-B) if as_published else np.exp(B) - 1)
            else:
                var = 0.01 * (100**b - 100**a)
            u = u + np.sqrt(var) * np.asarray(z[1 + half][name])
            if half == 0:
                g2 = beta(t) if name == "x" else 0.01 * 100**t * 2 * np.log(10)
                u = u + g2 * (t - end) * s
        np.testing.assert_allclose(found.x[name], u, rtol=1e-10, atol=1e-12)


def slope(sampler, **options):
    """Order of the covariance's error, by halvings from 100 to 800 steps, in closed form."""
    grids = [np.linspace(1.0, 1e-3, n + 1) for n in (100, 200, 400, 800)]
    errors = [MODEL.error(SYSTEM, 1e-3, *MODEL.law(SYSTEM, t, sampler, **options))[1] for t in grids]
    return np.log2(np.divide(errors[:-1], errors[1:])), errors


def test_s4_is_of_weak_order_one_and_has_an_exact_mean():
    slopes, errors = slope("s4")
    assert (np.abs(slopes - 1) < 0.06).all() and errors[1] < 0.01  # 200 steps
    mean, cov = MODEL.error(SYSTEM, 1e-3, *MODEL.law(SYSTEM, np.linspace(1.0, 1e-3, 201), "s4", 0.1))
    assert mean < 1e-12 and cov < 0.005
    published, worse = slope("s4", as_published=True)
    assert (np.abs(published - 1) < 0.06).all() and 1.4 < worse[1] / errors[1] < 1.9  # docs/differences.md


def test_the_linear_parts_of_s4_are_exact():
    """A score of 0 (a network that predicts x0 = x / alpha): the exact law of dx = -f x dtau + g dW."""
    still = jdiff.denoiser(lambda g, t: jax.tree.map(jnp.zeros_like, g), SYSTEM, "score")
    start = jax.tree.map(lambda v: jnp.broadcast_to(v, (4000, *v.shape[1:])), graph(1))
    for grid in ([0.5, 0.2], np.linspace(0.5, 0.2, 5)):
        chain = splitting.s4(still, grid, 0.0, denoise=False, dtype=np.float64)
        found = chain.sample(start, KEY)
        beta = lambda t: 0.1 * t + 19.9 * t * t / 2
        for name, keep, var in (
            ("x", np.exp((beta(0.5) - beta(0.2)) / 2), np.expm1(beta(0.5) - beta(0.2))),
            ("adj", 1.0, 0.01 * (100**0.5 - 100**0.2)),
        ):
            z = (np.asarray(found[name]) - keep * np.asarray(start[name]))[:, 0, 1] / np.sqrt(var)
            assert abs(z.mean()) < 4 / np.sqrt(4000) and abs(z.var() - 1) < 4 * np.sqrt(2 / 4000)


class Given(process.System):
    """SYSTEM with the noises that `draws` holds."""

    draws: ClassVar = []

    def noise(self, key, like, index=None):
        return self.draws.pop(0)


@pytest.mark.parametrize("name", ["s4", "s4, as published", "predictor_corrector"])
def test_laws_of_the_chains_are_the_closed_forms(name):
    """At norms="level" a chain is affine in sample and noises: its law from the Jacobians of its own steps."""
    given, grid = Given(SYSTEM.t_min, SYSTEM.t_max, SYSTEM.parts), np.linspace(1.0, 0.2, 7)
    den = MODEL.denoiser(given)
    if name == "predictor_corrector":
        table = solvers.euler_maruyama()(SYSTEM, grid)
        chain = markov.langevin_corrector(den, table, 0.1, temperature=0.8, dtype=np.float64)
    else:
        published = name != "s4"
        chain = splitting.s4(den, grid, 0.1, temperature=0.8, denoise=False, as_published=published, dtype=np.float64)

    @jax.jit
    def moved(u, z, row):
        def step(u, z):
            Given.draws[:] = [MODEL.graph(v[None]) for v in z]
            return MODEL.flat(chain.stepper.step(KEY, chain.stepper.init(KEY, MODEL.graph(u[None])), row)[0].x)[0]

        return step(u, z), *jax.jacfwd(step, (0, 1))(u, z)

    mean, cov = MODEL.noised(SYSTEM, grid[0])
    z = jnp.zeros((3, 9))  # a table's start draws one too, for nothing
    for k in range(5):  # the last row's corrector takes the grid to end in data
        mean, M, noises = (np.asarray(v) for v in moved(mean, z, jax.tree.map(lambda v, k=k: v[k], chain.rows)))
        cov = M @ cov @ M.T + np.einsum("ikj,lkj->il", noises, noises)
    kind, published = ("em", False) if name == "predictor_corrector" else ("s4", name != "s4")
    law = MODEL.law(SYSTEM, grid[:-1], kind, 0.1, 0.8, published)
    np.testing.assert_allclose(mean, law[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(cov, law[1], rtol=1e-9, atol=1e-12)


def test_s4_against_euler_and_a_langevin_step_of_its_own_at_equal_evaluations():
    """GDSS's claim. It holds for the covariance at snr 0.1, from 50 to 200 evaluations; for the mean always (it is
    exact). Plain Euler-Maruyama, without a corrector, has half of S4's error in the covariance at equal cost."""
    for nfe in (50, 100, 200):
        grid = np.linspace(1.0, 1e-3, nfe + 1)
        error = lambda *a, t: MODEL.error(SYSTEM, 1e-3, *MODEL.law(SYSTEM, t, *a))
        split, pair = error("s4", 0.1, t=grid), error("em", 0.1, t=grid[::2])
        assert split[1] < 0.85 * pair[1] and split[0] < 1e-12 < pair[0]
        assert error("em", t=grid)[1] < 0.6 * error("s4", t=grid)[1]


# ------------------------------------------------------------------------------------------------------ bad input
def test_bad_input_is_named():
    good = graph(2)
    bad = {**good, "adj": good["adj"].at[1, 0, 2].set(7.0)}
    den = MODEL.denoiser(SYSTEM)
    table = solvers.ddim()(SYSTEM, np.linspace(1, 0, 4))
    for call, says in (
        (lambda: jdiff.sample(den, table, bad), r"adj\[1, 0, 2\] = 7 but adj\[1, 2, 0\]"),
        (lambda: SYSTEM.diffuse(KEY, bad, 0.5), r"not symmetric: adj\[1, 0, 2\]"),
        (lambda: graphs.check({**good, "adj": good["adj"] + jnp.eye(3)}), r"adj\[0, 0, 0\] = 1; .* no loops"),
        (lambda: graphs.check({**good, "adj": good["adj"][:, :2]}), r"x has shape \(2, 3, 2\) and adj \(2, 2, 3\)"),
        (lambda: graphs.masked(good, np.ones((2, 4))), r"flags have shape \(2, 4\) .* expected \(2, 3\)"),
        (lambda: graphs.masked(good, np.full((2, 3), 0.5)), r"1 for a node and 0 for padding; got \[0.5\]"),
        (lambda: graphs.check(good, FLAGS), r"x\[1, 2, 0\] is not 0, but the flags say"),
        (lambda: jdiff.sample(den, table, {"x": good["x"]}), r"dict with keys \['adj', 'x'\]; got keys \['x'\]"),
        (lambda: jdiff.sample(den, table, good["x"]), r"dict with keys \['adj', 'x'\]; got"),
        (lambda: process.system({"x": process.edm(), "adj": process.flow()}), "x: 80, adj: 1"),
        (lambda: solvers.heun(churn=9.0)(SYSTEM, np.linspace(0.9, 0, 4)), "x and adj at different times"),
        (lambda: splitting.s4(den, [1.0, 0.5], -1.0), "snr must not be negative"),
        (lambda: splitting.s4(den, [1.0, 0.5], norms="image"), "s4: norms is 'image'"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    with pytest.raises(TypeError, match=r"a schedule for each of adj, x, and none of its own"):
        times.logsnr(SYSTEM, 5)
