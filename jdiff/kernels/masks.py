"""Which key a query may attend to, as data: known on the host when the program is built, and cut into blocks.

    masks.full(n, m)                           everything
    masks.window((32, 32), 8.0, text=77)       distance < 8 on a 32 x 32 grid of tokens; text sees and is seen (CLEAR)
    masks.block_causal(n, 256)                 a token sees its own block and those before
    masks.block_sparse(n, m, 64, pairs)        the (query block, key block) pairs of a list
    masks.dense(allowed)                       any boolean (n, m) array

Masks combine by `&` and `|`. A kernel asks for `blocks`: which blocks of (queries, keys) are empty, and are skipped;
which are full, and need no mask; and the distinct patterns of the others, of which a regular mask has few. What is
known only when the program runs is said by segment ids or a bias.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

Rows = Callable[[np.ndarray], np.ndarray]
"""(r,) query indices -> boolean (r, m): the keys that each of them may attend to."""

EMPTY, FULL = -2, -1


class Blocks(NamedTuple):
    """A mask cut into blocks of (bq, bk), padded with keys that nobody attends to.

    kind (nq, nk): EMPTY, FULL, or the index of the block's pattern. patterns (u, bq, bk): boolean, distinct.
    """

    kind: np.ndarray
    patterns: np.ndarray


@dataclasses.dataclass(frozen=True)
class Mask:
    """Of n queries and m keys. Equal and hashed by `key`, so that it may be an argument that is static under jit."""

    n: int
    m: int
    key: tuple[object, ...]
    rows: Rows = dataclasses.field(compare=False, repr=False)

    @property
    def whole(self) -> bool:
        """Whether it is `full`: every query attends to every key."""
        return self.key[0] == "full"

    def dense(self) -> np.ndarray:
        """Boolean (n, m), True where the query attends."""
        return self.rows(np.arange(self.n))

    @functools.cached_property
    def pairs(self) -> int:
        """How many (query, key) pairs attend."""
        return sum(int(self.rows(np.arange(i, min(i + 512, self.n))).sum()) for i in range(0, self.n, 512))

    def reorder(self, order: Sequence[int] | np.ndarray) -> "Mask":
        """The mask of tokens taken in another order (n = m): entry (i, j) is that of (order[i], order[j])."""
        order = np.asarray(order)
        if self.n != self.m or sorted(order.tolist()) != list(range(self.n)):
            raise ValueError(f"reorder: expected a permutation of the {self.n} tokens of a square mask")
        return Mask(self.n, self.n, ("reorder", self.key, _digest(order)), lambda i: self.rows(order[i])[:, order])

    def __and__(self, other: "Mask") -> "Mask":
        return self._combine("and", np.logical_and, other)

    def __or__(self, other: "Mask") -> "Mask":
        return self._combine("or", np.logical_or, other)

    def _combine(self, name: str, fn: np.ufunc, other: "Mask") -> "Mask":
        if (self.n, self.m) != (other.n, other.m):
            raise ValueError(f"masks of {self.n} x {self.m} and {other.n} x {other.m} tokens do not combine")
        return Mask(self.n, self.m, (name, self.key, other.key), lambda i: fn(self.rows(i), other.rows(i)))


def full(n: int, m: int | None = None) -> Mask:
    """Every query attends to every key; m: as many as n."""
    m = n if m is None else m
    return Mask(n, m, ("full", n, m), lambda i: np.ones((len(i), m), bool))


def window(shape: Sequence[int], radius: float, text: int = 0) -> Mask:
    """A token attends to those at a Euclidean distance < radius on the grid: a circle in 2-D, a ball in 3-D.

    shape: the grid of tokens, one to three sizes, in row-major order. text: tokens before the grid that attend to
    all and that all attend to. The local window of CLEAR (2412.16112).
    ValueError for another number of sizes, or a radius that is not positive.
    """
    shape = tuple(int(s) for s in shape)
    if not 1 <= len(shape) <= 3 or min(shape) < 1 or text < 0:
        raise ValueError(f"window: shape {shape} with {text} text tokens; expected one to three positive sizes")
    if not radius > 0:
        raise ValueError(f"window: radius {radius}; expected a positive number of tokens")
    grid, n = np.indices(shape).reshape(len(shape), -1).T, text + math.prod(shape)

    def rows(i: np.ndarray) -> np.ndarray:
        out = np.ones((len(i), n), bool)
        pixels = i >= text
        at = grid[i[pixels] - text]
        out[pixels, text:] = sum((at[:, None, a] - grid[None, :, a]) ** 2 for a in range(len(shape))) < radius**2
        return out

    return Mask(n, n, ("window", shape, float(radius), text), rows)


def block_causal(n: int, block: int) -> Mask:
    """Token i attends to j where j // block <= i // block: frames in order, tokens within a frame all to all."""
    if n < 1 or block < 1:
        raise ValueError(f"block_causal: {n} tokens in blocks of {block}; expected positive numbers")
    return Mask(n, n, ("block_causal", n, block), lambda i: np.arange(n) // block <= i[:, None] // block)


def block_sparse(n: int, m: int, block: int, pairs: Iterable[tuple[int, int]]) -> Mask:
    """Query block a attends to key block c for each (a, c) of pairs; blocks of `block` tokens, the last may be short.

    ValueError names the pairs that lie outside.
    """
    if min(n, m, block) < 1:
        raise ValueError(f"block_sparse: {n} queries, {m} keys in blocks of {block}; expected positive numbers")
    allowed = np.zeros((-(-n // block), -(-m // block)), bool)
    pairs = sorted({(int(a), int(c)) for a, c in pairs})
    if wrong := [p for p in pairs if not (0 <= p[0] < allowed.shape[0] and 0 <= p[1] < allowed.shape[1])]:
        raise ValueError(
            f"block_sparse: pairs {wrong[:5]} lie outside of {allowed.shape[0]} x {allowed.shape[1]} blocks"
        )
    for a, c in pairs:
        allowed[a, c] = True
    key = ("block_sparse", n, m, block, tuple(pairs))
    return Mask(n, m, key, lambda i: allowed[i // block][:, np.arange(m) // block])


def dense(allowed: np.ndarray) -> Mask:
    """The mask of a boolean (n, m) array, copied."""
    allowed = np.array(allowed)
    if allowed.ndim != 2 or allowed.dtype != bool:
        raise ValueError(f"dense: got {allowed.dtype} {allowed.shape}; expected a boolean (n, m) array of the host")
    n, m = allowed.shape
    return Mask(n, m, ("dense", n, m, _digest(allowed)), lambda i: allowed[i])


def tiles(shape: Sequence[int], tile: Sequence[int]) -> np.ndarray:
    """The tokens of a grid, tile by tile: an order in which a block of tokens is compact, so that windows meet few.

    tokens[tiles(...)] goes into the net, `mask.reorder(tiles(...))` is its mask, np.argsort(order) leads back.
    """
    if len(shape) != len(tile) or any(s % t for s, t in zip(shape, tile, strict=False)):
        raise ValueError(f"tiles: tile {tuple(tile)} does not divide the grid {tuple(shape)}")
    split = [k for s, t in zip(shape, tile, strict=True) for k in (s // t, t)]
    axes = [*range(0, len(split), 2), *range(1, len(split), 2)]
    return np.arange(math.prod(shape)).reshape(split).transpose(axes).reshape(-1)


@functools.lru_cache(maxsize=64)
def blocks(mask: Mask, bq: int, bk: int) -> Blocks:
    """The mask in blocks. What padded queries would attend to is nobody's concern: they never make a block partial."""
    nq, nk = -(-mask.n // bq), -(-mask.m // bk)
    kind, patterns = np.empty((nq, nk), np.int32), dict[bytes, int]()
    for row in range(1 if mask.whole else nq):
        i = np.arange(row * bq, min((row + 1) * bq, mask.n))
        padded = np.zeros((bq, nk * bk), bool)
        padded[: len(i), : mask.m] = mask.rows(i)
        for column, block in enumerate(padded.reshape(bq, nk, bk).swapaxes(0, 1)):
            if not block.any():
                kind[row, column] = EMPTY
            elif block[: len(i)].all():
                kind[row, column] = FULL
            else:
                kind[row, column] = patterns.setdefault(block.tobytes(), len(patterns))
    if mask.whole:
        kind[1:] = kind[0]
    return Blocks(kind, np.frombuffer(b"".join(patterns), bool).reshape(-1, bq, bk))


def visited(mask: Mask, bq: int, bk: int) -> float:
    """The fraction of blocks that a kernel with blocks of (bq, bk) computes."""
    return float((blocks(mask, bq, bk).kind != EMPTY).mean())


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
