"""Metrics against closed forms, SciPy, and NumPy loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jdiff import data, metrics
from jdiff.metrics import digits
from jdiff.metrics.kernel import unbiased_mmd2
from jdiff.metrics.train_digits import held_out_accuracy

KEY = jax.random.key(0)
N, D = 400, 5


def _normal(seed, n=N, d=D, shift=0.0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)) + shift, dtype)


def _moments(x):
    return metrics.Moments.init(x.shape[1]).update(x)


def _exact(mean, cov, n=10_000):
    """Moments of a law rather than of samples, in float64 (`finalise` divides by n - 1)."""
    return metrics.Moments(jnp.int32(n), jnp.asarray(mean), jnp.asarray(cov) * (n - 1))


# Moments


def test_moments_against_numpy_far_from_zero():
    x = _normal(0, n=1000, shift=300.0)
    n, mean, cov = _moments(x).finalise()
    x64 = np.asarray(x, np.float64)
    assert n == 1000
    np.testing.assert_allclose(mean, x64.mean(0), rtol=1e-6)
    np.testing.assert_allclose(cov, np.cov(x64.T), atol=2e-5)  # E[xx] - mean mean would be off by 1e-2


def test_streaming_and_merging_equal_all_at_once():
    x = _normal(0, shift=np.arange(D))
    whole = _moments(x).finalise()
    parts = [_moments(part) for part in np.split(x, [30, 31, 250])]
    for order in itertools.permutations(range(4)):
        merged = metrics.Moments.init(D)
        for i in order:
            merged = merged.merge(parts[i])
        tree = parts[order[0]].merge(parts[order[1]]).merge(parts[order[2]].merge(parts[order[3]]))
        for got in (merged.finalise(), tree.finalise()):
            assert got[0] == whole[0]
            np.testing.assert_allclose(got[1], whole[1], atol=1e-6)
            np.testing.assert_allclose(got[2], whole[2], atol=1e-5)


def test_padding_does_not_count():
    x = _normal(0)
    padded = jnp.concatenate([x, jnp.full((3, D), jnp.nan, jnp.float32)])
    got = metrics.Moments.init(D).update(padded, jnp.arange(N + 3) < N)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, _moments(x))


# Fréchet distance


def test_frechet_closed_forms():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.1, 3, D), rng.uniform(0.1, 3, D)
    shift = rng.normal(size=D)
    rotation = np.linalg.qr(rng.normal(size=(D, D)))[0]
    # Commuting covariances: |shift|^2 + sum (sqrt a - sqrt b)^2, in any basis.
    got = metrics.frechet_distance(
        _exact(np.zeros(D), rotation @ np.diag(a) @ rotation.T),
        _exact(shift, rotation @ np.diag(b) @ rotation.T),
    )
    assert float(got) == pytest.approx((shift**2).sum() + ((a**0.5 - b**0.5) ** 2).sum(), rel=1e-10)


def test_frechet_against_scipy_sqrtm():
    rng = np.random.default_rng(1)
    s, t = (m @ m.T for m in rng.normal(size=(2, D, D)))
    cross = scipy.linalg.sqrtm(s @ t).real
    got = metrics.frechet_distance(_exact(np.zeros(D), s), _exact(np.zeros(D), t))
    assert float(got) == pytest.approx(np.trace(s + t - 2 * cross), rel=1e-8)
    back = metrics.frechet_distance(_exact(np.zeros(D), t), _exact(np.zeros(D), s))
    assert float(back) == pytest.approx(float(got), rel=1e-10)


def test_frechet_with_constant_features():
    x = np.array(_normal(0))
    x[:, 1] = 4.0
    x[:, 2] = x[:, 0]
    same = metrics.frechet_distance(_moments(jnp.asarray(x)), _moments(jnp.asarray(x)))
    assert 0 <= float(same) < 1e-5
    y = x.copy()
    y[:, 1] = 6.0
    got = metrics.frechet_distance(_moments(jnp.asarray(x)), _moments(jnp.asarray(y)))
    assert float(got) == pytest.approx(4.0, rel=1e-4)


def test_frechet_needs_samples():
    with pytest.raises(ValueError, match=r"5-dimensional.*more than 6.*got 6 and 400.*kernel_distance"):
        metrics.frechet_distance(_moments(_normal(0, n=6)), _moments(_normal(1)))
    metrics.frechet_distance(_moments(_normal(0, n=7)), _moments(_normal(1)))
    with pytest.raises(ValueError, match="not finite"):
        metrics.frechet_distance(_moments(_normal(0).at[3, 2].set(jnp.nan)), _moments(_normal(1)))
    with pytest.raises(ValueError, match="5 and 4"):
        metrics.frechet_distance(_moments(_normal(0)), _moments(_normal(1, d=4)))


# Kernel distance


@pytest.mark.parametrize(
    "kernel, plain",
    [
        (metrics.cubic, lambda x, y: (x @ y / 3 + 1) ** 3),
        (metrics.energy, lambda x, y: -np.linalg.norm(x - y)),
        (metrics.rbf(1.5), lambda x, y: np.exp(-((x - y) ** 2).sum() / (2 * 1.5**2))),
    ],
    ids=["cubic", "energy", "rbf"],
)
def test_mmd_against_a_double_loop(kernel, plain):
    x, y = _normal(0, 7, 3, dtype=np.float64), _normal(1, 5, 3, 0.5, dtype=np.float64)
    a, b = np.asarray(x), np.asarray(y)
    within = [np.mean([plain(p, q) for p, q in itertools.permutations(z, 2)]) for z in (a, b)]
    expected = sum(within) - 2 * np.mean([plain(p, q) for p in a for q in b])
    assert float(unbiased_mmd2(x, y, kernel)) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_kid_is_unbiased_and_its_error_honest():
    keys = jax.random.split(KEY, 100)
    results = [
        metrics.kernel_distance(key, _normal(2 * i, 60), _normal(2 * i + 1, 40), blocks=4) for i, key in enumerate(keys)
    ]
    values = np.array([float(r) for r in results])
    assert abs(values.mean()) < 3 * values.std(ddof=1) / 10
    assert values.min() < 0 < values.max()
    rms = np.mean([r.error**2 for r in results]) ** 0.5  # root mean square of the stated errors
    assert rms == pytest.approx(values.std(ddof=1), rel=0.35)


def test_kernel_distance_sees_a_shift():
    near = metrics.kernel_distance(KEY, _normal(0), _normal(1))
    far = metrics.kernel_distance(KEY, _normal(0), _normal(1, shift=1.0))
    assert float(far) > 10 * far.error and abs(float(near)) < 5 * near.error
    assert str(far).startswith("KID ") and " ± " in str(far) and "n=400 vs 400" in str(far)
    with pytest.raises(ValueError, match=r"at least 20 samples.*got 19 and 400"):
        metrics.kernel_distance(KEY, _normal(0, 19), _normal(1))


# Sliced Wasserstein distance


def test_sliced_wasserstein_of_a_shift():
    x, shift = _normal(0), np.array([3, 0, 0, 4, 0], np.float32)
    got = metrics.sliced_wasserstein(KEY, x, x + shift, 20_000)
    assert float(got) == pytest.approx(5 / D**0.5, rel=0.02)


@pytest.mark.parametrize("n, m", [(40, 40), (40, 64), (41, 27), (1, 9)])
def test_one_dimensional_transport_against_repetition(n, m):
    """Each point repeated until both sides have n m points: then sorting pairs them off."""
    x, y = _normal(0, n, 1), 2 * _normal(1, m, 1)
    a, b = np.sort(np.repeat(x, m)), np.sort(np.repeat(y, n))
    got = metrics.sliced_wasserstein(KEY, x, y, 3)  # in one dimension every direction is the same
    assert float(got) == pytest.approx(np.mean((a - b) ** 2) ** 0.5, rel=1e-5)


# Precision and recall


def test_precision_recall_extremes():
    x, y = _normal(0), _normal(1, shift=100.0)
    same, apart = metrics.precision_recall(x, x), metrics.precision_recall(x, y)
    assert [float(r) for r in (*same, *apart)] == [1, 1, 0, 0]


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_against_numpy(k):
    x, y = _normal(0, 57, shift=0.7), 0.6 * _normal(1, 43)
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def inside(points, centres):
        own = np.sort(np.linalg.norm(centres[:, None] - centres[None], axis=-1), 1)[:, k]  # 0 is itself
        return (np.linalg.norm(points[:, None] - centres[None], axis=-1) <= own).any(1).mean()

    precision, recall = metrics.precision_recall(x, y, k, block=16)
    assert 0.05 < float(precision) < 0.95 and abs(float(precision) - float(recall)) > 0.05
    assert float(precision) == pytest.approx(inside(a, b), abs=1e-6)
    assert float(recall) == pytest.approx(inside(b, a), abs=1e-6)
    with pytest.raises(ValueError, match=r"at least 4 samples.*got 3 and"):
        metrics.precision_recall(x[:3], y, 3)


# Sharding


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_equals_unsharded(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    x, y = _normal(0), _normal(1, shift=0.3)

    def everything(x, y):
        moments = [jax.jit(lambda m, z: m.update(z))(metrics.Moments.init(D), z) for z in (x, y)]
        results = [
            metrics.frechet_distance(*moments),
            metrics.kernel_distance(KEY, x, y),
            metrics.sliced_wasserstein(KEY, x, y, 32),
            *metrics.precision_recall(x, y),
        ]
        return [float(r) for r in results]

    sharded = [jax.device_put(z, NamedSharding(mesh, PartitionSpec("data"))) for z in (x, y)]
    assert len(sharded[0].sharding.device_set) == 8
    np.testing.assert_allclose(everything(*sharded), everything(x, y), rtol=1e-4, atol=1e-5)


# Digits


def test_stored_weights_reproduce_their_accuracy():
    params, metadata = digits.load_weights()
    assert metadata["name"] == metrics.digit_features().__name__ == "digits-cnn-v1"
    assert metadata["command"] == f"python -m jdiff.metrics.train_digits --seed {metadata['seed']}"
    accuracy = held_out_accuracy(params)
    assert accuracy == pytest.approx(float(metadata["accuracy"]), abs=1.5 / 899)  # one image may tip over
    assert accuracy >= 0.97
    assert digits.WEIGHTS.stat().st_size < 1e6


@pytest.fixture(scope="module")
def halves():
    return data.load("digits", split="test"), data.load("digits", split="train")


def test_digit_features_are_standardised(halves):
    value = metrics.embed(metrics.digit_features(), halves[1])
    assert value.shape == (898, 32) and value.dtype == np.float32
    np.testing.assert_allclose(value.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(value.std(0), 1, atol=1e-3)


def test_evaluate_and_its_floor(halves, capsys):
    reference, held_out = halves
    noisy = held_out.take(np.arange(898))["image"]
    noisy = noisy + 0.3 * np.random.default_rng(0).normal(size=noisy.shape).astype(np.float32)
    report = metrics.evaluate(noisy, reference, metrics.digit_features(), KEY, held_out=held_out)
    names = ["frechet", "kernel", "sliced_wasserstein", "precision", "recall"]
    assert list(report) == names + [f"floor_{name}" for name in names]
    assert str(report["floor_frechet"]).endswith("(n=898 vs 899, features digits-cnn-v1, reference digits/test)")
    assert 0 < 2 * float(report["floor_frechet"]) < float(report["frechet"])
    assert float(report["floor_sliced_wasserstein"]) < float(report["sliced_wasserstein"])
    assert float(report["floor_precision"]) > 0.85 and float(report["floor_recall"]) > 0.85
    with capsys.disabled():
        print("\n" + str(report["floor_frechet"]))
    # The same images give the floor itself, whatever their order.
    same = metrics.evaluate(held_out.take(np.arange(898)[::-1])["image"], reference, metrics.digit_features(), KEY)
    assert same["frechet"].n == same["floor_frechet"].n == 449
    assert same["frechet"].reference == "digits/test (half)"


def test_scoring_is_of_the_eight_bit_images(halves):
    images = halves[0].take(np.arange(40))["image"]
    features = metrics.digit_features()
    nudged = images + np.float32(0.2 / 127.5)  # 255/16 v is within 0.5 of its rounding, but 0.2 more may not be
    stored = data.to_uint8(nudged)
    np.testing.assert_array_equal(metrics.embed(features, nudged, 16), metrics.embed(features, stored, 16))


def test_bad_evaluations(halves):
    features = metrics.digit_features()
    with pytest.raises(ValueError, match=r"samples have the shape \(8, 8, 3\)"):
        metrics.evaluate(np.zeros((99, 8, 8, 3), np.float32), halves[0], features, KEY)
    with pytest.raises(ValueError, match=r"32-dimensional.*got 20 and"):
        metrics.evaluate(np.zeros((20, 8, 8, 1), np.float32), *halves[:1], features, KEY, held_out=halves[1])
    with pytest.raises(ValueError, match="not finite"):
        metrics.evaluate(np.full((99, 8, 8, 1), np.nan, np.float32), halves[0], features, KEY)
