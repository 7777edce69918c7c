"""A row of a layout: one of our arrays, theirs that hold the same numbers, and how the one becomes the other."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

Arrays = list[np.ndarray]


class Move(NamedTuple):
    """One of our arrays and those of theirs that hold the same numbers."""

    theirs: tuple[str, ...]
    ours: str
    here: Callable[[Arrays], np.ndarray]
    there: Callable[[np.ndarray], Arrays]
    slice: int | None = None  # of a stacked array of ours
    extras: int | None = None  # of a table of positions: its rows before those of the patches


Rows = Iterator[Move]
Op = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]

SAME: Op = (lambda w: w, lambda w: w)
LINEAR: Op = (lambda w: w.T, lambda w: w.T)
CONV: Op = (lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))
POINT: Op = (lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None])  # a 1 x 1 convolution
LINE: Op = (lambda w: w[:, :, 0].T, lambda w: w.T[:, :, None])  # a convolution of length 1


def one(theirs: str, ours: str, op: Op = SAME, index: int | None = None) -> Move:
    return Move((theirs,), ours, lambda a: op[0](a[0]), lambda w: [op[1](w)], index)


def together(theirs: list[str], ours: str, op: Op = SAME, index: int | None = None) -> Move:
    """Several of theirs, one after another along their first axis."""
    n = len(theirs)
    return Move(tuple(theirs), ours, lambda a: op[0](np.concatenate(a)), lambda w: list(np.split(op[1](w), n)), index)


def after(op: Op, rows: np.ndarray) -> Op:
    """op with the rows of theirs taken in this order first: ours[i] is theirs[rows[i]]."""
    back = np.argsort(rows)
    return (lambda w: op[0](w[rows]), lambda w: op[1](w)[back])


def layer(
    theirs: str, ours: str, op: Op = LINEAR, index: int | None = None, order: Any = None, bias: bool = True
) -> Rows:
    """A linear layer or convolution; order: of its outputs, see `after`."""
    yield one(f"{theirs}.weight", f"{ours}/kernel", op if order is None else after(op, order), index)
    if bias:
        yield one(f"{theirs}.bias", f"{ours}/bias", SAME if order is None else after(SAME, order), index)


def norm(theirs: str, ours: str) -> Rows:
    yield one(f"{theirs}.weight", f"{ours}/scale")
    yield one(f"{theirs}.bias", f"{ours}/bias")


def joined(theirs: list[str], ours: str, op: Op = LINEAR, index: int | None = None, bias: bool = True) -> Rows:
    """Separate queries, keys and values, or keys and values, as one layer of ours."""
    yield together([f"{name}.weight" for name in theirs], f"{ours}/kernel", op, index)
    if bias:
        yield together([f"{name}.bias" for name in theirs], f"{ours}/bias", SAME, index)


def heads_first(width: int, heads: int, channels_first: bool = False) -> np.ndarray:
    """Their order (heads, 3, d), or (heads, d, 3), of queries, keys and values, as ours, (3, heads, d)."""
    shape = (heads, width // heads, 3) if channels_first else (heads, 3, width // heads)
    return np.arange(3 * width).reshape(shape).transpose((2, 0, 1) if channels_first else (1, 0, 2)).ravel()
