"""Stochastic interpolants: exact fields, identities, laws at every t and eps in both directions, bounds, bridges."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jdiff
from jdiff import exact, guidance, interpolants, metrics, ode, process, solvers, steering, times
from jdiff.interpolants import Interpolant

LEFT = exact.mixture([0.3, 0.7], [[-1.0, 0.5], [1.0, 0.0]], [0.1, [[0.2, 0.08], [0.08, 0.1]]])
RIGHT = exact.mixture([0.5, 0.5], [[0.0, 1.5], [0.5, -1.5]], [0.3, [0.1, 0.2]])
NOISE = exact.gaussian([0.0, 0.0], 1.0)
KEY = jax.random.key(0)
FLOW = process.flow()


def wiggle(t):
    """A gamma of one's own: sqrt(t (1 - t)) (1 + t / 2)."""
    xp = jnp if isinstance(t, jax.Array) else np
    u, h = t * (1.0 - t), 1.0 + 0.5 * t
    return xp.sqrt(u) * h, (0.5 - t) * h * h + 0.5 * u * h


INTERPOLANTS = {
    "linear, brownian": Interpolant(),
    "linear, 2 brownian": Interpolant(a=2.0),
    "linear, none": Interpolant(gamma="none"),
    "linear, quadratic": Interpolant(gamma="quadratic"),
    "linear, sigmoid": Interpolant(gamma="sigmoid"),
    "linear, own": Interpolant(gamma=wiggle),
    "trigonometric": Interpolant("trigonometric", "brownian", 0.7),
    "encoding, decoding": Interpolant("encoding_decoding", "sine_squared"),
    "mirror": Interpolant("mirror", "sine_squared", 0.5),
    "one-sided linear": interpolants.one_sided(FLOW),
    "one-sided trigonometric": interpolants.one_sided(process.trigonometric()),
    "one-sided VP": interpolants.one_sided(process.vp_linear()),
}
each = pytest.mark.parametrize("ip", INTERPOLANTS.values(), ids=INTERPOLANTS)


def model_of(ip, left=LEFT, right=RIGHT):
    return interpolants.between(ip, left, right if ip.two_sided else None)


# 1. Paths and fields ---------------------------------------------------------------------------------------------


@each
def test_coefficients(ip):
    t = np.array([0.02, 0.11, 0.3, 0.499, 0.62, 0.9, 0.98])
    h = 1e-6
    lower, here, upper = (ip.coefficients(t + s) for s in (-h, 0, h))
    for name, slope in (("alpha", here.dalpha), ("beta", here.dbeta)):
        np.testing.assert_allclose(slope, (getattr(upper, name) - getattr(lower, name)) / (2 * h), atol=1e-6)
    np.testing.assert_allclose(here.gdg, (upper.gamma**2 - lower.gamma**2) / (4 * h), atol=1e-6)
    ends = ip.coefficients(np.array([0.0, 1.0]))
    np.testing.assert_allclose(ends.alpha, [1, 1 if ip.path == "mirror" else 0], atol=0.01)
    np.testing.assert_allclose(ends.beta, [0, 1 if ip.two_sided else 0], atol=1e-12)
    np.testing.assert_allclose(ends.gamma[0], 0.0, atol=1e-12)
    device = ip.coefficients(jnp.asarray(t, jnp.float32))
    for a, b in zip(device, here, strict=True):
        assert np.shape(a) == t.shape and a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=2e-5 * (1 + np.abs(b).max()))


@functools.cache
def residuals():
    """|d/dt log p + div b + b . s| and |grad log p - s| at draws of x_t, by autodiff."""

    @functools.partial(jax.jit, static_argnums=0)
    def both(ip, arrays, x, t):
        at = lambda x, t: interpolants.exact._at(ip, arrays, x[None], t)
        log_p = lambda x, t: at(x, t).log_density[0]
        rate, score = jax.vmap(jax.grad(log_p, 1), (0, None))(x, t), jax.vmap(jax.grad(log_p), (0, None))(x, t)
        div = jax.vmap(lambda x: jnp.trace(jax.jacfwd(lambda x: at(x, t).b[0])(x)))(x)
        f = interpolants.exact._at(ip, arrays, x, t)
        return rate + div + jnp.sum(f.b * f.s, -1), score - f.s

    return both


@pytest.mark.parametrize("name", ["linear, own", "trigonometric", "encoding, decoding", "mirror", "one-sided VP"])
def test_the_exact_velocity_and_score_satisfy_the_transport_equation(name):
    """d p/dt + div(b p) = 0 with s = grad log p; so for every eps d p/dt + div((b + eps s) p) = eps lap p too."""
    m = model_of(ip := INTERPOLANTS[name])
    for t in (0.2, 0.7):
        x = m.sample(KEY, 16, t, jnp.float64)
        for r in residuals()(ip, (m.weights, m.means, m.covs), x, jnp.asarray(t)):
            assert np.abs(r).max() < 1e-11


@pytest.mark.parametrize("name", ["linear, own", "encoding, decoding"])
def test_exact_fields_against_draws_and_scipy(name):
    """b, v and eta are conditional means: residuals against draws of (x0, x1, z) are orthogonal to functions of x_t."""
    ip = INTERPOLANTS[name]
    m, n, t = model_of(ip), 40_000, 0.35
    keys = jax.random.split(KEY)
    x0, x1 = m.ends(keys[0], n, jnp.float64)
    z = jdiff.noise.normal(keys[1], x0)
    at = jnp.asarray(t)
    I, dI = ip.mean(at, x0, x1 if ip.two_sided else None)
    gamma, dgamma, _ = ip.noise(at)
    f = m(x := I + gamma * z, t)
    tests = jnp.stack([jnp.ones(n), x[:, 0], x[:, 1] ** 2, jnp.sin(3 * x[:, 0] - x[:, 1])], 1)
    for field, target in (("b", dI + dgamma * z), ("v", dI), ("eta", z)):
        products = np.asarray((target - getattr(f, field))[:, :, None] * tests[:, None]).reshape(n, -1)
        assert (np.abs(products.mean(0)) < 4 * products.std(0) / np.sqrt(n)).all(), field
    c, density = ip.coefficients(t), 0.0
    for w, mean, cov in zip(m.weights, m.means, m.covs, strict=True):
        mix = [c.alpha, c.beta]
        total = np.einsum("e,eifj,f->ij", mix, cov, mix) + c.gamma**2 * np.eye(2)
        density = density + w * scipy.stats.multivariate_normal(mix @ mean, total).pdf(x[:50])
    np.testing.assert_allclose(f.log_density[:50], np.log(density), rtol=1e-9)


@each
def test_conversions(ip):
    m, t = model_of(ip), 0.3
    x = m.sample(KEY, 32, t, jnp.float64)
    f = m(x, t)._asdict()
    pairs = itertools.product("bv", ("s", "eta")) if ip.two_sided else ((name,) for name in interpolants.FIELDS)
    if ip.path == "mirror":
        pairs = (("b",), ("s",), ("eta",))
    for known in pairs:
        for want in interpolants.FIELDS:
            if ip.gamma == "none" and ip.two_sided and want == "s" and "eta" in known:
                continue
            got = ip.convert(t, want, x=x, **{k: f[k] for k in known})
            np.testing.assert_allclose(got, f[want], atol=1e-9)


# 2. Generation ---------------------------------------------------------------------------------------------------


@functools.cache
def two_ends():
    ip = INTERPOLANTS["linear, brownian"]
    m = model_of(ip)
    return ip, m, m.ends(KEY, 1500)


def distance(x, y):
    return metrics.sliced_wasserstein(jax.random.key(3), np.asarray(x), np.asarray(y), projections=32).value


@pytest.mark.parametrize("forward", [False, True])
def test_the_law_at_every_time_whatever_the_noise(forward):
    """ODE and SDE, both ways, against exact draws at three times, within 1.3 of the distance of two sets of draws."""
    ip, m, ends = two_ends()
    n, steps = 1500, 80
    grid, found = times.uniform(FLOW, steps), {}
    for eps in (0.0, 0.3, 2.0):
        d, T = interpolants.stochastic(ip, grid, eps, forward=forward, **m.fields("b", "s"))
        assert T.noises == (eps > 0)
        _, path = jdiff.sample(d, T, ends[0 if forward else 1], jax.random.key(1), trajectory=True)
        found[eps] = path.x
    for k in (32, 60, steps):
        t = 1.0 - grid[k] if forward else grid[k]
        draws = [m.sample(jax.random.key(j), n, t) for j in range(10, 14)]
        floor = max(distance(a, b) for a, b in itertools.combinations(draws, 2))
        for eps, path in found.items():
            assert distance(path[k], draws[0]) < 1.3 * floor, (eps, k)
        wrong = m.sample(KEY, n, t + (0.3 if t < 0.5 else -0.3))
        assert distance(wrong, draws[0]) > 1.3 * floor  # the test can tell


def test_deterministic_solvers_run_on_a_transport_with_their_order():
    """Against the finest run: slopes of Heun and DPM-Solver++(2M) on b, as on any process."""
    _, m, ends = two_ends()
    d, x = interpolants.drift(m.interpolant, b=m.field("b")), jnp.asarray(ends[1][:64], jnp.float64)
    run = lambda s, n: np.asarray(
        jdiff.sample(d, solvers.parse(s)(d.process, times.uniform(FLOW, n, start=0.9, end=0.2)), x)
    )
    truth, _ = ode.sample(d, x, start=0.9, end=0.2, rtol=1e-9, atol=1e-9, variable="t")
    for solver, order in (("heun(variable='t')", 2), ("dpm_solver_pp", 2)):
        e = [np.sqrt(np.mean((run(solver, n) - truth) ** 2)) for n in (32, 64)]
        assert order - 0.2 < np.log2(e[0] / e[1]) < order + 0.6, solver


def test_likelihood_by_the_flow():
    """log p(x0) from the other end's density and the divergence of b."""
    _, m, ends = two_ends()
    x0 = jnp.asarray(ends[0][:32], jnp.float64)
    prior = lambda x: m(x, 1.0).log_density
    log_p, _, _ = ode.log_likelihood(
        interpolants.drift(m.interpolant, b=m.field("b")), x0, prior=prior, variable="t", rtol=1e-7, atol=1e-7
    )
    np.testing.assert_allclose(log_p, m(x0, 0.0).log_density, atol=1e-5)


# 3. Objectives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear, brownian", "one-sided VP"])
@pytest.mark.parametrize("field", interpolants.FIELDS)
def test_objectives_have_their_minimum_at_the_exact_field(name, field):
    """At f, for a step h: L(f + c h) - L(f) = c^2 E|h|^2 / 2, and L(f) = -E|f|^2 / 2, away from the ends."""
    ip, n, c = INTERPOLANTS[name], 8000, 0.3
    m = model_of(ip)
    x0, x1 = m.ends(KEY, n, jnp.float64)
    exactly = lambda x, t: getattr(m(x, t), field)
    step = lambda x, t: jnp.stack([jnp.sin(x[:, 0] + t[:, 0]), x[:, 0] * x[:, 1]], 1)
    seen = lambda params, x, t, y: (exactly(x, t) + params * step(x, t), extra.append((x, t)))[0]
    extra = []
    loss = interpolants.objective(ip, field, seen, time=lambda u: 0.1 + 0.8 * u)
    at = [np.asarray(loss(p, jax.random.key(1), x0, x1 if ip.two_sided else None)) for p in (0.0, c)]
    half = len(extra) // 2
    f2 = np.mean([np.mean(np.asarray(exactly(x, t)) ** 2, 1) for x, t in extra[:half]], 0)
    h2 = np.mean([np.mean(np.asarray(step(x, t)) ** 2, 1) for x, t in extra[:half]], 0)
    for gap in (at[0] + 0.5 * f2, at[1] - at[0] - 0.5 * c**2 * h2):
        assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(n)
    assert abs(h2.mean()) * 0.5 * c**2 > 5 * np.std(at[1] - at[0] - 0.5 * c**2 * h2) / np.sqrt(n)  # a step is seen


def test_antithetic_pairs_bound_the_variance_and_losses_know_their_index():
    """Times within 1e-6 of an end, where gamma' and 1 / gamma exceed 500: for any smooth field, of b and of s."""
    x0, x1 = (e[:500].astype(jnp.float64) for e in two_ends()[2])
    for field in ("b", "s"):
        make = lambda pairs, field=field: interpolants.objective(
            Interpolant(), field, lambda params, x, t, y: jnp.sin(x), time=lambda u: 1e-6 * u, antithetic=pairs
        )
        paired, single = (make(pairs)(None, KEY, x0, x1) for pairs in (None, False))
        assert np.std(paired) < 2 and np.std(single) > 100
    part = make(None)(None, KEY, x0[3:5], x1[3:5], index=jnp.array([3, 4]))
    np.testing.assert_allclose(part, paired[3:5], rtol=1e-6)


# 4. Bounds and bridges -------------------------------------------------------------------------------------------

A, B = exact.gaussian([0.0, 1.0], [[0.5, 0.3], [0.3, 1.0]]), exact.gaussian([1.0, -1.0], [[1.2, -0.4], [-0.4, 0.3]])


@functools.cache
def probed():
    probes = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    return jax.jit(lambda ip, arrays, t: interpolants.exact._at(ip, arrays, probes, t), static_argnums=0)


def affine(m, t, eps):
    """K and k of b + eps s = K x + k of a Gaussian model."""
    f = probed()(m.interpolant, (m.weights, m.means, m.covs), jnp.asarray(t))
    rows = np.asarray(f.b + eps * f.s)
    return (rows[:2] - rows[2]).T, rows[2]


def propagate(m, eps, n=200, push=lambda t: 0.0):
    """Mean and covariance at t = 1, and the flow of the mean, of dx = (b + eps s + push) dt + sqrt(2 eps) dW."""

    def rates(t, mean, cov, flow):
        K, k = affine(m, t, eps)
        return K @ mean + k + push(t), K @ cov + cov @ K.T + 2 * eps * np.eye(2), K @ flow

    y, h = (m.means[0, 0], m.covs[0, 0, :, 0], np.eye(2)), 1.0 / n
    for i in range(n):  # the midpoint rule
        half = [a + 0.5 * h * k for a, k in zip(y, rates(i * h, *y), strict=True)]
        y = tuple(a + h * k for a, k in zip(y, rates((i + 0.5) * h, *half), strict=True))
    return y


@functools.cache
def sinkhorn(eps):
    """Cov(x0, x1) of the entropic coupling of N(0, 0.5) and N(1, 1.2) with kernel N(x1 - x0; 0, 2 eps), on a grid."""
    x, y = np.linspace(-4, 4, 300), np.linspace(-5, 7, 300)
    p, q = scipy.stats.norm(0, np.sqrt(0.5)).pdf(x), scipy.stats.norm(1, np.sqrt(1.2)).pdf(y)
    p, q = p / p.sum(), q / q.sum()
    kernel = np.exp(-((x[:, None] - y) ** 2) / (4 * eps))
    v = np.ones(300)
    for _ in range(400):
        u = p / (kernel @ v)
        v = q / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    return (plan * np.outer(x - p @ x, y - q @ y)).sum()


@pytest.mark.parametrize("eps", [0.2, 1.0])
def test_schrodinger_bridge(eps):
    """Coupling: Sinkhorn's. Bridge: the SDE with b + eps s, which knows no coupling, reproduces it; others do not."""
    one = interpolants.schrodinger(exact.gaussian([0.0], 0.5), exact.gaussian([1.0], 1.2), eps)
    np.testing.assert_allclose(one.covs[0, 0, 0, 1, 0], sinkhorn(eps), rtol=1e-4)
    bridge = interpolants.schrodinger(A, B, eps)
    wrong = interpolants.between(bridge.interpolant, A, B)
    for m, same in ((bridge, True), (wrong, False)):
        mean, cov, flow = propagate(m, eps)
        np.testing.assert_allclose(mean, B.means[0], atol=3e-4)
        np.testing.assert_allclose(cov, B.cov, atol=3e-4)
        gap = np.abs(A.cov @ flow.T - m.covs[0, 0, :, 1]).max()
        assert gap < 3e-4 if same else gap > 0.05


def test_the_bridge_is_the_interpolant_of_least_energy():
    """E int |b + eps s|^2: among interpolants with the same gamma the bridge's is the least (the max over I)."""
    eps, t = 0.4, np.linspace(0.0, 1.0, 41)
    bridge = interpolants.schrodinger(A, B, eps)

    def energy(m):
        total = []
        for at in t:
            K, k = affine(m, at, eps)
            c = m.interpolant.coefficients(at)
            mix = [c.alpha, c.beta]
            mean, cov = mix @ m.means[0], np.einsum("e,eifj,f->ij", mix, m.covs[0], mix) + c.gamma**2 * np.eye(2)
            total.append(np.trace(K @ cov @ K.T) + np.sum((K @ mean + k) ** 2))
        return np.trapezoid(total, t)

    least = energy(bridge)
    for scale in (0.8, 0.95, 1.0 + 1e-9):
        cross = scale * bridge.covs[0, 0, :, 1]
        other = energy(interpolants.coupled(bridge.interpolant, A, B, cross))
        assert other > least * (1 + 0.01 * (1 - scale) ** 2) if scale < 1 else abs(other - least) < 1e-6, scale
    assert energy(interpolants.between(Interpolant("trigonometric", "brownian", 2 * eps), A, B)) > least + 0.1
    small = interpolants.schrodinger(A, B, 1e-6).covs[0, 0, :, 1]  # optimal transport, Cov = A T, T A T = B
    T = np.linalg.solve(A.cov, small)
    np.testing.assert_allclose(T.T @ A.cov @ T, B.cov, atol=1e-5)
    assert np.abs(interpolants.schrodinger(A, B, 1e3).covs[0, 0, :, 1]).max() < 1e-3


def test_the_kl_of_a_wrong_drift_is_bounded():
    """b off by delta exp(-6 t): the KL of the end in closed form (Gaussians), below the bound for every eps; the bound
    itself is E|gap|^2 / 4 eps to quadrature. Noise forgets an early error: more of it, less KL."""
    m = interpolants.between(Interpolant(), A, B)
    delta = np.array([0.3, -0.2])
    off = lambda x, t: jnp.exp(-6.0 * t) * jnp.asarray(delta, x.dtype)
    wrong = interpolants.field(m.interpolant, lambda x, t: m(x, t).b + off(x, t))
    draws = lambda key, t: m.sample(key, 10, t, jnp.float64)
    found = []
    for eps in (0.1, 0.5, 2.0):
        learned, true = (
            interpolants.drift(m.interpolant, eps, forward=True, b=b, s=m.field("s")) for b in (wrong, m.field("b"))
        )
        bound, error = interpolants.kl_bound(learned, true, draws, eps, KEY, nodes=8)
        np.testing.assert_allclose(bound, delta @ delta * (1 - np.exp(-12)) / 12 / (4 * eps), rtol=1e-6)
        assert error < 1e-6  # the gap is the same at every x
        mean, cov, _ = propagate(m, eps, push=lambda t: np.exp(-6.0 * t) * delta)
        np.testing.assert_allclose(cov, B.cov, atol=1e-3)
        found.append(0.5 * (mean - B.means[0]) @ np.linalg.solve(B.cov, mean - B.means[0]))
        assert found[-1] < bound
    assert found[0] > 2 * found[1] > 4 * found[2] > 1e-6


# 5. The SDE's tableau --------------------------------------------------------------------------------------------


def law(m, T, eps):
    """Mean and covariance of the table's output on a Gaussian model, backward, from x1: closed form, no draws."""
    mean, cov = np.zeros((T.registers, 2)), np.zeros((T.registers, 2, T.registers, 2))
    mean[0], cov[0, :, 0] = m.means[0, 1], m.covs[0, 1, :, 1]
    kick = lambda C: np.einsum("rz,qz,ij->riqj", C, C, np.eye(2))
    mean, cov = mean * T.h0[:, None], cov * T.h0[:, None, None, None] * T.h0[:, None] + kick(T.c0)
    for k in range(T.nfe):
        K, c = affine(m, T.t[k], -eps)
        if T.record.prediction == "x0":
            K, c = np.eye(2) - T.t[k] * K, -T.t[k] * c
        step = np.einsum("rq,ij->riqj", T.A[k], np.eye(2))
        step[:, :, 0] += np.einsum("r,ij->rij", T.B[k, :, 0], K)
        mean = np.einsum("riqj,qj->ri", step, mean) + T.B[k] * c
        cov = np.einsum("riqj,qjpl,sopl->riso", step, cov, step) + kick(T.C[k])
    return mean[0], cov[0, :, 0]


@pytest.mark.parametrize(
    ("method", "eps", "published", "order"),
    [("euler", 0.0, False, 1), ("euler", 0.5, False, 1), ("heun", 0.0, False, 2), ("heun", 0.5, False, 1),
     ("heun", 0.0, True, 1), ("heun", 0.5, True, 1)],
)  # fmt: skip
def test_weak_order_in_closed_form(method, eps, published, order):
    m = interpolants.between(Interpolant(), A, B)
    transport, errors = m.field("b").process, []
    for n in (20, 40, 80):
        mean, cov = law(m, interpolants.sde(transport, times.uniform(FLOW, n), eps, method, published), eps)
        errors.append(np.sqrt(np.mean((mean - A.means[0]) ** 2) + np.mean((cov - A.cov) ** 2)))
    assert abs(np.log2(errors[1] / errors[2]) - order) < 0.25, errors
    assert errors[2] < 0.1


def test_guidance_and_steering_apply():
    """CFG on a field is linear in it; FK steering on the SDE's drift reaches the tilted Gaussian N(m + l C c, C)."""
    m, c, lam = interpolants.between(Interpolant(), A, B), np.array([0.8, 0.6]), 0.8
    b, s = m.field("b"), m.field("s")
    x = m.sample(KEY, 4, 0.5)
    guided = guidance.cfg(b, interpolants.field(m.interpolant, lambda x, t: jnp.zeros_like(x)), 1.5)
    drift = interpolants.drift(m.interpolant, b=guided)
    np.testing.assert_allclose(drift(x, 0.5, "velocity"), 1.5 * m(x, 0.5).b, rtol=1e-5)
    drift, table = interpolants.stochastic(m.interpolant, times.uniform(FLOW, 50), 1.0, b=b, s=s)
    _, x1 = m.ends(KEY, 1500)
    out = steering.sample(drift, table, x1, jax.random.key(1), steering.fk(lambda x: x @ jnp.asarray(c, x.dtype), lam))
    target = A.means[0] @ c + lam * c @ A.cov @ c
    assert abs((np.asarray(out.x) @ c).mean() - target) < 0.12 < 0.3 * (target - A.means[0] @ c) + 0.1


# 6. Bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Interpolant(a=-1.0), "a is -1.0"),
        (lambda: Interpolant(gamma="browian"), "gamma is 'browian'; expected one of none"),
        (lambda: Interpolant("curved"), "path is 'curved'"),
        (lambda: Interpolant(gamma=lambda t: (t * (t - 1), t)), r"gamma\(0.5\) = -0.25; gamma must not be negative"),
        (lambda: Interpolant(gamma=lambda t: (t, t)), "gamma is 0 at t = 0 and 1 at t = 1"),
        (lambda: Interpolant("trigonometric", "sine_squared"), "needs gamma < 1"),
        (lambda: Interpolant(lambda t, x0, x1: x0 + t * x1), "expected x0 and x1"),
        (lambda: Interpolant(process.edm()), r"expected one on \[0, 1\]"),
        (lambda: Interpolant().convert(0.5, "s", b=1.0, v=1.0), "no conversion from b and v to s .* learn s or eta"),
        (lambda: Interpolant().convert(0.5, "b", s=1.0), "b needs v, and s or eta"),
        (lambda: Interpolant().convert(np.array([0.5, 1.0]), "s", eta=1.0), "no s at t = 1"),
        (lambda: Interpolant("mirror").convert(0.5, "s", b=1.0), "no s at t = 0.5"),
        (lambda: Interpolant().convert(0.5, "u", b=1.0), "unknown field 'u'"),
        (lambda: INTERPOLANTS["one-sided linear"].convert(0.5, "s", b=1.0), "needs x and one of"),
        (
            lambda: interpolants.objective(Interpolant(gamma="none"), "eta", lambda params, x, t, y: x),
            "no latent noise",
        ),
        (lambda: interpolants.between(Interpolant(), LEFT), "is between two ends"),
        (lambda: interpolants.between(Interpolant(), LEFT, exact.gaussian([0.0], 1.0)), "x0 has 2 dimensions and x1 1"),
        (lambda: interpolants.coupled(Interpolant(), A, B, 9 * np.eye(2)), "has the eigenvalue -"),
        (lambda: interpolants.schrodinger(A, B, 0.0), "eps is 0.0"),
        (lambda: interpolants.drift(Interpolant(), -0.1, b=two_ends()[1].field("b")), "eps is -0.1"),
        (lambda: interpolants.drift(Interpolant(), 0.1, b=two_ends()[1].field("b")), "no conversion from b to s"),
        (
            lambda: interpolants.stochastic(Interpolant(), [1.0, 0.0], 0.1, **two_ends()[1].fields("b", "eta")),
            "no s at t = 1",
        ),
        (lambda: interpolants.sde(two_ends()[1].field("b").process, [1.5, 0.0], 0.1), r"1.5, outside \[0, 1\]"),
        (lambda: interpolants.sde(two_ends()[1].field("b").process, [1.0, 0.0], lambda t: 0.2 - t), "eps is -0.8"),
        (lambda: solvers.ddpm()(two_ends()[1].field("b").process, [1.0, 0.0]), "ddpm adds the noise"),
        (lambda: two_ends()[1].field("b")(jnp.zeros((1, 2)), 0.5, "score"), "no conversion from velocity to score"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_ends_that_differ_in_shape():
    loss = interpolants.objective(Interpolant(), "b", lambda params, x, t, y: x)
    with pytest.raises(ValueError, match=r"x0 is \(4, 2\), float32 and x1 is \(4, 3\)"):
        loss(None, KEY, jnp.zeros((4, 2), jnp.float32), jnp.zeros((4, 3), jnp.float32))
    with pytest.raises(TypeError, match="samples of its other end"):
        two_ends()[1].field("b").process.prior(KEY, (1, 2))
