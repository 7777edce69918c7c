"""The train step, whole runs, exact resume (SIGKILL included), and what a run refuses."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdiff import checkpoint, ema, losses, mesh, pod, process, recipe, train
from jdiff.train import TrainConfig

TINY = {"width": 16, "depth": 1, "heads": 2, "patch": 4}
CONFIG = TrainConfig(
    net="DiT", net_options=TINY, batch=16, steps=12, warmup=2, learning_rate=3e-3, log_every=3,
    checkpoint_every=5, snapshot_every=4, tensorboard=False,
)  # fmt: skip


def config(out, **changes):
    return dataclasses.replace(CONFIG, out=str(out), **changes)


def run(c, **options):
    return train.train(c, quiet=True, **options)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rows(out):
    with open(Path(out) / "metrics.csv") as file:
        return [(int(r["step"]), float(r["loss"]), float(r["grad_norm"])) for r in csv.DictReader(file)]


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Runs of one configuration compile the same programs: take them from a cache."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("run") / "whole"
    return run(config(out, tensorboard=True))


# ------------------------------------------------------------------------------------------------------ one step
def linear(params, x, t, y):
    return params["w"] * x


def test_step_is_the_plain_update():
    """One step equals value_and_grad, clipping, SGD and EMA written out in NumPy float64."""
    p = process.flow()
    loss = losses.denoising_loss(linear, p, "velocity")
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5))
    params = {"w": jnp.asarray(0.3, jnp.float32)}
    state = train.init_state(params, optimizer, (0.1,))
    step = jax.jit(train.make_train_step(loss, optimizer, (0.1,)))
    x0 = jax.random.normal(jax.random.key(0), (8, 4), jnp.float32)
    sums, seen = train.meter(), [0.3]
    for i in range(3):
        key = jax.random.fold_in(jax.random.key(jnp.uint32(5)), i)
        value, slope = jax.value_and_grad(lambda w: loss({"w": w}, key, x0).mean())(state.params["w"])  # noqa: B023
        state, new = step(state, sums, {"image": x0}, jnp.uint32(5))
        seen.append(seen[-1] - 0.5 * np.clip(float(slope), -0.1, 0.1))
        np.testing.assert_allclose(new.loss - sums.loss, value, rtol=1e-5)
        np.testing.assert_allclose(new.grad_norm - sums.grad_norm, abs(slope), rtol=1e-5)
        np.testing.assert_allclose(state.params["w"], seen[-1], rtol=1e-5)
        sums = new
    i, g = np.arange(1, 4), ema.gamma_of_sigma_rel(0.1)
    weights = (i ** (g + 1) - (i - 1) ** (g + 1)) / 3 ** (g + 1)
    np.testing.assert_allclose(state.ema[0]["w"], weights @ seen[1:], rtol=1e-5)
    assert int(state.step) == 3 and int(sums.steps) == 3 and int(sums.first_bad) == -1
    assert all(x.dtype != jnp.float64 for x in jax.tree.leaves((state, sums)))


def test_sharded_step_is_the_unsharded_one():
    """The loss of a batch does not depend on the mesh, up to the order of one sum."""
    loss = losses.denoising_loss(linear, process.flow(), "velocity", stratified=True)
    optimizer = optax.sgd(0.1)
    x0 = jax.random.normal(jax.random.key(0), (16, 4), jnp.float32)
    state = train.init_state({"w": jnp.asarray(0.3, jnp.float32)}, optimizer, ())
    step = jax.jit(train.make_train_step(loss, optimizer, ()))
    split = mesh.batch(mesh.make())
    one = step(state, train.meter(), {"image": x0}, jnp.uint32(0))
    many = step(state, train.meter(), {"image": jax.device_put(x0, split)}, jnp.uint32(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, many)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rate(schedule):
    rate = recipe.learning_rate(config("", schedule=schedule, steps=100, warmup=10, learning_rate=0.2))
    got = np.array([float(rate(i)) for i in range(100)])
    np.testing.assert_allclose(got[:10], 0.02 + np.arange(10) * 0.018, rtol=1e-5)
    after = 0.2 if schedule == "constant" else 0.1 * (1 + np.cos(np.pi * np.arange(90) / 90))
    np.testing.assert_allclose(got[10:], after, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------------------------------------------- whole runs
def test_a_run_learns_and_leaves_what_it_promises(whole):
    table = rows(whole.out)
    assert [r[0] for r in table] == [3, 6, 9, 12]
    assert all(np.isfinite(r[1:]).all() for r in table) and table[-1][1] < table[0][1]
    assert checkpoint.steps(whole.out / "checkpoints") == [10, 12]
    assert checkpoint.steps(whole.out / "snapshots") == [4, 8, 12]
    assert list(whole.out.glob("events.out.tfevents*"))
    assert {x.dtype for x in jax.tree.leaves(whole.state.params)} == {np.dtype("float32")}
    assert int(whole.state.step) == 12


def test_checkpoints_hold_the_state_of_their_step(whole, tmp_path):
    """Saving is asynchronous and the state is donated to the next step: a checkpoint must not see that step."""
    early = run(config(tmp_path / "early", checkpoint_every=1, steps=12, keep=12))
    same(early.state, whole.state)
    for step in (4, 8):
        _, average, _ = checkpoint.load_params(tmp_path / "early", ema=0.1, step=step)
        wide = jax.tree.map(jnp.asarray, average)
        found = checkpoint.restore(whole.out / "snapshots", step, {"ema": (wide, wide)})["ema"]
        same(found[1], average)


def test_resume_is_exact(whole, tmp_path):
    """Stopped by an exception between checkpoints (5, 10) and rows (3, 6, ...), then started again, twice."""
    c = config(tmp_path / "run")

    def stop_at(step):
        def callback(done, metrics):
            if done >= step:
                raise KeyboardInterrupt

        return callback

    for step in (3, 9):
        with pytest.raises(KeyboardInterrupt):
            run(c, callback=stop_at(step))
    with open(tmp_path / "run/metrics.csv", "a") as file:
        file.write("10,0.1,0.")  # what a kill in the middle of a row leaves
    resumed = run(c)
    same(resumed.state, whole.state)
    assert rows(c.out) == rows(whole.out)
    same(run(c).state, whole.state)  # finished: read, nothing is trained


def test_sigterm_saves_the_step_and_the_run_goes_on_bitwise(whole, tmp_path):
    c = config(tmp_path / "run")
    before = signal.getsignal(signal.SIGTERM)
    ask = lambda done, metrics: os.kill(os.getpid(), signal.SIGTERM) if done == 6 else None
    with pytest.raises(pod.Preempted, match=r"stopped by SIGTERM at step 7, which is saved in .*run"):
        train.train(c, ask, quiet=True)
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [5, 7]  # none was due at 7
    assert signal.getsignal(signal.SIGTERM) is before
    same(run(c).state, whole.state)
    assert rows(tmp_path / "run") == rows(whole.out)


@pytest.mark.long
def test_a_constant_schedule_can_go_on(tmp_path):
    c = config(tmp_path / "short", schedule="constant", steps=8)
    run(c)
    longer = run(dataclasses.replace(c, steps=12, log_every=4))
    at_once = run(config(tmp_path / "long", schedule="constant"))
    same(longer.state, at_once.state)


def test_bfloat16_activations_keep_float32_parameters(tmp_path):
    c = config(tmp_path / "run", dtype="bfloat16", steps=3, process="flow", prediction="velocity", weighting="none")
    result = run(dataclasses.replace(c, time="logit_normal", labels=False))
    dtypes = {x.dtype for x in jax.tree.leaves((result.state.params, result.state.ema))}
    assert dtypes == {np.dtype("float32")} and np.isfinite(rows(c.out)[0][1])
    model = train.denoiser_from(result, ema=None)
    assert model.prediction == "velocity" and model(jnp.ones((2, 8, 8, 1), jnp.float32), 0.5).dtype == jnp.float32


def test_denoiser_from_a_run_is_the_trained_net(whole):
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1), jnp.float32)
    labels = jnp.arange(4, dtype=jnp.int32)
    for average in (None, 0.05, 0.1):
        a = train.denoiser_from(whole, average, labels)
        b = train.denoiser_from(whole.out, average, labels)
        np.testing.assert_array_equal(a(x, 2.0), b(x, 2.0))
        assert jax.tree.structure(a) == jax.tree.structure(b)  # so that one compiled sampler serves both
    # sigma small: preconditioning makes the denoiser the identity there, whatever the net says
    np.testing.assert_allclose(a(x, 1e-4), x, atol=1e-3)
    assert not np.array_equal(a(x, 2.0), train.denoiser_from(whole, 0.1, labels[::-1])(x, 2.0))
    assert np.isfinite(train.denoiser_from(whole, 0.1)(x, 2.0)).all()  # no labels: the null label


# ------------------------------------------------------------------------------------------------------ the guard
def test_non_finite_loss_names_its_step_and_keeps_the_last_good_checkpoint(tmp_path):
    """Looks every 100 steps, and still names step 7 of 12; no checkpoint holds the NaN."""
    from jdiff import data

    digits = data.load("digits", split="train")
    poison = data.batch_indices(len(digits), 16, 0, 6)[3]
    read = lambda rows: (digits.read(rows)[0], np.where(rows == poison, 99, digits.read(rows)[1]).astype(np.int32))
    broken = dataclasses.replace(digits, read=read)  # label 99 is no class: the net answers NaN
    c = config(tmp_path / "run", log_every=100)
    with pytest.raises(FloatingPointError, match=r"at step 7 of .* the checkpoint of step 5 is kept"):
        run(c, dataset=broken)
    _, params, _ = checkpoint.load_params(c.out)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batch": 13}, "batch 13 is not divisible by the mesh's 8 devices; the nearest is 16"),
        ({"batch": 4096}, "898"),
        ({"net_options": TINY | {"channels": 3}}, "channels is 3, but the data set digits .* 1"),
        ({"net_options": TINY | {"image_size": 32}}, "image_size is 32"),
        ({"net": "DiT-Ti/3"}, "unknown net"),
        ({"process": "vp"}, "unknown process 'vp'; expected one of .*edm, flow"),
        ({"process_options": {"beta": 1.0}}, "process_options"),
        ({"prediction": "eps", "precondition": True}, "precondition"),
        ({"prediction": "noise"}, "unknown prediction"),
        ({"weighting": "snr"}, "unknown weighting"),
        ({"time": "uniform", "time_mean": 0.0}, "time_mean"),
        ({"optimizer": "adamv"}, "unknown optimizer 'adamv'"),
        ({"schedule": "linear"}, "unknown schedule 'linear'"),
        ({"warmup": 12}, "warmup"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"seed": -1}, "seed"),
        ({"ema": (0.5,)}, "sigma_rel"),
        ({"data": "digit"}, "digits"),
    ],
)
def test_bad_configurations(tmp_path, changes, match):
    c = config(tmp_path / "run")
    for name, value in changes.items():
        object.__setattr__(c, name, value)  # past the type check, which is on in tests only
    with pytest.raises(ValueError, match=match):
        run(c)
    assert not (tmp_path / "run").exists()  # nothing was written


def test_another_configuration_is_refused_by_name(whole):
    with pytest.raises(checkpoint.CheckpointError, match=r"rate is 0.003 there, 0.1 in this command; seed is 0 there"):
        run(dataclasses.replace(CONFIG, out=str(whole.out), learning_rate=0.1, seed=1))


# ---------------------------------------------------------------------------------------------------- SIGKILL
@pytest.mark.long
def test_sigkill_and_resume_is_bitwise_exact(tmp_path):
    """A kill at a random moment and one in the middle of a checkpoint's write; ten are in benchmarks/kill_resume.py."""
    script = Path(__file__).parents[1] / "benchmarks/kill_resume.py"
    command = [sys.executable, str(script), "--kills", "2", "--steps", "72", "--seed", "1", "--out", str(tmp_path)]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")  # quick to compile
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "XLA_FLAGS": flags})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitwise equal" in done.stdout
