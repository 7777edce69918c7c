"""Every test runs in double precision where it asks for it, types checked, promotion strict, warnings as errors."""

import os
import re
from glob import iglob
from importlib.metadata import version
from pathlib import Path

from beartype import BeartypeConf
from beartype.claw import beartype_package
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

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def modules_with_shapes():
    """What jaxtyping has to check. Its wrapper makes a call of any function ten times as slow: in the modules that
    state no shapes, where a tableau is thousands of small calls on the host, beartype checks alone."""
    root = Path(__file__).parent.parent
    for file in iglob("jdiff/**/*.py", root_dir=root, recursive=True):
        if re.search(r"\b(Bool|Float|Int|Integer|Num|Shaped)\[", (root / file).read_text()):
            yield file.removesuffix(".py").removesuffix("/__init__").replace(os.sep, ".")


beartype_package("jdiff", conf=BeartypeConf(is_pep484_tower=True, claw_is_pep526=False))
install_import_hook([*modules_with_shapes()], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
