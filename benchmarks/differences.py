"""The effects that docs/differences.md quotes: this library's form beside the published one, on exact models.

    python benchmarks/differences.py            two minutes on two cores

Model: a Gaussian in 8 dimensions, standard deviations 0.02 to 2, float64, 256 starts from the prior. rms is the root
mean square of (sample - exact flow at sigma = 0), or at the grid's own end where it ends earlier.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import exact, interpolants, process, solvers, times

STD = np.geomspace(0.02, 2.0, 8)
MODEL = exact.gaussian(np.linspace(-1.0, 1.0, 8), STD**2)
VP = process.vp_discrete(np.linspace(1e-4, 2e-2, 1000))
EDM = process.edm()
FLOW = process.flow()
Z = np.random.default_rng(0).normal(size=(256, 8))


def rms(solver, p, t, to_data=True, dtype=jnp.float64, scale=1.0):
    x = p.prior_std * Z if t[0] == p.t_max else p.alpha(t[0]) * MODEL.means[0] + p.sigma(t[0]) * Z
    goal = MODEL.flow(p, jnp.asarray(x), t[0], 0.0 if to_data else t[-1])
    found = jdiff.sample(MODEL.denoiser(p), solver(p, t), jnp.asarray(scale * x, dtype))
    return float(np.sqrt(np.mean((np.asarray(found, np.float64) - np.asarray(goal)) ** 2)))


def show(what, columns, **values):
    print(f"\n{what}\n{'':34}" + "".join(f"{c!s:>10}" for c in columns))
    for name, row in values.items():
        print(f"  {name.replace('_', ' '):32}" + "".join(f"{v:10.2g}" for v in row))


def third_order():
    n = (10, 20, 40, 80, 160)
    smooth = lambda k: times.graded(times.logsnr(EDM, k, start=20.0, end=0.01), 6)
    whole = lambda k: times.logsnr(EDM, k)
    for label, grid, end in (("smooth range, graded start", smooth, False), ("whole range", whole, True)):
        ours = [rms(solvers.dpm_solver_pp(3), EDM, grid(k), end) for k in n]
        theirs = [rms(solvers.dpm_solver_pp(3, as_published=True), EDM, grid(k), end) for k in n]
        show(f"DPM-Solver++(3M), edm, log-SNR grid, {label}: rms at steps", n, ours=ours, as_published=theirs)
        if not end:
            slope = lambda e: np.log2(e[-2] / e[-1])
            print(f"  measured order: ours {slope(ours):.2f}, as published {slope(theirs):.2f}")


def lower_order():
    n = (5, 8, 10, 15, 20, 50)
    for end in (0.0, EDM.t_min):
        rows = {}
        for name, make in (("2M", solvers.dpm_solver_pp), ("unipc3", solvers.unipc)):
            order = 2 if name == "2M" else 3
            for lower in (False, True):
                solver = make(order, lower_order_final=lower)
                label = f"{name}_{'lower' if lower else 'full'}"
                rows[label] = [rms(solver, EDM, times.logsnr(EDM, k, end=end)) for k in n]
        show(f"lower_order_final, edm, log-SNR grid, end = {end}: rms at steps", n, **rows)


def unipc_bh():
    n = (5, 8, 10, 20, 50)
    rows = {}
    for order in (1, 2, 3):
        for variant in ("bh1", "bh2"):
            solver = solvers.unipc(order, variant, lower_order_final=False)
            rows[f"unipc{order}_{variant}"] = [rms(solver, VP, times.logsnr(VP, k)) for k in n]
    show("UniPC into sigma = 0 (peers' bh1: NaN), vp 1000, log-SNR grid: rms at steps", n, **rows)


def sde_order_three():
    n = (10, 20, 50, 100, 200)
    rows = {}
    for name, order, as_published in (("order_2", 2, False), ("order_3", 3, False), ("order_3_as_published", 3, True)):
        solver = solvers.dpm_solver_pp(order, eta=1.0, form="heun", as_published=as_published)
        std = [np.sqrt(np.diag(MODEL.law(solver(EDM, times.logsnr(EDM, k)))[1])) for k in n]
        rows[name] = [np.max(np.abs(s / STD - 1.0)) for s in std]
    show("SDE-DPM-Solver++, edm, log-SNR grid: worst relative error of a standard deviation at steps", n, **rows)


def deis_weights():
    p, n = process.vp_linear(), 10
    t = times.quadratic(p, n, end=1e-3)
    x, w = np.polynomial.legendre.leggauss(200)
    worst = 0.0
    for i in range(n):
        for order in range(1, min(i + 1, 3) + 1):
            past = t[i - order + 1 : i]
            basis = lambda u, i=i, past=past: np.prod([(u - s) / (t[i] - s) for s in past], axis=0)
            left, step = np.linspace(t[i], t[i + 1], 10_000, endpoint=False, retstep=True)
            a, s = p.alpha(left), p.sigma(left)
            rectangles = np.sum((p.dsigma(left) * a - s * p.dalpha(left)) / a**2 * basis(left)) * step
            ends = p.sigma(t[i : i + 2]) / p.alpha(t[i : i + 2])
            rho = ends.mean() + 0.5 * (ends[1] - ends[0]) * x
            exact_weight = 0.5 * (ends[1] - ends[0]) * np.sum(w * basis(p.t_of_lam(-np.log(rho))))
            worst = max(worst, abs(rectangles / exact_weight - 1.0))
    print(f"\nDEIS, 10,000 left rectangles in t against exact weights, {n} steps, t^2 grid: worst {worst:.1e} relative")


def repeated_sigma():
    n = (5, 8, 10, 20)
    solver = solvers.deis(3, "lam", lower_order_final=True)
    grid = lambda k: times.karras(VP, k, end=VP.t_min)
    show(
        "the last sigma twice costs one evaluation (DEIS-3, vp 1000, Karras): rms at NFE", n,
        ours=[rms(solver, VP, grid(k)) for k in n], repeated=[rms(solver, VP, grid(k - 1)) for k in n],
    )  # fmt: skip


def grids():
    n = (5, 8, 10, 20, 50)
    index = lambda k: np.linspace(0, 999, k + 1)[::-1][:-1].round()
    linspace = lambda k: np.append((index(k) + 1) / 1000, 0.0)
    rows = {"linspace_then_0": [rms(solvers.dpm_solver_pp(2), VP, linspace(k)) for k in n]}
    rows |= {name: [rms(solvers.dpm_solver_pp(2), VP, g(VP, k)) for k in n] for name, g in times.ALL.items()}
    show("time grids, DPM-Solver++(2M), vp 1000: rms at steps", n, **rows)


def rounded_times():
    t = times.karras(VP, 20)[:-1]
    rho, rounded = (VP.sigma(u) / VP.alpha(u) for u in (t, np.round(t * 1000) / 1000))
    moved = np.abs(rounded / rho - 1).max()
    print(f"\n20 Karras times, vp 1000, rounded to whole timesteps: sigma/alpha moves by up to {moved:.1%}")


def precision():
    n = (10, 50, 100)
    rows = {}
    for name, solver in (("deis3", solvers.deis(3, "lam")), ("unipc3", solvers.unipc(3, lower_order_final=False))):
        grid = lambda k: times.karras(EDM, k, end=EDM.t_min)
        rows[f"{name}_float64"] = [rms(solver, EDM, grid(k), False) for k in n]
        rows[f"{name}_float32_state"] = [rms(solver, EDM, grid(k), False, jnp.float32) for k in n]
    show("float32 state, float64 coefficients, edm, Karras to t_min: rms at steps", n, **rows)

    def weight(dtype, l0, l1, l2, l3):
        """int (u - l1)(u - l2) / ((l0 - l1)(l0 - l2)) e^u du from l0 to l3, in log rho; its closed form."""
        l0, l1, l2, l3 = (dtype(v) for v in (l0, l1, l2, l3))
        F = lambda u: np.exp(u) * (l1 * l2 - l1 * u + l1 - l2 * u + l2 + u * u - 2 * u + 2)
        return (F(l3) - F(l0)) / ((l0 - l1) * (l0 - l2))

    worst = 0.0
    for k in n:
        log_rho = -EDM.lam(times.karras(EDM, k, end=EDM.t_min))
        for i in range(2, k):
            nodes = log_rho[[i, i - 1, i - 2, i + 1]]
            worst = max(worst, abs(weight(np.float32, *nodes) / weight(np.float64, *nodes) - 1))
    print(f"  DEIS-3's weight by its closed form in float32: up to {worst:.1e} relative off (here: float64)")


def prior():
    n = (10, 50)
    solver = solvers.unipc(3, lower_order_final=False)
    show(
        "edm prior: 80 z, or sqrt(80^2 + 1) z; UniPC-3: rms against the flow from 80 z", n,
        ours=[rms(solver, EDM, times.logsnr(EDM, k)) for k in n],
        larger_prior=[rms(solver, EDM, times.logsnr(EDM, k), scale=np.sqrt(1 + 80.0**-2)) for k in n],
    )  # fmt: skip


def cosine():
    p = process.vp_cosine()
    bar = p.alpha(np.arange(1001) / 1000) ** 2
    betas = np.clip(1 - bar[1:] / bar[:-1], None, 0.999)
    clipped = process.vp_discrete(betas)
    moved = int(np.sum(1 - bar[1:] / bar[:-1] > 0.999))
    t = np.arange(1000) / 1000
    print(f"\ncosine with beta <= 0.999: {moved} of 1000 betas change; alpha(1) = {clipped.alpha(1.0):.1e}")
    print(f"  before t = 1 the two differ by {np.abs(clipped.alpha(t) - p.alpha(t)).max():.1e}")
    n = (10, 20)
    make = lambda q: [rms(solvers.dpm_solver_pp(2), q, times.uniform(q, k)) for k in n]
    show("  DPM-Solver++(2M), uniform times: rms at steps", n, ours=make(p), clipped=make(clipped))


def heun_variable():
    n = (5, 9, 19, 49)
    cases = {"flow, uniform": (FLOW, times.uniform), "vp 1000, uniform": (VP, times.uniform)}
    for name, (p, grid) in (cases | {"vp 1000, Karras": (VP, times.karras)}).items():
        rows = {v: [rms(solvers.heun(variable=v), p, grid(p, (k + 1) // 2)) for k in n] for v in ("sigma", "t")}
        show(f"Heun in sigma/alpha or in t, {name}: rms at NFE", n, **rows)


def ddpm_last_step():
    n = (8, 50, 250)
    p, rows = VP, {"ours": [], "noise_into_data_too": []}
    for k in n:
        t = times.uniform(p, k)
        _, cov = MODEL.law(solvers.ddpm("beta")(p, t))
        extra = 1.0 - (p.alpha(t[-2]) / p.alpha(0.0)) ** 2  # beta of the last step
        for row, c in zip(rows.values(), (cov, cov + extra * np.eye(8)), strict=True):
            row.append(np.max(np.sqrt(np.diag(c)) / STD - 1.0))
    show("DDPM 'fixed large', vp 1000, uniform: worst relative excess of a standard deviation at steps", n, **rows)


def vary_coeff():
    n = (10, 20, 50, 100)
    rows = {}
    for order in (2, 3):
        for name in ("ours", "as_published"):
            published = name == "as_published"
            solver = solvers.unipc(order, "vary_coeff", lower_order_final=False, as_published=published)
            rows[f"order_{order}_{name}"] = [rms(solver, VP, times.logsnr(VP, k)) for k in n]
        solver = solvers.unipc(order, lower_order_final=False)
        rows[f"order_{order}_bh2"] = [rms(solver, VP, times.logsnr(VP, k)) for k in n]
    show("UniPC vary_coeff, vp 1000, log-SNR grid: rms at steps", n, **rows)


def equal_steps(k):
    """The official log-SNR grid of DPM-Solver-fast: steps of order 3, 2 and 1 equally long."""
    sizes = [3] * (k // 3 - 1) + [2, 1] if k % 3 == 0 else [3] * (k // 3) + [k % 3]
    ends = VP.lam(times.logsnr(VP, len(sizes), end=VP.t_min))
    lam = [np.linspace(ends[i], ends[i + 1], m + 1)[:-1] for i, m in enumerate(sizes)]
    return np.append(VP.t_of_lam(np.concatenate(lam)), VP.t_min)


def singlestep():
    n = (12, 20, 30, 60)
    even = lambda k: times.logsnr(VP, k, end=VP.t_min)
    show(
        "DPM-Solver-fast, vp 1000 to t_min: evaluations even in log-SNR, or the official equal steps: rms at NFE", n,
        even=[rms(solvers.dpm_solver(), VP, even(k), False) for k in n],
        equal_steps=[rms(solvers.dpm_solver(), VP, equal_steps(k), False) for k in n],
        multistep_3_eps=[rms(solvers.dpm_solver(3, "multistep"), VP, even(k), False) for k in n],
        multistep_2M_x0=[rms(solvers.dpm_solver_pp(), VP, even(k), False) for k in n],
    )  # fmt: skip


def published_ipndm_v(g, x, model, noise):
    """iPNDM_v of order 3 with diff-sampler's weights, on `edm`: brackets are missing in the second difference's."""
    past, steps = [], -np.diff(g.t)
    for i in range(g.n):
        past = [model(x, g.t[i], kind="eps"), *past[:2]]
        r = steps[i] / steps[i - 1]
        if i == 0:
            d = past[0]
        elif i == 1:
            d = (1 + r / 2) * past[0] - (r / 2) * past[1]
        else:
            h, h1, h2 = steps[i], steps[i - 1], steps[i - 2]
            c = (1 - h / (3 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
            d = (1 + r / 2 + c) * past[0] - (r / 2 + (1 + h1 / h2) * c) * past[1] + (c * h1 / h2) * past[2]
        x = x - steps[i] * d
    return x


def ipndm_v():
    n = (10, 20, 40, 80)
    grid = lambda k: times.karras(EDM, k, end=EDM.t_min)
    published = jdiff.Solver("ipndm_v", published_ipndm_v, 3)
    show(
        "variable-step Adams-Bashforth of order 3 in sigma, edm, Karras to t_min: rms at steps", n,
        ours=[rms(solvers.deis(3, "rho"), EDM, grid(k), False) for k in n],
        as_published=[rms(published, EDM, grid(k), False) for k in n],
        ipndm_3=[rms(solvers.deis(3, method="ipndm"), EDM, grid(k), False) for k in n],
        ipndm_4=[rms(solvers.deis(4, method="ipndm"), EDM, grid(k), False) for k in n],
        log_snr=[rms(solvers.deis(3, "lam"), EDM, grid(k), False) for k in n],
    )  # fmt: skip


def two_s_sde(correlation):
    """SDE-DPM-Solver++(2S) on `edm` with the given correlation of the inner point's noise with the step's."""

    def sampler(g, x, model, noise):
        for i in range(0, g.n - 1, 2):
            (s0, s1, s2), z = g.s[i : i + 3], noise()
            D = model(x, g.t[i])
            part = lambda a, b: b * np.sqrt(1 - (b / a) ** 2)
            u = (s1 / s0) ** 2 * x + (1 - (s1 / s0) ** 2) * D + part(s0, s1) * z
            D1, c = model(u, g.t[i + 1]), correlation(s0, s1, s2)
            mean = (s2 / s0) ** 2 * x + (1 - (s2 / s0) ** 2) * D1
            x = mean + part(s0, s2) * (c * z + np.sqrt(1 - c**2) * noise())
        return model(x, g.t[-2])

    return jdiff.Solver("2S", sampler, 2)


def path_noise():
    n = (11, 21, 51, 101)
    exact_one = lambda s0, s1, s2: s2 * np.sqrt((s0**2 - s1**2) / (s0**2 - s2**2)) / s1
    kinds = {
        "the SDE's own": lambda s0, s1, s2: exact_one(s0, s1, s2),
        "Brownian in sigma (k-diffusion)": lambda s0, s1, s2: np.sqrt((s0 - s1) / (s0 - s2)),
        "independent": lambda s0, s1, s2: 0.0,
    }
    rows = {}
    for name, correlation in kinds.items():
        std = [np.sqrt(np.diag(MODEL.law(two_s_sde(correlation)(EDM, times.logsnr(EDM, k)))[1])) for k in n]
        rows[name] = [np.max(np.abs(s / STD - 1.0)) for s in std]
    show("SDE-DPM-Solver++(2S), edm, log-SNR grid: worst relative error of a standard deviation at NFE", n, **rows)


def momentum():
    n = (8, 20, 50, 100)
    rows = {}
    for beta in (0.8, 0.5):
        for name in ("ours", "as_published"):
            solver = solvers.heavy_ball(3, beta, "unipc", as_published=name == "as_published")
            std = [np.sqrt(np.diag(MODEL.law(solver(VP, times.logsnr(VP, k)))[1])) for k in n]
            rows[f"beta_{beta}_{name}"] = [np.max(np.abs(s / STD - 1.0)) for s in std]
    show("UniPC-3 with heavy ball, vp 1000, log-SNR: worst relative error of a standard deviation at steps", n, **rows)
    end = VP.t_min
    mass = lambda T: abs(T.unrolled()[-1] @ np.append(VP.alpha(T.t[0]), np.ones(T.nfe)) - VP.alpha(end))
    rows = {}
    for name in ("ours", "as_published"):
        solver = solvers.heavy_ball(3, 0.8, "unipc", as_published=name == "as_published")
        rows[name] = [mass(solver(VP, times.logsnr(VP, k, end=end))) for k in n]
    show("the same, beta 0.8, to t_min: how far a point mass at 1 is moved", n, **rows)


def interpolant_heun():
    n = (10, 20, 40, 80, 160)
    model = interpolants.between(interpolants.Interpolant(), MODEL, exact.gaussian(np.zeros(8), 1.0))
    drift = interpolants.drift(model.interpolant, b=model.field("b"))
    goal, rows = MODEL.means[0] + STD * Z, {}
    for name, published in (("ours", False), ("as_published", True)):
        tables = [interpolants.sde(drift.process, times.uniform(FLOW, k), 0.0, "heun", published) for k in n]
        found = [np.asarray(jdiff.sample(drift, T, jnp.asarray(Z))) for T in tables]
        rows[name] = [np.sqrt(np.mean((x - goal) ** 2)) for x in found]
    show("Interpolant to N(0, 1), linear, Brownian: Heun's ODE from t = 1 to 0, rms at steps", n, **rows)


PARTS = (
    third_order, lower_order, unipc_bh, sde_order_three, deis_weights, repeated_sigma, grids, rounded_times, precision,
    prior, cosine, heun_variable, ddpm_last_step, vary_coeff, singlestep, ipndm_v, path_noise, momentum,
    interpolant_heun,
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    for part in PARTS:
        if part.__name__ in args.parts:
            part()


if __name__ == "__main__":
    main()
