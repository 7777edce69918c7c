"""Synthetic videos: what is said of them is so."""

import numpy as np
import pytest

from jdiff.data.synthetic import video


def test_shapes_move_as_said():
    clips = video.moving_shapes(200, frames=12, size=10, seed=3)
    assert clips.frames.shape == (200, 12, 10, 10, 1) and clips.frames.dtype == np.float32
    assert clips.frames.min() == -1 and clips.frames.max() == 1 and set(clips.shape) == {0, 1}
    np.testing.assert_allclose(video.found_centre(clips.frames), clips.centre, atol=0.1)
    step = np.diff(clips.centre, axis=1)
    bounced = np.abs(np.abs(step[:, 1:]) - np.abs(step[:, :-1])).max(-1) > 1e-9
    assert bounced.mean() < 0.5 and np.linalg.norm(step, axis=-1).max() <= 10 / 8 + 1e-9
    again = video.moving_shapes(3, frames=12, size=10, seed=3)
    np.testing.assert_array_equal(again.frames, clips.frames[:3])  # a clip depends on the seed and its number alone
    assert video.sheet(clips.frames, 4).shape == (40, 120)


def test_ar1():
    law = video.ar1(5, 0.8)
    inverse = np.linalg.inv(law.cov)  # a Markov chain: the precision is tridiagonal
    assert np.abs(inverse[np.triu_indices(5, 2)]).max() < 1e-12 and np.allclose(np.diag(law.cov), 1)
    with pytest.raises(ValueError, match=r"rho=1\.0"):
        video.ar1(4, 1.0)
    with pytest.raises(ValueError, match="n=0"):
        video.moving_shapes(0)
