"""Sums of chirps, clean and in noise or reverberation: audio whose clean signal is known, for enhancement.

clean, noisy = audio.noisy_chirps(256, 64, snr=0.0, seed=0)        # (256, 64) each, float64
print(metrics.si_sdr(noisy, clean).mean())                          # 0 dB
"""

import numpy as np


def chirps(n: int, length: int, count: int = 2, seed: int = 0) -> np.ndarray:
    """n signals (n, length), each a sum of `count` linear chirps, scaled to a root mean square of 1/2.

    A chirp starts at a frequency uniform in [0.02, 0.2] cycles a sample and its frequency moves by up to 0.15 over the
    signal; phases are uniform, amplitudes uniform in [0.5, 1]. Signal i depends on the seed and on i alone.
    """
    if n < 1 or length < 2 or count < 1:
        raise ValueError(f"chirps: expected n >= 1, length >= 2 and count >= 1, got {n=}, {length=}, {count=}")
    u = np.stack([np.random.default_rng([seed, i]).uniform(size=(4, count, 1)) for i in range(n)])
    start, move, phase, loud = (u[:, k] for k in range(4))
    k = np.arange(length)
    turns = (0.02 + 0.18 * start) * k + 0.5 * 0.15 * (2.0 * move - 1.0) * k**2 / length + phase
    clean = ((0.5 + 0.5 * loud) * np.cos(2.0 * np.pi * turns)).sum(1)
    return 0.5 * clean / np.sqrt(np.mean(clean**2, 1, keepdims=True))


def noisy_chirps(n: int, length: int, snr: float = 0.0, count: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(clean, noisy), (n, length) each: white Gaussian noise of standard deviation 0.5 * 10^(-snr / 20), snr in dB."""
    clean = chirps(n, length, count, seed)
    noise = np.stack([np.random.default_rng([seed, i, 1]).normal(size=length) for i in range(n)])
    return clean, clean + 0.5 * 10.0 ** (-snr / 20.0) * noise


def room(length: int, decay: float = 8.0, seed: int = 0) -> np.ndarray:
    """An impulse response (length,): 1, then Gaussian noise that falls as e^(-k / decay), of energy 1 in all."""
    if length < 2 or not decay > 0:
        raise ValueError(f"room: expected length >= 2 and decay > 0, got {length=}, {decay=}")
    tail = np.random.default_rng(seed).normal(size=length - 1) * np.exp(-np.arange(1, length) / decay)
    return np.append(1.0, tail / np.sqrt(np.sum(tail**2)))


def reverberated(clean: np.ndarray, response: np.ndarray) -> np.ndarray:
    """The signals (n, length) through a room: convolved with `response`, cut to their length."""
    return np.stack([np.convolve(x, response)[: clean.shape[1]] for x in clean])
