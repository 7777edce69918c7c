"""OBC-SR (Ma et al. 2023, arXiv 2305.15357): one searched x_T shared by every image, against a random one.

    jdiff reproduce obc-sr

The restoration of `mrs`: held-out digits, an exact model. K candidates are scored on 32 training digits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import metrics, process, starts, times
from jdiff.experiments._claims import Claim, Measure, Run, Settings, table
from jdiff.experiments._restoration import digits, model, view

K, REFERENCES, TEST = 64, 32, 256


def feature_distance(x: jax.Array, target: jax.Array) -> jax.Array:
    """Squared distance in the digits classifier's features: what LPIPS is to photographs."""
    look = lambda v: metrics.digit_features()(jnp.clip(v, -1, 1).reshape(-1, 8, 8, 1))
    return jnp.mean((look(x) - look(target)) ** 2, -1)


@dataclass(frozen=True)
class Shared:
    """How x_T = y + sigma_inf z is chosen: z "searched" by a metric, "random" or "zero", one for all; or "fresh"."""

    begin: str
    metric: str = "pixels"
    start: float | None = None
    end: float = 1 / 101

    @property
    def process(self) -> process.Process:
        return process.mean_reverting("cosine", 0.5)

    def prepare(self, settings: Settings) -> Measure:
        mr, fn = model()
        metrics.embed(metrics.digit_features(), np.zeros((1, 8, 8, 1), np.float32))  # loads it, outside any trace
        judge = {"pixels": starts.squared_error, "features": feature_distance}
        images = {"train": digits("train")[0][:REFERENCES], "test": digits("test")[0][:TEST]}
        x0 = {split: jnp.asarray(v, jnp.float32) for split, v in images.items()}
        y = {split: jnp.asarray(view(v, settings.seed), jnp.float32) for split, v in images.items()}
        key = jax.random.key(settings.seed)

        def measure(tableau: jdiff.Tableau) -> dict[str, Any]:
            def h(z: jax.Array, y: jax.Array) -> jax.Array:
                x = mr.shift(y + self.process.prior_std * z, y, self.process.t_max)
                return jdiff.sample(mr.denoiser(fn, "x0", y), tableau, x, jax.random.fold_in(key, 1))

            def score(z: jax.Array, what: str) -> jax.Array:
                test = jax.jit(lambda z: judge[what](h(jnp.broadcast_to(z, x0["test"].shape), y["test"]), x0["test"]))
                return test(z).mean()

            def result(z: jax.Array) -> dict[str, float]:
                return {"RMSE": float(jnp.sqrt(score(z, "pixels"))), "features": float(score(z, "features"))}

            search = lambda split, what: starts.search_start(
                key, h, y[split], x0[split], (64,), candidates=K, metric=judge[what], chunk=16
            )
            if self.begin == "zero":
                return result(jnp.zeros(64))
            if self.begin == "fresh":
                return result(jax.random.normal(key, x0["test"].shape))
            found = {what: np.asarray(search("test", what).scores) for what in judge}
            if self.begin == "random":
                root = np.sqrt(found["pixels"])
                return {
                    "RMSE": float(root.mean()), "features": float(found["features"].mean()),
                    "RMSE sd": float(root.std(ddof=1)), "features sd": float(found["features"].std(ddof=1)),
                }  # fmt: skip
            best = search("train", self.metric)
            ranks = lambda v: np.argsort(np.argsort(np.asarray(v)))
            agree = np.corrcoef(ranks(best.scores), ranks(found[self.metric]))[0, 1]
            return {**result(best.start), "rank correlation": float(agree)}

        return measure


ODE = "mrs(order=2, lower_order_final=True)"
hundred = lambda p, n, start, end: times.uniform(p, 100, start=start, end=end)


def ahead(row: str, nfe: int, what: str) -> Callable[[Callable[..., float]], float]:
    """How far below the mean of the random starts, in their standard deviations."""
    return lambda e: (
        (e("random x_T, mean of 64", nfe, what) - e(row, nfe, what)) / e("random x_T, mean of 64", nfe, f"{what} sd")
    )


SEARCHED = {"searched by pixels": "RMSE", "searched by features": "features"}
TABLE = table(
    "obc-sr",
    "One shared x_T for restoration, searched among 64 on 32 training digits: root mean square error on 256 others.",
    rows={
        "random x_T, mean of 64": Run(ODE, Shared("random")),
        "searched by pixels": Run(ODE, Shared("searched")),
        "searched by features": Run(ODE, Shared("searched", "features")),
        "z = 0, x_T = y": Run(ODE, Shared("zero")),
        "fresh x_T for each": Run(ODE, Shared("fresh")),
        "posterior sampling, 100 steps": Run("ddpm", Shared("fresh"), hundred),
    },
    nfe=(4, 10),
    metric="RMSE",
    claims=tuple(
        claim
        for row, what in SEARCHED.items()
        for nfe in (4, 10)
        for claim in (
            Claim(
                f"{row}, NFE {nfe}: {what} below the random mean, in deviations", ahead(row, nfe, what), at_least=2.0
            ),
            Claim(
                f"{row}, NFE {nfe}: {what} over that of 100 steps of posterior sampling",
                lambda e, row=row, nfe=nfe, what=what: (
                    e(row, nfe, what) / e("posterior sampling, 100 steps", nfe, what)
                ),
                at_most=1.0,
            ),
            Claim(
                f"{row}, NFE {nfe}: rank correlation of the candidates, references against test",
                lambda e, row=row, nfe=nfe: e(row, nfe, "rank correlation"),
                at_least=0.6,
            ),
        )
    )
    + tuple(
        Claim(
            f"z = 0 against the searched start, NFE {nfe}: RMSE, ratio",
            lambda e, nfe=nfe: e("z = 0, x_T = y", nfe) / e("searched by pixels", nfe),
            at_most=1.0,
        )
        for nfe in (4, 10)
    ),
    notes=(
        "'features' in table.csv: mean squared distance in the classifier's 32 features, in LPIPS's place. In pixels "
        "the best start of all is the posterior's mean, near z = 0: what a search for it finds is the smallest draw.",
    ),
)
