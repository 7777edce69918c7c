"""Our solvers on the exact models of a survey of published samplers, beside the best number each cell had there.

    python benchmarks/peers.py models.npz                     all cells, a few minutes on two cores
    python benchmarks/peers.py models.npz --models gauss8 --nfe 5 10 20 --top 5

models.npz holds `<name>_weights (K,)`, `<name>_means (K, d)` and `<name>_covs (K, d, d)` of the mixtures gmm2
(25 sharp modes, d = 2), gmm64 (10 modes, d = 64) and gauss8 (one Gaussian, standard deviations 0.02 to 2, d = 8).

A cell is (model, start, NFE). rms is the root mean square over trajectories and coordinates of (sample - exact
probability-flow solution at sigma = 0), float64, from the start's own prior: vp (1000 discrete steps, linear betas
1e-4 to 2e-2, sigma/alpha = 157), edm (sigma = 80), flow (t = 1). NFE is counted; Heun spends at most what is given.
The reference is the closed form on gauss8; elsewhere SciPy's DOP853 in the angle arctan(sigma/alpha), which is first
run on gauss8 against the closed form. On gmm2 and gmm64 a few trajectories near the borders between modes make most
of the rms: with other starting noise it changes by factors (--same shows that on identical set-ups), so the ranking
is by the median over trajectories, and the rms of those two models is to be read with care.
"""

import argparse
import collections
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate

import jdiff
from jdiff import exact, process, solvers, times

NFE = (5, 6, 8, 10, 15, 20, 50, 100)
TRAJECTORIES = {"gmm2": 1024, "gmm64": 256, "gauss8": 512}
STARTS = {
    "vp": process.vp_discrete(np.linspace(1e-4, 2e-2, 1000)),
    "edm": process.edm(),
    "flow": process.flow(),
}

# Source: peer survey. The lowest rms of any published sampler there (diffusers 0.42.1, k-diffusion 0.1.1.post1, and
# the official codes of DPM-Solver, UniPC, DPM-Solver-v3, DC-Solver, EDM), float64, in the order of NFE above.
BEST = {
    ("gmm2", "vp"): (0.065, 0.056, 0.036, 0.038, 0.026, 0.016, 0.0012, 0.00086),
    ("gmm2", "edm"): (0.13, 0.11, 0.068, 0.044, 0.026, 0.015, 0.00076, 6.3e-05),
    ("gmm2", "flow"): (0.096, 0.08, 0.057, 0.048, 0.026, 0.024, 0.0048, 0.0012),
    ("gmm64", "vp"): (0.071, 0.064, 0.049, 0.025, 0.015, 0.0051, 0.00076, 0.00035),
    ("gmm64", "edm"): (0.17, 0.12, 0.062, 0.026, 0.0058, 0.0041, 0.00088, 0.00022),
    ("gmm64", "flow"): (0.14, 0.094, 0.055, 0.046, 0.037, 0.035, 0.001, 0.00031),
    ("gauss8", "vp"): (0.037, 0.014, 0.0065, 0.0043, 0.0016, 0.00069, 0.00089, 8.7e-05),
    ("gauss8", "edm"): (0.031, 0.014, 0.019, 0.009, 0.0026, 0.00061, 3.5e-05, 3.8e-05),
    ("gauss8", "flow"): (0.05, 0.039, 0.029, 0.021, 0.013, 0.0094, 0.0028, 0.00087),
}

# The same for the median over trajectories of each one's rms; another sampler may be the best.
MEDIAN = {
    ("gmm2", "vp"): (0.016, 0.017, 0.0074, 0.0056, 0.0017, 0.001, 0.00037, 4.8e-05),
    ("gmm2", "edm"): (0.027, 0.017, 0.017, 0.0052, 0.0019, 0.0012, 4.8e-05, 2.9e-05),
    ("gmm2", "flow"): (0.085, 0.061, 0.026, 0.014, 0.011, 0.0097, 0.0026, 0.00071),
    ("gmm64", "vp"): (0.045, 0.032, 0.017, 0.0069, 0.002, 0.00094, 0.00032, 5.5e-05),
    ("gmm64", "edm"): (0.064, 0.043, 0.014, 0.0069, 0.0022, 0.0012, 2.8e-05, 1.2e-05),
    ("gmm64", "flow"): (0.074, 0.059, 0.04, 0.029, 0.013, 0.0075, 0.00086, 0.00022),
    ("gauss8", "vp"): (0.035, 0.013, 0.006, 0.0039, 0.0015, 0.00064, 0.00074, 8.1e-05),
    ("gauss8", "edm"): (0.027, 0.013, 0.017, 0.0084, 0.0022, 0.00051, 3.1e-05, 3.1e-05),
    ("gauss8", "flow"): (0.046, 0.036, 0.026, 0.019, 0.012, 0.0085, 0.0024, 0.00071),
}

# The survey's own rms of set-ups that are ours too: how much of a difference is the draw of the starting noise.
SAME = {  # (solver, grid, last, start): {model: rms at NFE 5, 8, 10, 20, 50}
    ("2M", "karras", "0", "edm"): {
        "gmm2": (0.23, 0.13, 0.11, 0.053, 0.018),
        "gmm64": (0.23, 0.16, 0.094, 0.012, 0.002),
        "gauss8": (0.11, 0.15, 0.12, 0.029, 0.0038),
    },
    ("2M", "logsnr", "0", "edm"): {
        "gmm2": (0.16, 0.12, 0.072, 0.029, 0.012),
        "gmm64": (0.31, 0.14, 0.096, 0.0055, 0.0015),
        "gauss8": (0.15, 0.025, 0.035, 0.014, 0.0023),
    },
    ("unipc2", "logsnr", "0", "edm"): {
        "gmm2": (0.16, 0.097, 0.049, 0.038, 0.0059),
        "gmm64": (0.32, 0.13, 0.083, 0.0051, 0.0014),
        "gauss8": (0.14, 0.047, 0.045, 0.0098, 0.00066),
    },
}


def all_solvers():
    """Short name: solver."""
    found = {"ddim": solvers.ddim(), "heun": solvers.heun(), "heun t": solvers.heun(variable="t")}
    for lower in (False, True):
        tail = " lower" if lower else ""
        pp = lambda order, lower=lower, **options: solvers.dpm_solver_pp(order, lower_order_final=lower, **options)
        found |= {f"2M{tail}": pp(2), f"2M heun{tail}": pp(2, form="heun"), f"3M{tail}": pp(3)}
        found[f"3M published{tail}"] = pp(3, as_published=True)
        for variable in ("t", "rho", "lam"):
            found[f"deis3 {variable}{tail}"] = solvers.deis(3, variable, lower_order_final=lower)
        for order in (2, 3):
            found[f"unipc{order}{tail}"] = solvers.unipc(order, lower_order_final=lower)
            found[f"unipc{order} bh1{tail}"] = solvers.unipc(order, "bh1", lower_order_final=lower)
    return found


def all_grids(p):
    """(grid, where it ends): times of n steps. "0": sigma = 0 after t_min; "0 late": after t_min / 10; "t_min"."""
    late = dataclasses.replace(p, t_min=p.t_min / 10)
    found = {}
    for name, grid in times.ALL.items():
        found[name, "0"] = lambda n, grid=grid: grid(p, n)
        found[name, "t_min"] = lambda n, grid=grid: grid(p, n, end=p.t_min)
        if name in ("logsnr", "karras"):
            found[name, "0 late"] = lambda n, grid=grid: grid(late, n)
    return found


def steps(solver, nfe, last):
    return solver.steps(nfe) if last != "t_min" or solver.name != "heun" else nfe // 2


def dop853(model, p, x):
    """The probability flow from x at t_max to sigma = 0, along the angle phi: z = cos(phi) x0 + sin(phi) eps."""
    polar = process.vp_cosine(s=1e-12)  # any process knows E[x0 | cos x0 + sin eps]; here t = 2 phi / pi
    denoise = jax.jit(lambda z, t: model.denoiser(polar)(z, t))

    def slope(phi, z):
        z = z.reshape(x.shape)
        D = np.asarray(denoise(z, 2.0 * phi / np.pi))
        eps = (z - np.cos(phi) * D) / np.sin(phi)
        return (np.cos(phi) * eps - np.sin(phi) * D).ravel()

    a, s = float(p.alpha(p.t_max)), float(p.sigma(p.t_max))
    first, last = np.arctan2(s, a), 1e-6
    z = np.asarray(x) / np.hypot(a, s)
    found = scipy.integrate.solve_ivp(slope, (first, last), z.ravel(), "DOP853", rtol=1e-8, atol=1e-9)
    return np.asarray(denoise(found.y[:, -1].reshape(x.shape), 2.0 * last / np.pi))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="models.npz")
    parser.add_argument("--models", nargs="+", default=list(TRAJECTORIES), choices=list(TRAJECTORIES))
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--nfe", nargs="+", type=int, default=list(NFE), choices=NFE)
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise")
    parser.add_argument("--top", type=int, default=0, help="also print the best so many set-ups of each cell")
    parser.add_argument("--same", action="store_true", help="also print set-ups that the survey ran too")
    parser.add_argument("--csv", help="write every rms to this file")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    began = time.perf_counter()

    file = np.load(args.file)
    models = {}
    for name in args.models:
        w, m, c = (file[f"{name}_{what}"] for what in ("weights", "means", "covs"))
        models[name] = exact.mixture(w, m, list(c)) if len(w) > 1 else exact.gaussian(m[0], c[0])

    tables = {}
    for start in args.starts:
        for nfe in args.nfe:
            for (grid, last), make in all_grids(STARTS[start]).items():
                for name, solver in all_solvers().items():
                    tables[start, nfe, name, grid, last] = solver(STARTS[start], make(steps(solver, nfe, last)))
    print(f"{len(tables)} tables built, {time.perf_counter() - began:.0f} s", flush=True)

    rms, median = {}, {}
    for model_name, model in models.items():
        z = np.random.default_rng(args.seed).normal(size=(TRAJECTORIES[model_name], model.means.shape[1]))
        for start in args.starts:
            p = STARTS[start]
            x = jnp.asarray(p.prior_std * z)
            if isinstance(model, exact.Gaussian):
                target = np.asarray(model.flow(p, x, p.t_max, 0.0))
                print(f"{model_name} {start}: DOP853 - closed form: {np.abs(dop853(model, p, x) - target).max():.1e}")
            else:
                target = dop853(model, p, x)
            denoiser = model.denoiser(p)
            for (s, nfe, *setup), table in tables.items():
                if s == start:
                    error = np.asarray(jdiff.sample(denoiser, table, x)) - target
                    rms[model_name, start, nfe, *setup] = np.sqrt(np.mean(error**2))
                    median[model_name, start, nfe, *setup] = np.median(np.sqrt(np.mean(error**2, 1)))
            print(f"{model_name} {start} done, {time.perf_counter() - began:.0f} s", flush=True)

    if args.csv:
        with open(args.csv, "w") as out:
            print("model,start,nfe,solver,grid,last,rms,median", file=out)
            for key, value in rms.items():
                print(*key, f"{value:.4g}", f"{median[key]:.4g}", sep=",", file=out)
    print("\nour best median over trajectories / the best published median (below 1: better), and with what")
    cells(args, median, MEDIAN)
    print("\nour best rms / the best published rms (below 1: better), and with what")
    cells(args, rms, BEST)
    ranking(args, median, MEDIAN)
    if args.same:
        same(rms)


def cells(args, ours, published):
    """The best of each cell beside the number to beat."""
    won = total = 0
    for model in args.models:
        for start in args.starts:
            for nfe in args.nfe:
                cell = {k[3:]: v for k, v in ours.items() if k[:3] == (model, start, nfe)}
                order = sorted(cell, key=cell.__getitem__)
                best, beat = cell[order[0]], published[model, start][NFE.index(nfe)]
                won, total = won + (best < beat), total + 1
                name = f"{model:7}{start:5}{nfe:4}"
                print(f"{name} {best:8.2g} / {beat:8.2g} = {best / beat:5.2f}  {', '.join(order[0])}")
                for k in order[1 : args.top]:
                    print(f"{'':17}{cell[k]:8.2g} {'':19} {', '.join(k)}")
    print(f"{won} of {total} cells better than every published sampler of the survey")


def ranking(args, ours, published):
    """Each solver with its best grids, by the mean over cells of log(ours / best published)."""
    for low, high in ((5, 6), (8, 10), (15, 20), (50, 100)):
        logs = collections.defaultdict(list)
        for (model, start, nfe, *setup), value in ours.items():
            if low <= nfe <= high:
                logs[tuple(setup)].append(np.log(value / published[model, start][NFE.index(nfe)]))
        if not logs:
            continue
        print(f"\nNFE {low} to {high}: geometric mean over cells of median / best published; each solver's best grids")
        score = {setup: np.exp(np.mean(v)) for setup, v in logs.items()}
        for name in all_solvers():
            order = sorted((s for s in score if s[0] == name), key=score.__getitem__)[:3]
            print(f"  {name:20}" + "   ".join(f"{score[s]:6.2f} {s[1]}, {s[2]}" for s in order))


def same(rms):
    print("\nset-ups of the survey, rms, ours / theirs: the difference is the draw of the starting noise")
    for (*setup, start), values in SAME.items():
        for model, numbers in values.items():
            pairs = [((model, start, n, *setup), v) for n, v in zip((5, 8, 10, 20, 50), numbers, strict=True)]
            ratios = [f"{key[2]}: {rms[key] / v:.2f}" for key, v in pairs if key in rms]
            print(f"  {', '.join(setup):24}{start:5}{model:7}" + "  ".join(ratios))


if __name__ == "__main__":
    main()
