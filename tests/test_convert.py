"""Weights of others: outputs of the official PyTorch modules, kept as numbers; files that are read and files that are
refused, with nothing executed."""

import functools
import io
import json
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import official

from jdiff import checkpoint, cli, convert, nets
from jdiff.convert import torch_file

FROZEN = Path(__file__).parent / "golden" / "nets.npz"
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def abstract(name):
    kind, channels, options = official.CASES[name].net
    return nnx.eval_shape(lambda: nets.build(kind, official.SIZE, channels, rngs=nnx.Rngs(0), **options))


@functools.cache
def theirs(name):
    """The weights that the official module was given, under its names."""
    with np.load(FROZEN) as file:
        shapes = json.loads(str(file[f"{name}/shapes"]))
    return official.drawn(official.CASES[name], {k: tuple(shape) for k, shape in shapes.items()})


def output(name, net):
    """Our net as the official module is called."""
    x, t, y = official.inputs(official.CASES[name])

    @jit
    def run(net, x, t):
        if isinstance(net, nets.AutoencoderKL | nets.VQAutoencoder):
            kl = isinstance(net, nets.AutoencoderKL)
            z = net.encode(x).mean if kl else net.encode(x)
            return z.reshape(len(x), -1), net.decode(z if kl else net.quantise(z).z).reshape(len(x), -1)
        told = tuple(map(jnp.asarray, y if isinstance(y, tuple) else () if y is None else (y,)))
        state, c = net.embed(x, t, nets.Text(*told) if official.CASES[name].text else told[0] if told else None)
        whole = net.project(net.run(state, c), c)
        return whole if not isinstance(net, nets.SiT) else whole[..., : net.channels]

    got = run(net, jnp.asarray(x), jnp.asarray(t))
    return np.concatenate(got, 1) if isinstance(got, tuple) else np.asarray(got)


@pytest.mark.parametrize("name", official.CASES)
def test_outputs_are_those_of_the_official_modules(name):
    """Max relative error 1e-5 in float32; and the way back gives each of their arrays."""
    case = official.CASES[name]
    net, left = convert.to_ours(theirs(name), case.layout, abstract(name))
    with np.load(FROZEN) as file:
        want = file[f"{name}/output"]
    got = output(name, net)
    assert got.shape == want.shape and np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    back = convert.to_theirs(net, case.layout)
    assert {*back} | {*left} == {*theirs(name)}
    for key, value in back.items():
        np.testing.assert_allclose(value, theirs(name)[key], rtol=1e-6, atol=1e-6)


def test_misfits_are_listed():
    name, form = "DiT", "dit"
    good = theirs(name)
    bad = dict(good)
    del bad["blocks.1.mlp.fc1.bias"]
    bad["head.weight"] = np.zeros(3, np.float32)
    bad["blocks.0.attn.qkv.weight"] = np.zeros((96, 31), np.float32)
    with pytest.raises(convert.WeightsError) as caught:
        convert.to_ours(bad, form, abstract(name))
    text = str(caught.value)
    assert "3 entries do not fit layout dit of DiT, which has 31" in text
    assert "blocks.1.mlp.fc1.bias: missing" in text and "head.weight: not of this net" in text
    assert "blocks.0.attn.qkv.weight: shape (96, 31), as ours (31, 96); expected (32, 96)" in text
    with pytest.raises(convert.WeightsError, match=r"31 entries do not fit(.|\n)*and 21 more") as caught:
        convert.to_ours({}, form, abstract(name))
    assert str(caught.value).count(": missing") == 10
    with pytest.raises(convert.WeightsError, match=r"1 entries do not fit(.|\n)*head.weight: not of this net"):
        convert.to_ours(good | {"head.weight": np.zeros(3, np.float32)}, form, abstract(name))
    with pytest.raises(ValueError, match="it fits a UNet, not a DiT"):
        convert.to_ours(good, "edm", abstract(name))
    with pytest.raises(ValueError, match=r"unknown layout 'dits'; did you mean 'dit'\? Known: dit, uvit"):
        convert.to_ours(good, "dits", abstract(name))
    with pytest.raises(
        convert.WeightsError, match=r"no name of layout uvit is in the file, which has .*another layout\?"
    ):
        convert.to_ours(good, "uvit", abstract("U-ViT"))
    flat = good | {"x_embedder.proj.weight": np.zeros(3, np.float32)}
    with pytest.raises(convert.WeightsError, match=r"x_embedder.proj.weight: shape .* cannot be \(12, 32\)"):
        convert.to_ours(flat, form, abstract(name))
    tied = theirs("DiT (diffusers)")
    other = {k: v + 1 if "blocks.1.norm1.emb.class" in k else v for k, v in tied.items()}
    with pytest.raises(convert.WeightsError, match="the blocks have different embedders"):
        convert.to_ours(other, "diffusers-dit", abstract("DiT (diffusers)"))
    sub = {f"ema.{k}": v for k, v in good.items()} | {"opt.step": np.zeros(1, np.float32)}
    _, left = convert.to_ours(sub, form, abstract(name))  # a prefix, and things beside the net
    assert left == ("opt.step",)


def test_averages_are_read_where_there_are_some():
    """Under a prefix, and latent diffusion's, whose names have lost their dots."""
    good = theirs("DiT")
    both = {f"ema.{k}": v for k, v in good.items()} | {f"model.{k}": 2 * v for k, v in good.items()}
    for ema, factor in ((True, 1), (False, 2)):
        net, left = convert.to_ours(both, "dit", abstract("DiT"), ema=ema)
        np.testing.assert_array_equal(net.out.kernel[...], factor * good["final_layer.linear.weight"].T)
        assert len(left) == len(good) and all(name.startswith("model." if ema else "ema.") for name in left)
    with pytest.raises(convert.WeightsError, match="holds averaged weights alone"):
        convert.to_ours({f"ema.{k}": v for k, v in good.items()}, "dit", abstract("DiT"), ema=False)
    good = theirs("LDM")
    both = {f"model.diffusion_model.{k}": 2 * v for k, v in good.items()} | {"model_ema.decay": np.ones(())}
    both |= {"model_ema.diffusion_model" + k.replace(".", ""): v for k, v in good.items()}
    for ema, factor in ((True, 1), (False, 2)):
        net, left = convert.to_ours(both, "ldm", abstract("LDM"), ema=ema)
        np.testing.assert_array_equal(net.norm.scale[...], factor * good["out.0.weight"])
        assert len(left) == len(good) + 1 and "model_ema.decay" in left


def test_score_sdes_averages_have_no_names(tmp_path, no_torch):
    """A list in the order of the trained parameters: the frequencies, which are not trained, are not in it."""
    name = "NCSN++ (score SDE)"
    with np.load(FROZEN) as file:
        order = [k for k in json.loads(str(file[f"{name}/shapes"])) if k != "sigmas"]
    weights = {k: theirs(name)[k] for k in order}
    assert order[0] == "all_modules.0.W"
    tensors = {f"module.{k}": Tensor(v, f"m{i}") for i, (k, v) in enumerate(weights.items())}
    tensors = {"module.sigmas": Tensor(np.ones(10, np.float32), "s"), **tensors}
    listed = [Tensor(3 * weights[k], f"e{i}") for i, k in enumerate(order[1:])]
    ema = {"decay": 0.999, "num_updates": 5, "shadow_params": listed}
    file = tmp_path / "checkpoint_8.pth"
    everything = [*tensors.values(), *listed]
    write_zip(
        file, {"optimizer": {"state": {}}, "model": tensors, "ema": ema, "step": 7}, [t.storage for t in everything]
    )
    net, left = convert.load(file, "score-sde", abstract(name))
    want, _ = convert.to_ours(
        {k: v if k == order[0] else 3 * v for k, v in weights.items()}, "score-sde", abstract(name)
    )
    jax.tree.map(np.testing.assert_array_equal, net, want)
    assert "model.module.sigmas" not in left[1:] and "model.module.all_modules.1.weight" in left
    plain, _ = convert.load(file, "score-sde", abstract(name), ema=False)
    np.testing.assert_array_equal(plain.norm.scale[...] * 3, net.norm.scale[...])
    found = convert.read(file)
    del found["ema.shadow_params.11"]
    with pytest.raises(convert.WeightsError, match=r"the 153 arrays of ema.shadow_params are not the 154 trained"):
        convert.to_ours(found, "score-sde", abstract(name))


def test_names_of_older_diffusers():
    """Attention of its autoencoders was called query, key, value and proj_attn."""
    good, name = theirs("VAE (diffusers)"), "VAE (diffusers)"
    now_then = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    old = dict(good)
    for now, then in now_then:
        old = {k.replace(f".{now}.", f".{then}."): v for k, v in old.items()}
    assert {*old} != {*good}
    got, want = (convert.to_ours(a, "diffusers-vae", abstract(name))[0] for a in (old, good))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_weights_of_another_image_size():
    good, name = theirs("U-ViT"), "U-ViT"
    kind, channels, options = official.CASES[name].net
    large = nnx.eval_shape(lambda: nets.build(kind, 12, channels, rngs=nnx.Rngs(0), **options))
    with pytest.raises(
        convert.WeightsError, match=r"pos_embed: shape \(1, 18, 32\), as ours \(18, 32\); expected \(38, 32\)"
    ):
        convert.to_ours(good, "uvit", large)
    net, _ = convert.to_ours(good, "uvit", large, resize=True)
    table = good["pos_embed"][0]
    np.testing.assert_array_equal(net.positions[...], nets.patches.resize_positions(table, (6, 6), 2))
    np.testing.assert_array_equal(net.positions[:2], table[:2])
    told = theirs("DiT") | {"pos_embed": np.zeros((1, 64, 32), np.float32)}
    with pytest.raises(convert.WeightsError, match="pos_embed: positions of 64 patches, where the net has 16"):
        convert.to_ours(told, "dit", abstract("DiT"))
    convert.to_ours(told, "dit", abstract("DiT"), resize=True)


# --- PyTorch's files, written here with pickle alone
class Storage:
    def __init__(self, array, key):
        self.array, self.key = array, key


class Tensor:
    """Pickles as PyTorch's tensors do."""

    def __init__(self, array, key):
        self.array, self.storage = array, Storage(np.ascontiguousarray(array), key)

    def __reduce__(self):
        a = self.array
        strides = tuple(s // a.itemsize for s in np.ascontiguousarray(a).strides)
        return fake("torch._utils", "_rebuild_tensor_v2"), (self.storage, 0, a.shape, strides, False, {})


def fake(module, name):
    """A function or class that pickle writes as module.name, and that exists nowhere."""
    parts = module.split(".")
    for i in range(len(parts)):
        owner = sys.modules.setdefault(".".join(parts[: i + 1]), types.ModuleType(".".join(parts[: i + 1])))
    if not hasattr(owner, name):
        new = (
            type(name, (), {"__module__": module})
            if name[0].isupper()
            else types.FunctionType((lambda *_: 0).__code__, {})
        )
        new.__module__, new.__qualname__, new.__name__ = module, name, name
        setattr(owner, name, new)
    return getattr(owner, name)


KINDS = {"<f4": "FloatStorage", "<i8": "LongStorage", "<f2": "HalfStorage"}


class Writer(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", fake("torch", KINDS[obj.array.dtype.str]), obj.key, "cpu", obj.array.size)
        return None


@pytest.fixture
def no_torch(monkeypatch):
    """Modules named torch and so on while files are written, and never afterwards."""
    before = set(sys.modules)
    for name in ("torch", "torch._utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in {*sys.modules} - before:
        if name.split(".")[0] in ("torch", "torch_utils", "dnnlib"):
            del sys.modules[name]


def dumped(obj):
    file = io.BytesIO()
    Writer(file, protocol=2).dump(obj)
    return file.getvalue()


def write_zip(path, obj, storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", dumped(obj))
        for s in storages:
            archive.writestr(f"archive/data/{s.key}", s.array.tobytes())


def legacy(obj, storages):
    parts = [
        dumped(v) for v in (torch_file.LEGACY_MAGIC, 1001, {"little_endian": True}, obj, [s.key for s in storages])
    ]
    return b"".join(parts) + b"".join(struct.pack("<q", s.array.size) + s.array.tobytes() for s in storages)


def arrays():
    rng = np.random.default_rng(0)
    return {"w": rng.normal(size=(3, 4)).astype(np.float32), "n": np.arange(5), "h": np.ones((2, 2), np.float16)}


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_pytorch_files_are_read(tmp_path, no_torch, form):
    tensors = {k: Tensor(a, str(i)) for i, (k, a) in enumerate(arrays().items())}
    storages = [t.storage for t in tensors.values()]
    obj, file = {"ema": tensors, "step": 3, "args": [1.5, None, "text"]}, tmp_path / "model.pt"
    if form == "zip":
        write_zip(file, obj, storages)
    else:
        file.write_bytes(legacy(obj, storages))
    found = convert.read(file)
    assert {*found} == {f"ema.{k}" for k in arrays()}
    for k, a in arrays().items():
        np.testing.assert_array_equal(found[f"ema.{k}"], a)
        assert found[f"ema.{k}"].dtype == a.dtype


class Network:
    """As EDM's pickles have it: a function that would execute source code, and the state."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        source = "raise SystemExit('this source code was executed')"
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": "Net", "state": self.state}
        return fake("torch_utils.persistence", "_reconstruct_persistent_obj"), (meta,)


class Bytes:
    """A storage as a pickle within the pickle."""

    def __init__(self, storage):
        self.storage = storage

    def __reduce__(self):
        return fake("torch.storage", "_load_from_bytes"), (legacy(self.storage, [self.storage]),)


def test_networks_with_source_code_give_their_arrays(tmp_path, no_torch):
    tensor = Tensor(arrays()["w"], "0")
    tensor.storage = Bytes(tensor.storage)
    modules = fake("torch.nn.modules.container", "ModuleDict").__new__(fake("torch.nn.modules.container", "ModuleDict"))
    modules.__dict__ = {"_parameters": {}, "_buffers": {"b": tensor}, "_modules": {}, "training": True}
    net = Network({"_parameters": {"weight": tensor}, "_buffers": {}, "_modules": {"enc": modules}, "_init_args": ()})
    file = tmp_path / "network.pkl"
    file.write_bytes(dumped({"ema": net, "augment_pipe": None}))
    found = convert.read(file)
    assert {*found} == {"ema.weight", "ema.enc.b"}
    np.testing.assert_array_equal(found["ema.enc.b"], arrays()["w"])


class Malicious:
    def __init__(self, fn, *args):
        self.call = fn, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_nothing_in_a_file_is_executed(tmp_path, form):
    import os

    ran = tmp_path / "ran"
    for bad in (
        Malicious(os.system, f"touch {ran}"),
        Malicious(eval, f"open({str(ran)!r}, 'w')"),
        Malicious(getattr, os, "getcwd"),
        Malicious(np.load, str(ran)),
    ):
        try:
            data = dumped({"w": bad})
        except TypeError:  # a module is not pickled
            continue
        file = tmp_path / "bad.pt"
        if form == "zip":
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("archive/data.pkl", data)
        else:
            head = b"".join(dumped(v) for v in (torch_file.LEGACY_MAGIC, 1001, {})) if form == "legacy" else b""
            file.write_bytes(head + data)
        with pytest.raises(convert.WeightsError, match=r"bad\.pt: the file asks for .*nothing was executed"):
            convert.read(file)
        assert not ran.exists()


def test_a_tensor_stays_inside_its_storage(tmp_path, no_torch):
    tensor = Tensor(arrays()["w"], "0")
    tensor.array = np.zeros((3, 5), np.float32)
    file = tmp_path / "model.pt"
    write_zip(file, {"w": tensor}, [tensor.storage])
    with pytest.raises(convert.WeightsError, match="does not fit its 12 entries"):
        convert.read(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "is a git-lfs pointer, not the file"),
        (b"<!DOCTYPE html><html><body>Log in</body></html>", "is an HTML page, not weights"),
        (b"\n<html>Not found</html>", "is an HTML page"),
        (b"", "is empty"),
        (b"GIF89a and so on, which is no pickle", "is no weights file that can be read"),
        (struct.pack("<Q", 900) + b'{"w": ', "the header is cut off"),
        (
            struct.pack("<Q", 58) + b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}    ' + b"1234",
            "w is cut off",
        ),
    ],
)
def test_files_that_are_no_weights(tmp_path, data, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(convert.WeightsError, match=message):
        convert.read(file)


def test_the_command_there_and_back(tmp_path, capsys):
    from safetensors.numpy import save_file

    name = "DiT"
    there, ours, back = (tmp_path / f"{n}.safetensors" for n in ("there", "ours", "back"))
    save_file(theirs(name), there)
    options = "patch 2 width 32 depth 2 heads 4 num_classes 5 time_scale 1.0 learn_sigma True".split()
    place = ["--layout", "dit", "--net", "DiT", "--size", "8", "--out"]
    wrong = ["--net-options", "num_class", "5"]
    assert cli.main(["convert", str(there), *place, str(ours), *wrong]) == 2
    assert "DiT has no option 'num_class'; did you mean 'num_classes'" in capsys.readouterr().err
    assert cli.main(["convert", str(there), "--layout", "dit"]) == 2
    assert "give --net" in capsys.readouterr().err
    assert cli.main(["convert", str(there), *place, str(ours), "--net-options", *options]) == 0
    net, _, meta = checkpoint.load_params(ours)
    want, _ = convert.to_ours(theirs(name), "dit", abstract(name))
    jax.tree.map(np.testing.assert_array_equal, net, want)
    assert meta["source"] == "there.safetensors" and meta["net"] == abstract(name).config
    assert cli.main(["convert", str(ours), "--layout", "dit", "--out", str(back), "--back"]) == 0
    for key, value in convert.read(back).items():
        np.testing.assert_array_equal(value, theirs(name)[key])
    assert "2,000" not in capsys.readouterr().err
    assert cli.main(["convert", str(there), *place, str(ours), "--net-options", *options[:-2]]) == 2
    assert "final_layer.linear.weight: shape (24, 32)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    assert "diffusers' UNet2DConditionModel" in capsys.readouterr().out
