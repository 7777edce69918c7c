"""Parameters that an experiment trains once and keeps in its folder, so that a run that was stopped goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def kept(file: Path, like: Any, train: Callable[[], Any]) -> Any:
    """The pytree in `file`, structured as `like`; made by `train()` and written where the file is not there."""
    leaves, structure = jax.tree.flatten(like)
    if not file.exists():
        part = file.with_suffix(".part.npz")
        np.savez(part, *jax.tree.leaves(train()))
        part.replace(file)
    with np.load(file) as found:
        return structure.unflatten([jnp.asarray(found[f"arr_{i}"]) for i in range(len(leaves))])
