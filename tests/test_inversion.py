"""Tables read backwards, and gradients through sampling: round trips, plain jax.grad, closed forms, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import exact, gradients, inversion, process, solvers, times

P = process.vp_linear()
G = exact.gaussian([0.3, -0.5, 0.1], [[0.5, 0.1, 0.0], [0.1, 0.3, 0.05], [0.0, 0.05, 0.02]])
M = exact.mixture([0.3, 0.7], [[0.5, -0.4, 0.2], [-0.6, 0.3, 0.0]], [[0.05, 0.1, 0.2], 0.08])
KEY = jax.random.key(0)
REVERSIBLE = {
    "bdia": solvers.bdia(),
    "bdia_half": solvers.bdia(0.5),
    "bdia_edm": solvers.bdia(base="edm"),
    "bdia_edm_half": solvers.bdia(0.5, "edm"),
    "edict": solvers.edict(),
    "edict_plain": solvers.edict(alternate=False),
}


def grid(n, end=0.0, p=P):
    return times.uniform(p, n, end=end)


# Inversion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REVERSIBLE)
def test_round_trip(name):
    for p, end in ((P, 0.0), (process.edm(), 0.01))[: 1 if name.startswith("bdia_edm") else 2]:
        n = {"bdia_half": 20, "bdia_edm_half": 16}.get(name, 50)  # rounding grows by 1/gamma a step
        T = REVERSIBLE[name](p, times.karras(p, n, end=end) if p is not P else grid(n, end))
        for dtype, tolerance in ((jnp.float64, 1e-10), (jnp.float32, 1e-4)):
            x = p.prior(KEY, (4, 3), dtype=dtype)
            last = jdiff.registers(M.denoiser(p), T, x)
            np.testing.assert_allclose(last[0], jdiff.sample(M.denoiser(p), T, x), rtol=1e-5, atol=1e-6)
            if dtype == jnp.float32 and name.endswith("half"):
                continue  # 2^20, 2^16 times 1e-7
            if name == "bdia_edm_half":
                last = last[:2]  # the third register holds nothing at the end
            back = jdiff.invert(M.denoiser(p), T, last)
            assert float(jnp.abs(back - x).max()) < tolerance * p.prior_std


def test_another_partner_ends_elsewhere_and_ddim_inversion_is_approximate():
    """The oracle can fail: without the partner, or by DDIM's inversion, the noise is another."""
    T, x = solvers.bdia()(P, grid(50)), P.prior(KEY, (4, 3), dtype=jnp.float64)
    last = jdiff.registers(M.denoiser(P), T, x)
    wrong = jdiff.invert(M.denoiser(P), T, (last[0], last[0]))
    assert float(jnp.abs(wrong - x).max()) > 1e-2
    errors = []
    for n in (25, 50, 100, 200):
        t = grid(n, end=0.05)
        out = jdiff.sample(M.denoiser(P), solvers.ddim()(P, t), x)
        back = jdiff.sample(M.denoiser(P), solvers.ddim_inversion(P, t), out)
        errors.append(float(jnp.sqrt(jnp.mean((back - x) ** 2))))
    slopes = -np.diff(np.log2(errors))
    assert errors[1] > 1e-2 and slopes.min() > 0.8 and slopes[-1] < 1.3  # first order


def test_an_image_alone_gets_a_partner():
    t = grid(40)
    T, x0 = solvers.bdia()(P, t), M.sample(KEY, 4, jnp.float64)
    pair = inversion.partner(M.denoiser(P), t, x0)
    noise = jdiff.invert(M.denoiser(P), T, pair)
    again = jdiff.sample(M.denoiser(P), T, noise)
    plain = jdiff.sample(M.denoiser(P), solvers.ddim_inversion(P, t), x0)
    ddim = jdiff.sample(M.denoiser(P), solvers.ddim()(P, t), plain)
    error = lambda y: float(jnp.sqrt(jnp.mean((y - x0) ** 2)))
    # its forward pass starts by one DDIM step, which need not pass through the inverted second state
    assert error(again) < error(ddim)


def test_gamma_zero_is_ddim_and_point_mass_is_exact():
    t = grid(7, end=0.05)
    np.testing.assert_allclose(solvers.bdia(0.0)(P, t).unrolled(), solvers.ddim()(P, t).unrolled(), atol=1e-15)
    x = np.array([[0.4, -1.0, 2.0]])
    mu = jdiff.denoiser(lambda x, t: jnp.zeros_like(x) + 0.3, P, "x0")
    for solver in (solvers.bdia(), solvers.bdia(0.5)):  # EDICT takes eps of the new state at the old time
        got = jdiff.sample(mu, solver(P, t), jnp.asarray(x))
        eps = (x - 0.3 * P.alpha(t[0])) / P.sigma(t[0])
        np.testing.assert_allclose(got, 0.3 * P.alpha(t[-1]) + P.sigma(t[-1]) * eps, rtol=1e-9)


def test_orders_of_reversible_solvers():
    """gamma = 1 is of second order on a smooth grid, and EDM's parabola at any gamma; 0.5 and EDICT are not."""

    def slopes(solver):
        tables = [solver(P, grid(n, end=0.2)) for n in (20, 40, 80, 160)]
        end = P.alpha(0.2) ** 2 * np.array([0.5, 0.3, 0.02]) + P.sigma(0.2) ** 2
        return -np.diff(np.log2([np.abs(np.diag(G.law(T)[1]) - end).max() for T in tables]))

    found = {name: slopes(solver) for name, solver in REVERSIBLE.items()}
    for name in ("bdia", "bdia_edm", "bdia_edm_half"):
        assert found[name].min() > 1.9, (name, found[name])
    for name in ("bdia_half", "edict"):
        assert 0.85 < found[name][-1] < 1.3


def test_bdia_on_edm_is_heun_read_on_both_sides():
    """gamma 0 is EDM's Heun; on equal steps of sigma/alpha the bends of the two sides cancel, and BDIA-DDIM is left."""
    for p, end in ((process.edm(), 0.0), (process.flow(), 0.0), (P, 0.05)):
        t = times.karras(p, 7, start=0.9 * p.t_max, end=end)
        np.testing.assert_allclose(
            solvers.bdia(0.0, "edm")(p, t).unrolled(), solvers.heun()(p, t).unrolled(), rtol=1e-12, atol=1e-12
        )
    t = np.linspace(10.0, 2.0, 6)
    ends = 1 + np.arange(3, 10, 2)  # the slopes at the ends of all steps but the first
    weights = lambda gamma: np.abs(solvers.bdia(gamma, "edm")(process.edm(), t).unrolled()[::2, ends]).max()
    assert weights(1.0) < 1e-12 < 0.1 < weights(0.5)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm_solver_pp", "deis", "unipc"])
def test_tables_that_cannot_be_read_backwards(name):
    with pytest.raises(ValueError, match=rf"{name} cannot be read backwards: row \d .* moves by the output"):
        inversion.reverse(solvers.ALL[name]()(P, grid(5)))


def test_what_users_get_wrong():
    p = process.flow()
    T, x = solvers.bdia()(p, grid(5, p=p)), p.prior(KEY, (2, 3))
    den = G.denoiser(p)
    with pytest.raises(ValueError, match="bdia keeps 2 registers, got ArrayImpl"):
        jdiff.invert(den, T, x)
    with pytest.raises(ValueError, match="edict from a start with alpha > 0"):
        inversion.reverse(solvers.edict()(p, grid(5, p=p)))
    with pytest.raises(ValueError, match="close over it"):
        jax.jit(lambda T: gradients.sample(den, T, x, gradient="reversible"))(T)
    with pytest.raises(ValueError, match="draws noise"):
        inversion.reverse(solvers.ddpm()(p, grid(5, p=p)))
    with pytest.raises(ValueError, match="0 <= gamma <= 1"):
        solvers.bdia(1.5)
    with pytest.raises(ValueError, match="0 < p <= 1"):
        solvers.edict(0.0)
    with pytest.raises(ValueError, match="gradient is 'auto'"):
        gradients.sample(den, T, x, gradient="auto")
    with pytest.raises(ValueError, match="adjoint: order is 3"):
        gradients.adjoint(den, T, x, grid(5, p=p), order=3)
    with pytest.raises(ValueError, match="use variable='angle'"):
        gradients.adjoint(den, T, x, grid(5, p=p))
    with pytest.raises(ValueError, match="does not end by the x0 prediction"):
        gradients.adjoint(den, T, x, grid(5, p=p), variable="angle")


# Gradients ---------------------------------------------------------------------------------------------------------

NET = lambda w, x, t, y: jnp.tanh(x @ w["a"] + w["b"] * t) + 0.1 * y[:, None].astype(x.dtype)
WEIGHTS = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)) * 0.5), "b": jnp.asarray([0.1, -0.2, 0.3])}
LABELS = jnp.array([0, 1, 2, 1])


def loss_of(run):
    def loss(w, x):
        den = jdiff.denoiser(NET, P, "x0", params=w, cond=LABELS)
        return jnp.sum(jnp.sin(run(den, x)))

    return loss


@pytest.mark.parametrize("K", [7, 9])
def test_exact_gradients_equal_those_of_the_plain_scan(K):
    x = P.prior(KEY, (4, 3), dtype=jnp.float64)
    for solver, ways in (
        (solvers.bdia(), ("checkpoint", "reversible")),
        (solvers.edict(), ("reversible",)),
        (solvers.dpm_solver_pp(2, eta=1.0), ("checkpoint",)),
    ):
        T, key = solver(P, grid(K)), KEY if solver.stochastic else None
        want = jax.grad(loss_of(lambda den, x: jdiff.sample(den, T, x, key)), (0, 1))(WEIGHTS, x)  # noqa: B023
        for way in ways:
            run = lambda den, x: gradients.sample(den, T, x, key, gradient=way)  # noqa: B023
            got = jax.grad(loss_of(run), (0, 1))(WEIGHTS, x)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), got, want)
            value = loss_of(run)(WEIGHTS, x)
            np.testing.assert_allclose(value, loss_of(lambda den, x: jdiff.sample(den, T, x, key))(WEIGHTS, x))  # noqa: B023


@pytest.mark.parametrize("order", [1, 2, 4])
def test_adjoint_converges_to_the_closed_form_at_its_order(order):
    """On a Gaussian the flow is affine: d(c . x_end)/dx_start is c times its matrix, whatever x."""
    x, end, c = P.prior(KEY, (2, 3), dtype=jnp.float64), 0.1, jnp.array([1.0, -2.0, 0.5])
    want = jax.grad(lambda x: jnp.sum(G.flow(P, x, 1.0, end) @ c))(x)
    errors = []
    for n in (20, 40, 80, 160):
        t = times.logsnr(P, 8 * n if order == 1 else n, end=end)
        T = solvers.ddim()(P, t)
        got = jax.grad(lambda x: jnp.sum(gradients.adjoint(G.denoiser(P), T, x, t, order=order) @ c))(x)  # noqa: B023
        errors.append(float(jnp.abs(got - want).max()))
    slopes = -np.diff(np.log2(errors))
    assert slopes.min() > order - 0.1 and errors[-1] < 0.2, (slopes, errors)


def test_adjoint_of_parameters_and_the_last_prediction():
    """Parameters and noise, through x0 at the end, against jax.grad of many more steps."""
    x = P.prior(KEY, (4, 3), dtype=jnp.float64)
    fine, t = (times.karras(P, n, start=0.7) for n in (400, 100))
    T, many = solvers.heun()(P, fine), solvers.heun()(P, t)
    want = jax.grad(loss_of(lambda den, x: jdiff.sample(den, T, x)), (0, 1))(WEIGHTS, x)
    got = jax.grad(loss_of(lambda den, x: gradients.adjoint(den, many, x, t)), (0, 1))(WEIGHTS, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert float(jnp.abs(a - b).max()) < 5e-3 * float(jnp.abs(b).max())


def test_memory_of_gradients():
    """Compiled, not run: reversible and adjoint hold the same at 8 and 64 steps, direct holds 8 times as much."""
    x = P.prior(KEY, (256, 3), dtype=jnp.float64)

    def held(way, n):
        t = grid(n)
        T = (solvers.ddim() if way == "adjoint" else solvers.bdia())(P, t)
        run = (
            (lambda den, x: gradients.adjoint(den, T, x, t))
            if way == "adjoint"
            else (lambda den, x: gradients.sample(den, T, x, gradient=way))
        )
        den = lambda w: jdiff.denoiser(lambda w, x, t: jnp.tanh(x @ w), P, "x0", params=w)
        program = jax.jit(jax.grad(lambda w, x: jnp.sum(run(den(w), x) ** 2), (0, 1)))
        return program.lower(WEIGHTS["a"], x).compile().memory_analysis().temp_size_in_bytes

    growth = {way: held(way, 64) / held(way, 8) for way in ("direct", "checkpoint", "reversible", "adjoint")}
    assert growth["reversible"] < 1.15 and growth["adjoint"] < 1.15
    assert growth["direct"] > 4 and growth["checkpoint"] < 0.6 * growth["direct"]
