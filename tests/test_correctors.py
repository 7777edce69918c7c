"""Feynman-Kac correctors against closed forms: powers, products, tilts of Gaussians and mixtures, and their log Z."""

import dataclasses
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import exact, process, solvers, steering, times
from jdiff.steering import correctors
from jdiff.steering.together import together

P = process.vp_linear()
K, GROUPS, N = 60, 24, 600
M1, V1, M2, V2 = (np.array(v) for v in ([0.6, -0.4], [0.5, 0.3], [-0.5, 0.3], [0.4, 0.6]))
twice = lambda m, v: exact.mixture([0.5, 0.5], [m, m], [v, v])  # a Gaussian that compiles as the mixtures do
A, B = twice(M1, V1), twice(M2, V2)
MODES = exact.mixture([0.7, 0.3], [[-1.0, 0.3], [1.2, -0.2]], [[0.2, 0.4], [0.15, 0.3]])
OTHER = exact.mixture([0.4, 0.6], [[-0.8, 0.0], [1.0, 0.4]], [[0.3, 0.3], [0.25, 0.5]])
C = np.array([1.0, -0.5])
LAM = 0.8


def linear(x):
    return x @ jnp.asarray(C, x.dtype)


def grid_law(models, powers, p=P, t=0.0):
    """(mean, covariance, mass of x > 0, log Z) of prod p_i^b_i at time t, by the trapezoid rule to 1e-8."""
    line = np.linspace(-7.0, 7.0, 401)
    x = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    log = sum(b * np.asarray(m.log_density(p, jnp.asarray(x), t)) for m, b in zip(models, powers, strict=True))
    w = np.exp(log) * (line[1] - line[0]) ** 2
    mean = w @ x / w.sum()
    on_edge = np.where(x[:, 0] == 0, 0.5, x[:, 0] > 0)
    return mean, np.einsum("n,ni,nj->ij", w, x - mean, x - mean) / w.sum(), w @ on_edge / w.sum(), np.log(w.sum())


def go(corrector, grid=None, seed=0, particles=N, **options):
    grid = times.logsnr(P, K) if grid is None else grid
    x = P.prior(jax.random.key(seed), (GROUPS * particles, 2), dtype=jnp.float64)
    return steering.correct(corrector, grid, x, jax.random.key(seed + 1), groups=GROUPS, **options)


def misses(out, want):
    """Of mean, covariance, mass and Z: the distance to the truth in standard errors between groups (with a tolerance of
    0.01 for the steps), the largest."""
    mean, cov, mass, log_z = want
    w = np.asarray(jax.nn.softmax(out.log_w, -1), np.float64)[..., None]
    x = np.asarray(out.x).reshape(GROUPS, -1, 2)
    found = [
        ((w * x).sum(1), mean),
        (np.einsum("gni,gnj->gij", w * (x - mean), x - mean), cov),
        ((w[..., 0] * (x[..., 0] > 0)).sum(1), mass),
        (np.exp(np.asarray(out.log_z, np.float64) - log_z), 1.0),
    ]
    error = lambda v: v.std(0, ddof=1) / np.sqrt(GROUPS) + 1e-9
    return [float(np.max(np.maximum(np.abs(v.mean(0) - t) - 0.01, 0) / error(v))) for v, t in found]


def right(out, want):
    assert max(misses(out, want)) < 3.5, misses(out, want)


@dataclasses.dataclass(frozen=True)
class Mutant(correctors.Corrector):
    """The same program with other rows."""

    change: dict[str, Callable[[np.ndarray], np.ndarray]]

    def rows(self, times, d):
        rows = super().rows(times, d)
        return rows._replace(**{name: f(getattr(rows, name)) for name, f in self.change.items()})


def mutant(corrector, **change):
    return Mutant(**{f.name: getattr(corrector, f.name) for f in dataclasses.fields(corrector)}, change=change)


ANNEALED = [
    (A, 2.0, 1.0, 1.0),
    (A, 0.5, 0.7, 0.3),
    (MODES, 0.5, 1.0, 1.0),
    (MODES, 2.0, 1.0, 1.0),
    (MODES, 3.0, 1.0, 0.5),
]


@pytest.mark.parametrize(("model", "beta", "c", "n"), ANNEALED)
def test_annealed(model, beta, c, n):
    """p^beta for several velocities and noises: mean, covariance, mode weight and log Z."""
    corrector = steering.anneal(model.denoiser(P), beta, "flow", velocity=[c], noise=n, order=2)
    right(go(corrector), grid_law([model], [beta]))


@pytest.mark.long
def test_annealing_mutants():
    """Without weights, or with their sign or size wrong, the mode weight or Z is missed; and without the divergence."""
    want = grid_law([MODES], [2.0])
    corrector = steering.anneal(MODES.denoiser(P), 2.0, "flow", velocity=[1.3], order=2)
    right(go(corrector, particles=300), want)
    for change in (
        {"share": lambda v: 0 * v},
        {"share": lambda v: -v},
        {"share": lambda v: 2 * v},
        {"velocity": lambda v: v + 0.3},
        {"powers": lambda v: v * 1.1},
        {"sigma": lambda v: 0 * v},
        {"offset": lambda v: 0 * v},
        {"noise": lambda v: 1.1 * v},
    ):
        assert max(misses(go(mutant(corrector, **change), particles=300), want)) > 5, change


PAIRS = [
    ((A, B), (-0.5, 1.5), 1.0),
    ((A, B), (-0.5, 1.5), 0.0),
    ((MODES, OTHER), (0.5, 0.5), 0.6),
    ((MODES, OTHER), (1.8, -0.8), 1.0),
    ((A, A), (0.25, 0.25), 1.0),
]


@pytest.mark.parametrize(("models", "powers", "n"), PAIRS)
def test_averages_need_no_divergence(models, powers, n):
    """Guidance, geometric means and powers by the scores alone (c = b), SDE and ODE."""
    corrector = steering.product([m.denoiser(P) for m in models], powers, noise=n, order=2)
    right(go(corrector), grid_law(models, powers))


@pytest.mark.parametrize("end", [0.1, 0.25, 0.5])
def test_every_time_has_its_target(end):
    """A grid that ends at t > 0 samples prod p_t^b, with the log Z of that time."""
    grid = times.logsnr(P, K - 1, end=end)
    corrector = steering.geometric([A.denoiser(P), B.denoiser(P)], (-0.5, 1.5), order=2)
    out = go(corrector, grid)
    right(out, grid_law((A, B), (-0.5, 1.5), t=end))


def test_product_by_hutchinson():
    """Products of mixtures, with velocities that need a divergence, estimated by two probes."""
    for c in ((0.5, 0.5), (0.2, 0.6)):
        corrector = steering.product(
            [MODES.denoiser(P), OTHER.denoiser(P)], velocity=c, divergence="hutchinson", probes=2, order=2
        )
        right(go(corrector), grid_law((MODES, OTHER), (1.0, 1.0)))


def test_plain_guidance_misses_by_what_theory_gives():
    """Classifier-free guidance without weights: its law on Gaussians, propagated through the rows, not the target."""
    w = 1.5
    corrector = steering.corrected_cfg(B.denoiser(P), A.denoiser(P), w, order=2)
    rows, mean, var = corrector.rows(times.logsnr(P, K), 2), np.zeros(2), np.ones(2)

    def affine(t):
        """D_i = slope x + constant, of both."""
        a, s = P.alpha(t), P.sigma(t)
        slopes = np.array([a * v / (a * a * v + s * s) for v in (V1, V2)])
        return slopes, (1 - a * slopes) * np.array([M1, M2])

    for k in range(K):
        (f, e), (f1, e1) = affine(rows.t[k]), affine(rows.t1[k])
        gain, heun = rows.gain[k, :2, None], rows.heun[k, :2, None]
        again = 1 + (heun * f1).sum(0)
        slope = again * (rows.keep[k] + (gain * f).sum(0)) - (heun * f).sum(0)
        mean = slope * mean + again * (gain * e).sum(0) + (heun * (e1 - e)).sum(0)
        var = slope**2 * var + (again * rows.noise[k]) ** 2
    precision = (1 - w) / V1 + w / V2
    target = ((1 - w) * M1 / V1 + w * M2 / V2) / precision
    out = go(corrector, at=(), final=False)
    x = np.asarray(out.x)
    error = x.std(0) / np.sqrt(len(x))
    assert np.all(np.abs(x.mean(0) - mean) < 3.5 * error), (x.mean(0), mean)
    np.testing.assert_allclose(x.var(0), var, rtol=0.05)
    assert np.any(np.abs(mean - target) > 10 * error) or np.any(np.abs(var * precision - 1) > 0.2), (mean, target, var)


def test_nothing_to_correct():
    """b = 1: no weights, whatever the noise; and the steps are DDPM's and DDIM's."""
    den = MODES.denoiser(P)
    out = go(steering.geometric([den, den], [-0.6, 1.6], noise=0.7, order=2), at=())
    assert np.abs(np.asarray(out.log_w)).max() < 1e-4 and np.abs(np.asarray(out.log_z)).max() < 1e-4
    grid = times.logsnr(P, 12)
    for n, solver in ((1.0, solvers.ddpm()), (0.0, solvers.ddim())):
        rows, table = steering.anneal(den, 1.0, noise=n).rows(grid, 2), solver(P, grid)
        np.testing.assert_allclose(rows.keep, np.asarray(table.A)[:, 0, 0], atol=1e-12)
        np.testing.assert_allclose(rows.gain[:, 0], np.asarray(table.B)[:, 0, 0], atol=1e-12)
        noise = np.linalg.norm(np.asarray(table.C)[:, 0], axis=-1) if table.stochastic else 0.0
        np.testing.assert_allclose(rows.noise, noise, atol=1e-12)
    assert steering.anneal(den, 2.0, "tempered").noise == 0.5


@pytest.mark.parametrize("on", ["x", "x0"])
def test_tilted_by_a_reward(on):
    """p exp(lambda c x) of a Gaussian, by the reward of the noised sample or of the x0 prediction; a mutant."""
    mean, cov = M1 + LAM * V1 * C, np.diag(V1)
    log_z = LAM * C @ M1 + 0.5 * LAM**2 * C @ (V1 * C)
    mass = 0.5 * (1 + np.vectorize(__import__("math").erf)(mean[0] / np.sqrt(2 * V1[0])))
    corrector = steering.tilt(A.denoiser(P), linear, LAM, on=on, order=2)
    right(go(corrector), (mean, cov, mass, log_z))
    grid = times.logsnr(P, K)
    shaped = dataclasses.replace(corrector, strength=LAM * (1 - grid / P.t_max) ** 2, noise=0.3)
    right(go(shaped, grid), (mean, cov, mass, log_z))
    half = mutant(corrector, worth=lambda v: v * [1.0, 0.5, 1.0])
    assert max(misses(go(half), (mean, cov, mass, log_z))) > 5


def test_the_published_clipping_is_biased():
    """The official code's Euler step with weights clipped to one misses the target at few steps and a large scale."""
    w = 6.0
    want = grid_law((OTHER, MODES), (1 - w, w))
    grid = times.logsnr(P, 20, start=0.95)
    corrector = steering.corrected_cfg(MODES.denoiser(P), OTHER.denoiser(P), w, as_published=True)
    out = go(corrector, grid, threshold=1.0)
    assert max(misses(out, want)[:3]) > 5


def test_models_of_one_function_are_one_call():
    calls = []

    def net(x, t, label):
        calls.append(x.shape)
        return (x * 0.5 + label).astype(x.dtype)

    fn = jax.tree_util.Partial(net)
    x = jnp.ones((6, 2), jnp.float32)
    conds = [jnp.full((6, 1), v, jnp.float32) for v in (0.0, 1.0)]
    lifted = [jdiff.denoiser(fn, P, "x0", cond=c) for c in conds]
    pair = together([*lifted, A.denoiser(P)], "test")
    x0, eps, _ = pair.apply(x, jnp.float32(0.5), pair.init(x))
    assert calls == [(12, 2)]
    np.testing.assert_allclose(x0[1], lifted[1](x, 0.5), rtol=1e-6)
    np.testing.assert_allclose(eps[0], lifted[0](x, 0.5, kind="eps"), rtol=1e-6)
    np.testing.assert_allclose(x0[2], A.denoiser(P)(x, 0.5), rtol=1e-5)


def test_out_of_alpha_zero_and_windows():
    """Flow starts at alpha = 0: rows are finite there. A window allows resampling in it alone."""
    p = process.flow()
    rows = steering.product([MODES.denoiser(p)], [2.0], velocity=[1.0], order=2).rows(times.uniform(p, 10), 2)
    assert all(np.isfinite(v).all() for v in rows)
    assert rows.keep[0] == pytest.approx(0.9) and rows.share[0] == 0
    out = go(steering.anneal(MODES.denoiser(P), 3.0, "flow", order=2), window=(0.2, 0.5), threshold=1.0, final=False)
    when = times.logsnr(P, K)[1:]
    np.testing.assert_array_equal(np.asarray(out.info.resampled).all(1), (when >= 0.2) & (when <= 0.5))


def test_bad_input():
    den, flow = A.denoiser(P), A.denoiser(process.flow())
    with pytest.raises(ValueError, match=r"models\[1\] is on Flow.*models\[0\] on VPLinear"):
        steering.product([den, flow])
    with pytest.raises(TypeError, match="Mixture"):
        steering.product(cast("list[jdiff.Denoiser]", [A]))
    with pytest.raises(ValueError, match="no models"):
        steering.product([])
    with pytest.raises(ValueError, match="sum to 0; expected a positive sum"):
        steering.product([den, den], [1.0, -1.0])
    with pytest.raises(ValueError, match="one finite number each"):
        steering.product([den, den], [1.0])
    with pytest.raises(ValueError, match="noise is -1"):
        steering.product([den], noise=-1.0)
    with pytest.raises(ValueError, match="beta is 0"):
        steering.anneal(den, 0)
    with pytest.raises(ValueError, match=r"sum to 1\.5; expected 1"):
        steering.geometric([den, den], [0.5, 1.0])
    with pytest.raises(ValueError, match="form is 'best'"):
        steering.anneal(den, 2.0, "best")
    with pytest.raises(ValueError, match="divergence is 'some'"):
        steering.product([den], divergence="some")
    with pytest.raises(ValueError, match="must be positive, for particles to be drawn"):
        steering.product([den], velocity=[-1.0], noise=0.0).rows(times.logsnr(P, 4), 2)
    with pytest.raises(ValueError, match="strength has shape"):
        steering.tilt(den, linear, np.ones(3)).rows(times.logsnr(P, 4), 2)
    with pytest.raises(ValueError, match="window is"):
        go(steering.product([den]), window=(0.5, 0.2))
