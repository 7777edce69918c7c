"""One More Step (Hu et al. 2023, arXiv 2311.15744) and zero terminal SNR (Lin et al. 2023, arXiv 2305.08891).

    jdiff reproduce one-more-step

Both repair a schedule that ends at alpha_T > 0 while sampling starts from pure noise, so that the brightness of an
image is drawn to the middle. Exact models of 8 x 8 images: x = (class brightness) + b + 0.1 z, b one number an image.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import process, starts
from jdiff.experiments._claims import Claim, Measure, Run, Settings, table

D, STD = 64, 0.1
FLAWED = {
    "0.078": process.vp_discrete(np.linspace(1e-4, 5e-3, 1000)),
    "0.0047": process.vp_discrete(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),  # Stable Diffusion's
}


def network(std_b, t_process, x, t, mean):
    """The exact x0 prediction of N(mean 1, 0.01 I + std_b^2 1 1'), mean (n, 1) given as the condition."""
    a, s = t_process.alpha(t), t_process.sigma(t)
    gain = lambda var: a * var / (a * a * var + s * s)
    r = x - a * mean
    flat = jnp.mean(r, -1, keepdims=True)
    return mean + gain(STD**2 + D * std_b**2) * flat + gain(STD**2) * (r - flat)


@dataclass(frozen=True)
class Brightness:
    """`n` images from `begin`: "prior" N(0, I), "oms", "oms as published", "true" x_T, or "zero" terminal SNR."""

    begin: str
    bar: str = "0.078"  # alpha_T^2
    case: str = "class"  # brightness told by the class, -0.8, 0 or 0.8; or free in each "image", b of deviation 0.5
    n: int = 20_000
    start: float | None = None
    end: float = 0.0

    @property
    def process(self) -> process.Process:
        return process.zero_terminal_snr(FLAWED[self.bar]) if self.begin == "zero" else FLAWED[self.bar]

    def prepare(self, settings: Settings) -> Measure:
        p, keys = self.process, jax.random.split(jax.random.key(settings.seed), 5)
        free = self.case == "image"
        std_b, classes = (0.5, jnp.zeros(3)) if free else (0.02, jnp.array([-0.8, 0.0, 0.8]))
        mean = classes[jnp.arange(self.n, dtype=jnp.int32) % 3][:, None]
        b = std_b * jax.random.normal(keys[0], (self.n, 1))
        x0 = mean + b + STD * jax.random.normal(keys[1], (self.n, D))
        x = p.prior(keys[2], (self.n, D))
        psi = lambda x: -mean + 0.0 * x  # the optimum: minus E[x0 | class], as pure noise says nothing of x0
        if self.begin.startswith("oms"):
            x = starts.one_more_step(keys[3], psi, p, x, as_published=self.begin == "oms as published")
        if self.begin == "true":
            x = p.diffuse(keys[3], x0, p.t_max)
        fn = jax.tree_util.Partial(lambda x, t, mean: network(std_b, p, x, t, mean))
        denoiser = jdiff.denoiser(fn, p, "x0", cond=mean)
        truth = np.asarray(x0.mean(1)).reshape(-1)

        def measure(tableau: jdiff.Tableau) -> dict[str, Any]:
            found = np.asarray(jdiff.sample(denoiser, tableau, x))
            bright = found.mean(1)
            groups = np.arange(self.n) % 3
            distance = [np.abs(np.sort(bright[groups == c]) - np.sort(truth[groups == c])).mean() for c in range(3)]
            texture = (found - bright[:, None]).std() / STD * np.sqrt(D / (D - 1))
            return {
                "brightness W1": float(np.mean(distance)),
                "bias of the bright class": float((bright - truth)[groups == 2].mean()),
                "texture": float(texture),  # 1 where it is as in the data
            }

        return measure


CASES = {
    "by class, 0.078": ("0.078", "class"),
    "by class, 0.0047": ("0.0047", "class"),
    "free, 0.078": ("0.078", "image"),
}
BEGINS = {
    "N(0, I)": "prior",
    "one more step": "oms",
    "as published": "oms as published",
    "true x_T": "true",
    "zero SNR": "zero",
}
LAST = 200


def versus(above: str, below: str, case: str, bound: float, what: str = "brightness W1") -> Claim:
    """`above` has at most `bound` times the number of `below`."""
    value = lambda e: abs(e(f"{above} ({case})", LAST, what) / e(f"{below} ({case})", LAST, what))
    return Claim(f"{what}, {case}, NFE {LAST}: {above} over {below}", value, bound)


BIAS = "bias of the bright class"
TABLE = table(
    "one-more-step",
    "Brightness of images against the data's, by how sampling starts on a schedule that ends at alpha_T > 0.",
    rows={
        f"{name} ({case})": Run("dpm_solver_pp(order=2)", Brightness(begin, *what), "uniform")
        for case, what in CASES.items()
        for name, begin in BEGINS.items()
        if case == "by class, 0.078" or name != "as published"
    },
    nfe=(10, 50, LAST),
    metric="brightness W1",
    claims=(
        *(versus("one more step", "N(0, I)", case, 0.4) for case in CASES),
        *(versus("one more step", "true x_T", case, 1.1) for case in CASES),
        *(versus("zero SNR", "N(0, I)", case, 0.4) for case in CASES),
        *(versus("one more step", "N(0, I)", case, 0.1, BIAS) for case in list(CASES)[:2]),
        versus("as published", "one more step", "by class, 0.078", 1.1),
    ),
    notes=(
        "The number after the case is alpha_T^2: 0.078, a linear schedule cut short, and 0.0047, Stable Diffusion's. "
        "Wasserstein-1 distance of each image's mean pixel to that of as many exact draws, class by class. The network "
        "and psi are exact; psi, told the class, is minus the class's mean. 'free': nothing tells the brightness, and "
        "no psi that sees pure noise can know it.",
    ),
)
