"""Tracing: rows do what the formulas say, registers are few, mistakes are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import process, solvers, times
from jdiff.trace import grid

P = process.vp_linear()


def run_directly(solver, g, x, f, rng):
    """The sampler on plain numbers, no tableau: what tracing must reproduce."""
    points = []

    def model(x, t, kind="x0", label=""):
        points.append(x)
        D = f(x, t)
        return D if kind == "x0" else jdiff.predict.convert(g.process, x, t, D, "x0", kind)

    out = solver.sampler(g, x, model, lambda: rng.normal(size=x.shape))
    return out[0] if isinstance(out, tuple) else out, points


def run_rows(T, x, f, rng):
    """The tableau by the definition in its docstring, in NumPy."""
    draw = lambda M: [rng.normal(size=x.shape) if np.any(M[:, j]) else 0.0 for j in range(M.shape[1])]
    z = draw(T.c0)
    S = [T.h0[r] * x + sum(T.c0[r, j] * z[j] for j in range(T.noises)) for r in range(T.registers)]
    points = []
    for k in range(T.nfe):
        points.append(S[0])
        D, z = f(S[0], T.t[k]), draw(T.C[k])
        S = [
            sum(T.A[k, r, q] * S[q] for q in range(T.registers)) + T.B[k, r, 0] * D
            + sum(T.C[k, r, j] * z[j] for j in range(T.noises)) + (0 if T.E is None else T.E[k, r])
            for r in range(T.registers)
        ]  # fmt: skip
    return S[0], points


VARIANTS = {
    **{name: make() for name, make in solvers.ALL.items()},
    "euler_t": solvers.euler("t"),
    "heun_t": solvers.heun(variable="t"),
    "heun_churn": solvers.heun(churn=3.0),
    "ddim_eta": solvers.ddim(0.6),
    "ddpm_beta": solvers.ddpm("beta"),
    "dpm_solver_pp_1": solvers.dpm_solver_pp(1),
    "dpm_solver_pp_3": solvers.dpm_solver_pp(3),
    "dpm_solver_pp_heun": solvers.dpm_solver_pp(2, form="heun"),
    "dpm_solver_pp_sde": solvers.dpm_solver_pp(2, eta=1.0),
    "bdia_edm": solvers.bdia(0.5, "edm"),
    "deis_4": solvers.deis(4),
    "deis_lam": solvers.deis(3, "lam"),
    "deis_rho": solvers.deis(2, "rho"),
    "unipc_full": solvers.unipc(3, lower_order_final=False),
    "unipc_1": solvers.unipc(1, lower_order_final=False),
    "unipc_2_bh1": solvers.unipc(2, "bh1", lower_order_final=False),
    "unip": solvers.unipc(3, corrector=False, lower_order_final=False),
    "dpm_solver_2s": solvers.dpm_solver(2, "singlestep"),
    "dpm_solver_3m": solvers.dpm_solver(3, "multistep"),
    "dpm_solver_pp_2s": solvers.dpm_solver_pp(2, method="singlestep", form="heun"),
    "dpm_solver_pp_3s": solvers.dpm_solver_pp(3, method="singlestep", form="heun"),
    "dpm_solver_pp_2s_sde": solvers.dpm_solver_pp(2, 1.0, method="singlestep"),
    "dpm_solver_pp_2s_ancestral": solvers.dpm_solver_pp(2, 1.0, method="ancestral"),
    "dpm_solver_pp_2s_between": solvers.dpm_solver_pp(2, method="ancestral"),
    "dpm_solver_pp_3_sde": solvers.dpm_solver_pp(3, 1.0),
    "heavy_ball_unipc": solvers.heavy_ball(3, 0.8, "unipc"),
    "sa_solver_pece": solvers.sa_solver(2, 3, 0.0, mode="PECE", lower_order_final=False),
    "sa_solver_eps": solvers.sa_solver(2, 3, 0.0, prediction="eps", lower_order_final=False),
    "deis_rk_2": solvers.deis(2, method="rk"),
    "deis_rk_3": solvers.deis(3, method="rk"),
    "deis_rk_4": solvers.deis(4, method="rk"),
    "deis_ipndm": solvers.deis(4, method="ipndm"),
    "unipc_5_eps": solvers.unipc(5, lower_order_final=False, prediction="eps"),
    "unipc_vary": solvers.unipc(2, "vary_coeff", lower_order_final=False),
    "unipc_singlestep": solvers.unipc(3, method="singlestep"),
    "pndm_s": solvers.pndm(2),
    "pndm_ramp": solvers.pndm(4, "ramp"),
    "sa_ode": solvers.sa_solver(3, 4, 0.0, lower_order_final=False),
    "sa_few_steps": solvers.sa_solver(2, 2, 1.0, None, few_steps=True),
}


@pytest.mark.parametrize("solver", VARIANTS.values(), ids=VARIANTS)
def test_rows_do_what_the_formulas_say(solver):
    """On a nonlinear model, with the noises in the same order."""
    f = lambda x, t: np.tanh(3 * x + t) - 0.2 * x
    t = times.quadratic(P, 6)
    x = np.random.default_rng(1).normal(size=4)
    T = solver(P, t)
    want, at = run_directly(solver, grid(P, t), x, f, np.random.default_rng(2))
    got, points = run_rows(T, x, f, np.random.default_rng(2))
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(points, at, rtol=1e-10, atol=1e-10)
    assert T.nfe == solver.cost(6) and T.stochastic == solver.stochastic
    assert "denoise(x, t)" in T.explain() and T.explain().count("denoise") == T.nfe


def test_registers_are_few():
    """One for each value that truly crosses an evaluation: DESIGN's five are enough for all."""
    t = times.logsnr(P, 10)
    R = lambda s: s(P, t).registers
    assert [R(solvers.ddim()), R(solvers.ddpm()), R(solvers.heun())] == [1, 1, 2]
    assert [R(solvers.dpm_solver_pp(o)) for o in (1, 2, 3)] == [1, 2, 3]
    assert [R(solvers.deis(o)) for o in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert [R(solvers.unipc(o)) for o in (1, 2, 3)] == [3, 4, 5]


def test_a_noise_may_be_used_twice_and_a_point_evaluated_twice():
    def sampler(x, model, noise):
        z = noise()
        y = x + 0.5 * z
        D0 = model(y, 0.9)
        D1 = model(y, 0.5)  # the same point again
        return 0.25 * y + D0 - 2 * D1 + z

    T = jdiff.trace(sampler, P)
    np.testing.assert_allclose(T.unrolled(), [[1, 0, 0, 0.5, 0, 0], [1, 0, 0, 0.5, 0, 0], [0.25, 1, -2, 1.125, 0, 0]])


def test_two_noises_in_one_row_are_two():
    def sampler(x, model, noise):
        y = x + 3.0 * noise() + 4.0 * noise()
        return model(y, 0.5) + 1.0 * noise() - 2.0 * noise()

    T = jdiff.trace(sampler, P)
    assert (
        T.noises == 2 and sorted(T.unrolled()[0, 2:]) == [0, 0, 3, 4] and sorted(T.unrolled()[1, 2:]) == [-2, 0, 0, 1]
    )
    zeros = jdiff.denoiser(lambda x, t: 0 * x, P, "x0")
    x = np.asarray(jdiff.sample(zeros, T, jnp.zeros((40000, 1)), jax.random.key(0)))
    assert abs(x.var() - 5) < 5 * 4 * np.sqrt(2 / 40000)


def test_coefficients_may_have_the_samples_shape():
    w = np.array([[1.0], [2.0]])  # a coefficient a row of a (2, 3) sample
    T = jdiff.trace(lambda x, model, noise: (1 - w) * model(x, np.array([[0.4], [0.8]])) + w * x, P)
    assert T.A.shape == (1, 1, 1, 2, 1) and T.t.shape == (1, 2, 1)
    x = jnp.ones((5, 2, 3))
    out = jdiff.sample(jdiff.denoiser(lambda x, t: t * x, P, "x0"), T, x)
    np.testing.assert_allclose(out[0], w + (1 - w) * np.array([[0.4], [0.8]]) * np.ones((2, 3)))


def test_several_outputs():
    T = jdiff.trace(lambda x, model, noise: 2.0 * model(x, 0.5)[1], P, outputs=2)
    den = jdiff.Denoiser(lambda x: (), lambda x, t, carry: ((x, 3 * x), carry), P, "x0")
    np.testing.assert_allclose(jdiff.sample(den, T, jnp.ones((1, 2))), 6 * np.ones((1, 2)))


@pytest.mark.parametrize(
    ("sampler", "says"),
    [
        (lambda x, model, noise: x * model(x, 0.5), "cannot multiply two symbols"),
        (lambda x, model, noise: x + 1.0, "cannot add the constant"),
        (lambda x, model, noise: 0.5, "returned 0.5"),
        (lambda x, model, noise: x, "no network evaluation"),
    ],
)
def test_what_is_no_tableau(sampler, says):
    with pytest.raises((TypeError, ValueError), match=says):
        jdiff.trace(sampler, P)


def test_validate_names_the_entry():
    T = solvers.ddim()(P, times.uniform(P, 3))
    A = T.A.copy()
    A[1, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"ddim: A\[1, 0, 0\] = nan"):
        T.replace(A=A).validate()
    with pytest.raises(ValueError, match=r"B\[2, 0, 0\] = 1e\+09"):
        T.replace(B=np.where(np.arange(3)[:, None, None] == 2, 1e9, T.B)).validate()
    with pytest.raises(ValueError, match="C has shape"):
        T.replace(C=np.zeros((2, 1, 1))).validate()
    with pytest.raises(ValueError, match="sigma = 0 without reaching it"):
        solvers.heun()(process.edm(), [1.0, 1e-9, 1e-12])
