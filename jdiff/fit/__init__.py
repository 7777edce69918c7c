"""Solvers fitted to a model: a solver is data, so it can be optimised for a model and a number of evaluations.

train, valid, held = (jdiff.fit.reference(model, n, shape, seed) for n, seed in ((512, 1), (256, 2), (512, 3)))
fit = jdiff.fit.table(model, 8, train, valid)
jdiff.fit.save("solver.safetensors", fit.tableau, fit.meta | jdiff.fit.report(model, fit, held))
x = jdiff.sample(model, jdiff.solvers.load("solver.safetensors"), noise)
"""

from jdiff.solvers.file import save

from . import compensation
from .free import Params, from_tableau, to_tableau
from .gradient import Fit, standard, table
from .layers import AutoDiffusion, autodiffusion, layered
from .newton import objective
from .olss import Olss, olss
from .reference import Reference, Source, fingerprint, reference
from .report import errors, report
from .score import score, squares
from .search import Found, Space, evolution, kendall, ranking
from .spaces import Subset, compile_schedule, grid, s3, schedules, subsets

__all__ = [
    "AutoDiffusion", "Fit", "Found", "Olss", "Params", "Reference", "Source", "Space", "Subset", "autodiffusion",
    "compensation", "compile_schedule", "errors", "evolution", "fingerprint", "from_tableau", "grid", "kendall",
    "layered", "objective", "olss", "ranking", "reference", "report", "s3", "save", "schedules", "score", "squares",
    "standard", "subsets", "table", "to_tableau",
]  # fmt: skip
