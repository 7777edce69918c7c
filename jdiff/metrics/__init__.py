"""How far samples are from a reference: distances of features, each said with n, features and reference.

    from jdiff import data, metrics
    report = metrics.evaluate(samples, data.load("digits", split="test"), metrics.digit_features(), key)
    print(report["frechet"], report["floor_frechet"], sep="\\n")

SciPy, Pillow and safetensors are imported by the functions that need them, if at all.
"""

from .digits import digit_features
from .graphs import graph_mmd
from .kernel import cubic, energy, kernel_distance, rbf
from .moments import Moments, frechet_distance
from .neighbours import precision_recall
from .result import Result
from .score import embed, evaluate
from .sdr import si_sdr
from .sliced import sliced_wasserstein

__all__ = [
    "Moments",
    "Result",
    "cubic",
    "digit_features",
    "embed",
    "energy",
    "evaluate",
    "frechet_distance",
    "graph_mmd",
    "kernel_distance",
    "precision_recall",
    "rbf",
    "si_sdr",
    "sliced_wasserstein",
]
