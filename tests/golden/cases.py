"""What make_golden.py lifts: the samplers of diffusers and k-diffusion behind one signature, and the list of cases.

A sampler here is a function (x, model, noise) -> sample on float64 tensors (1, n): model(x, alpha, sigma) returns
the denoised sample, noise() a draw. A scheduler that wants another output is given it computed from that one.
"""

import ast
import functools
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch


@dataclass
class Case:
    name: str
    library: str
    entry: str  # class or function
    options: dict
    process: str  # what the state is: "vp" and "flow" as usual, "ve" is x = x0 + sigma eps
    grid: str
    sampler: Callable
    levels: np.ndarray  # (N + 1, 2): (alpha, sigma) at the step ends, noise first
    note: str = ""
    timesteps: list = field(default_factory=list)


# ---- diffusers


@functools.cache
def scheduler_module(stem: str) -> types.ModuleType:
    """The module diffusers.schedulers.scheduling_<stem>, its text read with float64 in place of float32."""
    spec = importlib.util.find_spec(f"diffusers.schedulers.scheduling_{stem}")
    module = types.ModuleType(f"float64_{stem}")
    module.__package__ = "diffusers.schedulers"
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(Path(spec.origin).read_text().replace("float32", "float64"), spec.origin, "exec"), module.__dict__)
    return module


def pair(alpha, sigma) -> tuple[float, float]:
    return float(alpha), float(sigma)


def diffusers_level(scheduler, i: int) -> tuple[float, float]:
    """(alpha, sigma) at the end of step i - 1, with the scheduler's own arithmetic."""
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # the multistep classes
        return pair(*scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i]))
    if "FlowMatch" in type(scheduler).__name__:
        return pair(1 - scheduler.sigmas[i], scheduler.sigmas[i])
    if hasattr(scheduler, "sigmas"):  # EulerDiscrete, HeunDiscrete: the state is x0 + sigma eps
        return pair(1.0, scheduler.sigmas[i])
    if i < len(scheduler.timesteps):  # DDIM, DDPM
        product = scheduler.alphas_cumprod[scheduler.timesteps[i]]
    else:
        product = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))
    return pair(product**0.5, (1 - product) ** 0.5)


def diffusers_case(name, stem, entry, steps, process="vp", sigmas=None, step=None, note="", **options) -> Case:
    module, flow_match = scheduler_module(stem), "FlowMatch" in entry
    if not flow_match:
        options = {"beta_start": 1e-4, "beta_end": 2e-2, "prediction_type": "sample", **options}

    def new():
        scheduler = getattr(module, entry)(**options)
        scheduler.set_timesteps(**({"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}))
        return scheduler

    def sampler(x, model, noise):
        scheduler = new()
        with mock.patch.object(module, "randn_tensor", lambda *a, **k: noise(), create=True):
            for i, t in enumerate(scheduler.timesteps):
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(x, t)  # EulerDiscrete insists; what it returns is for a network
                alpha, sigma = diffusers_level(scheduler, i)
                output = model(x, alpha, sigma)
                if flow_match:  # it takes the velocity eps - x0
                    output = (x - output) / sigma
                x = scheduler.step(output, t, x, return_dict=False, **(step or {}))[0]
        return x

    scheduler = new()
    ends = [diffusers_level(scheduler, i) for i in range(len(scheduler.timesteps) + 1)]
    levels = np.array(list(dict.fromkeys(ends)))  # HeunDiscrete lists its inner levels twice
    spacing = "given sigmas" if sigmas is not None else options.get("timestep_spacing", "default")
    if options.get("use_flow_sigmas") or flow_match:
        spacing = "flow"
    times = [float(t) for t in scheduler.timesteps]
    shown = options | (step or {})
    return Case(name, "diffusers", entry, shown, process, f"{spacing}, {steps} steps", sampler, levels, note, times)


# ---- k-diffusion


@functools.cache
def k_sampling() -> types.ModuleType:
    """k_diffusion.sampling as installed, without its package's __init__ (see above)."""
    root = Path(importlib.util.find_spec("k_diffusion").submodule_search_locations[0])
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__, package.utils = [str(root)], utils
    tree = ast.parse((root / "utils.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) == "append_dims"]
    exec(compile(tree, "utils.py", "exec"), utils.__dict__)
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    return importlib.import_module("k_diffusion.sampling")


def k_case(name, entry, sigmas, grid, note="", **options) -> Case:
    function = getattr(k_sampling(), entry)
    takes_noise = "noise_sampler" in inspect.signature(function).parameters

    def sampler(x, model, noise):
        sampler_noise = {"noise_sampler": lambda *a: noise()} if takes_noise else {}
        call = lambda x, sigma: model(x, 1.0, float(sigma[0]))
        with mock.patch("torch.randn_like", lambda *a: noise()):
            return function(call, x, torch.tensor(sigmas), disable=True, **sampler_noise, **options)

    levels = np.stack([np.ones_like(sigmas), sigmas], axis=1)
    return Case(name, "k-diffusion", entry, options, "ve", grid, sampler, levels, note)


# ---- the cases


def karras(n: int, low=0.002, high=80.0, rho=7.0) -> np.ndarray:
    ramp = np.linspace(0, 1, n)
    return np.append((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho, 0.0)


def cases() -> Iterator[Case]:
    trail, lin = {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}

    make = functools.partial(diffusers_case, stem="ddim", entry="DDIMScheduler", clip_sample=False, **trail)
    yield make("ddim_eta0_trailing10", steps=10)
    yield make("ddim_eta1_trailing10", steps=10, step={"eta": 1.0})
    yield make("ddim_eta0.5_trailing8", steps=8, step={"eta": 0.5})
    yield make("ddim_eta0_trailing8_alpha0", steps=8, set_alpha_to_one=False, note="ends at the table's first level")
    yield make("ddim_clipped_trailing10", steps=10, clip_sample=True, note="must be refused: clipping is not linear")
    make = functools.partial(diffusers_case, stem="ddpm", entry="DDPMScheduler", clip_sample=False, **trail)
    tiny = "variance is clamped to 1e-20, so the last step adds noise of standard deviation 1e-10"
    yield make("ddpm_small_trailing10", steps=10, variance_type="fixed_small", note=tiny)
    yield make("ddpm_small_linspace8", steps=8, variance_type="fixed_small", **lin, note="last call at t=0: no noise")
    yield make("ddpm_large_trailing8", steps=8, variance_type="fixed_large", note="noise at the last step too")

    dpm = functools.partial(diffusers_case, stem="dpmsolver_multistep", entry="DPMSolverMultistepScheduler")
    zero, low = {"final_sigmas_type": "zero"} | trail, {"final_sigmas_type": "sigma_min"} | trail
    no = {"lower_order_final": False}
    yield dpm("dpmpp1_zero_trailing10", steps=10, solver_order=1, **zero)
    yield dpm("dpmpp2m_midpoint_zero_trailing10", steps=10, solver_order=2, solver_type="midpoint", **zero)
    yield dpm("dpmpp2m_heun_zero_trailing10", steps=10, solver_order=2, solver_type="heun", **zero)
    yield dpm("dpmpp3m_zero_trailing10", steps=10, solver_order=3, **zero)
    yield dpm("dpmpp3m_zero_trailing10_nolof", steps=10, solver_order=3, **zero, **no)
    warm = "solver_type also rules the second-order steps of order 3"
    heun = {"solver_type": "heun", "note": warm}
    yield dpm("dpmpp3m_heun_zero_trailing10_nolof", steps=10, solver_order=3, **zero, **no, **heun)
    yield dpm("dpmpp1_low_trailing10", steps=10, solver_order=1, **low)
    yield dpm("dpmpp2m_midpoint_low_trailing10", steps=10, solver_order=2, **low)
    yield dpm("dpmpp2m_midpoint_low_trailing10_nolof", steps=10, solver_order=2, **low, **no)
    yield dpm("dpmpp2m_heun_low_trailing10_nolof", steps=10, solver_order=2, solver_type="heun", **low, **no)
    yield dpm("dpmpp2m_midpoint_low_linspace8_nolof", steps=8, solver_order=2, **(low | lin), **no)
    yield dpm("dpmpp3m_low_trailing10", steps=10, solver_order=3, **low)
    yield dpm("dpmpp3m_low_trailing10_nolof", steps=10, solver_order=3, **low, **no)
    late = "16 steps: lower_order_final is on and does nothing (it acts below 15 steps)"
    yield dpm("dpmpp2m_midpoint_low_trailing16", steps=16, solver_order=2, **low, note=late)
    yield dpm("dpmpp3m_low_trailing16", steps=16, solver_order=3, **low, note=late)
    yield dpm("dpmpp3m_zero_trailing16", steps=16, solver_order=3, **zero, note="16 steps: last first, others third")
    sde = functools.partial(dpm, algorithm_type="sde-dpmsolver++")
    yield sde("sde_dpmpp1_low_trailing10", steps=10, solver_order=1, **low)
    yield sde("sde_dpmpp2m_midpoint_zero_trailing10", steps=10, solver_order=2, **zero)
    yield sde("sde_dpmpp2m_midpoint_low_trailing10_nolof", steps=10, solver_order=2, **low, **no)
    yield sde("sde_dpmpp2m_heun_low_trailing10_nolof", steps=10, solver_order=2, solver_type="heun", **low, **no)
    wrong = "DEFECT: the 1/2 in its D2 coefficient has the wrong sign (README); do not follow it"
    yield sde("sde_dpmpp3m_low_trailing10_nolof", steps=10, solver_order=3, **low, **no, note=wrong)
    eps = functools.partial(dpm, algorithm_type="dpmsolver", **low, **no)
    yield eps("dpm1_low_trailing10_nolof", steps=10, solver_order=1)
    yield eps("dpm2m_midpoint_low_trailing10_nolof", steps=10, solver_order=2)
    yield eps("dpm2m_heun_low_trailing10_nolof", steps=10, solver_order=2, solver_type="heun")
    yield eps("dpm3m_low_trailing10_nolof", steps=10, solver_order=3)
    yield dpm("dpmpp2m_flow10", process="flow", steps=10, solver_order=2, use_flow_sigmas=True)
    yield dpm("dpmpp2m_flow10_shift3", process="flow", steps=10, solver_order=2, use_flow_sigmas=True, flow_shift=3.0)

    deis = functools.partial(diffusers_case, stem="deis_multistep", entry="DEISMultistepScheduler")
    for order in (1, 2, 3):
        yield deis(f"deis{order}_trailing10", steps=10, solver_order=order, **trail)
    yield deis("deis2_trailing10_nolof", steps=10, solver_order=2, **trail, **no)
    yield deis("deis3_trailing10_nolof", steps=10, solver_order=3, **trail, **no)
    yield deis("deis3_linspace8_nolof", steps=8, solver_order=3, **lin, **no)
    yield deis("deis3_trailing16", steps=16, solver_order=3, **trail, note=late)

    uni = functools.partial(diffusers_case, stem="unipc_multistep", entry="UniPCMultistepScheduler")
    for kind in ("bh1", "bh2"):
        for order in (1, 2, 3):
            options = {"solver_order": order, "solver_type": kind}
            yield uni(f"unipc{order}_{kind}_low_trailing10", steps=10, **options, **low)
            yield uni(f"unip{order}_{kind}_low_trailing10", steps=10, **options, **low, disable_corrector=[*range(10)])
    for order in (1, 2, 3):
        yield uni(f"unipc{order}_bh2_zero_trailing10", steps=10, solver_order=order, solver_type="bh2", **zero)
    yield uni("unipc2_bh1_zero_trailing10", steps=10, solver_order=2, solver_type="bh1", **zero, note="must be refused")
    yield uni("unipc2_bh2_low_linspace8", steps=8, solver_order=2, solver_type="bh2", **(low | lin))
    yield uni("unipc3_bh2_low_trailing10_nolof", steps=10, solver_order=3, solver_type="bh2", **low, **no)
    yield uni("unipc3_bh1_low_trailing10_nolof", steps=10, solver_order=3, solver_type="bh1", **low, **no)
    yield uni("unipc3_bh2_eps_low_trailing10", steps=10, solver_order=3, solver_type="bh2", predict_x0=False, **low)
    for order in (2, 3):
        flow = {"process": "flow", "solver_order": order, "solver_type": "bh2", "use_flow_sigmas": True}
        yield uni(f"unipc{order}_bh2_flow10", steps=10, **flow, note="starts at sigma = 1 - 1e-6")

    euler = functools.partial(diffusers_case, stem="euler_discrete", entry="EulerDiscreteScheduler", process="ve")
    yield euler("euler_trailing10", steps=10, **trail)
    yield euler("euler_karras8", steps=8, sigmas=karras(8))
    heun = functools.partial(diffusers_case, stem="heun_discrete", entry="HeunDiscreteScheduler", process="ve")
    yield heun("heun_trailing10", steps=10, **trail)
    yield heun("heun_linspace8", steps=8, **lin)
    match = functools.partial(diffusers_case, stem="flow_match_euler_discrete", process="flow")
    yield match("flow_euler10", entry="FlowMatchEulerDiscreteScheduler", steps=10)
    yield match("flow_euler10_shift3", entry="FlowMatchEulerDiscreteScheduler", steps=10, shift=3.0)

    vp = diffusers_case("", "euler_discrete", "EulerDiscreteScheduler", 10, **trail).levels[:, 1]
    churn = {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
    gate = "levels hold sigma_hat = sigma (1 + gamma) where churn acts, and grid the sigmas themselves"
    for tag, sigmas, grid in (("karras8", karras(8), "Karras 80..0.002, 0"), ("vp10", vp, "as euler_trailing10")):
        case = functools.partial(k_case, sigmas=sigmas, grid=grid)
        yield case(f"k_euler_{tag}", "sample_euler")
        yield case(f"k_heun_{tag}", "sample_heun")
        yield case(f"k_dpmpp2m_{tag}", "sample_dpmpp_2m")
        yield case(f"k_dpmpp2m_sde_midpoint_eta1_{tag}", "sample_dpmpp_2m_sde", eta=1.0, solver_type="midpoint")
        yield case(f"k_dpmpp2m_sde_heun_eta1_{tag}", "sample_dpmpp_2m_sde", eta=1.0, solver_type="heun")
        yield case(f"k_dpmpp3m_sde_eta0_{tag}", "sample_dpmpp_3m_sde", eta=0.0)
        yield case(f"k_euler_ancestral_{tag}", "sample_euler_ancestral", eta=1.0)
        yield case(f"k_lms4_{tag}", "sample_lms", order=4)
    case = functools.partial(k_case, sigmas=karras(8), grid="Karras 80..0.002, 0")
    yield case("k_euler_churn_karras8", "sample_euler", **churn, note=gate)
    yield case("k_heun_churn_karras8", "sample_heun", **churn, note=gate)
    yield case("k_dpmpp2m_sde_midpoint_eta0_karras8", "sample_dpmpp_2m_sde", eta=0.0, solver_type="midpoint")
    yield case("k_dpmpp2m_sde_heun_eta0_karras8", "sample_dpmpp_2m_sde", eta=0.0, solver_type="heun")
    yield case("k_dpmpp3m_sde_eta1_karras8", "sample_dpmpp_3m_sde", eta=1.0)
    yield case("k_lms2_karras8", "sample_lms", order=2)
    yield case("k_dpm2_karras8", "sample_dpm_2")
