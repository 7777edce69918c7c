"""Compiled programs' texts, kept from one plan to the next: JAX's own cache takes no program for absent devices.

They lie in JAX's folder, JAX_COMPILATION_CACHE_DIR, under the hash of what was compiled and of the compiler's version;
without that variable nothing is kept.
"""

import gzip
import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

SIZES = ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes")


class Compiled(NamedTuple):
    """text: the compiled program. sizes: as `memory_analysis` gives them. seconds: that it took; 0: it was kept."""

    text: str
    sizes: Any
    seconds: float


def compiled(lowered: Any, topology: str) -> Compiled:
    """`lowered`, compiled now or before for this topology. What the compiler raises is raised, and not kept."""
    path = _path(lowered, topology)
    if path is not None and path.exists():
        found = json.loads(gzip.decompress(path.read_bytes()))
        return Compiled(found["text"], SimpleNamespace(**found["sizes"]), 0.0)
    start = time.perf_counter()
    made = lowered.compile()
    text, sizes, seconds = made.as_text(), made.memory_analysis(), time.perf_counter() - start
    if path is not None:
        content = {"text": text, "sizes": {name: getattr(sizes, name) for name in SIZES}}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(gzip.compress(json.dumps(content).encode(), 1))
        part.replace(path)  # whole or not at all
    return Compiled(text, sizes, seconds)


def _path(lowered: Any, topology: str) -> Path | None:
    if not (folder := os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        return None
    names = ("jax", "jaxlib", "libtpu")  # each looked up by name: reading all that is installed takes 0.1 s
    versions = [d.version for name in names for d in importlib.metadata.distributions(name=name)]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL")]
    what = json.dumps([lowered.as_text(), topology, sorted(versions), flags])
    return Path(folder) / f"jdiff-plan-{hashlib.sha256(what.encode()).hexdigest()}.json.gz"
