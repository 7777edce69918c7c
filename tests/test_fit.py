"""Fitting solvers to a model: exactness by construction, closed-form optima, no gain on training noise, files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import exact, fit, process, solvers, times
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
    return d, fit.table(d, 3, train, valid, steps=400, batch=64, starts=1), train, valid


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
    assert len(found) == 12  # Heun evaluates a time twice
    x = p.prior(jax.random.key(0), (3, 2), dtype=jnp.float64)
    for name in ("deis(order=3, variable='lam'), logsnr", "unipc(order=3), uniform", "dpm_solver_pp(order=2), karras"):
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
