"""What a fitted solver gains, on noise that neither fitted nor chose it."""

from typing import Any

import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff.tableau import Tableau

from .gradient import Fit
from .reference import Reference, Source, model_at, refuse_leak


def errors(source: Source, tableau: Tableau, ref: Reference, batch: int = 1024) -> dict[str, float]:
    """{"rms", "median"}: over trajectories and elements, and the median over trajectories of each one's."""
    parts = []
    for first in range(0, len(ref), batch):
        r = ref[first : first + batch]
        x = jdiff.sample(model_at(source, jnp.asarray(r.index)), tableau, jnp.asarray(r.x))
        square = (np.asarray(x, np.float64) - np.asarray(r.target, np.float64)) ** 2
        parts.append(square.reshape(len(r), -1).mean(1))
    each = np.concatenate(parts)
    return {"rms": float(np.sqrt(each.mean())), "median": float(np.sqrt(np.median(each)))}


def report(source: Source, fit: Fit, held: Reference) -> dict[str, Any]:
    """Errors of the fitted solver and of the best standard one (chosen on the validation set) on held-out noise.

    Also their ratios. ValueError where `held` holds a noise that the fit has seen.
    """
    refuse_leak(fit.seen, held, "held-out")
    ours, name = errors(source, fit.tableau, held), fit.standard[0]
    theirs = errors(source, fit.standard[1], held)
    ratio = {k: ours[k] / theirs[k] if theirs[k] > 0 else np.inf for k in ours}
    return {
        "held": len(held), "held seed": held.seed, "fitted": ours, "standard": name, "standard error": theirs,
        "ratio": ratio,
    }  # fmt: skip
