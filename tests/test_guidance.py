"""Guidance that extrapolates between models: identities, exact laws, published algorithms written out, counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import exact, guidance, process, solvers, times
from jdiff.predict import convert

VP, FLOW, EDM = process.vp_linear(), process.flow(), process.edm()
COV = [[0.5, 0.1], [0.1, 0.3]]
C, U = exact.gaussian([0.8, -0.5], COV), exact.gaussian([-0.3, 0.4], COV)
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (5, 2), jnp.float64)
T = jnp.float64(0.6)


def toy(p, mean, gain):
    """A cheap affine model of x0 that depends on the time."""
    m = np.asarray(mean)
    return jdiff.denoiser(lambda x, t: gain * x + jnp.asarray(m, x.dtype) * (1.0 + 0.3 * t), p, "x0")


def pair(p=VP):
    return toy(p, [0.8, -0.5], 0.3), toy(p, [-0.3, 0.4], 0.6)


def close(a, b, tol=1e-6):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def counted(fn, p, prediction="x0", **options):
    """A lifted function that counts its samples as they are evaluated, also inside a compiled program."""
    seen = []

    def net(x, t, *cond):
        jax.debug.callback(lambda: seen.append(x.shape[0]))
        return fn(x, t, *cond)

    return jdiff.denoiser(net, p, prediction, **options), seen


def evaluations(denoiser, seen, table, n=2):
    """Samples evaluated by a run, over the batch."""
    x = denoiser.process.prior(KEY, (n, 2))
    jdiff.sample(denoiser, table, x).block_until_ready()
    jax.effects_barrier()
    return sum(seen) / n


# --- cfg and its rules
def test_cfg_is_the_score_of_the_geometric_mean():
    """Equal covariances: p_u^(1-w) p_c^w of the noised laws is the Gaussian about the extrapolated mean."""
    c, u = C.denoiser(VP), U.denoiser(VP)
    for w in (0.0, 1.0, 2.5):
        mean = exact.gaussian(U.means[0] + w * (C.means[0] - U.means[0]), COV)
        close(guidance.cfg(c, u, w)(X, T), mean.denoiser(VP)(X, T))
        close(guidance.autoguidance(c, u, w)(X, T), mean.denoiser(VP)(X, T))
        close(guidance.compose([c, u], [w, 1.0 - w])(X, T), mean.denoiser(VP)(X, T))
        close(guidance.compose([c], [w], u)(X, T), mean.denoiser(VP)(X, T))


def test_equal_branches_guide_nothing():
    c, _ = pair(FLOW)
    hot = {"together": False}
    for guided in (
        guidance.cfg(c, c, 7.0, **hot),
        guidance.cfg(c, c, 7.0, rescale=0.7),
        guidance.cfg_zero(c, c, 7.0),
        guidance.apg(c, c, 7.0, momentum=-0.5, norm=2.0),
        guidance.autoguidance(c, c, 7.0),
        guidance.cfg_pp(c, c, 0.7, times.uniform(FLOW, 5)),
        guidance.compose([c, c], [3.0, -1.0], c),
        guidance.mix([c, c, c], lambda x, t, outs: jnp.stack([x, -x, 2 * x])),
    ):
        close(guided(X, T), c(X, T), 1e-6)


def test_rescale_keeps_the_conditional_deviation():
    c, u = pair(VP)
    std = lambda v: np.std(np.asarray(v), axis=1)
    whole, plain = guidance.cfg(c, u, 4.0, rescale=1.0), guidance.cfg(c, u, 4.0)
    np.testing.assert_allclose(std(whole(X, T)), std(c(X, T)), rtol=1e-6)
    assert np.abs(std(plain(X, T)) / std(c(X, T)) - 1).max() > 0.1
    close(guidance.cfg(c, u, 4.0, rescale=0.3)(X, T), 0.3 * whole(X, T) + 0.7 * plain(X, T))
    eps = guidance.cfg(c, u, 4.0, rescale=1.0, kind="eps")
    np.testing.assert_allclose(std(eps(X, T, "eps")), std(c(X, T, "eps")), rtol=1e-6)


def test_interval_is_half_open_and_saves_the_second_branch():
    c, u = pair()
    guided = guidance.cfg(c, u, 3.0, interval=(0.3, 0.7))
    for t, inside in ((0.3, False), (0.31, True), (0.7, True), (0.71, False)):
        expected = guidance.cfg(c, u, 3.0)(X, t) if inside else c(X, t)
        close(guided(X, t), expected)
    each = jnp.asarray([0.2, 0.4, 0.5, 0.7, 0.9]).reshape(5, 1)  # a time a sample
    close(guided(X, each), [guided(X[i : i + 1], float(each[i, 0]))[0] for i in range(5)])
    con, seen = counted(lambda x, t, y: x * y, VP, cond=jnp.ones((2, 1), jnp.float32))
    table = solvers.ddim()(VP, times.uniform(VP, 10))
    guided = guidance.cfg(con, con.with_cond(jnp.zeros((2, 1), jnp.float32)), 2.0, interval=(0.25, 0.55))
    assert evaluations(guided, seen, table) == 10 + 3


def test_three_branches_in_one_batch():
    """Composition of three conditions of one network: one call, and the same as three."""
    calls = []

    def net(w, x, t, y):
        calls.append(x.shape[0])
        return w * x + y

    w = jnp.float64(0.3)
    models = [jdiff.denoiser(net, VP, "eps", params=w, cond=jnp.full((5, 1), m)) for m in (1.0, -1.0, 0.5)]
    one, apart = (guidance.compose(models[:2], [2.0, -0.5], models[2], together=b) for b in (True, False))
    close(one(X, T, "eps"), 0.3 * X + 0.5 + 2.0 * 0.5 - 0.5 * -1.5)
    close(one(X, T), apart(X, T), 1e-12)
    assert calls == [15, 15, 5, 5, 5]  # `one` twice
    everybody = [models[0].with_cond(jnp.full((1, 1), m)) for m in (1.0, -1.0)]  # a condition of batch 1
    close(guidance.cfg(*everybody, 2.0)(X, T, "eps"), 0.3 * X + 3.0)


def test_negative_prompts_push_away():
    """The negative's condition in place of the null one: at a mode of the negative the sample is moved away from it."""
    good, bad = exact.gaussian([1.0, 0.0], 0.1).denoiser(VP), exact.gaussian([-1.0, 0.0], 0.1).denoiser(VP)
    null = exact.mixture([0.5, 0.5], [[1.0, 0.0], [-1.0, 0.0]], [0.1, 0.1]).denoiser(VP)
    x = float(VP.alpha(0.3)) * jnp.asarray([[-1.0, 0.0]])
    away, plain = guidance.cfg(good, bad, 2.0)(x, 0.3), guidance.cfg(good, null, 2.0)(x, 0.3)
    assert away[0, 0] > plain[0, 0] - 1e-6 and away[0, 0] > good(x, 0.3)[0, 0] > bad(x, 0.3)[0, 0]
    both = guidance.compose([good, bad], [2.0, -1.0], null)
    close(both(x, 0.3), null(x, 0.3) + 2 * (good(x, 0.3) - null(x, 0.3)) - (bad(x, 0.3) - null(x, 0.3)))


@pytest.mark.parametrize("p", [VP, FLOW], ids=["vp", "flow"])
def test_cfg_pp_is_the_paper_s_two_output_step(p):
    """x1 = a1 [D_u + lam (D_c - D_u)] + s1 eps_u, traced on two outputs; plain cfg at scale lam is another thing."""
    t, (c, u), lam = times.uniform(p, 6), pair(p), 0.7
    g = jdiff.trace  # the algorithm, on two outputs

    def sampler(x, model, noise):
        a, s = p.alpha(t), p.sigma(t)
        for i in range(6):
            D, D_u = model(x, t[i])
            x = a[i + 1] * D + s[i + 1] * convert(p, x, t[i], D_u, "x0", "eps")
        return x

    def two(x, t, carry):
        Dc, Du = c(x, t), u(x, t)
        return (Du + lam * (Dc - Du), Du), carry

    pairwise = jdiff.Denoiser(lambda x: (), two, p, "x0")
    x = p.prior(KEY, (4, 2), dtype=jnp.float64)
    expected = jdiff.sample(pairwise, g(sampler, p, outputs=2), x)
    ddim = solvers.ddim()(p, t)
    close(jdiff.sample(guidance.cfg_pp(c, u, lam, t), ddim, x), expected, 1e-5)
    assert np.abs(jdiff.sample(guidance.cfg(c, u, lam), ddim, x) - expected).max() > 0.05


def test_cfg_zero_projects_and_starts_late():
    """v_c = k v_u is kept whatever the scale (plain cfg scales it); no velocity, no move, above zero_above."""
    v = jdiff.denoiser(lambda x, t: 0.5 * x + 1.0, FLOW, "velocity")
    twice = jdiff.denoiser(lambda x, t: x + 2.0, FLOW, "velocity")
    close(guidance.cfg_zero(twice, v, 5.0)(X, T, "velocity"), X + 2.0)
    assert np.abs(guidance.cfg(twice, v, 5.0)(X, T, "velocity") - (X + 2.0)).max() > 1.0
    c, u = pair(FLOW)
    a, b = (np.asarray(m(X, T, "velocity")) for m in (c, u))
    star = (a * b).sum(1, keepdims=True) / (b * b).sum(1, keepdims=True)
    close(guidance.cfg_zero(c, u, 3.0)(X, T, "velocity"), star * b + 3.0 * (a - star * b))
    t = times.uniform(FLOW, 4)
    table, x = solvers.euler()(FLOW, t), FLOW.prior(KEY, (3, 2), dtype=jnp.float64)
    _, path = jdiff.sample(guidance.cfg_zero(c, u, 3.0, zero_above=t[1]), table, x, trajectory=True)
    close(path.x[1], path.x[0], 1e-6)
    assert np.abs(path.x[2] - path.x[1]).max() > 0.01


def test_apg_drops_the_parallel_part():
    c, u = pair(VP)
    Dc, Du = c(X, T), u(X, T)
    dot = lambda a, b: np.sum(np.asarray(a) * np.asarray(b), 1)
    close(guidance.apg(c, u, 4.0, eta=1.0)(X, T), guidance.cfg(c, u, 4.0)(X, T))
    step = guidance.apg(c, u, 4.0)(X, T) - Dc
    np.testing.assert_allclose(dot(step, Dc), 0.0, atol=1e-6)
    rest = 3.0 * (Dc - Du) - step
    np.testing.assert_allclose(np.abs(dot(rest, Dc)), np.sqrt(dot(rest, rest) * dot(Dc, Dc)), rtol=1e-5)
    short = guidance.apg(c, u, 4.0, eta=1.0, norm=0.01)(X, T) - Dc
    np.testing.assert_allclose(np.sqrt(dot(short, short)), 0.03, rtol=1e-5)
    slow = guidance.apg(c, u, 4.0, eta=1.0, momentum=-0.5)
    carry = slow.init(X)
    _, carry = slow.apply(X, T, carry)
    second, _ = slow.apply(2 * X, T, carry)
    d = (c(2 * X, T) - u(2 * X, T)) - 0.5 * (Dc - Du)
    close(second, c(2 * X, T) + 3.0 * d)


def test_schedules_keep_their_mean():
    u = (np.arange(4000) + 0.5) / 4000
    for make in (guidance.linear, guidance.cosine, guidance.beta):
        w = np.asarray(make(VP, 4.0)(jnp.asarray(u)))
        np.testing.assert_allclose(w.mean(), 4.0, rtol=1e-4)
        close(make(VP, 1.0)(jnp.asarray(u)), 1.0)
    linear, cosine, beta, sine = (f(VP, 4.0) for f in (guidance.linear, guidance.cosine, guidance.beta, guidance.sine))
    ends = jnp.asarray([0.0, 1.0])
    for shape, expected in ((linear, [7, 1]), (cosine, [7, 1]), (beta, [1, 1]), (sine, [4, 4])):
        close(shape(ends), expected)
    close(sine(jnp.asarray(0.5)), 8.0)
    logs = EDM.t_of_lam(np.linspace(EDM.lam(EDM.t_max), EDM.lam(EDM.t_min), 5))  # noise to data
    close(guidance.linear(EDM, 3.0, clock="lam")(jnp.asarray(logs)), [1, 2, 3, 4, 5])
    c, un = pair()
    close(guidance.cfg(c, un, linear)(X, 0.25), guidance.cfg(c, un, 5.5)(X, 0.25))
    each = jnp.asarray([0.0, 0.25, 0.5, 0.75, 1.0]).reshape(5, 1)
    close(guidance.cfg(c, un, linear)(X, each)[1], guidance.cfg(c, un, 5.5)(X, 0.25)[1])
    table = guidance.at_steps([1.0, 0.5, 0.2], [1.0, 2.0, 3.0])
    close([table(jnp.asarray(t)) for t in (1.0, 0.5, 0.2)], [1.0, 2.0, 3.0])


def test_another_scale_compiles_nothing():
    traces = []

    def net(w, x, t, y):
        traces.append(0)
        return w * x * y

    w, t = jnp.float32(0.3), times.uniform(VP, 4)
    con, null = (jdiff.denoiser(net, VP, "x0", params=w, cond=jnp.full((2, 1), m, jnp.float32)) for m in (1.0, 0.5))
    x = VP.prior(KEY, (2, 2))
    for grid in (t, times.quadratic(VP, 4)):
        for scale in (2.0, 3.0):
            jdiff.sample(guidance.cfg_pp(con, null, scale / 4, grid), solvers.ddim()(VP, grid), x)
            jdiff.sample(guidance.cfg(con, null, guidance.linear(VP, scale)), solvers.ddim()(VP, grid), x)
    assert len(traces) == 2


# --- residual cfg
def test_residual_cfg():
    """Self-negative at delta 1 is scale D_c - (scale - 1) source; scale 1 is the model; onetime remembers X."""
    c, u = pair(VP)
    source = X[::-1] + 1.0
    close(guidance.residual_cfg(c, 1.5, source=source)(X, T), 1.5 * c(X, T) - 0.5 * source)
    close(guidance.residual_cfg(c, 1.0, source=source, delta=0.6)(X, T), c(X, T))
    close(guidance.residual_cfg(c, 1.5, source=source, delta=0.0)(X, T, "eps"), 1.5 * c(X, T, "eps"))
    virtual = convert(VP, X, T, source, "x0", "eps")
    eps = 0.8 * virtual + 1.5 * (c(X, T, "eps") - 0.8 * virtual)
    close(guidance.residual_cfg(c, 1.5, source=source, delta=0.8)(X, T, "eps"), eps)
    once = guidance.residual_cfg(c, 1.5, negative=u)
    first, carry = once.apply(X, T, once.init(X))
    close(first, guidance.cfg(c, u, 1.5)(X, T, "eps"))  # the first evaluation is cfg's
    later, _ = once.apply(2 * X, jnp.float64(0.4), carry)
    close(later, guidance.residual_cfg(c, 1.5, source=u(X, T))(2 * X, 0.4, "eps"))


def test_residual_cfg_costs_what_it_says():
    table = solvers.ddim()(VP, times.uniform(VP, 6))
    for expected, wrap in (
        (6, lambda c, u: guidance.residual_cfg(c, 1.4, source=jnp.zeros((2, 2), jnp.float32))),
        (7, lambda c, u: guidance.residual_cfg(c, 1.4, negative=u)),
        (12, lambda c, u: guidance.cfg(c, u, 1.4)),
    ):
        con, seen = counted(lambda x, t, y: x * y, VP, cond=jnp.ones((2, 1), jnp.float32))
        assert evaluations(wrap(con, con.with_cond(jnp.zeros((2, 1), jnp.float32))), seen, table) == expected


# --- reflection
def ddim_move(p, x, D, t0, t1):
    a0, s0, a1, s1 = p.alpha(t0), p.sigma(t0), p.alpha(t1), p.sigma(t1)
    return s1 / s0 * x + (a1 - a0 * s1 / s0) * D


@pytest.mark.parametrize("p", [VP, FLOW], ids=["vp", "flow"])
def test_reflection_is_the_paper_s_loop(p):
    strong, weak = pair(p)
    t, steps = times.uniform(p, 5), (0, 1, 3)
    x = start = p.prior(KEY, (4, 2), dtype=jnp.float64)
    for k in range(5):
        if k in steps:
            z = ddim_move(p, x, strong(x, t[k]), t[k], t[k + 1])
            back = ddim_move(p, z, weak(z, t[k + 1]), t[k + 1], t[k])
            x = x + 0.8 * (back - x)
        x = ddim_move(p, x, strong(x, t[k]), t[k], t[k + 1])
    guided = guidance.reflection(strong, weak, t, steps=steps, lam=0.8)
    close(jdiff.sample(guided, solvers.ddim()(p, t), start), x, 1e-5)


def test_reflection_adds_the_difference_and_equal_models_come_back():
    """x' - x = h times the score difference to first order, and of second order in h for equal models."""
    strong, weak = pair(VP)
    moved = {True: [], False: []}
    for h in (0.02, 0.01):
        for same in (True, False):
            z = ddim_move(VP, X, strong(X, 0.5), 0.5, 0.5 - h)
            D = (strong if same else weak)(z, 0.5 - h)
            moved[same].append(np.asarray(ddim_move(VP, z, D, 0.5 - h, 0.5) - X))
    ratio = np.abs(moved[True][0]).max() / np.abs(moved[True][1]).max()
    assert 3.5 < ratio < 4.5 and 1.8 < np.abs(moved[False][0]).max() / np.abs(moved[False][1]).max() < 2.2
    difference = np.asarray(strong(X, 0.5, "score") - weak(X, 0.5, "score"))
    cosine = np.sum(difference * moved[False][1]) / np.linalg.norm(difference) / np.linalg.norm(moved[False][1])
    assert cosine > 0.99


def test_reflection_costs_what_it_says():
    con, seen = counted(lambda x, t, y: x * y, VP, cond=jnp.full((2, 1), 0.5, jnp.float32))
    t = times.uniform(VP, 6)
    table, weak = solvers.ddim()(VP, t), con.with_cond(jnp.full((2, 1), 0.4, jnp.float32))
    assert evaluations(guidance.reflection(con, weak, t), seen, table) == 6 + 2 * 5
    seen.clear()
    assert evaluations(guidance.reflection(con, weak, t, steps=(0, 2)), seen, table) == 6 + 2 * 2


# --- bad input
C_, U_ = pair()
GRID = times.uniform(VP, 4)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: guidance.cfg(C_, None, 2.0), "branch 1 is None.*unconditional branch"),
        (lambda: guidance.autoguidance(C_, pair(FLOW)[1], 2.0), "one process"),
        (lambda: guidance.cfg(C_, U_, 2.0, interval=(0.5, 1.5)), r"\(0.5, 1.5\), outside the process's times \[0, 1\]"),
        (lambda: guidance.cfg(C_, U_, 2.0, interval=(-0.1, 0.5)), "outside the process's times"),
        (lambda: guidance.cfg(C_, U_, float("nan")), "scale is nan"),
        (lambda: guidance.cfg(C_, U_, 2.0, rescale=1.5), "rescale is 1.5"),
        (lambda: guidance.cfg(C_, U_, 2.0, kind="noise"), "unknown prediction kind 'noise'"),
        (lambda: guidance.cfg_pp(C_, U_, 7.5, GRID), r"lam is 7.5; expected a number in \[0, 1\]"),
        (lambda: guidance.cfg_zero(C_, U_, 2.0, 3.0), "zero_above is 3.0"),
        (lambda: guidance.apg(C_, U_, 2.0, norm=0.0), "norm is 0.0"),
        (lambda: guidance.apg(C_, U_, 2.0, momentum=-2.0), "momentum is -2.0"),
        (lambda: guidance.linear(VP, 2.0, clock="sigma"), "clock is 'sigma'"),
        (lambda: guidance.beta(VP, 2.0, a=0.5), "a, b are 0.5"),
        (lambda: guidance.at_steps(GRID, [1.0]), "one value a time"),
        (lambda: guidance.compose([C_, U_], [1.0]), "2 models and 1 weights"),
        (lambda: guidance.residual_cfg(C_, 2.0), "give one of source"),
        (lambda: guidance.residual_cfg(C_, 2.0, source=X, negative=U_), "give one of source"),
        (lambda: guidance.residual_cfg(C_, 2.0, source=X, delta=3.0), "delta is 3.0"),
        (lambda: guidance.residual_cfg(C_, 2.0, negative=pair(FLOW)[1]), "one process"),
        (lambda: guidance.reflection(C_, U_, GRID, steps=(3,)), r"steps is \[3\] of a grid of 4"),
        (lambda: guidance.reflection(C_, U_, GRID, steps=(7,)), r"steps is \[7\]"),
        (lambda: guidance.reflection(C_, U_, GRID, lam=float("nan")), "lam is nan"),
        (lambda: guidance.reflection(C_, U_, GRID)(X, jnp.full((5, 1), 0.5)), "one time for the whole batch"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says):
        make()
