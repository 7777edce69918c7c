"""From formulas to a tableau: a sampler written as in its paper, run once on linear symbols.

    def sampler(g, x, model, noise):              # DDIM
        for i in range(g.n):
            D = model(x, g.t[i])                  # one network evaluation, as an x0 prediction
            x = (g.s[i+1] / g.s[i]) * x - g.a[i+1] * np.expm1(-g.h(i)) * D
        return x

`model(x, t)` and `noise()` return symbols; symbols add up and are scaled by host numbers, and nothing else (a
product of two symbols, or a nonlinear function of one, is no tableau: write a Stepper). `trace` then does what a
compiler does: a value that is used after the next network evaluation crosses it in a register.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jdiff.predict import convert
from jdiff.process import Process, System
from jdiff.tableau import Record, Tableau, join, stack

Value = Any  # in a sampler: a symbol; the same formulas run on arrays of the sample's shape too
Model = Callable[..., Value]  # model(x, t, kind="x0", label="")
Noise = Callable[[], Value]


@dataclass
class _Tape:
    process: Process
    outputs: int = 1
    prediction: str = "x0"
    points: list["Linear"] = field(default_factory=list)
    times: list[Any] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    results: list[list["Linear"]] = field(default_factory=list)
    noises: list[list["Linear"]] = field(default_factory=lambda: [[]])

    def __post_init__(self) -> None:
        self.one = Linear(self, (), "1")

    @property
    def segment(self) -> int:
        return len(self.points)

    def model(self, x: "Linear", t: Any, kind: str = "x0", label: str = "") -> Any:
        """One network evaluation at (x, t); a symbol of the given prediction kind (a tuple where outputs > 1)."""
        k = self.segment
        self.points.append(x)
        self.times.append(np.asarray(t, np.float64))
        self.labels.append(label)
        self.noises.append([])
        names = [f"D{k}"] if self.outputs == 1 else [f"D{k}.{o}" for o in range(self.outputs)]
        self.results.append([Linear(self, (), name) for name in names])
        wanted = tuple(convert(self.process, x, self.times[-1], D, self.prediction, kind) for D in self.results[-1])
        return wanted[0] if self.outputs == 1 else wanted

    def noise(self) -> "Linear":
        """Fresh standard normal noise of the sample's shape."""
        z = Linear(self, (), "z")
        self.noises[-1].append(z)
        return z


class Linear:
    """A linear combination of earlier symbols. `segment` is the number of network evaluations made before it."""

    __array_ufunc__ = None  # NumPy numbers on the left defer to __rmul__

    def __init__(self, tape: _Tape, terms: tuple[tuple[Any, "Linear"], ...], name: str = "u"):
        self.tape, self.terms, self.name, self.segment = tape, terms, name, tape.segment

    def __add__(self, other: Any) -> "Linear":  # a symbol, or nothing: 0
        if not isinstance(other, Linear):
            if np.all(np.asarray(other) == 0):
                return self
            raise TypeError(f"a tableau is linear: cannot add the constant {other!r} to a symbol")
        return Linear(self.tape, ((1.0, self), (1.0, other)))

    def __mul__(self, factor: Any) -> "Linear":
        if isinstance(factor, Linear):
            raise TypeError("a tableau is linear: cannot multiply two symbols; write a Stepper for nonlinear updates")
        return Linear(self.tape, ((_number(factor), self),))

    def __truediv__(self, divisor: Any) -> "Linear":
        return self * (1.0 / np.asarray(divisor, np.float64))

    def __neg__(self) -> "Linear":
        return self * -1.0

    def __sub__(self, other: "Linear") -> "Linear":
        return self + (-other)

    __radd__, __rmul__ = __add__, __mul__


def _number(value: Any) -> Any:
    """float64: an array of a sample's shape, or a float, which multiplies faster than an array of no dimensions."""
    value = np.asarray(value, np.float64)
    return value if value.ndim else float(value)


def constant(like: Value, value: Any) -> Value:
    """A constant, in a sampler: as a symbol beside symbols, itself beside arrays. After the first evaluation only."""
    if not isinstance(like, Linear):
        return value
    return Linear(like.tape, ((_number(value), like.tape.one),))


@dataclass(frozen=True)
class Grid:
    """What a formula needs of a time grid of n steps, in float64: times t, a = alpha, s = sigma, lam = log(a / s)."""

    process: Process
    t: np.ndarray
    a: np.ndarray
    s: np.ndarray
    lam: np.ndarray

    @property
    def n(self) -> int:
        return len(self.t) - 1

    def h(self, i: int) -> Any:
        """Step i in half log-SNR, lam[i+1] - lam[i]; +inf into sigma = 0 and out of alpha = 0."""
        return self.lam[i + 1] - self.lam[i]

    def rho(self, i: int) -> Any:
        """Noise-to-signal ratio sigma / alpha; +inf where alpha = 0."""
        with np.errstate(divide="ignore"):
            return self.s[i] / self.a[i]


def grid(process: Process, times: Any) -> Grid:
    """A checked Grid. ValueError for times that are not finite, in range and strictly falling, or with lam = -inf
    anywhere but at the first of them."""
    t = process.check_times(times)
    return Grid(process, t, process.alpha(t), process.sigma(t), process.lam(t))


@dataclass(frozen=True)
class Solver:
    """A builder: `solver(process, times)` is a Tableau. Made by the functions of `jdiff.solvers`.

    `sampler(g, x, model, noise)` states the formulas, on one grid. `cost(n)` is the NFE of n steps
    that end at sigma = 0. `prediction` is what the formulas hold constant or make a polynomial of ("x0", "eps", ..);
    `when` says in one line when to use it. `from_point`: it may start where sigma = 0, at a bridge's end.
    """

    name: str
    sampler: Callable[[Grid, Value, Model, Noise], Value]
    order: int
    references: tuple[str, ...] = ()
    cost: Callable[[int], int] = lambda n: n
    min_steps: int = 1
    stochastic: bool = False
    prediction: str = "x0"
    when: str = ""
    from_point: bool = False

    def __call__(self, process: Process, times: Any) -> Tableau:
        """times (n + 1,), or (n + 1, *d): a grid for each element of a sample of shape *d (or one that broadcasts).

        On a `System`: a table a part, joined; ValueError where they evaluate at different times or costs.
        """
        if isinstance(process, System):
            return join([self(part, times) for _, part in process.parts], process)
        if np.ndim(times) > 1:
            times = process.check_times(times)
            columns = times.reshape(len(times), -1).T
            each = {tuple(c): self(process, c) for c in np.unique(columns, axis=0)}
            return stack([each[tuple(c)] for c in columns], times.shape[1:])
        if self.stochastic and not process.gaussian:
            raise ValueError(
                f"{self.name} adds the noise of alpha x0 + sigma eps with a Gaussian eps, and {process} is no such "
                "process; take a deterministic solver, or jdiff.interpolants.stochastic"
            )
        g = grid(process, times)
        if g.n < self.min_steps:
            raise ValueError(f"{self.name} needs at least {self.min_steps} steps, got {g.n} from {g.n + 1} times")
        if np.any(g.s[0] == 0) and not self.from_point:
            raise ValueError(
                f"{self.name}: {process} starts at a point at t = {g.t[0]:g} (sigma = 0), so the first step must draw "
                "noise: take solvers.ddpm, or start at an earlier time"
            )
        sampler = functools.partial(self.sampler, g)
        return trace(sampler, process, name=self.name, order=self.order, references=self.references).validate()

    def steps(self, nfe: int) -> int:
        """The most steps that `nfe` network evaluations pay for, on a grid that ends at sigma = 0."""
        if int(nfe) != nfe or nfe < 1:
            raise ValueError(f"NFE is {nfe}; expected a whole number of network evaluations, at least 1")
        n = 0
        while self.cost(n + 1) <= nfe:
            n += 1
        if n < self.min_steps:
            least = f"{self.cost(self.min_steps)} network evaluations ({self.min_steps} steps)"
            raise ValueError(f"{self.name} needs at least {least}, got NFE {nfe}")
        return n


def trace(
    sampler: Callable[[Value, Model, Noise], Any],
    process: Process,
    *,
    name: str = "custom",
    order: int = 1,
    references: tuple[str, ...] = (),
    outputs: int = 1,
    prediction: str = "x0",
) -> Tableau:
    """Run `sampler(x, model, noise)` on symbols and return the tableau of what it did.

    `model(x, t, kind="x0", label="")` evaluates the network, `noise()` draws standard noise; the returned symbol is
    the sample, or the first of a tuple whose others are kept in registers to the end (what inversion starts from).
    Coefficients may be arrays that broadcast against one sample. prediction: what the tableau's B multiplies; x0 output
    keeps coefficients small at both ends of a Gaussian process, "velocity" is for transports.
    """
    tape = _Tape(process, outputs, prediction)
    x = Linear(tape, (), "x")
    last = sampler(x, tape.model, tape.noise)
    last, *kept = last if isinstance(last, tuple) else (last,)
    if not isinstance(last, Linear):
        raise TypeError(f"{name}: the sampler returned {last!r}; expected a symbol, the sample")
    if not tape.points:
        raise ValueError(f"{name}: the sampler made no network evaluation")
    points = [*tape.points, last]
    K = len(tape.points)
    flat = functools.cache(_flatten)  # every value is looked at twice

    # Values that cross evaluations, and the last evaluation each must survive.
    until: dict[Linear, int] = {}
    queue = [*points, *kept]
    for k, point in enumerate(points):
        if point.segment < k:  # evaluated later than computed
            until[point] = max(until.get(point, -1), k - 1)
    for node in kept:
        until[node] = max(until.get(node, -1), K - 1)
    seen: set[Linear] = set()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        for leaf in flat(node):
            if leaf.segment < node.segment and leaf is not tape.one:
                until[leaf] = max(until.get(leaf, -1), node.segment - 1)
                queue.append(leaf)

    # Register allocation: 0 is the evaluation point, the others keep their place while they live.
    places: list[dict[Linear, int]] = []
    born: list[list[Linear]] = [[] for _ in range(K + 1)]
    for node in until:
        born[node.segment].append(node)
    rank = {node: i for i, node in enumerate(until)}
    alive: list[Linear] = []
    for k, point in enumerate(points):
        alive = sorted((n for n in [*alive, *born[k]] if until[n] >= k), key=rank.__getitem__)
        live = [n for n in (alive if k < K else kept) if n is not point]
        before = places[-1] if places else {}
        place = {point: 0} | {n: before[n] for n in live if before.get(n, 0) > 0}
        free = (r for r in range(1, len(live) + K + 2) if r not in place.values())
        for n in live:
            if n not in place:
                place[n] = next(free)
        places.append(place)
    R = 1 + max(max(p.values()) for p in places)
    Z = max(len(z) for z in tape.noises)

    rows: dict[str, list[Any]] = {"A": [], "B": [], "C": [], "E": []}
    start = {"h0": [0.0] * R, "c0": [[0.0] * Z for _ in range(R)]}
    for k, place in enumerate(places):
        A = [[0.0] * R for _ in range(R)]
        B = [[0.0] * outputs for _ in range(R)]
        C = [[0.0] * Z for _ in range(R)]
        E = [0.0] * R
        for node, r in place.items():
            if k > 0 and node.segment < k:
                A[r][places[k - 1][node]] = 1.0
                continue
            for leaf, c in flat(node).items():
                if leaf is tape.one:
                    if k == 0:
                        raise TypeError(f"{name}: a constant before the first network evaluation has no place")
                    E[r] = E[r] + c
                elif leaf in tape.noises[k]:
                    j = tape.noises[k].index(leaf)
                    C[r][j] = C[r][j] + c
                elif k > 0 and leaf in tape.results[k - 1]:
                    o = tape.results[k - 1].index(leaf)
                    B[r][o] = B[r][o] + c
                elif k > 0:
                    A[r][places[k - 1][leaf]] = A[r][places[k - 1][leaf]] + c
                else:
                    start["h0"][r] = start["h0"][r] + c
        if k == 0:
            start["c0"] = C
        else:
            for key, value in (("A", A), ("B", B), ("C", C), ("E", E)):
                rows[key].append(value)

    constants = any(np.any(np.asarray(c) != 0) for row in rows["E"] for c in row)
    names = tuple(tuple(_names(place, points[k], R)) for k, place in enumerate(places))
    return Tableau(
        t=_pack(tape.times, (K,)),
        A=_pack(rows["A"], (K, R, R)),
        B=_pack(rows["B"], (K, R, outputs)),
        C=_pack(rows["C"], (K, R, Z)),
        h0=_pack(start["h0"], (R,)),
        c0=_pack(start["c0"], (R, Z)),
        record=Record(name, order, process, tuple(tape.labels), names, references, prediction, outputs),
        E=_pack(rows["E"], (K, R)) if constants else None,
    )


def _pack(nested: Any, lead: tuple[int, ...]) -> np.ndarray:
    """Nested lists of numbers or sample-shaped arrays as one array (*lead, *d)."""
    with contextlib.suppress(ValueError):  # ragged: numbers beside arrays
        return np.array(nested, np.float64).reshape(*lead, *np.shape(nested)[len(lead) :])
    flat = np.empty(lead, dtype=object)
    for index in np.ndindex(*lead):
        value = nested
        for i in index:
            value = value[i]
        flat[index] = np.asarray(value, np.float64)
    d = np.broadcast_shapes(*(v.shape for v in flat.ravel())) if flat.size else ()
    return np.array([np.broadcast_to(v, d) for v in flat.ravel()], np.float64).reshape(*lead, *d)


def _flatten(node: Linear) -> dict[Linear, Any]:
    """The node over inputs, outputs, noises and nodes of earlier segments."""
    total: dict[Linear, Any] = {}
    stack: list[tuple[Any, Linear]] = [(factor, child) for factor, child in node.terms] or [(1.0, node)]
    segment = node.segment
    while stack:
        c, n = stack.pop()
        if n.terms and n.segment == segment:
            for factor, child in n.terms:
                stack.append((c * factor, child))
        else:
            total[n] = total.get(n, 0.0) + c
    return total


def _names(place: dict[Linear, int], point: Linear, R: int) -> list[str]:
    names = [""] * R
    for node, r in place.items():
        names[r] = "x" if node is point else (node.name if node.name != "x" else "xT")
        if names[r] == "u":
            names[r] = f"u{r}"
    return names
