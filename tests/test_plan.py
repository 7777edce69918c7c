"""`jdiff plan`: what it reads off compiled programs against closed forms and XLA's own counts, and what it refuses."""

import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdiff import cli, mesh, nets
from jdiff.plan import CHIPS, PlanConfig, chips, command, hlo, kept, plan, program, report, table
from jdiff.plan.estimate import Plan, _out_of_memory

TINY = PlanConfig(
    net="DiT", net_options={"patch": 4, "width": 64, "depth": 3, "heads": 2}, topology="cpu:8", mesh="data=2,fsdp=4",
    batch=16, size=8, channels=2, classes=4, ema=(0.1,), dtype="float32",
)  # fmt: skip
AXES = {"data": 2, "fsdp": 4}


# ------------------------------------------------------------------------------------------------ reading programs
@pytest.fixture(scope="module")
def looped():
    """Seven turns of a product with a sharded weight, gathered in each, and a sum over both axes: compiled."""
    m = mesh.make(AXES)
    put = lambda *axes: NamedSharding(m, P(*axes))

    def f(x, w):
        def turn(x, _):
            w_ = jax.lax.with_sharding_constraint(w, put())
            return jnp.tanh(jax.lax.with_sharding_constraint(x @ w_, put(("data", "fsdp"), None))), None

        return jax.lax.scan(turn, x * 2, length=7)[0].sum()

    x, w = (jax.ShapeDtypeStruct((256, 64), jnp.float32, sharding=put(("data", "fsdp"), None)),
            jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=put(None, "fsdp")))  # fmt: skip
    return jax.jit(f, out_shardings=put()).lower(x, w).compile().as_text()


def test_collectives_of_a_known_program(looped):
    """A gather of (64, 64) float32 over 4 devices, 3/4 of which each receives; a sum of one number over 8."""
    found = hlo.Program(looped).moved(dict(mesh.make(AXES).shape))
    gathers = {k: v for k, v in found.collectives.items() if k[0] == "all-gather"}
    assert list(gathers) == [("all-gather", "fsdp")]
    turns = found.counts["all-gather", "fsdp"]
    assert turns in (1, 7)  # XLA may move it out of the loop
    assert gathers["all-gather", "fsdp"] == turns * 64 * 64 * 4 * 3 / 4
    sums = sum(v for k, v in found.collectives.items() if k[0] == "all-reduce" and "data" in k[1])
    assert 0 < sums <= 3 * 2 * 4


def test_trip_counts_without_the_compilers_note(looped):
    noted = hlo.Program(looped)
    loops = [(name, i) for name, body in noted.computations.items() for i in body.values() if i.op == "while"]
    assert [noted.trips(*loop) for loop in loops] == [7]
    bare = hlo.Program(re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", looped))
    loops = [(name, i) for name, body in bare.computations.items() for i in body.values() if i.op == "while"]
    assert not re.search("known_trip_count", loops[0][1].rest) and [bare.trips(*loop) for loop in loops] == [7]


SPREAD = """\
HloModule m

%start (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  %g = f32[32]{0} all-gather(%p), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %c = f32[32]{0} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%more (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %g = f32[32]{0} all-gather(%p), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
}

%cond (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(8)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %a = f32[32]{0} fusion(%x), kind=kOutput, calls=%more
  %r = f32[8]{0} all-reduce(%x), channel_id=6, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %r)
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %zero = s32[] constant(2)
  %first = f32[32]{0} fusion(%x), kind=kOutput, calls=%start
  %t = (s32[], f32[8]{0}) tuple(%zero, %x)
  ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body
}
"""


def test_a_collective_spread_over_fusions_counts_once_and_loops_by_their_steps():
    found = hlo.Program(SPREAD).moved(AXES)
    assert found.counts == {("all-gather", "fsdp"): 1, ("all-reduce", "data"): 3}  # 2, 4, 6
    assert found.collectives == {("all-gather", "fsdp"): 3 * 32, ("all-reduce", "data"): 3 * 32}


def test_collectives_of_one_channel_are_told_apart_by_their_chains():
    """As of shard_map: the first gather spread over two fusions as above, a second one of the channel in the loop."""
    head, more, rest = SPREAD.partition("%more")
    chained = lambda text, n: text.replace(
        "dimensions={0}", f'dimensions={{0}}, frontend_attributes={{chain_id="{n}"}}'
    )
    one = chained(SPREAD, 0)
    assert hlo.Program(one).moved(AXES).counts["all-gather", "fsdp"] == 1
    again = chained(head.partition("\n\n")[2].replace("%start", "%again"), 1)
    two = chained(head, 0) + again + chained(more + rest.replace("calls=%more", "calls=%again"), 0)
    found = hlo.Program(two).moved(AXES)
    assert found.counts["all-gather", "fsdp"] == 1 + 3


@pytest.mark.parametrize(
    ("groups", "want"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", (4, "fsdp")),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (2, "data")),
        ("replica_groups=[1,8]<=[8]", (8, "data x fsdp")),
        ("replica_groups={}", (8, "data x fsdp")),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (4, "fsdp")),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (2, "data")),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (4, "fsdp")),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (2, "data")),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", (2, "fsdp")),
        ("source_target_pairs={{0,4},{4,0}}", (2, "data")),
    ],
)
def test_which_axes_a_collective_crosses(groups, want):
    assert hlo.crossed(f", channel_id=1, {groups}, use_global_device_ids=true", AXES) == want


def test_bytes_of_shapes():
    assert hlo.nbytes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0}, pred[])") == 12 + 16 + 1
    assert hlo.nbytes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0}, pred[])", hbm_only=True) == 17
    assert hlo.nbytes("f8e4m3fn[10]{0}") == 10


def test_memory_traffic_of_a_loop_over_slices_counts_slices():
    """A sum over the rows of w in a loop reads w once, not once a turn; each turn reads and writes x."""
    w = jax.ShapeDtypeStruct((50, 1000), jnp.float32)
    f = lambda w: jax.lax.scan(lambda x, row: (x + jnp.sin(row), None), jnp.zeros(1000, jnp.float32), w)[0]
    found = hlo.Program(jax.jit(f).lower(w).compile().as_text()).moved({"data": 1})
    assert 50 * 3 * 4000 <= found.hbm < 50 * 8 * 4000


NESTED = """\
%inner (p: f32[4,8], i: s32[]) -> f32[1,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = f32[1,8]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,8}
}

%outer (i: s32[], p: f32[4,8]) -> f32[1,8] {
  %i = s32[] parameter(0)
  %p = f32[4,8]{1,0} parameter(1)
  %b = f32[4,8]{1,0} bitcast(%p)
  ROOT %f = f32[1,8]{1,0} fusion(%b, %i), kind=kLoop, calls=%inner
}

ENTRY %main (x: f32[4,8], i: s32[]) -> f32[1,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %room = f32[1000]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %f = f32[1,8]{1,0} fusion(%i, %x), kind=kLoop, calls=%outer
}
"""


def test_slices_are_seen_through_nested_fusions():
    assert hlo.Program(NESTED).moved({"data": 1}).hbm == 32 + 32 + 4  # written, read, the index


# ------------------------------------------------------------------------------------------------------------- FLOPs
def test_products_are_xlas_count():
    """An unrolled net without a loop, its step with gradients: XLA counts what is not a matrix product too."""
    model = _net(16, 2, patch=2, width=256, depth=2, heads=4, unroll=2)
    x, t = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 16, 16, 2), (4,)))
    forward = lambda model, x, t: jnp.square(model(x, t, jnp.zeros(4, jnp.int32))).sum()
    for f, times in ((forward, 1), (jax.grad(forward), 3)):
        traced = jax.jit(f).trace(model, x, t)
        counted = 2 * program.products(traced.jaxpr.jaxpr)
        assert abs(counted / (times * 2 * 4 * nets.macs(model)) - 1) < (1e-9 if times == 1 else 0.01)
        assert 1 < traced.lower().cost_analysis()["flops"] / counted < 1.05


def _net(size, channels, **options):
    return nnx.eval_shape(lambda: nets.build("DiT", size, channels, num_classes=4, rngs=nnx.Rngs(0), **options))


# ------------------------------------------------------------------------------------------------------------- plans
def test_nets_that_are_told_a_text_are_planned():
    """On the mesh, training and sampling, and with the text in the count of products."""
    text = {"patch": 4, "width": 64, "depth": 3, "heads": 2, "context": 12, "pooled": 8}
    config = dataclasses.replace(TINY, net="MMDiT", net_options=text, text=5)
    macs = nets.macs(nnx.eval_shape(lambda: nets.build("MMDiT", 8, 2, **text, rngs=nnx.Rngs(0))), text=5)
    counts = program.build(config, jax.devices()).counted()
    assert counts.useful == 6 * 16 * macs and abs(counts.flops / counts.useful - 1) < 0.1
    sampled = program.build(dataclasses.replace(config, sample=2, solver="ddim"), jax.devices())
    assert 0.9 < sampled.counted().flops / sampled.counted().useful < 1


@pytest.fixture(scope="module")
def planned():
    return plan(TINY)


def test_a_plan_of_simulated_devices(planned):
    """Parameters by hand: kernels split over fsdp, the rest whole; two moments and one average beside them."""
    d, k = 64, 3
    kernels = k * (6 * d * d + 4 * d * d + 8 * d * d) + 32 * d + 2 * d * d + d * 32 + 5 * d + 256 * d + d * d
    whole = k * (6 * d + 4 * d + 5 * d) + d + 2 * d + 32 + 2 * d
    parts = planned.memory
    assert parts["parameters"] == 4 * (kernels // 4 + whole)
    assert parts["averages"] == parts["parameters"]
    assert parts["optimizer state"] == 2 * parts["parameters"] + 8  # two counters
    assert planned.fits and planned.devices == 8 and not planned.seconds
    assert any(kind == "all-reduce" and "data" in axes for kind, axes, _, _ in planned.collectives)
    assert planned.useful * 8 == 6 * 16 * nets.macs(_net(8, 2, **TINY.net_options))
    assert abs(planned.flops / planned.useful - 1) < 0.02  # nothing is computed again, and images need no gradient


def test_no_kernel_is_gathered_more_often_than_it_is_used(planned):
    """Attention's and the MLPs' kernels forward and backward, 3/4 of each; adaLN's, a third of all, never."""
    d, depth = 64, 3
    once = depth * (4 * d * d + 8 * d * d)
    gathered = sum(b for kind, _, _, b in planned.collectives if kind == "all-gather")
    assert 1 <= gathered / (2 * 3 / 4 * 4 * once) < 1.2  # what is outside of the blocks is little


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs TPU's compiler: jdiff[aot]")
def test_a_tpu_receives_little_more_than_it_must():
    """Compiled for four chips of v5p: the blocks' kernels gathered twice, their gradients scattered once, bfloat16."""
    d, depth = 256, 4
    net = {"patch": 2, "width": d, "depth": depth, "heads": 4}
    config = PlanConfig(
        net="DiT",
        net_options=net,
        topology="v5p:2x2x1",
        mesh="fsdp=4",
        batch=64,
        size=16,
        classes=10,
        ema=(),
        optimizer="sgd",
    )
    found = command.plan(config, timeout=230)
    ideal = 3 * 3 / 4 * 2 * depth * (4 * d * d + 8 * d * d)
    received = sum(b for *_, b in found.collectives)
    assert 1 <= received / ideal < 1.2, found.collectives
    assert found.fits and found.capacity == 95 * 2**30 and 0 < found.at_least < found.at_most < 1e-3
    assert abs(found.flops / found.useful - 1) < 0.02


SPLIT = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jdiff import mesh
from jdiff.plan import chips, estimate, hlo
topology, axes = sys.argv[1:]
m = mesh.make(axes, estimate.find_devices(chips.parse(topology)))
put = lambda shape, *axes: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(m, P(*axes)))
dot = lambda x, w: mesh.rows_split(x, w, (((1,), (0,)), ((), ()))).astype(jnp.float32).sum()
args = put((m.size * 256, 1152), mesh.BATCH), put((1152, 3456), "fsdp")
moved = hlo.Program(jax.jit(mesh.on(m, jax.grad(dot, 1))).lower(*args).compile().as_text()).moved(dict(m.shape))
least = 1152 * 3456 * 2 * (1 - 1 / m.shape["fsdp"])
over = {kind: size / least for (kind, axes), size in moved.collectives.items() if axes == "fsdp"}
assert over.get("all-reduce", 0) < 0.01 and 1 <= over["reduce-scatter"] and sum(over.values()) < 1.1, over
"""


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs TPU's compiler: jdiff[aot]")
@pytest.mark.parametrize(("topology", "axes"), [("v5p:8x8x8", "data=4,fsdp=128"), ("v5e:4x4", "fsdp=16")])
def test_gradients_are_scattered(topology, axes):
    """DiT-XL/2's kernel on 128 chips, 9 rows each, less than a tile; and on the whole of a torus: not summed whole."""
    env = {**os.environ, **command.LIBTPU}
    env.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", SPLIT, topology, axes], env=env, capture_output=True, text=True, timeout=230
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_rematerialisation_costs_flops_and_keeps_less(planned):
    build = lambda c: program.build(c, jax.devices())
    again = build(dataclasses.replace(TINY, remat="full")).counted()
    assert again.kept < 0.6 * planned.kept and again.flops / 8 > 1.2 * planned.flops
    assert again.useful / 8 == planned.useful


def test_sampling_is_planned_too():
    built = program.build(dataclasses.replace(TINY, sample=6, solver="ddim"), jax.devices())
    counts = built.counted()
    assert counts.useful == 2 * 6 * 16 * nets.macs(_net(8, 2, **TINY.net_options))
    assert 0.96 < counts.flops / counts.useful < 1  # a time is embedded once for all images
    assert set(built.parts) == {"parameters"}


def test_reports(planned):
    text = report(planned)
    for words in ("mesh data=2,fsdp=4", "parameters", "all-gather", "over fsdp", "fits", "How each figure"):
        assert words in text
    assert Plan.from_json(planned.to_json()) == planned
    chip = dataclasses.replace(TINY, topology="v5e:2x4")
    made = lambda **k: dataclasses.replace(planned, config=chip, capacity=16e9, **k)
    slow, fast = ({"arithmetic": a, "memory": 0.1, "links": 0.2} for a in (0.5, 0.3))
    assert made(seconds=slow).at_least == 0.5 and made(seconds=slow).at_most == 0.8
    assert made(seconds=slow, useful=197e12 * 0.2).mfu(0.5) == pytest.approx(0.4)
    assert "MFU" in report(made(seconds=slow))
    rows = table([made(seconds=slow), made(seconds=fast), made(seconds={}, fits=False, over=2e9)]).splitlines()
    assert [("best" in r) for r in rows] == [False, False, False, True, False]
    assert "no, by 2 GB" in rows[-1]


def test_an_out_of_memory_error_is_read():
    text = "RESOURCE_EXHAUSTED: E1000: Ran out of memory in memory space hbm. Used 17.49G of 15.75G hbm."
    over, there = _out_of_memory(text)
    assert over == pytest.approx(1.74 * 2**30) and there == 15.75 * 2**30
    text = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (117.51G) exceeds available HBM (15.75G)."
    assert _out_of_memory(text)[0] == pytest.approx(101.76 * 2**30)
    assert _out_of_memory("INTERNAL: something else") == (0.0, 0.0)


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--topology", "v9:2x2"], r"unknown topology 'v9:2x2'; known: v4:.*v5e:1x1.*v5p:.*v6e:.*cpu:8"),
        (["--topology", "v5p:4x4"], r"unknown topology 'v5p:4x4'"),
        (["--topology", "v5e"], r"unknown topology 'v5e'"),
    ],
)
def test_unknown_topologies(args, match, capsys):
    assert cli.main(["plan", *args]) == 2
    assert re.search(match, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mesh": "data=3"}, r"mesh data 3 does not multiply to the 8 devices"),
        ({"batch": 12}, r"batch 12 is not divisible by the mesh's 8 devices; the nearest is"),
        ({"net": "DiT-XXL"}, r"unknown net 'DiT-XXL'; did you mean"),
        ({"remat": "some"}, r"unknown remat 'some'; expected one of none, full, dots"),
        ({"sample": 0}, r"sample is 0; expected at least 1"),
        ({"net_options": {"patch": 4, "width": 36, "depth": 1, "heads": 3}, "mesh": "fsdp=8"}, r"36 by fsdp = 8"),
    ],
)
def test_what_does_not_fit_together(changes, match):
    with pytest.raises(ValueError, match=match):
        program.build(dataclasses.replace(TINY, **changes), jax.devices())


def test_without_the_compiler_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", "--topology", "v5e:4x4"]) == 2
    assert "pip install 'jdiff[aot]'" in capsys.readouterr().err


def test_a_compiled_program_is_kept(monkeypatch, tmp_path):
    """The second time nothing is compiled; another program, or compiler, is another file; no folder, no keeping."""
    lower = lambda n: jax.jit(lambda x: jnp.sin(x) @ x).lower(jax.ShapeDtypeStruct((n, n), jnp.float32))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    first, again = (kept.compiled(lower(8), "cpu:8") for _ in range(2))
    assert first.text == again.text and first.seconds > 0 and again.seconds == 0
    assert all(getattr(first.sizes, name) == getattr(again.sizes, name) for name in kept.SIZES)
    assert kept.compiled(lower(9), "cpu:8").seconds > 0 and kept.compiled(lower(8), "v5e:2x2").seconds > 0
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--another")
    assert kept.compiled(lower(8), "cpu:8").seconds > 0
    assert len(list((tmp_path / "cache").iterdir())) == 4
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert kept.compiled(lower(8), "cpu:8").seconds > 0


def test_a_compiler_that_dies_or_hangs_is_one_line(monkeypatch, tmp_path):
    run = functools.partial(command.plan, TINY)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(
        ValueError, match=r"DiT on cpu:8, mesh data=2,fsdp=4, batch 16, remat none: the compiler gave up"
    ):
        run()
    (tmp_path / "hangs").write_text("#!/bin/sh\nexec sleep 20\n")
    (tmp_path / "hangs").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "hangs"))
    with pytest.raises(ValueError, match=r"not compiled within 0 s; --timeout allows more"):
        run(timeout=0.2)


def test_candidates_and_the_remedy(monkeypatch, planned):
    base = dataclasses.replace(TINY, topology="v5e:2x2", mesh="data=4")
    assert [c.mesh for c in command.candidates(base)] == ["data=4,fsdp=1", "data=2,fsdp=2", "data=1,fsdp=4"]
    assert len(list(command.candidates(base, ("fsdp=4",), (8, 16), ("none", "full")))) == 4
    assert len(list(command.candidates(dataclasses.replace(base, topology="v4:2x2x1")))) == 4  # two devices a chip

    def compiled(config, timeout):
        fits = config.mesh == "data=1,fsdp=4" and config.remat == "none"
        return dataclasses.replace(planned, config=config, fits=fits, over=1e9)

    monkeypatch.setattr(command, "plan", compiled)
    assert "--mesh data=1,fsdp=4 --remat none fits" in command.remedy(base)
    assert "--mesh data=1,fsdp=4" in command.remedy(dataclasses.replace(base, mesh="data=2,fsdp=2"))
    nothing = command.remedy(dataclasses.replace(base, mesh="fsdp=4", remat="full"))
    assert "none of these does" in nothing


def test_a_sweep_is_a_table_and_what_was_refused(monkeypatch, planned, tmp_path, capsys):
    def compiled(config, timeout):
        if config.mesh == "fsdp=3":
            raise ValueError("mesh fsdp 3 does not multiply")
        seconds = {"arithmetic": 0.1, "memory": 0.1, "links": 0.2 if config.mesh == "data=4" else 0.3}
        return dataclasses.replace(planned, config=config, seconds=seconds)

    monkeypatch.setattr(command, "plan", compiled)
    where = ["--topology", "v5e:2x2", "--meshes", "data=4", "fsdp=4", "fsdp=3", "--remats", "none"]
    assert cli.main(["plan", "--sweep", *where, "--out", str(tmp_path / "t.md")]) == 0
    said = capsys.readouterr()
    assert said.out == (tmp_path / "t.md").read_text() and "3/3" in said.err
    head, _, first, second, empty, refused = said.out.splitlines()
    assert "mesh" in head and "(best)" in first and "data=4" in first and "(best)" not in second and not empty
    assert refused.startswith("- ") and "mesh fsdp=3" in refused and "does not multiply" in refused


def test_the_table_of_chips():
    assert chips.parse("v5e:16x16") == ("v5e", (16, 16)) and chips.parse("v5p:8x8x8").name == "v5p:8x8x8"
    for chip in CHIPS.values():
        assert 1e14 < chip.flops < 1e16 and 1e11 < chip.hbm_rate < 1e13 and 1e11 < chip.link_rate < 1e12
