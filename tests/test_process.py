"""Processes, time grids and noise: identities, inverses, float32 at both ends, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import noise, process, times

PROCESSES = {
    "vp_linear": process.vp_linear(),
    "vp_cosine": process.vp_cosine(),
    "vp_discrete": process.vp_discrete(np.linspace(1e-4, 2e-2, 1000)),
    "trigonometric": process.trigonometric(),
    "edm": process.edm(),
    "flow": process.flow(),
    "ve": process.ve(),
    "subvp": process.subvp(),
    "pfgmpp": process.pfgmpp(16.0),
    "shifted": process.shifted(process.flow(), 2.5),
}
each = pytest.mark.parametrize("p", PROCESSES.values(), ids=PROCESSES)


ULPS = 4e-7  # the bits are the same; XLA rounds the last digit of a normal differently for other shapes


def inside(p, n=37):
    return np.linspace(0.0007, 0.9993, n) * p.t_max


@each
def test_data_end_is_exact_and_log_snr_inverts(p):
    assert p.alpha(0.0) == 1 and p.sigma(0.0) == 0 and p.lam(0.0) == np.inf and p.t_of_lam(np.inf) == 0
    t = inside(p)
    np.testing.assert_allclose(p.t_of_lam(p.lam(t)), t, rtol=1e-10, atol=1e-13)
    assert (np.diff(p.lam(t)) < 0).all()


@each
def test_derivatives_against_central_differences(p):
    n = 1000 if isinstance(p, process.VPDiscrete) else 37  # stay inside the linear pieces of the discrete table
    t = (np.arange(5, n, 50 if n == 1000 else 1) + 0.5) / n * p.t_max
    h = 1e-7 * p.t_max
    for f, df in ((p.alpha, p.dalpha), (p.sigma, p.dsigma)):
        np.testing.assert_allclose(df(t), (f(t + h) - f(t - h)) / (2 * h), rtol=1e-5, atol=1e-6)


@each
def test_forward_sde_moments(p):
    """f and g of the SDE reproduce the marginal: d alpha^2 = 2 f alpha^2, d sigma^2 = 2 f sigma^2 + g^2."""
    t = inside(p)[5:-5]
    f, g = p.drift(t), p.diffusion(t)
    np.testing.assert_allclose(p.alpha(t) * p.dalpha(t), f * p.alpha(t) ** 2, rtol=1e-12)
    np.testing.assert_allclose(2 * p.sigma(t) * p.dsigma(t), 2 * f * p.sigma(t) ** 2 + g**2, rtol=1e-10)


@each
def test_float32_on_device_agrees_with_float64_on_host_up_to_both_ends(p):
    t32 = np.float32([1e-6, 1e-4, 1e-2, 0.3, 0.9, 0.999, 0.999999]) * np.float32(p.t_max)
    t = t32.astype(np.float64)
    for name in ("alpha", "sigma", "lam"):
        device = np.asarray(jax.jit(getattr(p, name))(jnp.asarray(t32)))
        assert device.dtype == np.float32
        scale = 1.0 if name == "lam" else 0.0
        np.testing.assert_allclose(device, getattr(p, name)(t), rtol=2e-5, atol=3e-6 * scale)


def test_known_values():
    p = PROCESSES["vp_linear"]  # integral of beta over [0, 1] is 10.05
    assert p.alpha(1.0) == pytest.approx(np.exp(-10.05 / 2), rel=1e-12)
    discrete = PROCESSES["vp_discrete"]
    bars = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    np.testing.assert_allclose(discrete.alpha((np.arange(1000) + 1) / 1000) ** 2, bars, rtol=1e-12)
    cosine = lambda t: np.cos(np.pi / 2 * (t + 0.008) / 1.008)
    np.testing.assert_allclose(
        PROCESSES["vp_cosine"].alpha(np.linspace(0, 0.9, 9)), cosine(np.linspace(0, 0.9, 9)) / cosine(0)
    )
    assert abs(PROCESSES["vp_cosine"].alpha(1.0)) < 1e-16
    subvp = PROCESSES["subvp"]  # appendix B: sigma = 1 - exp(-integral of beta)
    assert subvp.sigma(1.0) == pytest.approx(1 - np.exp(-10.05), rel=1e-12)
    np.testing.assert_allclose(PROCESSES["ve"].sigma([0.5, 1.0]) ** 2, [0.01 * 50 - 1e-4, 2500 - 1e-4], rtol=1e-12)
    ve = PROCESSES["ve"].sigma(1.0)
    assert [q.prior_std for q in PROCESSES.values()] == [1, 1, 1, 1, 80, 1, ve, subvp.sigma(1.0), 80, 1]


def test_shifts_compose_and_move_the_log_snr():
    """a = sqrt(dim / 4096); shift(a) o shift(b) = shift(a b); logit t' = logit t + log a; on flow lam - log a."""
    t, flow = np.linspace(0.01, 0.99, 9), process.flow()
    logit = lambda u: np.log(u / (1 - u))
    np.testing.assert_allclose(logit(process.shift(t, 3.0)), logit(t) + np.log(3), rtol=1e-12)
    np.testing.assert_allclose(process.shift(process.shift(t, 3.0), 0.7), process.shift(t, 2.1), rtol=1e-12)
    np.testing.assert_allclose(process.shifted(flow, 2.5).lam(t), flow.lam(t) - np.log(2.5), rtol=1e-11, atol=1e-11)
    assert process.shifted(flow, dim=64 * 1024) == process.shifted(flow, 4.0)
    assert process.shifted(process.shifted(flow, 2.0), 3.0) == process.shifted(flow, 6.0)
    for base in (process.vp_cosine(), process.edm()):  # the same curve of (alpha, sigma), at other times
        p, u = process.shifted(base, 3.0), inside(base)
        np.testing.assert_allclose(p.sigma(u), base.sigma(process.shift(u, 3.0, base.t_max)), rtol=1e-12)
        np.testing.assert_allclose(p.t_of_lam(p.lam(u)), u, rtol=1e-9)
    grid = times.shifted(flow, 4, 3.0)  # the grid for a network that is told the unshifted time
    np.testing.assert_allclose(grid, [1.0, 0.9, 0.75, 0.5, 0.0], rtol=1e-12)
    heavy = process.shifted(process.pfgmpp(4), 2.0)
    np.testing.assert_array_equal(
        heavy.kernel(jax.random.key(0), jnp.zeros((3, 2))), heavy.base.kernel(jax.random.key(0), jnp.zeros((3, 2)))
    )


def test_exponential_schedule():
    """HIR-Diff's, as its code computes it: 1 - exp(-k i / n) reversed, scaled to [0, 1] and then to [1e-3, 1]."""
    bars = 1 - np.exp(-8.0 * np.arange(51)[::-1] / 50)
    bars = (bars - bars.min()) / (bars.max() - bars.min()) * (1 - 1e-3) + 1e-3
    np.testing.assert_allclose(process.vp_exponential(n=50).alpha(np.arange(51) / 50) ** 2, bars, rtol=1e-10)
    assert process.vp_exponential().alpha(0.5) ** 2 > 0.98  # the cosine schedule is at 0.49


def test_processes_are_static_values():
    assert process.vp_linear() == process.vp_linear() and hash(process.flow()) == hash(process.flow())
    assert process.vp_linear(beta_max=10.0) != process.vp_linear()


@each
@pytest.mark.parametrize("name", times.ALL)
def test_grids(p, name):
    for n in (1, 2, 7, 50):
        t = times.ALL[name](p, n)
        assert t.shape == (n + 1,) and t.dtype == np.float64 and t[0] == p.t_max and t[-1] == 0
        p.check_times(t)
        t = times.ALL[name](p, n, end=0.05)
        assert t[-1] == 0.05 and len(t) == n + 1
        p.check_times(t)


def test_karras_grid_is_edms():
    """Karras et al. 2022, eq. 5, with n points from 80 to 0.002 and then 0."""
    n, i = 18, np.arange(18)
    expected = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(times.karras(process.edm(), n), np.append(expected, 0.0), rtol=1e-12)


def test_grids_by_powers():
    """DEIS (Zhang & Chen 2023): t^(1/k) evenly spaced; in sigma that is Karras' grid with rho = k."""
    vp, edm = process.vp_linear(), process.edm()
    np.testing.assert_allclose(np.diff(np.cbrt(times.cubic(vp, 9))), -np.cbrt(vp.t_max) / 9, rtol=1e-12)
    np.testing.assert_array_equal(times.quadratic(vp, 9, end=0.1), times.power(vp, 9, 2.0, end=0.1))
    for k in (1.0, 3.0, 7.0):
        expected = times.karras(edm, 9, rho=k, end=edm.t_min)
        np.testing.assert_allclose(times.power(edm, 9, k, end=edm.t_min), expected, rtol=1e-12)


def test_graded_start():
    t = times.graded(np.array([1.0, 0.5, 0.0]), 3)
    np.testing.assert_allclose(t, [1.0, 1 - 1 / 16, 1 - 1 / 8, 1 - 1 / 4, 0.5, 0.0])
    np.testing.assert_allclose(times.graded(t, 0), t)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([1.0, 0.5, 0.5, 0.0], r"repeated: times\[1\] = 0.5"),
        ([0.0, 0.5, 1.0], r"rises: times\[0\] = 0.0"),
        ([1.5, 0.5, 0.0], r"1.5, outside \[0, 1\]"),
        ([1.0, 0.5, -0.1], r"-0.1, outside"),
        ([1.0, np.nan, 0.0], r"times\[1\] is nan"),
        ([1.0], r"shape \(1,\)"),
    ],
)
def test_bad_times(bad, says):
    with pytest.raises(ValueError, match=says):
        jdiff.solvers.ddim()(process.vp_linear(), bad)


def test_bad_arguments():
    for call, says in (
        (lambda: process.vp_linear(beta_min=3, beta_max=1), "beta_min < beta_max"),
        (lambda: process.vp_discrete([0.1, 1.2]), r"inside \(0, 1\)"),
        (lambda: process.edm(sigma_min=0), "0 < sigma_min"),
        (lambda: process.flow(t_min=2), "0 < t_min"),
        (lambda: process.shifted(process.flow()), "give a, or dim"),
        (lambda: process.shifted(process.flow(), dim=-3), "expected a > 0"),
        (lambda: times.shifted(process.flow(), 4, 0.0), "expected a > 0"),
        (lambda: process.vp_exponential(k=-1.0), "expected k > 0"),
        (lambda: times.uniform(process.flow(), 0), "at least 1; got 0"),
        (lambda: times.logsnr(process.edm(), 5, start=90.0), "start <= 80"),
        (lambda: times.karras(process.edm(), 5, rho=-1), "rho > 0"),
        (lambda: times.power(process.edm(), 5, 0.0), "k > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_noise_depends_on_key_and_global_index_alone():
    key = jax.random.key(3)
    whole = noise.normal(key, jax.ShapeDtypeStruct((8, 5), jnp.float32))
    part = noise.normal(key, jax.ShapeDtypeStruct((3, 5), jnp.float32), jnp.array([4, 1, 7]))
    np.testing.assert_allclose(part, whole[jnp.array([4, 1, 7])], rtol=ULPS)
    mesh = jax.sharding.Mesh(jax.devices(), "data")
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.jit(lambda k: noise.normal(k, jax.ShapeDtypeStruct((8, 5), jnp.float32)), out_shardings=split)(key)
    np.testing.assert_allclose(sharded, whole, rtol=ULPS)
    many = np.asarray(noise.normal(key, jax.ShapeDtypeStruct((40000,), jnp.float64)))
    assert abs(many.mean()) < 4 / 200 and abs(many.var() - 1) < 4 * np.sqrt(2) / 200


def test_diffuse_and_prior():
    p = process.flow()
    x0 = jnp.full((20000, 2), 3.0)
    x = np.asarray(p.diffuse(jax.random.key(0), x0, 0.25))
    assert abs(x.mean() - 0.75 * 3) < 4 * 0.25 / 200 and abs(x.std() - 0.25) < 0.005
    t = jnp.array([0.0, 1.0])[None]  # a time a coordinate
    x = np.asarray(p.diffuse(jax.random.key(0), x0, t))
    assert (x[:, 0] == 3).all() and abs(x[:, 1].std() - 1) < 0.03
    tree = p.diffuse(jax.random.key(0), {"a": x0, "b": x0[:, :1]}, 0.5)
    assert tree["a"].shape == (20000, 2) and not np.allclose(tree["a"][:, :1], tree["b"])
    np.testing.assert_allclose(
        process.edm().prior(jax.random.key(1), (4, 2))[2:],
        process.edm().prior(jax.random.key(1), (2, 2), index=jnp.array([2, 3])),
        rtol=ULPS,
    )
