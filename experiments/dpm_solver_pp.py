"""DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) against DDIM and noise prediction, unguided and under guidance.

    jdiff reproduce dpm-solver-pp

The paper's claim is about guidance: data prediction is stable where noise prediction of high order is not. Eight
modes on a ring; the guided model is classifier-free guidance of scale 7.5 from the ring to one of its modes, both
exact; the goal is the guided ODE itself, by 1000 steps of third order. Guided rows: uniform times, lower order at the
end, as the paper's text-to-image samples.
"""

import jax
import numpy as np

import jdiff
from jdiff import exact, guidance, process, solvers, times
from jdiff.experiments import _models
from jdiff.experiments._claims import Claim, Exact, Measure, Run, Settings, table
from jdiff.reproduce import Published

angle = np.arange(8) * np.pi / 4
MEANS = np.stack([np.cos(angle), np.sin(angle)], 1)
RING = exact.mixture(np.full(8, 1 / 8), MEANS, [0.04] * 8)


class Guided(Exact):
    """The ring, guided to its first mode."""

    def prepare(self, settings: Settings) -> Measure:
        with jax.enable_x64(True):
            p = self.process
            x = _models.noise(self.model, p, settings.seed, settings.n)
            denoiser = guidance.cfg(exact.gaussian(MEANS[0], 0.04).denoiser(p), self.model.denoiser(p), 7.5)
            fine = solvers.unipc(3)(p, times.logsnr(p, 1000, end=self.end))
            goal = np.asarray(jdiff.sample(denoiser, fine, x))

        def measure(tableau: jdiff.Tableau):
            with jax.enable_x64(True):
                return _models.errors(denoiser, tableau, x, goal)

        return measure


PLAIN, GUIDED = (kind(RING, process.vp_linear(), end=1e-3) for kind in (Exact, Guided))
LOWER = "order=2, lower_order_final=True"
ROWS = {
    "DDIM": Run("ddim", PLAIN),
    "++2M": Run("dpm_solver_pp", PLAIN),
    "++2S": Run("dpm_solver_pp(method='singlestep')", PLAIN),
    "++3M": Run("dpm_solver_pp(order=3)", PLAIN),
    "eps-2M": Run("dpm_solver(order=2, method='multistep')", PLAIN),
    "guided: DDIM": Run("ddim", GUIDED, "uniform"),
    "guided: ++2M": Run(f"dpm_solver_pp({LOWER})", GUIDED, "uniform"),
    "guided: eps-2M": Run(f"dpm_solver(method='multistep', {LOWER})", GUIDED, "uniform"),
    "guided: DPM-Solver-fast": Run("dpm_solver", GUIDED, "uniform"),
    "guided: PNDM, ramp": Run("pndm(warmup='ramp')", GUIDED, "uniform"),
}
TABLE = table(
    "dpm-solver-pp",
    "DPM-Solver++ against DDIM and noise prediction: rms error to the flow, unguided and guided by 7.5.",
    rows=ROWS,
    nfe=(5, 10, 20, 40, 80),
    metric="rms",
    notes=(
        "The guided claim is the paper's for learned models of bounded pixels, with thresholding. These rows ask "
        "whether it is one about solvers alone, on an exact model in two dimensions.",
    ),
    claims=(
        Claim("unguided, NFE 10: 2M over DDIM", lambda e: e("++2M", 10) / e("DDIM", 10), 0.5),
        Claim("unguided, NFE 20: 2M over DDIM", lambda e: e("++2M", 20) / e("DDIM", 20), 0.2),
        Claim("unguided: 2M's error at NFE 20 over that at 40", lambda e: e("++2M", 20) / e("++2M", 40), 5.0, 3.0),
        Claim("guided, NFE 40: 2M over DDIM", lambda e: e("guided: ++2M", 40) / e("guided: DDIM", 40), 0.25),
        Claim("guided, NFE 5: 2M over noise prediction's 2M",
              lambda e: e("guided: ++2M", 5) / e("guided: eps-2M", 5), 0.5),
        Claim("guided, NFE 20: 2M over DDIM", lambda e: e("guided: ++2M", 20) / e("guided: DDIM", 20), 1.0),
        Claim("guided, NFE 20: 2M over noise prediction's 2M",
              lambda e: e("guided: ++2M", 20) / e("guided: eps-2M", 20), 1.0),
    ),
    published=(Published.load("dpm_solver_pp_imagenet256.toml"),),
)  # fmt: skip
