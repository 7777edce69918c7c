"""Scale-invariant signal-to-distortion ratio of audio (Le Roux et al. 2019, arXiv 1811.02508)."""

import numpy as np
from jaxtyping import Float


def si_sdr(estimate: Float[np.ndarray, "n length"], clean: Float[np.ndarray, "m width"]) -> Float[np.ndarray, " n"]:
    """10 log10 (|c clean|^2 / |c clean - estimate|^2) in dB, c the best scale: eq. 4; one number a signal.

    ValueError for shapes that differ or a clean signal that is silent.
    """
    if estimate.shape != clean.shape:
        raise ValueError(f"si_sdr: the estimate has shape {estimate.shape}, the clean signal {clean.shape}")
    energy = np.sum(clean**2, -1, keepdims=True)
    if not (energy > 0).all():
        raise ValueError(f"si_sdr: clean signal {int(np.argmin(energy))} is silent; the ratio is not defined")
    target = np.sum(estimate * clean, -1, keepdims=True) / energy * clean
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(np.sum(target**2, -1) / np.sum((target - estimate) ** 2, -1))
