"""Which blocks a kernel visits, in which order, and how large they are: tables of the host."""

from typing import NamedTuple

import numpy as np

from . import masks
from .masks import EMPTY, Mask

MAX_STEPS = 32768  # of which the lists take 512 kB; a TPU has 1 MB of scalar memory


class Steps(NamedTuple):
    """The block pairs in the order in which they are visited, int32. outer has a sentinel before and after."""

    outer: np.ndarray
    inner: np.ndarray
    kind: np.ndarray
    pattern: np.ndarray  # that of the last partial block, so that a full one asks for no copy


def steps(kind: np.ndarray) -> Steps:
    """Row by row the blocks of `kind` that are not empty; a row without one has one step, which writes zeros."""
    outer, inner = np.nonzero(
        (kind != EMPTY) | ((kind == EMPTY).all(1, keepdims=True) & (np.arange(kind.shape[1]) == 0))
    )
    found = kind[outer, inner]
    last = np.maximum.accumulate(np.where(found >= 0, np.arange(len(found)), 0))
    return Steps(*(np.asarray(a, np.int32) for a in (np.r_[-1, outer, -1], inner, found, np.maximum(found[last], 0))))


class Rows(NamedTuple):
    """The same by rows, int32: row i meets the blocks inner[start[i] : start[i + 1]]; none, if it is empty.

    pattern: that of a partial block; FULL (-1) of a full one.
    """

    start: np.ndarray
    inner: np.ndarray
    pattern: np.ndarray


def rows(kind: np.ndarray) -> Rows:
    """The blocks of `kind` that are not empty. Never of length 0, which no kernel can be given."""
    outer, inner = np.nonzero(kind != EMPTY)
    start = np.searchsorted(outer, np.arange(len(kind) + 1))
    found = (start, np.append(inner, 0), np.append(kind[outer, inner], masks.FULL))
    return Rows(*(np.asarray(a, np.int32) for a in found))


def visits(mask: Mask) -> int:
    """How many steps the mask takes with the blocks of `block_sizes`."""
    return len(steps(masks.blocks(mask, *block_sizes(mask)).kind).inner)


def block_sizes(mask: Mask) -> tuple[int, int]:
    """Of queries and keys, so that least is computed, a block counted as 32 tokens longer and wider than it is: large
    blocks where they pad little, small ones where more of them can be skipped. (The 32 has not been measured.)"""
    if mask.whole:
        pick = lambda n: min((512, 384, 256, 128), key=lambda size: (-(-n // size) * (size + 32), -size))
        return pick(mask.n), pick(mask.m)
    kinds = {size: masks.blocks(mask, size, size).kind for size in (256, 128)}
    size = min(kinds, key=lambda size: int((kinds[size] != EMPTY).sum()) * (size + 32) ** 2)
    return size, size
