"""What a learned vector field is: divergences, conservativity, gauge freedom, Fokker-Planck residuals, dimension.

Pure functions. A field is a function of the batch, f(x) -> shaped like x, at a fixed time, such as
`lambda x: denoiser(x, t, "score")`. Samples must not interact. See docs/analysis.md.
"""

from .divergence import divergence, jacobian, norm
from .equation import fokker_planck, fokker_planck_loss, score_fokker_planck
from .gauge import asymmetry, conservative, gauge_decomposition, gauge_penalty, gauge_residual
from .manifold import intrinsic_dim, singular_values

__all__ = [
    "asymmetry",
    "conservative",
    "divergence",
    "fokker_planck",
    "fokker_planck_loss",
    "gauge_decomposition",
    "gauge_penalty",
    "gauge_residual",
    "intrinsic_dim",
    "jacobian",
    "norm",
    "score_fokker_planck",
    "singular_values",
]
