"""What a chip has, from the vendor's pages; and the names of topologies.

A figure is a chip's, as published; where JAX shows two devices a chip, each has half of it. Links: bytes a second that
all of a chip's links together can RECEIVE; the pages of today give both directions together, twice of that.
"""

import re
from typing import NamedTuple


class Chip(NamedTuple):
    """flops: bfloat16 FLOP/s; hbm: bytes; hbm_rate, link_rate: bytes a second; devices: JAX devices a chip."""

    flops: float
    hbm: float
    hbm_rate: float
    link_rate: float
    devices: int
    shapes: tuple[str, ...]
    source: str


_PAGE = "cloud.google.com/tpu/docs/"

CHIPS: dict[str, Chip] = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9, 2, ("2x2x1", "2x2x2", "4x4x4", "8x8x8"), _PAGE + "v4"),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 1, ("1x1", "2x2", "2x4", "4x4", "8x8", "16x16"), _PAGE + "v5e"),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 1, ("2x2x1", "4x4x4", "8x8x8", "16x16x24"), _PAGE + "v5p"),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 400e9, 1, ("1x1", "2x2", "2x4", "4x4", "8x8", "16x16"), _PAGE + "v6e"),
    "tpu7x": Chip(2307e12, 192 * 2**30, 7380e9, 600e9, 2, ("2x2x1", "4x4x4", "4x4x8", "8x8x8"), _PAGE + "tpu7x"),
}


class Topology(NamedTuple):
    """kind: a name in CHIPS, or cpu. shape: chips along each dimension; of cpu, the number of simulated devices."""

    kind: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"


def parse(name: str) -> Topology:
    """ "v5e:16x16" or "cpu:8" as a Topology; ValueError, with the known ones, for another."""
    kind, _, shape = name.partition(":")
    dims = len(CHIPS[kind].shapes[0].split("x")) if kind in CHIPS else 1
    if (kind not in CHIPS and kind != "cpu") or not re.fullmatch("x".join([r"[1-9]\d*"] * dims), shape):
        raise ValueError(
            f"unknown topology {name!r}; known: {known()}. Other sizes of these kinds are tried: the compiler says "
            "whether they exist"
        )
    return Topology(kind, tuple(map(int, shape.split("x"))))


def known() -> str:
    """The topologies that are sure to exist."""
    return "; ".join(f"{k}:{', '.join(c.shapes)}" for k, c in CHIPS.items()) + "; cpu:8 (simulated devices)"
