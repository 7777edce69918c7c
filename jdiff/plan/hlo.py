"""Reading a compiled program's text (HLO): which bytes move, over which links, how often.

XLA's own cost analysis counts the body of a loop once; here loops are followed, with their trip counts read from their
conditions. A collective that the TPU compiler has spread over several fusions (an asynchronous collective fusion: one
start, steps beside the arithmetic, one end, all of one channel and chain) is one collective, counted at its start.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"pred": 1, "bf16": 2} | {f"{k}{n}": n // 8 for k in "sufc" for n in (8, 16, 32, 64, 128)}
FREE = {"tuple", "get-tuple-element", "bitcast", "parameter", "constant", "while", "conditional", "call", "iota"} | {
    "after-all", "partition-id", "replica-id", "opt-barrier", "optimization-barrier", "add-dependency", "broadcast"
}  # fmt: skip


class Instruction(NamedTuple):
    """One line: `name = shape op(operands), rest`."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool


class Moved(NamedTuple):
    """collectives: {(kind, axes crossed): bytes that one device receives}; hbm: bytes to and from its memory."""

    collectives: dict[tuple[str, str], float]
    counts: dict[tuple[str, str], int]
    hbm: float


def nbytes(shape: str, hbm_only: bool = False) -> int:
    """Bytes of an array's or a tuple's shape; hbm_only: without what is kept in the core's own memory, S(1)."""
    total = 0
    for kind, dims, layout in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?", shape):
        if not (hbm_only and re.search(r"S\([1-9]", layout)):
            size = SIZES.get(kind, 1 if kind.startswith("f8") else 0)
            total += size * math.prod(int(n) for n in dims.split(",") if n)
    return total


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations of a module, each {name: Instruction}, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            inside = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
            continue
        m = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)
        op = re.search(r"(?:^|\s)([a-z][a-z0-9\-]*)\(", m[3]) if m else None
        if inside is not None and m and op:
            operands, rest = _close(m[3][op.end() :])
            if literal := op[1] in ("constant", "parameter"):  # what is in the parentheses is a value
                rest = operands
            names = () if literal else tuple(re.findall(r"%([\w.\-]+)", operands))
            inside[m[2]] = Instruction(m[2], m[3][: op.start()], op[1], names, rest, bool(m[1]))
    return computations, entry


def _close(text: str) -> tuple[str, str]:
    """What is inside the parenthesis that is open at the start, and what comes after it."""
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return text[:i], text[i + 1 :]
    return text, ""


class Program:
    """A compiled program's text, to be asked what it moves."""

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        self.started = {  # collectives that are spread over fusions, and where each starts
            chain: name
            for name, body in self.computations.items()
            if any('"AsyncCollectiveStart"' in i.rest for i in body.values())
            for i in body.values()
            if (chain := _chain(i))
        }

    def moved(self, mesh: dict[str, int]) -> Moved:
        """mesh: {axis: size}, in the order of the mesh."""
        received, counts, hbm = Counter(), Counter(), 0.0
        for name, times in self.visits(self.entry, 1):
            fused = name in self.fused
            for i in self.computations[name].values():
                hbm += 0 if fused else times * self.traffic(name, i)
                kind = i.op.removesuffix("-start")
                if kind in KINDS and self.started.get(_chain(i), name) == name:
                    group, axes = crossed(i.rest, mesh)
                    size = sum(nbytes(self.computations[name][o].shape) for o in i.operands)
                    kind = "reduce-scatter" if "all-reduce-scatter" in name else kind
                    per = {"all-gather": group - 1, "all-reduce": 2 * (group - 1) / group, "collective-permute": 1}
                    received[kind, axes] += times * size * per.get(kind, (group - 1) / group)
                    counts[kind, axes] += times
        return Moved(dict(received), dict(counts), hbm)

    @functools.cached_property
    def fused(self) -> set[str]:
        """Computations inside of fusions, which touch no memory of their own."""
        found = {c for b in self.computations.values() for i in b.values() if i.op != "while" for c in _called(i)}
        loops = {c for b in self.computations.values() for i in b.values() if i.op == "while" for c in _called(i)}
        calls = {"call", "conditional", "async-start"}
        runs = {c for b in self.computations.values() for i in b.values() if i.op in calls for c in _called(i)}
        return found - loops - runs

    def visits(self, name: str, times: int) -> Iterator[tuple[str, int]]:
        """Every computation that runs, and how often."""
        yield name, times
        for i in self.computations[name].values():
            if i.op == "while":
                yield from self.visits(_called(i, "body")[0], times * self.trips(name, i))
            elif i.op in ("fusion", "call", "async-start", "conditional"):  # of a conditional all branches
                for c in _called(i):
                    yield from self.visits(c, times)

    def trips(self, where: str, loop: Instruction) -> int:
        """How often a loop runs: from its note where the compiler left one, else from counter, step and bound."""
        if note := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(note[1])
        cond, body = (self.computations[_called(loop, key)[0]] for key in ("condition", "body"))
        bound = [int(n) for i in cond.values() if i.op == "constant" and (n := i.rest).isdigit()]
        places = [int(re.search(r"index=(\d+)", i.rest)[1]) for i in cond.values() if i.op == "get-tuple-element"]  # type: ignore[index]
        if not bound or not places:
            return 1
        root = next(i for i in body.values() if i.root)
        start = self._number(
            self.computations[where], self._element(self.computations[where], loop.operands[0], places[0])
        )
        step = 1
        if root.op == "tuple":
            last = _through(body, root.operands[places[0]])
            added = [self._number(body, o) for o in last.operands] if last.op in ("add", "fusion") else []
            step = max((n for n in added if n), default=1)
        return max(-(-(max(bound) - (start or 0)) // step), 1)

    def _element(self, body: dict[str, Instruction], name: str, place: int) -> str:
        made = _through(body, name)
        return made.operands[place] if made.op == "tuple" else name

    def _number(self, body: dict[str, Instruction], name: str) -> int | None:
        found = _through(body, name)
        return int(found.rest) if found.op == "constant" and re.fullmatch(r"-?\d+", found.rest) else None

    def traffic(self, where: str, i: Instruction) -> float:
        """Bytes that an instruction reads from and writes to the device's memory; slices of arrays count as slices."""
        if i.op in FREE or i.op.endswith("-done") or '"AllocateBuffer"' in i.rest:
            return 0
        body = self.computations[where]
        shapes = [body[o].shape if o in body else "" for o in i.operands]
        size = functools.partial(nbytes, hbm_only=True)
        if i.op in ("dynamic-slice", "gather", "slice"):
            return 2 * size(i.shape)
        if i.op in ("dynamic-update-slice", "scatter"):
            return 2 * size(shapes[-1 if i.op == "scatter" else 1])
        if i.op.endswith("-start"):
            return size(i.shape)
        if i.op != "fusion":
            return size(i.shape) + sum(map(size, shapes))
        inner = self.computations[_called(i)[0]]
        root = next(r for r in inner.values() if r.root)
        outs = [_through(inner, o) for o in root.operands] if root.op == "tuple" else [_through(inner, root.name)]
        written = re.findall(r"[a-z]+\d*[a-z0-9]*\[[\d,]*\](?:\{[^}]*\})?", i.shape)
        total = 0.0
        for out, shape in zip(outs, written, strict=False):
            update = inner[out.operands[1]].shape if out.op == "dynamic-update-slice" else None
            total += size(shape) if update is None else size(shape) and nbytes(update)
        for p in inner.values():
            if p.op == "parameter" and (whole := size(shapes[int(p.rest)])):
                total += min(whole, self.read(_called(i)[0], p.name))
        return total

    def read(self, where: str, name: str) -> float:
        """Bytes of a value that the computation around it reads: of slices the slices, inf where all of it may be."""
        total = 0.0
        for user in self.computations[where].values():
            if name not in user.operands:
                continue
            if user.op in ("dynamic-slice", "slice", "gather"):
                total += nbytes(user.shape)
            elif user.op == "bitcast":
                total += self.read(where, user.name)
            elif user.op == "fusion":
                inside = _called(user)[0]
                inner = {int(p.rest): p.name for p in self.computations[inside].values() if p.op == "parameter"}
                total += sum(self.read(inside, inner[k]) for k, o in enumerate(user.operands) if o == name)
            elif user.op != "dynamic-update-slice" or user.operands[0] != name:  # what is updated in place is not read
                return math.inf
        return total


def _through(body: dict[str, Instruction], name: str) -> Instruction:
    """The instruction behind copies and bitcasts."""
    i = body[name]
    while i.op in ("copy", "bitcast", "convert", "copy-done", "copy-start") and i.operands and i.operands[0] in body:
        i = body[i.operands[0]]
    return i


def _chain(i: Instruction) -> tuple[str, ...]:
    """Channel and chain of a collective, () of anything else. `shard_map` writes one channel for all of its own."""
    if i.op.removesuffix("-start") not in KINDS:
        return ()
    return tuple(m[1] if (m := re.search(p, i.rest)) else "" for p in (r"channel_id=(\d+)", r'chain_id="(\d+)"'))


def _called(i: Instruction, key: str = "") -> list[str]:
    keys = key or "calls|to_apply|body|condition|true_computation|false_computation"
    found = re.findall(rf"(?:{keys})=%?([\w.\-]+)", i.rest)
    if branches := re.search(r"(?:branch_computations|called_computations)=\{([^}]*)\}", i.rest):
        found += re.findall(r"[\w.\-]+", branches[1])
    return found


def crossed(rest: str, mesh: dict[str, int]) -> tuple[int, str]:
    """(devices in a group, "data x fsdp": the mesh axes along which its members differ) of a collective."""
    shape, n = tuple(mesh.values()), math.prod(mesh.values())
    if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", rest):
        groups = [[int(v) for v in p.split(",")] for p in re.findall(r"\{([\d,]+)\}", pairs[1])]
    else:
        groups = [list(_group(rest, n))]
    axes = [
        name
        for k, name in enumerate(mesh)
        if any(len({np.unravel_index(member, shape)[k] for member in group}) > 1 for group in groups)
    ]
    return len(groups[0]), " x ".join(axes) or "none"


def _group(rest: str, n: int) -> np.ndarray:
    """The first of the replica groups, in any of the three ways to write them."""
    if m := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return np.array([int(v) for v in m[1].split(",")])
    if m := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _iota(m[2], m[3]).reshape(_ints(m[1]))[0]
    if m := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", rest):
        sizes = {a: int(k) for a, k in re.findall(r"'(\w+)'=(\d+)", m[1])}
        ids = re.search(r"device_ids=\(?\[([\d,]+)\](?:T\(([\d,]+)\))?", m[2])
        devices = (_iota(ids[1], ids[2]) if ids else np.arange(math.prod(sizes.values()))).reshape(-1)
        over, dims, at = [], [], {}
        for axis, k in sizes.items():  # an axis may be used in part: 'axis_0':(2)4 is 4 behind 2 of it
            part = re.search(rf"'{axis}':\((\d+)\)(\d+)", m[3])
            split = [int(part[1]), int(part[2]), k // int(part[1]) // int(part[2])] if part else [k]
            at[axis] = len(dims) + (1 if part else 0)
            dims += split
            over += [at[axis]] if f"'{axis}'" in m[3] else []
        grid = devices.reshape(dims)
        return np.moveaxis(grid, over, range(-len(over), 0)).reshape(-1, math.prod(dims[a] for a in over))[0]
    return np.arange(n)


def _iota(dims: str, order: str | None) -> np.ndarray:
    grid = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return grid.transpose(_ints(order)) if order else grid


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))
