"""What make_official.py lifts: the authors' own codes, one folder of them, behind the signature of cases.py.

Each file is read as it is in the authors' repository (see make_official.py). The network that a code calls returns
what it asks for (eps, or the denoised sample), computed from the denoised sample of the basis vectors.
"""

import ast
import importlib
import itertools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from cases import Case

BETAS = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)


def noise_network(model, level):
    """A network eps(x, t) on (1, n) tensors; level(t) -> (alpha, sigma)."""

    def network(x, t):
        alpha, sigma = level(float(torch.as_tensor(t).reshape(-1)[0]))
        return (x - alpha * model(x.reshape(1, -1), alpha, sigma).reshape(x.shape)) / sigma

    return network


def levels(times, level) -> np.ndarray:
    return np.array([level(float(t)) for t in times])


def solver_class(stem: str, name: str, klass: str, steps: int, skip: str, make: dict, run: dict, end=1e-3) -> Case:
    """DPM_Solver of dpm_solver_pytorch.py and UniPC of uni_pc.py: the same interface."""
    module = importlib.import_module(stem)
    schedule = module.NoiseScheduleVP("discrete", betas=BETAS, dtype=torch.float64)
    level = lambda t: (
        schedule.marginal_alpha(torch.tensor([t])).item(),
        schedule.marginal_std(torch.tensor([t])).item(),
    )

    def sampler(x, model, noise):
        solver = getattr(module, klass)(noise_network(model, level), schedule, **make)
        return solver.sample(x.reshape(1, 1, 1, -1), steps=steps, skip_type=skip, t_end=end, **run).reshape(1, -1)

    solver = getattr(module, klass)(lambda x, t: x, schedule, **make)
    if run["method"] == "singlestep":
        times, _ = solver.get_orders_and_timesteps_for_singlestep_solver(steps, run["order"], skip, 1.0, end, "cpu")
    elif run["method"] == "singlestep_fixed":
        times = solver.get_time_steps(skip, 1.0, end, steps // run["order"], "cpu")
    else:
        times = solver.get_time_steps(skip, 1.0, end, steps, "cpu")
    options = {"steps": steps, "skip_type": skip, "t_end": end, **make, **run}
    return Case(name, stem, klass, options, "vp", f"{skip}, 1 to {end:g}", sampler, levels(times, level))


def pndm(name: str, method: str, steps: int) -> Case:
    module = importlib.import_module("pndm_method")
    cumulative = torch.cat([torch.ones(1), torch.cumprod(1 - BETAS, 0)])
    level = lambda t: (cumulative[int(t) + 1].sqrt().item(), (1 - cumulative[int(t) + 1]).sqrt().item())
    times = [float(t) for t in range(999 - 999 % steps, -1, -(1000 // steps))][:steps] + [-1.0]
    step = getattr(module, f"gen_order_{method}")

    def sampler(x, model, noise):
        image, outputs, network = x.reshape(1, 1, 1, -1), [], noise_network(model, level)
        for now, then in itertools.pairwise(times):
            pair = torch.full((1,), now), torch.full((1,), then)
            image = step(image, *pair, network, cumulative, outputs)
        return image.reshape(1, -1)

    note = "half steps truncate to whole indices; the last step ends at index -1, alpha = 1"
    return Case(name, "PNDM", f"gen_order_{method}", {"steps": steps}, "vp", f"every {1000 // steps}th index",
                sampler, levels(times, level), note)  # fmt: skip


def deis(name: str, steps: int, phase: str, power: float, **options) -> Case:
    """th_deis on the continuous schedule, beta 0.1 to 20, from t = 1 to 1e-3."""
    import jax

    jax.config.update("jax_enable_x64", True)
    package = importlib.import_module("th_deis.vpsde")
    make = importlib.import_module("th_deis.sampler")
    sde = package.VPSDE(*package.get_linear_alpha_fns(0.1, 20.0), 1e-3, 1.0)
    level = lambda t: (float(np.sqrt(sde.t2alpha_fn(t))), float(np.sqrt(-np.expm1(np.log(sde.t2alpha_fn(t))))))
    times = importlib.import_module("th_deis.sde").get_rev_ts(sde, steps, power, ts_phase=phase)

    def sampler(x, model, noise):
        return make.get_sampler(sde, noise_network(model, level), phase, power, steps, **options)(x)

    settings = {"num_step": steps, "ts_phase": phase, "ts_order": power, **options}
    return Case(
        name, "DEIS", "get_sampler", settings, "vp_linear", f"{phase}, power {power:g}", sampler, levels(times, level)
    )


def diff_sampler(name: str, entry: str, times: np.ndarray, **options) -> Case:
    """diff-sampler on the EDM form, x = x0 + sigma eps."""
    module = importlib.import_module("diff_solvers")
    level = lambda t: (1.0, t)

    def sampler(x, model, noise):
        network = lambda x, t, class_labels=None: model(x.reshape(1, -1), 1.0, float(t)).reshape(x.shape)
        start = (x / times[0]).reshape(1, 1, 1, -1)
        out = getattr(module, entry)(network, start, t_steps=torch.tensor(times), **options)
        return out.reshape(1, -1)

    return Case(name, "diff-sampler", entry, options, "ve", "karras", sampler, levels(times, level))


def sa_solver(name: str, mode: str, tau: float, predictor: int, corrector: int, steps=8, kind="data", **more) -> Case:
    module = importlib.import_module("sa_solver")
    module.tqdm = lambda steps: steps
    schedule = module.NoiseScheduleVP("discrete", betas=BETAS, dtype=torch.float64)
    level = lambda t: (
        schedule.marginal_alpha(torch.tensor([t])).item(),
        schedule.marginal_std(torch.tensor([t])).item(),
    )
    make = {"algorithm_type": f"{kind}_prediction"}
    run = {"predictor_order": predictor, "corrector_order": corrector, "skip_type": "logSNR", **more}

    def sampler(x, model, noise):
        solver = module.SASolver(noise_network(model, level), schedule, **make)
        with mock.patch("torch.randn_like", lambda x: noise().reshape(x.shape)):
            image = x.reshape(1, 1, 1, -1)
            return solver.sample(mode, image, lambda t: tau, steps, **run).reshape(1, -1)

    times = list(module.SASolver(lambda x, t: x, schedule, **make).get_time_steps("logSNR", 1.0, 1e-3, steps, 1, "cpu"))
    ends = levels(times, level)
    if mode == "more_steps":
        ends = np.concatenate([ends, [[1.0, 0.0]]])
    options = {"mode": mode, "tau": tau, "steps": steps, "kind": kind, **run}
    return Case(name, "SA-Solver", "SASolver", options, "vp", "logSNR, 1 to 0.001", sampler, ends)


def two_s_ancestral(name: str, folder: Path, eta: float, steps: int) -> Case:
    """k-diffusion's dpmpp_2s_ancestral, of its file only the functions that it needs."""
    wanted = ("to_d", "get_ancestral_step", "sample_dpmpp_2s_ancestral")
    tree = ast.parse((folder / "k_sampling.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in wanted]
    sizes = types.SimpleNamespace(append_dims=lambda x, n: x[(...,) + (None,) * (n - x.ndim)])
    known = {"torch": torch, "trange": lambda n, **kw: range(n), "utils": sizes}
    exec(compile(tree, "k_sampling.py", "exec"), known)
    sigmas = np.append(karras(steps - 1, 0.1), 0.0)

    def sampler(x, model, noise):
        call = lambda x, sigma: model(x, 1.0, float(sigma[0]))
        return known[wanted[-1]](call, x, torch.tensor(sigmas), eta=eta, noise_sampler=lambda *a: noise())

    levels = np.stack([np.ones_like(sigmas), sigmas], axis=1)
    return Case(name, "k-diffusion", wanted[-1], {"eta": eta}, "ve", "Karras 80..0.1, 0", sampler, levels)


def _momentum_code() -> tuple[types.ModuleType, types.ModuleType]:
    stub = types.ModuleType("diffusers")
    for klass in ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler"):
        setattr(stub, klass, type(klass, (), {}))
    with mock.patch.dict(sys.modules, {"diffusers": stub}):
        sys.modules.pop("momentum_scheduler", None)
        return stub, importlib.import_module("momentum_scheduler")


def momentum_unipc(name: str, order: int, beta: float, steps=8) -> Case:
    """UniPC with heavy ball, driven as diffusers' scheduler of that time drives it: the last time is index 0."""
    _, module = _momentum_code()
    cumulative = torch.cumprod(1 - BETAS, 0)
    alpha, sigma = cumulative.sqrt(), (1 - cumulative).sqrt()
    times = [round(999 * (1 - k / steps)) for k in range(steps + 1)]
    level = lambda t: (alpha[int(t)].item(), sigma[int(t)].item())

    def sampler(x, model, noise):
        s = object.__new__(module.MomentumUniPCMultistepScheduler)
        s.alpha_t, s.sigma_t, s.lambda_t = alpha, sigma, torch.log(alpha / sigma)
        s.config, s.predict_x0, s.solver_p = types.SimpleNamespace(solver_type="bh2"), True, None
        s.timestep_list, s.model_outputs = [], []
        s.initialize_momentum(beta)
        before, now, used = None, x.reshape(1, 1, 1, -1), 0
        for k, t in enumerate(times[:-1]):
            output = model(now.reshape(1, -1), *level(t)).reshape(now.shape)
            if k > 0:
                now = s.multistep_uni_c_bh_update(output, t, before, now, used)
            s.timestep_list, s.model_outputs = [*s.timestep_list, t], [*s.model_outputs, output]
            used = min(order, steps - k, k + 1)
            before, now = now, s.multistep_uni_p_bh_update(output, times[k + 1], now, used)
        return now.reshape(1, -1)

    options = {"order": order, "beta": beta, "steps": steps}
    return Case(name, "momentum-diffusion", "MomentumUniPCMultistepScheduler", options, "vp", "indices 999 to 0",
                sampler, levels(times, level))  # fmt: skip


def momentum(name: str, entry: str, order: float, steps=10) -> Case:
    """The wrappers of DDIM in the momentum code: `order` 2.8 is order 3 with beta = 0.8."""
    stub, module = _momentum_code()
    cumulative = torch.cumprod(1 - BETAS, 0)
    level = lambda t: (
        (cumulative[int(t)].sqrt().item(), (1 - cumulative[int(t)]).sqrt().item()) if t >= 0 else (1.0, 0.0)
    )
    times = [999 - k * (1000 // steps) for k in range(steps)]

    def sampler(x, model, noise):
        base = stub.DDIMScheduler()
        base.config = types.SimpleNamespace(num_train_timesteps=1000, prediction_type="epsilon")
        base.num_inference_steps, base.alphas_cumprod, base.final_alpha_cumprod = steps, cumulative, torch.tensor(1.0)
        wrapped, network = getattr(module, entry)(base, order), noise_network(model, level)
        for t in times:
            x = wrapped.step(network(x, t), t, x)
        return x

    return Case(name, "momentum-diffusion", entry, {"order": order, "steps": steps}, "vp", "trailing",
                sampler, levels([*times, -1], level))  # fmt: skip


def karras(n: int, low=0.002, high=80.0, rho=7.0) -> np.ndarray:
    return np.linspace(high ** (1 / rho), low ** (1 / rho), n + 1) ** rho


def cases(folder: Path) -> Iterator[Case]:
    sys.path.insert(0, str(folder))
    for kind, short in (("dpmsolver", "dpm"), ("dpmsolver++", "dpmpp")):
        make = {"algorithm_type": kind}
        for order in (1, 2, 3):
            for form in ("dpmsolver", "taylor")[: 1 if order == 1 else 2]:
                for lower in (True, False)[: 1 if order == 1 else 2]:
                    run = {"method": "multistep", "order": order, "solver_type": form, "lower_order_final": lower}
                    yield solver_class("dpm_solver_pytorch", f"{short}_multi{order}_{form}_lof{lower:d}_logsnr8",
                                       "DPM_Solver", 8, "logSNR", make, run)  # fmt: skip
                for steps, method in ((9, "singlestep"), (10, "singlestep"), (9, "singlestep_fixed")):
                    if order > 1:
                        run = {"method": method, "order": order, "solver_type": form}
                        yield solver_class("dpm_solver_pytorch", f"{short}_{method}{order}_{form}_logsnr{steps}",
                                           "DPM_Solver", steps, "logSNR", make, run)  # fmt: skip
            run = {"method": "singlestep", "order": order, "solver_type": "dpmsolver"}
            yield solver_class("dpm_solver_pytorch", f"{short}_singlestep{order}_uniform10",
                               "DPM_Solver", 10, "time_uniform", make, run)  # fmt: skip
    for kind, short in (("noise_prediction", "eps"), ("data_prediction", "x0")):
        for variant in ("bh1", "bh2", "vary_coeff"):
            for order in (1, 2, 3, 4):
                for lower in (True, False)[: 1 if order == 1 else 2]:
                    make = {"algorithm_type": kind, "variant": variant}
                    run = {"method": "multistep", "order": order, "lower_order_final": lower}
                    yield solver_class("uni_pc", f"unipc_{short}_{variant}_{order}_lof{lower:d}_logsnr8", "UniPC",
                                       8, "logSNR", make, run)  # fmt: skip
    for steps in (8, 10):
        yield pndm(f"pndm_ddim_{steps}", "1", steps)
        yield pndm(f"pndm_s_{steps}", "2", steps)
        yield pndm(f"pndm_f_{steps}", "4", steps)
    for rk in ("1euler", "2heun", "3kutta", "4rk"):
        yield deis(f"deis_rk_{rk}", 6, "rho", 7, method="rho_rk", rk_method=rk)
    yield deis("deis_ipndm", 8, "t", 1, method="ipndm")
    for order in (0, 1, 2, 3):
        yield deis(f"deis_tab{order}", 8, "t", 2, method="t_ab", ab_order=order)
        yield deis(f"deis_rhoab{order}", 8, "t", 2, method="rho_ab", ab_order=order)
    for order in (2, 3, 4):
        yield diff_sampler(f"diff_ipndm{order}", "ipndm_sampler", karras(8), max_order=order)
        yield diff_sampler(f"diff_ipndm_v{order}", "ipndm_v_sampler", karras(8), max_order=order)
    yield diff_sampler("diff_dpm2", "dpm_2_sampler", karras(5), r=0.5)
    for mode in ("few_steps", "more_steps"):
        for tau in (0.0, 1.0, 0.4):
            for predictor, corrector in ((1, 0), (2, 0), (3, 0), (1, 2), (2, 3), (3, 4)):
                yield sa_solver(f"sa_{mode}_tau{tau:g}_{predictor}{corrector}", mode, tau, predictor, corrector)
    for kind, pc_mode in (("data", "PECE"), ("noise", "PEC"), ("noise", "PECE")):
        for tau, predictor, corrector in ((0.0, 3, 4), (1.0, 2, 3), (0.4, 3, 4)):
            name = f"sa_{kind}_{pc_mode.lower()}_tau{tau:g}_{predictor}{corrector}"
            yield sa_solver(name, "few_steps", tau, predictor, corrector, kind=kind, pc_mode=pc_mode)
    for eta in (0.0, 0.5, 1.0):
        yield two_s_ancestral(f"k_2s_ancestral_eta{eta:g}", folder, eta, 6)
    for order, beta in ((2, 0.5), (3, 0.8), (3, 1.0)):
        yield momentum_unipc(f"hbunipc_{order}_beta{beta:g}", order, beta)
    for short, entry in (("ghvb", "GHVBScheduler"), ("hb", "PLMSWithHBScheduler"), ("nesterov", "PLMSWithNTScheduler")):
        for order in (1, 2, 3, 4, 5):
            yield momentum(f"{short}_{order}_beta0.5", entry, order - 0.5)
        yield momentum(f"{short}_3_beta1", entry, 3)
