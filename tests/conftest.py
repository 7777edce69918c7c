"""Every test runs in double precision where it asks for it, types checked, promotion strict, warnings as errors."""

import gc
import os
import re
from glob import iglob
from importlib.metadata import version
from pathlib import Path

from beartype import BeartypeConf, BeartypeDecorPlace
from beartype.claw import beartype_packages
from jaxtyping import install_import_hook

# Hundreds of small programs are compiled here and each is run once or twice, so the compiler is told to be quick: that
# takes more than half of its time away. XLA ends the process at a flag that it does not know, hence the version.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Traces are millions of small objects that reference counts free: Python need not look for cycles 1,500 times a minute.
gc.set_threshold(50_000, 10, 10)

# To draw a parameter inside a trace Flax asks the tracer of its random stream for a sharding. It has none, and the text
# of the error that JAX makes, which Flax drops, retells the program so far (a profile of six nets: 20 of 45 s).
if hasattr(jax.core.Tracer, "_origin_msg"):
    for tracer in (jax.core.Tracer, *jax.core.Tracer.__subclasses__()):
        tracer._origin_msg = lambda self: ""


HOST = ("process", "times", "predict", "tableau", "trace", "order", "solvers")


def modules_with_shapes():
    """What jaxtyping checks: all but HOST, where beartype checks alone unless a file states shapes. jaxtyping's wrapper
    makes any call ten times as slow, and on the host a tableau is thousands of small calls."""
    root = Path(__file__).parent.parent
    for file in iglob("jdiff/**/*.py", root_dir=root, recursive=True):
        package, *parts = file.removesuffix(".py").removesuffix(f"{os.sep}__init__").split(os.sep)
        shapes = re.search(r"\b(Bool|Float|Int|Integer|Num|Shaped)\[", (root / file).read_text())
        if parts and (shapes or parts[0] not in HOST):
            yield ".".join([package, *parts])


# the wrapper goes inside jax.jit, not around it
TYPES = BeartypeConf(is_pep484_tower=True, claw_is_pep526=False, claw_decor_place_func=BeartypeDecorPlace.FIRST)
beartype_packages([f"jdiff.{name}" for name in HOST], conf=TYPES)
install_import_hook([*modules_with_shapes()], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


LONG = ("test_train", "test_cli", "test_nets", "test_interpolants", "test_analysis", "test_notebook", "test_correctors")


def pytest_collection_modifyitems(items):
    """The longest files first: a process takes a file at a time, and none should be left alone with one at the end."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forget compiled programs before Linux's limit of 65,530 memory maps a process, past which XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
