"""Which examples make up which batch: a pure function of (seed, step)."""

from functools import lru_cache

import numpy as np
from jaxtyping import Int64


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> Int64[np.ndarray, "n"]:
    """The order of epoch `epoch`: the ranks of n words of the counter-based generator Philox(seed, epoch).

    NumPy promises that raw words of a bit generator never change between its versions; it does not promise
    that of `Generator.permutation`. (Ties, of probability n^2 / 2^65, are settled by the stable sort.)
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.flags.writeable = False  # the cache hands the same array to every caller
    return order


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Int64[np.ndarray, "batch_size"]:
    """Which of n examples make up the global batch of `step`, shape (batch_size,), int64.

    The stream is one permutation of 0..n-1 an epoch, laid end to end; a batch is positions
    step * batch_size up to (step + 1) * batch_size of it, so a batch may cross from one epoch into the next,
    no example is dropped, and any step costs the same: one cached permutation (O(n), once an epoch).

    Raises ValueError for batch_size outside 1..n, or a negative seed or step.
    """
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must be between 1 and the {n} examples there are, got {batch_size}")
    if not 0 <= seed < 2**64 or step < 0:
        raise ValueError(f"seed (below 2^64) and step must not be negative, got {seed=}, {step=}")
    epoch, start = divmod(step * batch_size, n)
    first = permutation(n, seed, epoch)[start : start + batch_size]
    if len(first) == batch_size:
        return first.copy()
    return np.concatenate([first, permutation(n, seed, epoch + 1)[: batch_size - len(first)]])
