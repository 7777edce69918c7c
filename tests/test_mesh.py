"""The mesh: what it refuses, where arrays lie, and that no layout changes a number."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jdiff
from jdiff import losses, mesh, nets, process, solvers, times, train
from jdiff.plan import hlo
from jdiff.recipe import NetCall
from jdiff.train import TrainConfig

OPTIONS = {"patch": 2, "width": 32, "depth": 2, "heads": 4, "num_classes": 4}
P = process.flow()


def net(**changes):
    return nets.build("DiT", 8, 1, rngs=nnx.Rngs(0), **(OPTIONS | changes))


def spec(tree, *path):
    for key in path:
        tree = tree[key]
    return tuple(tree.spec)


def test_sizes():
    assert dict(mesh.make().shape) == {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert dict(mesh.make("fsdp=2,data=-1").shape) == {"data": 4, "fsdp": 2, "tensor": 1, "sequence": 1}
    assert dict(mesh.make({"tensor": 2}, jax.devices()[:2]).shape)["tensor"] == 2


@pytest.mark.parametrize(
    ("axes", "match"),
    [
        ("data=3", r"mesh data 3 does not multiply to the 8 devices \(data=8 would\); write"),
        ("data=3,fsdp=2", r"mesh data 3 x fsdp 2 does not multiply to the 8 devices \(data=4 would\)"),
        ("data=-1,fsdp=3", r"does not multiply to the 8 devices"),
        ("data=2,model=4", r"unknown axis 'model'; expected one of data, fsdp, tensor, sequence"),
        ("data", r"cannot read 'data='; expected axis=size"),
        ("data=0", r"cannot read 'data=0'"),
    ],
)
def test_bad_sizes(axes, match):
    with pytest.raises(ValueError, match=match):
        mesh.make(axes)


def test_one_rule_set_lays_out_parameters_optimizer_and_averages():
    import optax

    m, model = mesh.make("data=2,fsdp=2,tensor=2"), net()
    params = nnx.to_pure_dict(nnx.state(model))
    state = jax.eval_shape(lambda p: train.init_state(p, optax.adamw(1e-3), (0.1,)), params)
    laid = mesh.shardings(m, model, state)
    for tree in (laid.params, laid.ema[0], laid.opt_state[0].mu, laid.opt_state[0].nu):
        assert spec(tree, "blocks", "attention", "qkv", "kernel") == (None, "fsdp", "tensor")
        assert spec(tree, "blocks", "mlp_out", "kernel") == (None, "tensor", "fsdp")
        assert spec(tree, "blocks", "mlp_in", "bias") == (None, "tensor")
        assert spec(tree, "conditioning", "labels") == (None, "fsdp")
    assert tuple(laid.step.spec) == tuple(laid.opt_state[0].count.spec) == ()
    big = [p for p, a in jax.tree.leaves_with_path(params) if a.size >= 1024]
    whole = [p for p, s in jax.tree.leaves_with_path(laid.params) if all(a is None for a in s.spec) and p in big]
    assert not whole, whole  # nothing large is replicated


@pytest.mark.parametrize("name", ["UNet-CIFAR", "DiT-S/2"])
def test_the_rules_reach_every_large_parameter(name):
    model = nnx.eval_shape(lambda: nets.build(name, 32, 3, num_classes=10, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model))
    laid = mesh.shardings(mesh.make("fsdp=8"), model, params)
    each = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(laid), strict=True)
    total = sum(a.size for _, a in jax.tree.leaves_with_path(params))
    whole = sum(a.size for (_, a), s in each if "fsdp" not in s.spec)
    assert whole < 0.01 * total


def test_what_does_not_divide_is_named():
    m, model = mesh.make("fsdp=8"), net(width=36, heads=3)
    params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(model)))
    with pytest.raises(ValueError, match=r"36 by fsdp = 8 \(fsdp = 4 would\), of blocks/attention/out/kernel \(2, 36"):
        mesh.shardings(m, model, params)
    with pytest.raises(ValueError, match=r"(?s)batch 13 .*nearest is 16\. the mesh does not divide 36 by fsdp = 8"):
        mesh.check(m, model, 13, params)
    with pytest.raises(ValueError, match=r"batch 13 .* 8 devices; the nearest is 16"):
        mesh.check(m, net(), 13)
    with pytest.raises(ValueError, match=r"heads 4 is not divisible by tensor = 8; the nearest is 8, or tensor = 4"):
        mesh.check(mesh.make("tensor=8"), net(), 8)
    with pytest.raises(ValueError, match=r"tokens 4 is not divisible by sequence = 8"):
        mesh.check(mesh.make("sequence=8"), net(patch=4), 8)


@pytest.mark.parametrize("axes", ["data=2,fsdp=4", "fsdp=8"])
@pytest.mark.parametrize(
    ("product", "split", "shape"),
    [(mesh.rows_split, ("fsdp",), (64, 32)), (mesh.columns_split, (None, "fsdp"), (24, 24))],  # 128 at a time, or not
)
def test_products_with_split_kernels(axes, product, split, shape):
    """Value, tangent and gradients against float64 NumPy; the kernel is gathered, its gradient scattered."""
    m, rng = mesh.make(axes), np.random.default_rng(0)
    x, w, g = (rng.normal(size=n) for n in ((16, shape[0]), shape, (16, shape[1])))
    put = lambda a, *axes: jax.device_put(a.astype(np.float32), NamedSharding(m, PartitionSpec(*axes)))
    dot = lambda x, w: product(x, w, (((1,), (0,)), ((), ())), precision="highest")
    args, weight = (put(x, mesh.BATCH), put(w, *split)), put(g, mesh.BATCH)
    grads = jax.jit(mesh.on(m, jax.grad(lambda a: (dot(*a) * weight).sum()))).lower(args).compile()
    value, tangent = jax.jit(mesh.on(m, lambda a: jax.jvp(dot, a, a)))(args)
    np.testing.assert_allclose(value, x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tangent, 2 * x @ w, rtol=1e-5, atol=1e-5)
    for got, want in zip(grads(args), (g @ w.T, x.T @ g), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert grads(args)[1].sharding.is_equivalent_to(args[1].sharding, 2)
    moved = hlo.Program(grads.as_text()).moved(dict(m.shape))
    over = {kind: size for (kind, axes), size in moved.collectives.items() if axes == "fsdp"}
    least = w.size * 4 * (1 - 1 / m.shape["fsdp"])
    assert over == {"all-gather": least, "reduce-scatter": least}


@pytest.fixture(scope="module")
def setting():
    """A net with no zeros left, a loss and a batch of 16."""
    import optax

    model = net(unroll=2)
    params = nnx.to_pure_dict(nnx.state(model))
    leaves, tree = jax.tree.flatten(params)
    shake = [a + 0.1 * jax.random.normal(jax.random.key(i), a.shape, a.dtype) for i, a in enumerate(leaves)]
    params = jax.tree.unflatten(tree, shake)
    call = NetCall(nnx.graphdef(model), P)
    loss = losses.denoising_loss(call, P, "velocity", label_dropout=0.1, null_label=4)
    sgd = optax.sgd(0.1, momentum=0.9)  # Adam's first update is a sign, which no rounding error may turn
    step = train.make_train_step(loss, sgd, (0.1,))
    state = train.init_state(params, sgd, (0.1,))
    image = jax.random.normal(jax.random.key(9), (16, 8, 8, 1), jnp.float32)
    data = {"image": image, "label": jnp.arange(16, dtype=jnp.int32) % 4}
    return model, call, step, state, data


@pytest.fixture(scope="module")
def alone(setting):
    _, _, step, state, data = setting
    return jax.jit(step)(state, train.meter(), data, jnp.uint32(0))


@pytest.mark.parametrize("axes", ["data=2,fsdp=2,tensor=2", "tensor=2,sequence=4", "data=2,fsdp=4"])
def test_a_step_on_any_mesh_is_that_of_one_device(setting, alone, axes):
    model, _, step, state, data = setting
    m = mesh.explicit(mesh.make(axes))
    laid = mesh.shardings(m, model, state)
    placed = jax.device_put(state, laid)
    split = jax.device_put(data, mesh.batch(m))
    run = jax.jit(mesh.on(m, step))  # no out_shardings: where arrays lie is in their types
    new, sums = run(placed, train.meter(), split, jnp.uint32(0))
    np.testing.assert_allclose(sums.loss, alone[1].loss, rtol=1e-5)
    np.testing.assert_allclose(sums.grad_norm, alone[1].grad_norm, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), new, alone[0])
    for a, s in zip(jax.tree.leaves(new), jax.tree.leaves(laid), strict=True):
        assert a.sharding.is_equivalent_to(s, a.ndim)
    assert jax.tree.leaves(mesh.on_auto(mesh.make(axes), new))[0].sharding.mesh.axis_types[0] == AxisType.Auto


def test_sampling_on_a_mesh(setting):
    """Parameters and batch on the mesh: the samples are those of one device, and stay split."""
    model, call, _, state, _ = setting
    m = mesh.make("data=4,fsdp=2")
    table = solvers.ddim()(P, times.uniform(P, 3))
    x = P.prior(jax.random.key(1), (8, 8, 8, 1))
    sample = lambda params, x: jdiff.sample(jdiff.denoiser(call, P, "velocity", params=params), table, x)
    params = jax.device_put(state.params, mesh.shardings(m, model, state.params))
    out = jax.jit(mesh.on(m, sample))(params, jax.device_put(x, mesh.batch(m)))
    np.testing.assert_allclose(out, sample(state.params, x), atol=2e-5)
    assert out.addressable_shards[0].data.shape == (1, 8, 8, 1)
    typed = mesh.explicit(m)
    kinds = jax.device_put((params, x), (mesh.shardings(typed, model, params), mesh.batch(typed)))
    kind = jax.jit(mesh.on(typed, mesh.auto(sample, mesh.BATCH))).eval_shape(*kinds).sharding
    assert kind.spec[0] == mesh.BATCH


@pytest.mark.long
def test_a_run_goes_on_on_another_mesh(tmp_path):
    """Stopped after two of four steps on fsdp and restored on another mesh: the run that was not stopped."""
    options = {"width": 16, "depth": 1, "heads": 2, "patch": 4}
    config = TrainConfig(
        out=str(tmp_path), net="DiT", net_options=options, batch=16, steps=4, warmup=1, optimizer="sgd", log_every=2,
        checkpoint_every=2, snapshot_every=4, tensorboard=False, ema=(), mesh="data=4,fsdp=2",
    )  # fmt: skip
    whole = jax.device_get(train.train(config, quiet=True).state)
    shutil.rmtree(tmp_path / "checkpoints/4")
    moved = train.train(dataclasses.replace(config, mesh="data=2,fsdp=2,tensor=2"), quiet=True).state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), jax.device_get(moved), whole)
