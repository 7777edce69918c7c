"""Fitting solvers to a model: exactness by construction, closed-form optima, no gain on training noise, files."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdiff
from jdiff import cli, exact, fit, nets, process, solvers, times
from jdiff.fit.command import Labelled
from jdiff.fit.free import coefficients, rollout

EDM, VP, FLOW = process.edm(), process.vp_linear(), process.flow()
GAUSS = exact.gaussian(np.array([0.3, -0.5]), np.array([0.05, 1.5]) ** 2)


def trajectories(p, seed, n, model=GAUSS):
    """Of a Gaussian, whose flow is a closed form; float64."""
    x = p.prior(jax.random.key(seed), (n, 2), dtype=jnp.float64)
    return fit.Reference(x, np.asarray(model.flow(p, x, p.t_max, 0.0)), np.arange(n), seed)


@pytest.fixture(scope="module")
def fitted():
    d = GAUSS.denoiser(EDM)
    train, valid = trajectories(EDM, 1, 64), trajectories(EDM, 2, 64)
    some = fit.standard(EDM, 3, ("ddim", "dpm_solver_pp(order=2)"))
    return d, fit.table(d, 3, train, valid, steps=30, batch=64, starts=2, candidates=some), train, valid


# The table's form ------------------------------------------------------------------------------------------------


def random_params(nfe, seed):
    rng = np.random.default_rng(seed)
    return fit.Params(rng.normal(size=nfe), rng.normal(size=(nfe, nfe)), 0.3 * rng.normal(size=(2, nfe)))


@pytest.mark.parametrize("p", [EDM, VP, FLOW, process.vp_discrete(np.linspace(1e-4, 2e-2, 100))])
def test_any_numbers_solve_a_point_mass_exactly(p):
    """With D = mu the sample is mu to 1e-12, whatever the parameters; times fall."""
    for seed in range(5):
        T = fit.to_tableau(p, random_params(6, seed))
        U = T.unrolled()
        assert abs(U[-1, 0]) < 1e-12 and abs(U[-1, 1:].sum() - 1) < 1e-12
        p.check_times(np.append(T.t, 0.0))
        tied = random_params(6, seed)._replace(level=np.zeros((2, 6)))
        U = fit.to_tableau(p, tied).unrolled()[1:-1]
        np.testing.assert_allclose(U[:, 0] * p.sigma(p.t_max), p.sigma(T.t[1:]), rtol=1e-12)
        np.testing.assert_allclose(U[:, 1:].sum(1) + U[:, 0] * p.alpha(p.t_max), p.alpha(T.t[1:]), rtol=1e-10)


@pytest.mark.parametrize("p", [EDM, VP, FLOW])
def test_standard_solvers_are_of_this_form(p):
    """Unrolled into it and back, and run by the differentiable rollout, they are what they were."""
    found = fit.standard(p, 6, ("deis(order=3, variable='lam')", "unipc(order=3)", "dpm_solver_pp(order=2)", "heun"))
    assert len(found) == 60  # on auto's 20 grids; Heun evaluates a time twice
    x = p.prior(jax.random.key(0), (3, 2), dtype=jnp.float64)
    for name in (
        "deis(order=3, variable='lam') on logsnr to 0 after t_min",
        "unipc(order=3) on uniform to 0",
        "dpm_solver_pp(order=2) on karras to 0 after t_min",
    ):
        T = found[name]
        params = fit.from_tableau(T)
        np.testing.assert_allclose(fit.to_tableau(p, params).unrolled(), T.unrolled(), rtol=1e-6, atol=1e-8)
        co = coefficients(p, jax.tree.map(jnp.asarray, params))
        points, _ = rollout(GAUSS.denoiser(p), co, x)
        np.testing.assert_allclose(points[-1], jdiff.sample(GAUSS.denoiser(p), T, x), rtol=1e-7, atol=1e-7)


def test_what_is_not_of_this_form_is_refused():
    t = times.karras(EDM, 5)
    for T, why in (
        (solvers.ddpm()(EDM, t), "deterministic"),
        (solvers.euler("t")(FLOW, times.uniform(FLOW, 5, end=0.1)), "exact on point masses"),
        (solvers.ddim()(EDM, times.karras(EDM, 5, start=20.0)), "from t_max"),
    ):
        with pytest.raises(ValueError, match=why):
            fit.from_tableau(T)


# Fitting ---------------------------------------------------------------------------------------------------------


def test_a_fitted_table_nears_the_exact_map_and_stays_exact_on_points(fitted):
    """On a Gaussian the flow is an affine map, which a table may equal; its law is then the exact one."""
    d, found, *_ = fitted
    held = trajectories(EDM, 3, 256)
    said = fit.report(d, found, held)
    assert said["ratio"]["rms"] < 0.05 and said["fitted"]["rms"] < 0.01
    U = found.tableau.unrolled()
    assert abs(U[-1, 0]) < 1e-12 and abs(U[-1, 1:].sum() - 1) < 1e-12
    mean, cov = GAUSS.law(found.tableau)
    np.testing.assert_allclose(mean, GAUSS.mean, atol=0.02)
    np.testing.assert_allclose(np.sqrt(np.diag(cov)), [0.05, 1.5], rtol=0.02)
    best = np.minimum.accumulate([v for _, _, v in found.history])
    assert best[-1] < found.history[0][2]


def test_no_gain_is_reported_on_noise_that_was_seen(fitted):
    d, found, train, valid = fitted
    for seen in (train, valid, trajectories(EDM, 1, 70)[60:]):
        with pytest.raises(ValueError, match="were trained on"):
            fit.report(d, found, seen)
    with pytest.raises(ValueError, match="another seed"):
        fit.table(d, 3, train, train[:10])


# Reference trajectories ------------------------------------------------------------------------------------------


def test_references_hold_their_tolerance_and_are_kept(tmp_path):
    d, file = GAUSS.denoiser(VP), tmp_path / "a.npz"
    make = lambda tolerance=1e-4, **o: fit.reference(
        d, 8, (2,), 7, tolerance=tolerance, dtype=jnp.float64, file=file, last=1e-5, **o
    )
    first = make()
    exactly = np.asarray(GAUSS.flow(VP, first.x, VP.t_max, 0.0))
    assert first.error <= 1e-4 and np.sqrt(np.mean((first.target - exactly) ** 2)) < 3e-4
    before = file.stat().st_mtime_ns
    again = make()
    np.testing.assert_array_equal(again.target, first.target)
    assert file.stat().st_mtime_ns == before
    assert make(key="another model").steps and file.stat().st_mtime_ns != before
    with pytest.raises(FloatingPointError, match="larger tolerance"):
        make(1e-15, most=64)


# Files -----------------------------------------------------------------------------------------------------------


def test_a_file_holds_a_solver_bit_for_bit(tmp_path, fitted):
    discrete = process.vp_discrete(np.linspace(1e-4, 2e-2, 100))
    for T in (
        fitted[1].tableau,
        solvers.ddpm()(discrete, times.uniform(discrete, 4)),
        solvers.unipc(3)(FLOW, times.uniform(FLOW, 4)),
    ):
        solvers.file.save(tmp_path / "s.safetensors", T, {"nfe": T.nfe})
        back = solvers.load(tmp_path / "s.safetensors")
        for a, b in zip(jax.tree.leaves(T), jax.tree.leaves(back), strict=True):
            np.testing.assert_array_equal(np.asarray(a), b)
        assert back.record == T.record and solvers.file.metadata(tmp_path / "s.safetensors") == {"nfe": T.nfe}
    x = jnp.ones((1, 2))
    with pytest.raises(ValueError, match="denoiser's process"):
        jdiff.sample(GAUSS.denoiser(EDM), back, x)
    with pytest.raises(FileNotFoundError, match="fit-solver"):
        solvers.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678 no")
    with pytest.raises(ValueError, match="not a solver"):
        solvers.load(tmp_path / "bad.safetensors")
    assert dataclasses.is_dataclass(back)


# OLSS ------------------------------------------------------------------------------------------------------------

SHARP = exact.mixture(np.full(3, 1 / 3), np.array([[-1.0, 0.0], [1.0, 0.3], [0.2, 1.0]]), [0.01, 0.02, 0.01])


def test_olss_leaves_less_than_ddim_at_every_step():
    """On the set that it was fitted on, from the same points; and on other noise it is much nearer to the full run."""
    d = SHARP.denoiser(VP)
    noise = lambda seed, n: VP.prior(jax.random.key(seed), (n, 2), dtype=jnp.float64)
    found = fit.olss(d, 6, noise(1, 32), fine=60)
    assert (found.residual <= found.ddim * (1 + 1e-9)).all() and (found.residual < 0.9 * found.ddim).any()
    VP.check_times(found.times)
    x, t = noise(2, 200), times.uniform(VP, 60)
    full = jdiff.sample(d, solvers.ddim()(VP, t), x)
    off = lambda T: float(jnp.sqrt(jnp.mean((jdiff.sample(d, T, x) - full) ** 2)))
    assert off(found.tableau) < 0.5 * off(solvers.ddim()(VP, times.uniform(VP, 6)))
    with pytest.raises(ValueError, match="complete run"):
        fit.olss(d, 6, noise(1, 4), fine=60, times=times.karras(VP, 6))


def test_olss_of_the_full_run_itself_is_ddim():
    """Where the complete run has as many steps, DDIM leaves nothing, and the least squares have nothing to add."""
    d = SHARP.denoiser(VP)
    x = VP.prior(jax.random.key(1), (8, 2), dtype=jnp.float64)
    found = fit.olss(d, 5, x, fine=5, times=times.uniform(VP, 5))
    assert found.residual.max() < 1e-9
    want = jdiff.sample(d, solvers.ddim()(VP, times.uniform(VP, 5)), x)
    np.testing.assert_allclose(jdiff.sample(d, found.tableau, x), want, atol=1e-9)


# S3 --------------------------------------------------------------------------------------------------------------


def by_hand(order):
    """DPM-Solver-2 and -3 as their paper writes them (Lu et al. 2022, algorithms 1 and 2)."""

    def sampler(g, x, model, noise):
        p = g.process
        for i in range(g.n):
            h, s1 = g.h(i), g.s[i + 1]
            at = lambda r, i=i, h=h: p.t_of_lam(g.lam[i] + r * h)
            go = lambda r, e, i=i, h=h, x=x, t=at: (p.alpha(t(r)) / g.a[i]) * x - (p.sigma(t(r)) * np.expm1(r * h)) * e
            e = model(x, g.t[i], kind="eps")
            if order == 2:
                x = (g.a[i + 1] / g.a[i]) * x - s1 * np.expm1(h) * model(go(0.5, e), at(0.5), kind="eps")
                continue
            r1, r2 = 1 / 3, 2 / 3
            first = model(go(r1, e), at(r1), kind="eps") - e
            u = go(r2, e) - (p.sigma(at(r2)) * r2 / r1 * (np.expm1(r2 * h) / (r2 * h) - 1)) * first
            second = model(u, at(r2), kind="eps") - e
            x = (g.a[i + 1] / g.a[i]) * x - s1 * np.expm1(h) * e - (s1 / r2 * (np.expm1(h) / h - 1)) * second
        return x

    return solvers.Solver(f"dpm_solver_{order}_by_hand", sampler, order)


D = solvers.Decision
SCHEDULES = {
    "ddim": (solvers.ddim(), lambda i: D()),
    "ddim, eps": (solvers.ddim(), lambda i: D(kind="eps")),
    "2M": (solvers.dpm_solver_pp(2), lambda i: D(2, derivative="halved")),
    "3M": (solvers.dpm_solver_pp(3), lambda i: D(3) if i > 1 else D(2, derivative="halved")),
    "unipc 2": (
        solvers.unipc(2, lower_order_final=False),
        lambda i: D(2, corrector=2, derivative="halved") if i else D(corrector=1),
    ),
    "dpm_solver 2": (by_hand(2), lambda i: D(2, "eps", "singlestep", "halved")),
    "dpm_solver 3": (by_hand(3), lambda i: D(3, "eps", "singlestep", "low")),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_known_solvers_are_schedules(name):
    known, decide = SCHEDULES[name]
    for p, t in ((VP, times.logsnr(VP, 5, end=0.05)), (EDM, times.karras(EDM, 5, end=0.1))):
        T = solvers.schedule([decide(i) for i in range(5)])(p, t)
        np.testing.assert_allclose(T.unrolled(), known(p, t).unrolled(), rtol=1e-9, atol=1e-10)
    other = solvers.schedule([D(2, "eps", "singlestep") for _ in range(5)])(EDM, t)  # not any of these: it may differ
    want = known(EDM, t).unrolled()
    assert other.unrolled().shape != want.shape or np.abs(other.unrolled() - want).max() > 1e-4


def test_schedules_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="one a step"):
        solvers.schedule([D()] * 3)(VP, times.uniform(VP, 4))
    with pytest.raises(ValueError, match="at least one Decision"):
        solvers.schedule([])
    for bad in (lambda: D(4), lambda: D(kind="v"), lambda: D(corrector=-1)):
        with pytest.raises(ValueError, match="Decision"):
            bad()


def test_every_individual_of_s3_is_a_schedule_of_that_cost():
    space, rng = fit.schedules(6), np.random.default_rng(0)
    several = [space.random(rng) for _ in range(8)]
    several += [space.mutate(rng, a) for a in several]
    several += [space.cross(rng, a, b) for a, b in itertools.pairwise(several)]
    for a in several:
        T = fit.compile_schedule(VP, a)
        U = T.unrolled()
        assert T.nfe == 6 and abs(U[-1, 0]) < 1e-9 and abs(U[-1, 1:].sum() - 1) < 1e-6
        assert space.encode(a).shape == (66,)


def test_s3_never_loses_its_best_and_gains_on_held_out_noise():
    d = SHARP.denoiser(VP)
    train, held = (fit.reference(d, 64, (2,), seed, tolerance=1e-3, dtype=jnp.float64) for seed in (1, 2))
    T, found = fit.s3(d, 3, train, budget=64, population=32)
    assert (np.diff(found.history) <= 0).all() and len(found.seen) == 64 == len(found.scores)
    assert found.score == found.scores.min() <= found.scores[:28].min()  # the known solvers stand in front
    known = fit.compile_schedule(VP, found.seen[int(np.argmin(found.scores[:28]))])
    assert fit.errors(d, T, held)["median"] <= 1.05 * fit.errors(d, known, held)["median"]


# The search engine -----------------------------------------------------------------------------------------------


def test_the_predictor_ranks_what_it_has_not_seen():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(160, 6))
    y = x[:, 0] + 0.5 * x[:, 1] ** 2
    guess = fit.ranking(x[:120], y[:120])
    assert fit.kendall(guess(x[120:]), y[120:]) > 0.5 > abs(fit.kendall(rng.normal(size=40), y[120:])) + 0.2
    assert fit.kendall(y, y) == 1.0 == -fit.kendall(y, -y)


@pytest.mark.long
def test_autodiffusion_searches_times_and_layers_of_a_net():
    """A tiny DiT with random weights: masks act where they should, and the search finds those that made the target."""
    net = nets.build("DiT-Ti/2", 8, 1, num_classes=3, depth=3, width=16, heads=2, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    graph, state = nnx.split(net)
    state = jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), state)
    p = process.vp_linear()
    x, labels = p.prior(jax.random.key(0), (4, 8, 8, 1)), jnp.arange(4, dtype=jnp.int32) % 3
    model = jdiff.denoiser(nnx.merge(graph, state), p, "v", cond=labels)
    run = lambda model, table: np.asarray(jdiff.sample(model, table, x))
    table = solvers.ddim()(p, [1.0, 0.5, 0.0])
    np.testing.assert_array_equal(run(fit.layered(model, np.ones((2, 3))), table), run(model, table))
    one, other = (run(fit.layered(model, masks), table) for masks in ([[1, 0, 1], [1, 1, 0]], [[1, 1, 0], [1, 0, 1]]))
    by_hand = model.with_cond({"y": labels, "blocks": jnp.array([1.0, 0.0, 1.0])})
    look = jax.jit(lambda model: model(x, 0.5))
    np.testing.assert_allclose(look(fit.layered(model, [[1, 0, 1], [1, 1, 1]])), look(by_hand), rtol=1e-6)
    assert np.abs(one - other).max() > 1e-3  # each evaluation has its own row
    calls = []

    def fitness(model, table):
        calls.append(1)
        return float(np.square(run(model, table) - one).mean())

    found = fit.autodiffusion(model, 2, 3, fitness, keep=2 / 3, total=4, budget=240, population=12)
    assert len(calls) == 240 and found.stages[-1].best[0][1] == 1 and found.stages[-1].best[1] == ((1, 0, 1), (1, 1, 0))
    assert found.stages[-1].score < 1e-8 < found.stages[0].score  # with full masks the target is out of reach
    np.testing.assert_allclose(run(found.model, found.tableau), one, atol=1e-5)
    with pytest.raises(TypeError, match=r"lifted by jdiff\.denoiser"):
        fit.layered(jdiff.Denoiser(lambda x: (), lambda x, t, c: (x, c), p, "x0"), [[1]])
    with pytest.raises(ValueError, match=r"masks has shape \(3,\)"):
        fit.layered(model, np.ones(3))


def test_subsets_of_times_and_layers():
    """AutoDiffusion's space: all times where k is their number, full masks where all may be kept, the budget kept."""
    rng = np.random.default_rng(0)
    everything = fit.subsets(5, 5, blocks=2)
    a = everything.mutate(rng, everything.random(rng))
    assert a == ((4, 3, 2, 1, 0), ((1, 1),) * 5)
    space = fit.subsets(20, 4, blocks=3, keep=0.75)
    a, b = space.random(rng), space.random(rng)
    for _ in range(30):
        a = space.cross(rng, space.mutate(rng, a), b)
        assert len(a[0]) == 4 and (np.diff(a[0]) < 0).all() and np.sum(a[1]) == 9
    target = {17, 11, 6, 1}
    found = fit.evolution(
        fit.subsets(20, 4), lambda many: np.array([-len(target & set(m[0])) for m in many]), budget=400
    )
    assert set(found.best[0]) == target and (np.diff(found.history) <= 0).all()
    with pytest.raises(ValueError, match="1 <= k <= 5"):
        fit.subsets(5, 6)
    with pytest.raises(ValueError, match="parents <= population"):
        fit.evolution(space, lambda many: np.zeros(len(many)), population=4, parents=5)


def test_an_optimised_grid_beats_the_standard_ones():
    d = SHARP.denoiser(VP)
    train, held = (fit.reference(d, 48, (2,), seed, tolerance=1e-3, dtype=jnp.float64) for seed in (1, 2))
    t, found = fit.grid(d, solvers.ddim(), 4, train, budget=84)
    VP.check_times(t)
    assert (np.diff(found.history) <= 0).all()
    standard = [solvers.ddim()(VP, make(VP, 4)) for make in times.ALL.values()]
    assert fit.score(d, [solvers.ddim()(VP, t)], held)[0] < fit.score(d, standard, held).min()


# The command line -------------------------------------------------------------------------------------------------


def test_sampling_with_a_file_refuses_another_process_grid_or_number(tmp_path):
    """`jdiff sample RUN --solver FILE`: times and number of evaluations are the file's."""
    T = solvers.unipc(2)(EDM, times.karras(EDM, 5))
    file = str(tmp_path / "five.safetensors")
    fit.save(file, T, {})
    table = cli._table(cli.SampleConfig(solver=file))(EDM)
    np.testing.assert_array_equal(table.A, T.A)
    with pytest.raises(ValueError, match="fitted for EDM"):
        cli._table(cli.SampleConfig(solver=file))(VP)
    for wrong in (cli.SampleConfig(solver=file, nfe=6), cli.SampleConfig(solver=file, grid="karras")):
        with pytest.raises(ValueError, match="5 network evaluations; leave"):
            cli._table(wrong)
    assert cli._table(cli.SampleConfig(solver="ddim"))(EDM).nfe == 20


def test_labels_and_guidance_follow_the_sample():
    """Sample i has label i modulo the classes, in whatever batch; guidance mixes it with the null class."""
    fn = lambda x, t, y: 0.0 * x + y.astype(x.dtype)[:, None]
    model = jdiff.denoiser(fn, EDM, "x0", cond=jnp.zeros(1, jnp.int32))
    x, index = jnp.zeros((3, 1)), jnp.array([4, 9, 11])
    out = lambda labels: Labelled(*labels)(model, index)(x, 1.0)[:, 0]
    np.testing.assert_array_equal(out((10,)), [4, 9, 1])
    np.testing.assert_array_equal(out((10, 7)), [7, 7, 7])
    np.testing.assert_array_equal(out((10, None, 2.0, 10)), [-2, 8, -8])  # 10 + 2 (y - 10)
