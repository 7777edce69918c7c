"""Compressed spectrograms: against SciPy's transform, exactly invertible, and the compression undone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from jdiff.data.spectrogram import spectrogram, waveform
from jdiff.data.synthetic import audio

CHIRPS = audio.chirps(3, 700, 2, seed=0)


@pytest.mark.parametrize(("window", "hop"), [(510, 128), (64, 16), (32, 7)])
def test_the_transform_is_scipys_and_inverts(window, hop):
    x = jnp.asarray(CHIRPS)
    plain = np.asarray(spectrogram(x, window=window, hop=hop, exponent=1.0, factor=1.0))
    hann = scipy.signal.get_window("hann", window)
    right = (
        scipy.signal.stft(CHIRPS, window=hann, nperseg=window, noverlap=window - hop, boundary="even", padded=False)[
            2
        ].transpose(0, 2, 1)
        * hann.sum()
    )
    assert plain.shape == (3, 1 + 700 // hop, window // 2 + 1, 2)
    np.testing.assert_allclose(plain[..., 0] + 1j * plain[..., 1], right, atol=1e-10)
    packed = np.asarray(spectrogram(x, window=window, hop=hop))
    size = np.linalg.norm(packed, axis=-1)
    np.testing.assert_allclose(size, 0.15 * np.abs(right) ** 0.5, atol=1e-6)
    np.testing.assert_allclose(packed[..., 0] * np.abs(right), size * right.real, atol=1e-8)  # the angle stays
    for options in ({"exponent": 1.0, "factor": 1.0}, {}):
        s = spectrogram(x, window=window, hop=hop, **options)
        back = np.asarray(waveform(s, 700, window=window, hop=hop, **options))
        np.testing.assert_allclose(back, CHIRPS, atol=1e-7)


def test_silence_gradients_and_bad_input():
    quiet = jnp.zeros((1, 100), jnp.float32)
    there = lambda x: jnp.sum(waveform(spectrogram(x, window=32, hop=8), 100, window=32, hop=8) ** 2)
    assert float(there(quiet)) == 0 and np.isfinite(jax.grad(there)(quiet)).all()
    x = jnp.asarray(CHIRPS[:, :100], jnp.float32)
    back = waveform(spectrogram(x, window=32, hop=8), 100, window=32, hop=8)
    np.testing.assert_allclose(back, x, atol=1e-5)
    assert back.dtype == jnp.float32
    with pytest.raises(ValueError, match="hops of 1 to half a window"):
        spectrogram(x, window=32, hop=20)
    with pytest.raises(ValueError, match="expected more than half a window of 510"):
        spectrogram(x)
    with pytest.raises(ValueError, match=r"13 frames of 17 frequencies; 90 samples have \(12, 17\)"):
        waveform(spectrogram(x, window=32, hop=8), 90, window=32, hop=8)
