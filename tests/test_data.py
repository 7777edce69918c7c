"""Data sets, their order, and the rule for 8 bits."""

import io
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
from PIL import Image

from jdiff import data


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def _png(image) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "png")
    return out.getvalue()


def _write(root, n=4, shape=(6, 6, 3), seed=0):
    """Classes "a" and "b" of n images each; returns {relative name: image}."""
    rng = np.random.default_rng(seed)
    images = {f"{c}/{i:02d}.png": rng.integers(0, 256, shape).astype(np.uint8) for c in "ab" for i in range(n)}
    for name, image in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(_png(image))
    return images


# The embedded digits


def test_digits_are_the_published_ones(digits):
    # Counts of the classes as the UCI documentation of optdigits.tes gives them.
    assert np.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.shape == (8, 8, 1) and len(digits) == 1797 and digits.num_classes == 10
    assert digits.images.min() == 0 and digits.images.max() == 16
    batch = digits.take(np.arange(1797))
    assert batch["image"].dtype == np.float32 and batch["label"].dtype == np.int32
    assert batch["image"].min() == -1 and batch["image"].max() == 1


def test_digit_halves_are_disjoint_and_complete(digits):
    train, test = data.load("digits", split="train"), data.load("digits", split="test")
    assert (len(train), len(test)) == (898, 899)
    rows = lambda d: {image.tobytes() for image in d.images}
    assert rows(train).isdisjoint(rows(test)) and rows(train) | rows(test) == rows(digits)
    assert abs(np.bincount(train.labels) - np.bincount(test.labels)).max() <= 1


# Order


@pytest.mark.parametrize("n, batch", [(10, 4), (12, 4), (7, 7), (5, 1), (9, 8)])
def test_each_epoch_is_a_permutation(n, batch):
    stream = np.concatenate([data.batch_indices(n, batch, 3, step) for step in range(3 * n)])
    epochs = stream[: len(stream) // n * n].reshape(-1, n)
    assert (np.sort(epochs, 1) == np.arange(n)).all()
    if n > 5:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_order_depends_on_the_seed_and_is_uniform():
    assert (data.batch_indices(50, 50, 0, 0) != data.batch_indices(50, 50, 1, 0)).any()
    first = [data.batch_indices(4, 1, seed, 0)[0] for seed in range(2000)]
    counts = np.bincount(first, minlength=4)
    assert ((counts - 500) ** 2 / 500).sum() < 16.3  # chi squared, 3 degrees of freedom, p = 0.001


def test_far_steps_cost_no_iteration():
    assert data.batch_indices(1797, 128, 0, 10**12).shape == (128,)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_batch_is_the_union_over_processes(digits, processes):
    whole = data.batches(digits, 16, seed=5, start_step=110)  # crosses the end of an epoch
    parts = [
        data.batches(digits, 16, seed=5, start_step=110, process_index=p, process_count=processes)
        for p in range(processes)
    ]
    for _ in range(4):
        expected, got = next(whole), [next(part) for part in parts]
        for name in expected:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in got]), expected[name])


def test_resume_equals_iterating(digits):
    run = data.batches(digits, 100, seed=1)
    skipped = [next(run) for _ in range(20)][-1]
    resumed = next(data.batches(digits, 100, seed=1, start_step=19))
    np.testing.assert_array_equal(resumed["image"], skipped["image"])
    np.testing.assert_array_equal(resumed["label"], skipped["label"])
    other = next(data.batches(digits, 100, seed=2, start_step=19))
    assert (other["label"] != skipped["label"]).any()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"batch_size": 1798}, "1798"),
        ({"batch_size": 0}, "between 1 and the 1797"),
        ({"batch_size": 10, "process_count": 4}, r"10 .* 4 processes; .* 8"),
        ({"batch_size": 3, "process_count": 4}, r"3 .* 4 processes; .* 4"),
        ({"batch_size": 8, "process_count": 2, "process_index": 2}, "process_index"),
        ({"batch_size": 8, "start_step": -1}, "negative"),
        ({"batch_size": 8, "seed": -1}, "negative"),
    ],
)
def test_bad_batches(digits, kwargs, message):
    with pytest.raises(ValueError, match=message):
        data.batches(digits, **({"seed": 0} | kwargs))


# Folders and archives


def test_folder_and_zip_agree(tmp_path):
    images = _write(tmp_path / "train")
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    with zipfile.ZipFile(tmp_path / "test.zip", "w") as archive:
        for name in reversed(images):  # members out of order
            archive.writestr(name, _png(images[name]))
    loaded = [
        data.load(tmp_path / "train"),
        data.load(tmp_path, split="train"),
        data.load(tmp_path / "test.zip"),
        data.load(tmp_path, split="test"),
    ]
    for dataset in loaded:
        np.testing.assert_array_equal(dataset.images, np.stack([images[name] for name in sorted(images)]))
        assert dataset.class_names == ("a", "b") and dataset.labels.tolist() == [0] * 4 + [1] * 4
    assert [dataset.name for dataset in loaded[:2]] == ["train", f"{tmp_path.name}/train"]


def test_reading_lazily_is_the_same(tmp_path, monkeypatch):
    _write(tmp_path)
    eager = data.load(tmp_path)
    monkeypatch.setattr("jdiff.data.images.IN_MEMORY_BYTES", 0)
    lazy = data.load(tmp_path)
    assert eager.in_memory and not lazy.in_memory
    a, b = (data.batches(d, 4, seed=0, start_step=3, process_index=1, process_count=2) for d in (eager, lazy))
    for _ in range(3):  # plain look-up against Grain's threads
        x, y = next(a), next(b)
        np.testing.assert_array_equal(x["image"], y["image"])
        np.testing.assert_array_equal(x["label"], y["label"])
    b.close()


def test_crop_and_resize(tmp_path):
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 200  # the central square is constant, what is cut off is not
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "wide.png").write_bytes(_png(image))
    (tmp_path / "c" / "tall.png").write_bytes(_png(image.transpose(1, 0, 2)))
    dataset = data.load(tmp_path, size=3)
    assert dataset.shape == (3, 3, 3) and (dataset.images == 200).all() and dataset.class_names == ("c",)
    with pytest.raises(ValueError, match=r"tall.png' is 4 x 8, 'c/wide.png' is 8 x 4.*size"):
        data.load(tmp_path)


def test_grey_stays_grey_unless_mixed(tmp_path):
    grey = np.arange(36, dtype=np.uint8).reshape(6, 6)
    (tmp_path / "x.png").write_bytes(_png(grey))
    assert data.load(tmp_path).shape == (6, 6, 1) and data.load(tmp_path).class_names == (tmp_path.name,)
    (tmp_path / "y.png").write_bytes(_png(np.stack([grey] * 3, -1)))
    mixed = data.load(tmp_path)
    assert mixed.shape == (6, 6, 3) and (mixed.images[0] == mixed.images[1]).all()


@pytest.mark.parametrize("lazy", [False, True])
def test_a_broken_image_is_named(tmp_path, monkeypatch, lazy):
    images = _write(tmp_path, shape=(16, 16, 3))
    if lazy:
        monkeypatch.setattr("jdiff.data.images.IN_MEMORY_BYTES", 0)
    path = tmp_path / "b" / "02.png"
    path.write_bytes(_png(images["b/02.png"])[:-200])  # the header is whole, the pixels are not
    with pytest.raises(ValueError, match=r"b/02.png.*broken"):
        data.load(tmp_path).take(np.array([6]))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"b/02.png.*broken"):
        data.load(tmp_path)


def test_bad_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.zip"):
        data.load(tmp_path / "nowhere.zip")
    with pytest.raises(FileNotFoundError, match="no image"):
        data.load(tmp_path)
    (tmp_path / "broken.zip").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"broken.zip.*neither"):
        data.load(tmp_path / "broken.zip")
    _write(tmp_path)
    with pytest.raises(FileNotFoundError, match="val"):
        data.load(tmp_path, split="val")
    (tmp_path / "stray.png").write_bytes(_png(np.zeros((6, 6), np.uint8)))
    with pytest.raises(ValueError, match=r"stray.png"):
        data.load(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        data.load("digit")
    with pytest.raises(ValueError, match="train"):
        data.load("digits", split="val")


def test_deep_colour_is_refused(tmp_path):
    (tmp_path / "deep.png").write_bytes(_png(np.arange(36, dtype=np.uint16).reshape(6, 6)))
    with pytest.raises(ValueError, match=r"deep.png.*8 bits"):
        data.load(tmp_path)


# TFDS

BUILDER = """
import numpy as np, tensorflow_datasets as tfds
class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        image = tfds.features.Tensor(shape=(6, 5, 3), dtype=np.uint8)
        label = tfds.features.ClassLabel(names=["cat", "dog"])
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({'image': image, 'label': label}))
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(24), "test": self._generate_examples(8)}
    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"image": np.full((6, 5, 3), i, np.uint8), "label": i % 2}
"""


def _python(code, cwd):
    """A fresh interpreter, so that what it imports can be counted; warnings of TFDS are its own affair."""
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_tfds_without_tensorflow(tmp_path):
    # The builder must live in a package: in __main__ TFDS does not find its folder.
    (tmp_path / "little").mkdir()
    (tmp_path / "little" / "__init__.py").write_text("")
    (tmp_path / "little" / "little_dataset_builder.py").write_text(BUILDER)
    _python(
        """
        from little.little_dataset_builder import Builder
        Builder(data_dir="prepared", file_format="array_record").download_and_prepare()
        """,
        tmp_path,
    )
    root = str(__import__("pathlib").Path(data.__file__).parents[2])
    out = _python(
        f"""
        import sys; sys.path.insert(0, {root!r})
        import numpy as np
        from jdiff import data
        d = data.load("tfds:little:train", data_dir="prepared")
        assert (len(d), d.shape, d.class_names, d.name) == (24, (6, 5, 3), ("cat", "dog"), "tfds:little/train")
        values = d.images[:, 0, 0, 0]                     # each image is its own number, its label the parity
        assert sorted(values) == list(range(24)) and (d.labels == values % 2).all()
        batches = data.batches(d, 8, seed=0, start_step=2, process_index=1, process_count=2)
        for step in range(2, 6):
            got, expected = next(batches), d.take(data.batch_indices(24, 8, 0, step)[4:])
            assert (got["image"] == expected["image"]).all() and (got["label"] == expected["label"]).all()
        assert len(data.load("tfds:little:1.0.0", split="test", data_dir="prepared")) == 8
        assert data.load("tfds:little:test", data_dir="prepared", size=4).images.shape == (8, 4, 4, 3)
        for name, kind, words in (
            ("tfds:litle", FileNotFoundError, "did you mean 'little'"),
            ("tfds:little:val", ValueError, "['test', 'train']"),
        ):
            try:
                data.load(name, data_dir="prepared")
            except kind as error:
                assert words in str(error), error
            else:
                raise AssertionError(name)
        batches.close()
        assert "tensorflow" not in sys.modules
        print("read")
        """,
        tmp_path,
    )
    assert out.strip().endswith("read")


# 8 bits


def test_to_uint8_rule():
    x = np.array([-2, -1, -1 + 1 / 127.5, 0, 1, 7], np.float32)
    assert data.to_uint8(x).tolist() == [0, 0, 1, 128, 255, 255]  # 127.5 goes to the even number
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(data.to_uint8(data.from_uint8(every)), every)
    # Rounded, not truncated: an error of 0.4 levels does not move a pixel.
    for shift in (-0.4, 0.4):
        moved = data.from_uint8(every) + np.float32(shift / 127.5)
        np.testing.assert_array_equal(data.to_uint8(moved), every)
    with pytest.raises(ValueError, match="1 of 2 pixel values are not finite"):
        data.to_uint8(np.array([0, np.nan], np.float32))


def test_grid(tmp_path, digits):
    images = digits.take(np.arange(5))["image"]
    path = data.save_grid(images, tmp_path / "new" / "grid.png", columns=3, scale=2)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == ((2 * 9 + 1) * 2, (3 * 9 + 1) * 2)
    tile = sheet[2 * 10 : 2 * 18 : 2, 2 * 10 : 2 * 18 : 2]  # second row, second column: image 4
    np.testing.assert_array_equal(tile, data.to_uint8(images[4, ..., 0]))
    np.testing.assert_array_equal(sheet[::2], sheet[1::2])
    with pytest.raises(ValueError, match="PNG"):
        data.save_grid(images, tmp_path / "grid.jpg")
    with pytest.raises(ValueError, match=r"\(n, H, W, 1 or 3\)"):
        data.save_grid(images[0], tmp_path / "grid.png")


def test_import_is_light():
    root = str(__import__("pathlib").Path(data.__file__).parents[2])
    heavy = "grain", "tensorflow_datasets", "PIL", "scipy.linalg", "safetensors", "rich", "optax"
    _python(f"import sys, jdiff.data, jdiff.metrics; assert not set({heavy}) & set(sys.modules)", root)
