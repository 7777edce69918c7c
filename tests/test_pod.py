"""Several processes as one run, and stopping when asked: pieces in one process, and a run of two processes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import checkpoint, cli, data, mesh, pod, train


def test_the_command_line_ends_with_143(monkeypatch, capsys):
    def train_(config):
        raise pod.Preempted("stopped by SIGTERM at step 7, which is saved in there")

    monkeypatch.setattr(train, "train", train_)
    assert cli.main(["train"]) == 143
    assert "step 7" in capsys.readouterr().err


def test_rows_and_places():
    """In one process all rows; each device gets the rows that device_put would give it."""
    for axes in ("data=8", "data=2,fsdp=2,tensor=2", "tensor=8"):
        m = mesh.make(axes)
        sharding, x = mesh.batch(m), np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
        held = pod.rows(sharding, 16)
        np.testing.assert_array_equal(held, np.arange(16))
        placed = pod.place(x[held], held, sharding, 16)
        for got, want in zip(placed.addressable_shards, jax.device_put(x, sharding).addressable_shards, strict=True):
            np.testing.assert_array_equal(got.data, want.data)
    some = np.array([1, 2, 5, 11])
    images = data.load("digits", split="train")
    part, all_of = (next(data.batches(images, 16, seed=3, start_step=2, rows=rows)) for rows in (some, None))
    np.testing.assert_array_equal(part["image"], all_of["image"][some])


def test_rows_and_places_of_one_process_of_several(monkeypatch):
    """A process whose devices hold two parts of the batch that do not touch, one of them twice."""
    parts = {"a": (slice(4, 8),), "b": (slice(12, 16),), "c": (slice(4, 8),)}
    sharding = mesh.batch(mesh.make())
    monkeypatch.setattr(type(sharding), "addressable_devices_indices_map", lambda self, shape: parts)
    held = pod.rows(sharding, 16)
    np.testing.assert_array_equal(held, [4, 5, 6, 7, 12, 13, 14, 15])
    x, asked = np.arange(32.0).reshape(16, 2), [(slice(4, 6), slice(None)), (slice(12, 16), slice(None))]
    given = lambda shape, sharding, part: jnp.concatenate([part(index) for index in asked])
    monkeypatch.setattr(jax, "make_array_from_callback", given)
    np.testing.assert_array_equal(pod.place(x[held], held, sharding, 16), x[[4, 5, 12, 13, 14, 15]])


def test_who_disagrees_is_named(monkeypatch):
    pod.agree(batch=1, mesh="data=2")  # alone: agrees
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    found = {"batch": [16, 32, 16], "mesh": ["", "", ""]}
    monkeypatch.setattr(pod, "_gathered", lambda what: found)
    with pytest.raises(ValueError, match=r"disagree on batch: 16 in process 0, 2; 32 in process 1\. Start the same"):
        pod.agree(batch=16)


@pytest.mark.parametrize("text", ["10.0.0.2,2,0", "10.0.0.2:1234,2,2", "host:1,2", "Auto"])
def test_processes_that_cannot_be_read(text, capsys):
    with pytest.raises(ValueError, match=r"expected auto, or HOST:PORT,COUNT,INDEX"):
        pod.start(text)


def test_no_cluster(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **k: (_ for _ in ()).throw(ValueError("no coordinator")))
    with pytest.raises(
        ValueError, match=r"of 'auto' did not find one another: no coordinator\. Start the same command"
    ):
        pod.start("auto")


@pytest.mark.long
def test_two_processes_and_one_that_goes_on_elsewhere(tmp_path, monkeypatch):
    """Six steps of two processes with two devices each, then two of one process on another mesh: the run that was one
    process's from the start. What kills, SIGTERM and disagreement do to several is in benchmarks/processes.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import processes

    both = processes.start(tmp_path / "run", "2x2", 6, "fsdp=4")
    codes = [p.wait(timeout=200) for p in both]
    assert codes == [0, 0], [processes.said(tmp_path / "run", i).read_text()[-2000:] for i in range(2)]
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [6]
    configs = [processes.config(str(tmp_path / name), 8, "data=4,fsdp=2") for name in ("run", "alone")]
    moved, alone = (jax.device_get(train.train(c, quiet=True).state) for c in configs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), moved, alone)
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines()[1:] for name in ("run", "alone")]
    losses = np.array([[float(row.split(",")[1]) for row in of] for of in rows])
    np.testing.assert_allclose(*losses, rtol=1e-5)


LATENTS = """
import numpy as np, tensorflow_datasets as tfds
class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        latent = tfds.features.Tensor(shape=(8, 8, 4), dtype=np.float32)
        label = tfds.features.ClassLabel(num_classes=10)
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({'latent': latent, 'label': label}))
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        rng = np.random.default_rng(0)
        for i in range(64):
            yield i, {"latent": rng.normal(size=(8, 8, 4)).astype(np.float32), "label": i % 10}
"""

DRY_RUN = """
import sys
from latents.latents_dataset_builder import Builder
Builder(data_dir="prepared", file_format="array_record").download_and_prepare()
import numpy as np
from jdiff import data
from jdiff.experiments import train_dit_imagenet
found = data.load("tfds:latents", data_dir="prepared").take(np.arange(64))
assert found["image"].dtype == np.float32 and np.abs(found["image"]).max() > 2 and found["image"].shape == (64, 8, 8, 4)
options = "--net DiT --net-options patch 2 width 32 depth 2 heads 2 --batch 16 --steps 4 --warmup 1"
where = "--data tfds:latents --data-dir prepared --out run --mesh data=-1,fsdp=4 --log-every 2 --checkpoint-every 4"
train_dit_imagenet.main(f"{options} {where}".split())
assert "tensorflow" not in sys.modules
"""


@pytest.mark.long
def test_dry_run_of_the_imagenet_script_on_simulated_devices(tmp_path):
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents/__init__.py").touch()
    (tmp_path / "latents/latents_dataset_builder.py").write_text(LATENTS)
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", DRY_RUN], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 4/4" in done.stdout and checkpoint.steps(tmp_path / "run/checkpoints") == [4]
    assert subprocess.run(["bash", "-n", root / "experiments/train_dit_imagenet.sh"]).returncode == 0
