"""Checkpoints: what is read back, what is refused and with which words. Runs are trained in test_train.py."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdiff import checkpoint, ema, train
from jdiff.checkpoint import CheckpointError
from jdiff.train import TrainConfig

STEPS = 32


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    net = {"width": 16, "depth": 1, "heads": 2, "patch": 4}
    config = TrainConfig(
        out=str(tmp_path_factory.mktemp("run") / "run"), net="DiT", net_options=net, batch=8, steps=STEPS, warmup=1,
        log_every=STEPS, checkpoint_every=16, snapshot_every=4, tensorboard=False,
    )  # fmt: skip
    return train.train(config, quiet=True)


@pytest.fixture
def copy(result, tmp_path):
    """A folder of its own to damage."""
    return Path(shutil.copytree(result.out, tmp_path / "copy"))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_was_saved_comes_back(result):
    net, params, meta = checkpoint.load_params(result.out)
    same(params, result.state.params)
    same(nnx.to_pure_dict(nnx.state(net)), params)
    assert meta["step"] == STEPS and meta["net"] == net.config and meta["prediction"] == "x0"
    assert meta["process"] == ["edm", {}] and meta["data"]["name"] == "digits/train" and "jax" in meta["versions"]
    assert checkpoint.latest_step(result.out / "checkpoints") == STEPS
    for i, sigma_rel in enumerate(ema.SIGMA_RELS):
        same(checkpoint.load_params(result.out, ema=sigma_rel)[1], result.state.ema[i])
    _, earlier, meta = checkpoint.load_params(result.out, step=16)
    assert meta["step"] == 16 and not np.array_equal(jax.tree.leaves(earlier)[0], jax.tree.leaves(params)[0])


def test_length_of_the_average_is_chosen_after_training(result):
    """Rebuilt from snapshots: two tracked lengths as they are, and one between them between them."""
    times = checkpoint.steps(result.out / "snapshots")
    _, middle, _ = checkpoint.load_params(result.out, ema=0.07)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    short, long = map(flat, result.state.ema)
    share = (flat(middle) - long) @ (short - long) / ((short - long) @ (short - long))
    assert times == list(range(4, STEPS + 1, 4)) and 0.2 < share < 0.95
    with pytest.raises(CheckpointError, match=r"sigma_rel 0.01 at step 32: 8 snapshots .* take snapshots more often"):
        checkpoint.load_params(result.out, ema=0.01)


def test_safetensors_there_and_back(result, tmp_path):
    file = tmp_path / "model.safetensors"
    checkpoint.export_safetensors(result.out, file, ema=0.1)
    net, params, meta = checkpoint.load_params(file)
    same(params, result.state.ema[1])
    assert meta["average"] == 0.1 and net.config == meta["net"] and [p.name for p in tmp_path.iterdir()] == [file.name]
    x = jnp.ones((2, 8, 8, 1), jnp.float32)
    np.testing.assert_array_equal(train.denoiser_from(file, 0.1)(x, 1.0), train.denoiser_from(result, 0.1)(x, 1.0))
    with pytest.raises(CheckpointError, match=r"holds step 32 with ema=0.1 alone; asked for .*ema=0.05"):
        checkpoint.load_params(file, ema=0.05)
    with pytest.raises(ValueError, match=r"ends in .safetensors"):
        checkpoint.export_safetensors(result.out, tmp_path / "model.bin")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load_params(file)


def test_safetensors_of_another_net(result, tmp_path):
    from safetensors.numpy import save_file

    file = tmp_path / "other.safetensors"
    save_file({"w": np.ones(2, np.float32)}, file)
    with pytest.raises(CheckpointError, match="not written by jdiff"):
        checkpoint.load_params(file)
    save_file({"w": np.ones(2, np.float32)}, file, {"jdiff": json.dumps({**result.meta, "average": None, "step": 1})})
    with pytest.raises(CheckpointError, match=r"does not fit its own net DiT: blocks\."):
        checkpoint.load_params(file)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax drops its coroutines
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_damaged_files(copy, how):
    half = lambda b: (b[: len(b) // 2], b[len(b) // 2], b[len(b) // 2 + 1 :])
    cut = {
        "truncated": lambda p: p.write_bytes(half(p.read_bytes())[0]),
        "flipped": lambda p: p.write_bytes(b"%b%c%b" % ((h := half(p.read_bytes()))[0], h[1] ^ 16, h[2])),
        "missing": Path.unlink,
    }[how]
    for file in copy.glob(f"checkpoints/{STEPS}/params/**/d/*"):  # which of them holds the data is TensorStore's
        cut(file)
    with pytest.raises(CheckpointError, match=rf"checkpoints/{STEPS} cannot be read: .*; delete .* from step 16"):
        checkpoint.load_params(copy)
    config = TrainConfig(**result_config(copy), out=str(copy))
    with pytest.raises(CheckpointError, match="cannot be read"):  # resume says so too, and touches nothing
        train.train(config, quiet=True)
    shutil.rmtree(copy / f"checkpoints/{STEPS}")  # what the message advises
    assert checkpoint.load_params(copy)[2]["step"] == 16


def result_config(out):
    fields = json.loads((out / "config.json").read_text())
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    fixed = {k: v for k, v in fields.items() if k in names} | {"ema": tuple(fields["ema"])}
    return fixed | {"log_every": STEPS, "checkpoint_every": 16, "tensorboard": False}


def test_unfinished_saves_do_not_count(copy):
    """A save that was killed has another name, whatever is in it."""
    shutil.move(copy / f"checkpoints/{STEPS}", copy / f"checkpoints/{STEPS}.orbax-checkpoint-tmp")
    assert checkpoint.latest_step(copy / "checkpoints") == 16
    shutil.rmtree(copy / "checkpoints/16")
    assert checkpoint.latest_step(copy / "checkpoints") is None
    with pytest.raises(CheckpointError, match=r"only an unfinished save \(32.orbax-checkpoint-tmp\): start the same"):
        checkpoint.load_params(copy)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="there is no run at"):
        checkpoint.load_params(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"no checkpoint \(found: \['notes.txt'\]\)"):
        checkpoint.load_params(tmp_path)
    assert checkpoint.latest_step(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="there is no file"):
        checkpoint.load_params(tmp_path / "model.safetensors")


def test_a_step_that_is_not_there(result):
    with pytest.raises(CheckpointError, match="no finished step 20; it has 16, 32"):
        checkpoint.load_params(result.out, step=20)


def test_other_arrays_are_refused_by_name(result):
    other = {"params": {"w": jnp.ones((3, 2))}}
    with pytest.raises(CheckpointError, match=r"params is of another configuration: .* arrays differ: blocks"):
        checkpoint.restore(result.out / "checkpoints", STEPS, other)
    _, like, _ = checkpoint.load_params(result.out)
    wrong = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape, 2), x.dtype), like)
    with pytest.raises(CheckpointError, match=r"bias is float32\[1, 16\], expected float32\[1, 16, 2\]"):
        checkpoint.restore(result.out / "checkpoints", STEPS, {"params": wrong})


def test_differences_are_named():
    same_config = {"a": 1, "b": (1, 2), "c": {"d": None}}
    checkpoint.check_same(same_config, {"a": 1, "b": [1, 2], "c": {"d": None}}, "x")
    with pytest.raises(
        CheckpointError, match=r"x belongs .*: a is 1 there, 2 in this command; e is 'not there' there, 0 in"
    ):
        checkpoint.check_same(same_config, same_config | {"a": 2, "e": 0}, "x")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_kind_of_leaf_survives(tmp_path, dtype):
    """bfloat16, integers, scalars, integer keys (the UNet's lists) and tuples, bit for bit."""
    tree = {
        "down": {0: jnp.arange(3, dtype=dtype), 1: jnp.zeros((), jnp.int32)},
        "t": (jnp.full(2, jnp.nan, dtype), {}),
    }
    with checkpoint.writer(tmp_path) as writer:
        checkpoint.save(writer, 3, {"tree": tree}, {"a": [1, None]})
        checkpoint.save(writer, 3, {"tree": tree}, {"a": 2})  # there already: left alone
    found = checkpoint.restore(tmp_path, 3, {"tree": tree})
    assert found["meta"] == {"a": [1, None]} and jax.tree.structure(found["tree"]) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(found["tree"]), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_step_is_removed_at_once_or_not_at_all(tmp_path, monkeypatch):
    """A kill in the middle of a removal leaves a folder of another name, which the next writer clears away."""

    def killed(folder):
        (Path(folder) / "_CHECKPOINT_METADATA").unlink()
        raise KeyboardInterrupt

    tree = {"tree": {"w": jnp.ones(3, jnp.float32)}}
    with pytest.raises(KeyboardInterrupt), checkpoint.writer(tmp_path, keep=1) as writer:
        checkpoint.save(writer, 1, tree, {})
        checkpoint.save(writer, 2, tree, {})
        writer.manager.wait_until_finished()
        monkeypatch.setattr(shutil, "rmtree", killed)
        checkpoint.save(writer, 3, tree, {})
    monkeypatch.undo()
    assert checkpoint.steps(tmp_path) == [2, 3] and (tmp_path / "1.deleted").is_dir()
    for step in (2, 3):
        checkpoint.restore(tmp_path, step, tree)
    with checkpoint.writer(tmp_path, keep=1):
        assert not (tmp_path / "1.deleted").exists()
    assert checkpoint.steps(tmp_path) == [3]


def test_checksums_see_every_bit(tmp_path, monkeypatch):
    """Any flipped bit and any exchange of elements changes a leaf's sum; a sharded array has the unsharded sum."""
    x = np.random.default_rng(0).standard_normal((8, 3, 5)).astype(np.float32)
    words = x.view(np.uint32).ravel().astype(np.uint64)
    want = int((words * (2 * np.arange(words.size, dtype=np.uint64) + 1)).sum() % 2**32)
    total = lambda x: int(checkpoint.checksums({"x": x})[0])
    assert total(x) == want
    split = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec("data"))
    assert total(jax.device_put(x, split)) == want
    for place in (0, 77, 119):
        for bit in (0, 13, 31):
            flipped = x.view(np.uint32).copy()
            flipped.ravel()[place] ^= np.uint32(1 << bit)
            assert total(flipped.view(np.float32)) != want

    tree = {"tree": {"v": jnp.ones(3, jnp.bfloat16), "w": jnp.ones((2, 2), jnp.float32)}}
    right = checkpoint.checksums
    with monkeypatch.context() as patch, checkpoint.writer(tmp_path) as writer:
        patch.setattr(checkpoint, "checksums", lambda tree: right(tree) ^ jnp.asarray([0, 1], jnp.uint32))
        checkpoint.save(writer, 1, tree, {})
    with pytest.raises(CheckpointError, match=r"damaged .*wrong checksum of w"):
        checkpoint.restore(tmp_path, 1, tree)
