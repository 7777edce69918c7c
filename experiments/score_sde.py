"""Score SDE's samplers on an exact model: predictors, a Langevin corrector, and the probability-flow ODE.

    jdiff reproduce score-sde

The question of Song et al. 2021, table 1: what do predictor, corrector and ODE give at equal steps, at equal cost?
There with trained networks; here the score is exact, so that what is seen is discretisation alone.
"""

from jdiff import process
from jdiff.experiments import _models
from jdiff.experiments._claims import Claim, Law, Run, table

VE = Law(_models.survey("gmm2"), process.edm(sigma_min=0.01, sigma_max=50.0))
SAMPLERS = {
    "Euler-Maruyama": "euler_maruyama",
    "reverse diffusion": "reverse_diffusion",
    "ancestral": "ddpm",
    "PC, reverse diffusion": "predictor_corrector",
    "ODE, Heun": "heun",
    "ODE, DEIS-3": "deis(variable='lam')",
}

TABLE = table(
    "score-sde",
    "Sliced Wasserstein distance of 20,000 samples of an exact mixture (VE, sigma 50 to 0.01 and 0, geometric times).",
    rows={name: Run(solver, VE) for name, solver in SAMPLERS.items()},
    nfe=(25, 50, 100),
    metric="sliced Wasserstein",
    claims=(
        Claim(
            "one corrector (snr 0.16) at the same 25 predictor steps, over none",
            lambda e: e("PC, reverse diffusion", 50) / e("reverse diffusion", 25),
            at_most=0.92,
        ),
        Claim(
            "the same at 50 predictor steps",
            lambda e: e("PC, reverse diffusion", 100) / e("reverse diffusion", 50),
            at_most=0.85,
        ),
        Claim(
            "at equal cost, NFE 100, correction loses to smaller steps in two dimensions",
            lambda e: e("PC, reverse diffusion", 100) / e("reverse diffusion", 100),
            at_least=1.0,
        ),
        Claim(
            "at NFE 50 the ODE (DEIS-3) is ahead of every SDE sampler",
            lambda e: e("ODE, DEIS-3", 50) / min(e(row, 50) for row in SAMPLERS if not row.startswith("ODE")),
            at_most=1.0,
        ),
    ),
    notes=(
        "A PC row of NFE 2N has N predictor steps. Its Langevin step is sized by the level (see "
        "`solvers.predictor_corrector`), not by the batch's norms.",
        "",
        "Published (README of score_sde, CIFAR-10, trained networks, Fréchet distance): VP deep 2.41 with PC, 3.08 "
        "with the ODE; VE deep (NCSN++) 2.20 with PC.",
    ),
)
