"""SiT (Ma et al. 2024, arXiv 2401.08740) on digits: three paths, ODE and SDE, forms of the noise, last steps.

    jdiff reproduce sit

The networks are the three digits models of `fast-sampling`, velocities of the linear path. A linear combination of x0
and eps is a linear combination of them on any path, scaled: so the same networks are sampled along all three.
"""

from dataclasses import dataclass

import jax
from jax.tree_util import Partial
from jaxtyping import PyTree

from jdiff import process
from jdiff.denoiser import Denoiser
from jdiff.experiments._claims import Claim, Digits, Run, table
from jdiff.process import Process
from jdiff.reproduce import Published
from jdiff.solvers import sit_times

PATHS = {"Linear": process.flow(), "GVP": process.trigonometric(), "VP": process.vp_linear()}


def along(path: Process, denoiser: Denoiser) -> Denoiser:
    """A denoiser of `flow` on another process: x0 given x / (alpha + sigma) at flow's time sigma / (alpha + sigma)."""
    return Denoiser(denoiser.init, Partial(_Along(path), denoiser), path, "x0")


@dataclass(frozen=True)
class _Along:
    path: Process

    def __call__(self, denoiser: Denoiser, x: PyTree, t: jax.Array, carry: PyTree) -> tuple[PyTree, PyTree]:
        a, s = self.path.alpha(t), self.path.sigma(t)
        return denoiser((1.0 / (a + s)) * x, s / (a + s)), carry


@dataclass(frozen=True, eq=False)
class OnPath(Digits):
    """The digits models of `flow`, sampled along another path."""

    path: Process = PATHS["Linear"]

    @property
    def process(self) -> Process:
        return self.path


DIGITS = {name: OnPath("flow", wrap=lambda d, p=p: along(p, d), path=p) for name, p in PATHS.items()}
ROWS = {
    **{f"{name}, ODE": Run("heun(variable='t')", digits, "uniform") for name, digits in DIGITS.items()},
    **{f"{name}, SDE, sigma": Run("sit(form='sigma')", digits, sit_times) for name, digits in DIGITS.items()},
    **{f"{name}, SDE, SBDM": Run("sit()", digits, sit_times) for name, digits in DIGITS.items()},
    **{
        f"Linear, SDE, {form.replace('_', '-')}": Run(f"sit(form={form!r})", DIGITS["Linear"], sit_times)
        for form in ("constant", "linear", "decreasing", "increasing_decreasing")
    },
    **{
        f"Linear, SDE, sigma, last {last}": Run(f"sit(form='sigma', last={last!r})", DIGITS["Linear"], sit_times)
        for last in ("tweedie", "none")
    },
}
SDES = [name for name in ROWS if name.startswith("Linear, SDE") and "last" not in name]

TABLE = table(
    "sit",
    "Digits: Fréchet distance (features of the 32-dimensional classifier) of three paths under ODE and SDE samplers.",
    rows=ROWS,
    nfe=(10, 50),
    metric="Fréchet distance",
    claims=(
        *(
            Claim(
                f"{path} at NFE 50, the script's SDE (sigma, mean) over the ODE",
                lambda e, path=path: e(f"{path}, SDE, sigma", 50) / e(f"{path}, ODE", 50),
                at_most=1.0,
            )
            for path in PATHS
        ),
        Claim(
            "Linear at NFE 50, the best form of noise over the ODE",
            lambda e: min(e(row, 50) for row in SDES) / e("Linear, ODE", 50),
            at_most=1.0,
        ),
        Claim(
            "which form matters: the worst over the best at NFE 50, Linear",
            lambda e: max(e(row, 50) for row in SDES) / min(e(row, 50) for row in SDES),
            at_least=1.1,
        ),
        *(
            Claim(
                f"{path} over VP, ODE at NFE 10",
                lambda e, path=path: e(f"{path}, ODE", 10) / e("VP, ODE", 10),
                at_most=1.0,
            )
            for path in ("Linear", "GVP")
        ),
        Claim(
            "the last step: none over mean at NFE 50, sigma",
            lambda e: e("Linear, SDE, sigma, last none", 50) / e("Linear, SDE, sigma", 50),
            at_least=1.0,
        ),
    ),
    notes=(
        "Times as published for the SDE (the last step is 0.04 long, the others equal), uniform for the ODE. Here one "
        "network, trained on the linear path, is sampled along all three: what differs between paths is the sampler "
        "alone. The published table trains a network for each. On linear paths the last steps Euler and Tweedie are "
        "one. The constant form is unstable near data: a step multiplies errors by 1 - w dt / sigma^2, which is -11 at "
        "t = 0.04, NFE 50.",
    ),
    published=(Published.load("sit.toml"),),
)
