"""Diffusion over tokens: states are integers 0 .. K - 1 and `mask` = K, times are in [0, 1], t = 0 is the data.

    process = discrete.absorbing(K)                  # also mask_and_replace(K), uniform(K), spindle(K, F)
    loss = discrete.vlb_loss(apply, process)         # or masked_loss(apply, process.mask)
    stepper = discrete.ancestral(network, process)   # or masked, first_hitting, confident
    state, info = jdiff.run(stepper, discrete.rows(np.linspace(1, 0, 26)), process.prior(key, (n, length)), key)

One process (`MaskReplace`); absorbing, uniform, VQ-Diffusion's and M2DM's are configurations of it. The samplers are
Steppers, so that steering serves them too. `PoissonTime`: NeoDiff's intrinsic time of each token.
"""

from jdiff.discrete.draw import categorical, exponential
from jdiff.discrete.intrinsic import PoissonTime
from jdiff.discrete.losses import masked_loss, vlb_loss
from jdiff.discrete.process import MaskReplace, absorbing, mask_and_replace, spindle, uniform
from jdiff.discrete.samplers import ancestral, blocks, confident, draws, first_hitting, masked, rows

__all__ = [
    "MaskReplace", "PoissonTime", "absorbing", "ancestral", "blocks", "categorical", "confident", "draws",
    "exponential", "first_hitting", "mask_and_replace", "masked", "masked_loss", "rows", "spindle",
    "uniform", "vlb_loss",
]  # fmt: skip
