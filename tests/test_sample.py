"""Sampling: one compilation, reproducible noise, meshes, pytrees, checks, and every bad input by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import exact, guidance, process, solvers, times

P = process.vp_linear()
G = exact.gaussian([0.3, -0.5], [[0.5, 0.1], [0.1, 0.3]])
KEY = jax.random.key(0)


def counted(fn):
    """fn that counts how often it is traced (or called eagerly)."""

    def wrapper(*args):
        wrapper.traces += 1
        return fn(*args)

    wrapper.traces = 0
    return wrapper


def test_one_compilation_for_grids_seeds_scales_and_solvers():
    net = counted(lambda w, x, t, y: w * x * y[:, None])
    w = jnp.float32(0.3)

    def go(solver, grid, seed, scale):
        cond, null = (jdiff.denoiser(net, P, "x0", params=w, cond=jnp.full(4, c)) for c in (0.5, 0.1))
        den = guidance.cfg(cond, null, scale)
        return jdiff.sample(den, solver(P, grid), P.prior(jax.random.key(seed), (4, 2)))

    outs = [
        go(solvers.ddim(), times.uniform(P, 8), 0, 1.0),
        go(solvers.ddim(), times.logsnr(P, 8), 0, 1.0),
        go(solvers.ddim(), times.logsnr(P, 8), 1, 1.0),
        go(solvers.ddim(), times.logsnr(P, 8), 0, 3.0),
        go(solvers.dpm_solver_pp(1), times.uniform(P, 8), 0, 1.0),  # another solver of the same shape
        go(solvers.euler(), times.quadratic(P, 8), 0, 1.0),
    ]
    # lax.scan traces its body once; jit once. A second program would add to this.
    assert net.traces == 1
    assert len({float(o[0, 0]) for o in outs[:4]}) == 4
    np.testing.assert_allclose(outs[0], outs[4], rtol=1e-5)
    go(solvers.ddim(), times.uniform(P, 9), 0, 1.0)
    assert net.traces == 2


def test_sample_is_the_scan_of_a_python_loop():
    T = solvers.unipc(3)(P, times.logsnr(P, 7))
    den, x = G.denoiser(P), P.prior(KEY, (5, 2))
    init, step = jdiff.stepper(den, jnp.asarray(T.h0, jnp.float32), jnp.asarray(T.c0, jnp.float32))
    state, all_rows = init(None, x), jdiff.rows(T, jnp.float32)
    for k in range(T.nfe):
        state, info = step(None, state, jax.tree.map(lambda a, k=k: a[k], all_rows))
        assert info.x.shape == (5, 2) and info.outputs[0].dtype == jnp.float32
    np.testing.assert_allclose(jdiff.sample(den, T, x), state.x, rtol=1e-5, atol=1e-6)


def test_state_permutes_as_a_whole():
    """step(gather(state)) = gather(step(state)): what resampling needs; permuting the sample alone is another thing."""
    T = solvers.dpm_solver_pp(3)(P, times.logsnr(P, 7))
    init, step = jdiff.stepper(G.denoiser(P), jnp.asarray(T.h0), jnp.asarray(T.c0))
    all_rows = jdiff.rows(T, jnp.float64)
    row = lambda k: jax.tree.map(lambda a: a[k], all_rows)
    state = init(None, P.prior(KEY, (6, 2), dtype=jnp.float64))
    for k in range(3):
        state, _ = step(None, state, row(k))
    pick = jnp.array([3, 3, 0, 5, 1, 0])
    gather = lambda s: jax.tree.map(lambda a: a[pick], s)
    np.testing.assert_allclose(
        step(None, gather(state), row(3))[0].x, gather(step(None, state, row(3))[0]).x, rtol=1e-12
    )
    alone = state._replace(registers=(state.x[pick], *state.registers[1:]))
    assert np.abs(step(None, alone, row(3))[0].x - gather(step(None, state, row(3))[0]).x).max() > 1e-3


@pytest.mark.parametrize("solver", [solvers.ddpm(), solvers.unipc(3), solvers.heun(churn=5.0)])
def test_a_sample_does_not_depend_on_its_batch_or_mesh(solver):
    T = solver(P, times.logsnr(P, 5))
    den = G.denoiser(P)
    x = P.prior(KEY, (8, 2))
    whole = np.asarray(jdiff.sample(den, T, x, KEY))
    part = jdiff.sample(den, T, x[3:6], KEY, index=jnp.arange(3, 6))
    np.testing.assert_allclose(part, whole[3:6], rtol=1e-6, atol=1e-6)
    mesh = jax.sharding.Mesh(jax.devices(), "data")
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    out = jdiff.sample(den, T, jax.device_put(x, spec), KEY)
    assert out.sharding.is_equivalent_to(spec, 2)
    np.testing.assert_allclose(out, whole, rtol=1e-6, atol=1e-6)
    other = jdiff.sample(den, T, x, jax.random.key(1))
    assert T.stochastic == bool(np.abs(other - whole).max() > 1e-3)


def test_trajectory():
    T = solvers.heun()(P, times.logsnr(P, 4))
    x = P.prior(KEY, (3, 2))
    out, path = jdiff.sample(G.denoiser(P), T, x, trajectory=True)
    assert path.x.shape == (T.nfe + 1, 3, 2) and path.x0.shape == (T.nfe, 3, 2)
    np.testing.assert_array_equal(path.x[0], x)
    np.testing.assert_array_equal(path.x[-1], out)
    np.testing.assert_allclose(path.t, T.t, rtol=1e-6)
    np.testing.assert_allclose(path.x0[2], G.denoiser(P)(path.x[2], T.t[2]), rtol=1e-4, atol=1e-5)


def test_callback_reports_from_inside_the_loop():
    seen = []
    out = jdiff.sample(
        G.denoiser(P),
        solvers.ddim()(P, times.uniform(P, 6)),
        P.prior(KEY, (2, 2)),
        callback=lambda k: seen.append(int(k)),
    )
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]


def test_pytrees_and_a_time_a_coordinate():
    """Two modalities in one tree; and per-element times through a whole solver, on the exact joint denoiser."""
    halve = jdiff.denoiser(lambda x, t: jax.tree.map(lambda a: 0.5 * a, x), P, "x0")
    tree = {"image": P.prior(KEY, (3, 4, 2)), "label": P.prior(KEY, (3, 1))}
    out = jdiff.sample(halve, solvers.ddpm()(P, times.uniform(P, 4)), tree, KEY)
    alone = jdiff.sample(halve, solvers.ddim()(P, times.uniform(P, 4)), tree["label"])
    assert out["image"].shape == (3, 4, 2)
    np.testing.assert_allclose(
        jdiff.sample(halve, solvers.ddim()(P, times.uniform(P, 4)), tree)["label"], alone, rtol=1e-6
    )

    # A time a coordinate: independent coordinates, so each must come out as with its own scalar grid.
    two = exact.gaussian([0.3, -0.5], [0.5, 0.2])
    grids = [times.uniform(P, 6), times.quadratic(P, 6)]
    both = solvers.dpm_solver_pp(2)(P, np.stack(grids, -1))
    x = P.prior(KEY, (4, 2), dtype=jnp.float64)
    got = jdiff.sample(two.denoiser(P), both, x)
    for i, g in enumerate(grids):
        single = jdiff.sample(two.denoiser(P), solvers.dpm_solver_pp(2)(P, g), x)
        np.testing.assert_allclose(got[:, i], single[:, i], rtol=1e-6, atol=1e-8)


def test_differentiable_and_vmappable_over_tables():
    den, x = G.denoiser(P), P.prior(KEY, (4, 2), dtype=jnp.float64)
    T = solvers.ddim()(P, times.uniform(P, 5))

    def loss(B):
        return jnp.sum(jdiff.sample(den, T.replace(B=B), x) ** 2)

    B = jnp.asarray(T.B)
    g = jax.grad(loss)(B)
    e = jnp.zeros_like(B).at[2, 0, 0].set(1e-6)
    np.testing.assert_allclose(g[2, 0, 0], (loss(B + e) - loss(B - e)) / 2e-6, rtol=1e-5)
    assert jax.vmap(loss)(jnp.stack([B, 1.01 * B])).shape == (2,)
    assert np.isfinite(jax.grad(lambda x: jdiff.sample(den, T, x).sum())(x)).all()


def test_half_precision_networks_keep_a_float32_state():
    net = jdiff.denoiser(lambda x, t: (0.5 * x).astype(jnp.bfloat16), P, "eps")
    assert jdiff.sample(net, solvers.unipc(2)(P, times.logsnr(P, 4)), P.prior(KEY, (2, 3))).dtype == jnp.float32


def test_guidance():
    """Guided Gaussians in one batch or two calls; scale 0, 1; outside the interval the conditional model."""
    calls = []

    def net(w, x, t, mean):
        calls.append(x.shape[0])
        return w * x + mean

    w, x, t = jnp.float32(0.2), P.prior(KEY, (3, 2)), 0.5
    con, unc = (jdiff.denoiser(net, P, "eps", params=w, cond=jnp.full((3, 1), m, jnp.float32)) for m in (1.0, -1.0))
    apart = jdiff.denoiser(lambda x, t: 0.2 * x - 1.0, P, "eps")
    for scale, expected in ((0.0, -1.0), (1.0, 1.0), (2.5, 4.0)):
        np.testing.assert_allclose(guidance.cfg(con, unc, scale)(x, t, "eps"), 0.2 * x + expected, rtol=1e-5)
        np.testing.assert_allclose(guidance.cfg(con, apart, scale)(x, t, "eps"), 0.2 * x + expected, rtol=1e-5)
    assert calls == [6, 3, 6, 3, 6, 3]  # one batch of twice the size, or two calls of which one is `net`
    scales = jnp.asarray([[0.0], [1.0], [2.5]], jnp.float32)
    np.testing.assert_allclose(
        guidance.cfg(con, unc, scales)(x, t, "eps") - 0.2 * x, [[-1, -1], [1, 1], [4, 4]], rtol=1e-5
    )
    for t, expected in ((0.2, 1.0), (0.5, 4.0), (0.9, 1.0)):
        guided = guidance.cfg(con, unc, 2.5, interval=(0.3, 0.8))
        np.testing.assert_allclose(guided(x, t, "eps"), 0.2 * x + expected, rtol=1e-5)
    x0 = jdiff.denoiser(lambda x, t: jdiff.predict.convert(P, x, t, 0.2 * x - 1.0, "eps", "x0"), P, "x0")
    np.testing.assert_allclose(guidance.cfg(con, x0, 2.5)(x, 0.5, "eps"), 0.2 * x + 4.0, rtol=1e-4)
    with pytest.raises(ValueError, match="one process"):
        guidance.cfg(con, jdiff.denoiser(lambda x, t: x, process.flow(), "eps"), 2.0)
    with pytest.raises(ValueError, match="t_low < t_high"):
        guidance.cfg(con, unc, 2.0, interval=(0.8, 0.3))


def test_check_names_the_evaluation_and_its_time():
    t = times.uniform(P, 5)
    net = jdiff.denoiser(lambda x, t: jnp.where(t < 0.5, jnp.nan, 1.0).astype(x.dtype) * x, P, "x0")
    T = solvers.ddim()(P, t)
    assert not np.isfinite(jdiff.sample(net, T, P.prior(KEY, (2, 2)))).all()
    with pytest.raises(FloatingPointError, match=r"ddim: .* network's output, at evaluation 4 of 5, t = 0.4"):
        jdiff.sample(net, T, P.prior(KEY, (2, 2)), check=True)
    big = jdiff.denoiser(lambda x, t: x * 3e38, P, "x0")
    with pytest.raises(FloatingPointError, match="at evaluation"):
        jdiff.sample(big, T, P.prior(KEY, (2, 2)), check=True)
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda x: jdiff.sample(G.denoiser(P), T, x, check=True))(P.prior(KEY, (2, 2)))


def test_bad_input_is_one_clear_error_before_compilation():
    den, T, x = G.denoiser(P), solvers.ddim()(P, times.uniform(P, 3)), P.prior(KEY, (2, 2))
    each = solvers.ddim()(P, np.stack([times.uniform(P, 3)] * 3, -1))
    wrong_shape = jdiff.denoiser(lambda x, t: x[:, :1], P, "x0")
    learned_variance = jdiff.denoiser(lambda x, t: jnp.concatenate([x, x], -1), P, "eps")
    cases = [
        (lambda: jdiff.sample(den, solvers.ddpm()(P, times.uniform(P, 3)), x), ValueError, "pass key=jax.random.key"),
        (lambda: jdiff.sample(den, T, x.at[0, 0].set(jnp.nan)), ValueError, "initial sample x holds NaN"),
        (lambda: jdiff.sample(den, T, x.astype(jnp.bfloat16)), TypeError, r"x has dtype bfloat16.*float32"),
        (lambda: jdiff.sample(den, T, jnp.ones((2, 2), int)), TypeError, "x has dtype int64"),
        (lambda: jdiff.sample(den, T, {"a": x, "b": x[:1]}), ValueError, r"shapes \[\(2, 2\), \(1, 2\)\]"),
        (lambda: jdiff.sample(den, T, {}), ValueError, "x is empty"),
        (
            lambda: jdiff.sample(wrong_shape, T, x),
            ValueError,
            r"returned shape \(2, 1\) for a sample of shape \(2, 2\)",
        ),
        (lambda: jdiff.sample(learned_variance, T, x), ValueError, "extra channels cut off"),
        (lambda: jdiff.sample(den, solvers.ddim()(process.flow(), [1.0, 0.5]), x), ValueError, "built for Flow"),
        (lambda: jdiff.sample(jdiff.denoiser(lambda x, t: (x, x), P, "x0"), T, x), ValueError, "one array for each"),
        (lambda: jdiff.sample(den, each, x), ValueError, r"shape \(3,\) .* one sample of shape \(2,\)"),
        (lambda: den(x, np.zeros(3)), ValueError, r"time has shape \(3,\), .* shape \(2, 2\); .* a sample \(2, 1\)"),
        (lambda: jdiff.denoiser(lambda x, t: x, P, "epsilon"), ValueError, "unknown prediction kind 'epsilon'"),
    ]
    compiled = []
    for _ in range(2):  # the second time round, small eager operations such as isfinite are compiled already
        compiled.clear()
        jax.monitoring.register_event_duration_secs_listener(lambda name, *a, **k: compiled.append(name))
        for call, error, says in cases:
            with pytest.raises(error, match=says):
                call()
    assert not [name for name in compiled if "backend_compile" in name]
