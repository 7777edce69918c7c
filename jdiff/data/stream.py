"""Batches as a pure function of (seed, step): nothing to save or restore, any number of processes."""

import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Integer

from .dataset import Dataset
from .order import batch_indices


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: Integer[np.ndarray, " rows"] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches {"image": float32 (b, H, W, C) in [-1, 1], "label": int32 (b,)} from step `start_step`.

    batch_size is the GLOBAL one; process p of P yields rows p b to (p + 1) b, b = batch_size / P, of the
    global batch that `batch_indices` gives, so the batch does not depend on P, and an iterator that starts
    at step s yields what one that started at 0 yields from its s-th batch on. rows: other rows of the global batch
    than that share, ascending (`jdiff.pod.rows`).

    Data sets that are read from disk are read ahead by Grain's threads (whole batches, in order).
    Raises ValueError for a batch_size that does not fit the data set or the number of processes.
    """
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in 0..process_count - 1, got {process_index=}, {process_count=}")
    if batch_size % process_count:
        fit = max(round(batch_size / process_count), 1) * process_count
        raise ValueError(
            f"batch_size {batch_size} is not divisible by the {process_count} processes; the nearest that fits is {fit}"
        )
    batch_indices(len(dataset), batch_size, seed, start_step)  # reports bad values now
    share = batch_size // process_count
    mine = slice(process_index * share, (process_index + 1) * share) if rows is None else rows
    return _batches(dataset, batch_size, seed, start_step, mine)


def _batches(dataset, batch_size, seed, start_step, mine):

    def batch(step):
        return dataset.take(batch_indices(len(dataset), batch_size, seed, step)[mine])

    if dataset.in_memory:
        yield from map(batch, itertools.count(start_step))
        return
    import grain

    # One element of the Grain data set is one whole batch: random access stays with `batch_indices`.
    reader = (
        grain.MapDataset.range(start_step, np.iinfo(np.int64).max)
        .map(batch)
        .to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8))
    )
    yield from reader
