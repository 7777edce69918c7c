"""Complex spectrograms whose magnitudes are compressed: SGMSE+'s view of audio, and the way back.

s = spectrogram(audio)                       # (batch, length) -> (batch, frames, frequencies, 2), real and imaginary
x = waveform(s, audio.shape[1])              # exactly

Richter et al. 2023 (arXiv 2208.05830): c -> 0.15 |c|^(1/2) e^(i angle c), so that coefficients of speech are
about 1 in size; the window is Hann's (periodic), of 510 samples with hops of 128, at 16 kHz.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def _window(window: int, hop: int, exponent: float, factor: float) -> np.ndarray:
    if window < 2 or not 1 <= hop <= window // 2 or not (0 < exponent <= 1 and factor > 0):
        raise ValueError(
            "spectrogram: expected window >= 2, hops of 1 to half a window, 0 < exponent <= 1 and factor > 0; got "
            f"{window=}, {hop=}, {exponent=}, {factor=}"
        )
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)


def spectrogram(
    audio: Float[Array, "batch length"],
    *,
    window: int = 510,
    hop: int = 128,
    exponent: float = 0.5,
    factor: float = 0.15,
) -> Float[Array, "batch frames frequencies 2"]:
    """Compressed short-time Fourier transform, frames centred on every `hop`-th sample, the ends mirrored.

    frames = 1 + length // hop, frequencies = window // 2 + 1. exponent 1 and factor 1: the transform itself.
    ValueError for signals not longer than half a window, or numbers out of range.
    """
    weights = jnp.asarray(_window(window, hop, exponent, factor), audio.dtype)
    if audio.shape[1] <= window // 2:
        raise ValueError(f"spectrogram: {audio.shape[1]} samples; expected more than half a window of {window}")
    x = jnp.pad(audio, ((0, 0), (window // 2, window // 2)), "reflect")
    starts = hop * np.arange(1 + (x.shape[1] - window) // hop)
    c = jnp.fft.rfft(x[:, starts[:, None] + np.arange(window)] * weights)
    square = jnp.square(c.real) + jnp.square(c.imag)
    scale = jnp.where(square > 0, factor * jnp.where(square > 0, square, 1.0) ** (0.5 * (exponent - 1.0)), 0.0)
    return jnp.stack([scale * c.real, scale * c.imag], -1)


def waveform(
    coefficients: Float[Array, "batch frames frequencies 2"], length: int, *, window: int = 510, hop: int = 128,
    exponent: float = 0.5, factor: float = 0.15,
) -> Float[Array, "batch length"]:  # fmt: skip
    """The audio of a spectrogram: expanded, transformed back and overlap-added, in the least-squares sense.

    So what is no spectrogram of any signal, as a network's output, gives the nearest one's. ValueError for a number of
    frames or frequencies that does not fit.
    """
    weights = _window(window, hop, exponent, factor)
    n, frames, frequencies, _ = coefficients.shape
    expected = 1 + (length + 2 * (window // 2) - window) // hop, window // 2 + 1
    if (frames, frequencies) != expected:
        raise ValueError(f"waveform: {frames} frames of {frequencies} frequencies; {length} samples have {expected}")
    square = jnp.sum(jnp.square(coefficients), -1) / factor**2
    scale = jnp.where(square > 0, jnp.where(square > 0, square, 1.0) ** (0.5 / exponent - 0.5) / factor, 0.0)
    c = jax.lax.complex(*(scale * coefficients[..., i] for i in (0, 1)))
    pieces = jnp.fft.irfft(c, window) * jnp.asarray(weights, coefficients.dtype)
    places = (hop * np.arange(frames)[:, None] + np.arange(window)).ravel()
    inside = slice(window // 2, window // 2 + length)  # hops of half a window at most: all of it is covered
    x = jnp.zeros((n, int(places[-1]) + 1), coefficients.dtype).at[:, places].add(pieces.reshape(n, -1))
    weight = np.bincount(places, np.tile(weights**2, frames))
    return x[:, inside] / jnp.asarray(weight[inside], coefficients.dtype)
