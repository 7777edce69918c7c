"""A solver is data: the tableau of a general linear method over R registers of the sample's shape.

    f, carry = denoiser.apply(S[0], t[k], carry)        one network evaluation, as an x0 prediction
    S        = A[k] S + B[k] f + C[k] z (+ E[k])        z: fresh standard noise, up to Z of them

Register 0 is always the next evaluation point, and after the last row the sample. A tableau is a pytree of arrays
and an argument of the compiled program: another grid of the same length, or another solver of the same shape
(K, R, Z), compiles nothing. Nobody types these matrices: `jdiff.trace` makes them from formulas, and `explain()`
prints formulas back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from jdiff.process import Process, System

HUGE = 1e5  # in x0 output the published solvers stay below alpha / sigma at the smallest noise level


@dataclass(frozen=True)
class Record:
    """What a tableau is, for people and for checks; stays on the host and never enters a compiled program.

    `names[k][r]` says what register r holds before row k (x: the state, D3: the output of evaluation 3,
    u: any other value). `outputs` is the number O of arrays that the denoiser returns (1 unless said).
    """

    name: str
    order: int
    process: Process
    labels: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    references: tuple[str, ...] = ()
    prediction: str = "x0"
    outputs: int = 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tableau:
    """Coefficients, float64 on the host. `*d` (usually absent) broadcasts against one sample, without its batch axis.

    t  (K, *d)          model time of each evaluation        A  (K, R, R, *d)   registers to registers
    B  (K, R, O, *d)    outputs to registers                 C  (K, R, Z, *d)   noises to registers
    h0 (R, *d)          initial sample to registers          c0 (R, Z, *d)      noises drawn before evaluation 0
    E  (K, R, *d)       constants to registers; None for all solvers but those that carry statistics of the model
    """

    t: Any
    A: Any
    B: Any
    C: Any
    h0: Any
    c0: Any
    record: Record = field(metadata={"static": True})
    E: Any = None

    @property
    def nfe(self) -> int:
        """Number of network evaluations K."""
        return self.A.shape[0]

    @property
    def registers(self) -> int:
        return self.A.shape[1]

    @property
    def noises(self) -> int:
        """Most fresh noises Z that one row uses; 0 for a deterministic solver."""
        return self.C.shape[2]

    @property
    def stochastic(self) -> bool:
        return self.noises > 0

    def replace(self, **changes: Any) -> "Tableau":
        return replace(self, **changes)

    def pad(self, registers: int, noises: int) -> "Tableau":
        """The same solver with idle registers and noises, so that solvers of one K share one compiled program."""
        extra = {"R": registers - self.registers, "Z": noises - self.noises}
        if min(extra.values()) < 0:
            raise ValueError(f"pad: {self.record.name} has {self.registers} registers, {self.noises} noises; got fewer")
        axes = {"A": ".RR", "B": ".R.", "C": ".RZ", "h0": "R", "c0": "RZ"}
        axes |= {} if self.E is None else {"E": ".R"}
        wide = lambda v, ax: np.pad(v, [(0, extra.get(a, 0)) for a in ax] + [(0, 0)] * (np.ndim(v) - len(ax)))
        names = tuple(n + ("",) * extra["R"] for n in self.record.names)
        arrays = {name: wide(np.asarray(getattr(self, name)), ax) for name, ax in axes.items()}
        return replace(self, **arrays, record=replace(self.record, names=names))

    def part(self, i: int) -> "Tableau":
        """The scalar coefficients of a system's part number i, as `join` has them in its last axis."""
        arrays = {name: getattr(self, name) for name in ("A", "B", "C", "h0", "c0", "E")}
        return replace(self, **{name: None if v is None else np.asarray(v)[..., i] for name, v in arrays.items()})

    def validate(self) -> "Tableau":
        """Check shapes and entries on the host; returns the tableau. ValueError names the first bad entry."""
        K, R, Z, O = self.nfe, self.registers, self.noises, self.record.outputs
        expected = {"A": (K, R, R), "B": (K, R, O), "C": (K, R, Z), "h0": (R,), "c0": (R, Z), "t": (K,)}
        expected |= {} if self.E is None else {"E": (K, R)}
        for name, lead in expected.items():
            value = np.asarray(getattr(self, name))
            if value.shape[: len(lead)] != lead:
                raise ValueError(f"{self.record.name}: {name} has shape {value.shape}, expected {lead} (+ sample axes)")
            bad = ~np.isfinite(value) if name == "t" else ~(np.abs(value) <= HUGE)  # NaN fails <= too
            if bad.any():
                where = tuple(int(i) for i in np.argwhere(bad)[0])
                raise ValueError(
                    f"{self.record.name}: {name}{list(where)} = {value[where]:.3g}; entries must be finite and at most "
                    f"{HUGE:g} in size. A grid that comes too near sigma = 0 without reaching it does this"
                )
        return self

    def unrolled(self) -> np.ndarray:
        """Every evaluation point, then the sample, over [x, D_0 .. D_{K-1}, z_0 ..]: (K + 1, 1 + K O + (K + 1) Z).

        A last column holds the constants, where the tableau has any.

        Noise columns: Z drawn before evaluation 0, then Z in every row. Scalar coefficients only (no `*d`).
        """
        K, R, Z, O = self.nfe, self.registers, self.noises, self.record.outputs
        S = np.zeros((R, 1 + K * O + (K + 1) * Z + (self.E is not None)))
        first_noise = 1 + K * O
        S[:, 0] = self.h0
        S[:, first_noise : first_noise + Z] = self.c0
        points = [S[0]]
        for k in range(K):
            S = np.asarray(self.A[k]) @ S
            S[:, 1 + k * O : 1 + (k + 1) * O] += self.B[k]
            S[:, first_noise + (k + 1) * Z : first_noise + (k + 2) * Z] += self.C[k]
            if self.E is not None:
                S[:, -1] += self.E[k]
            points.append(S[0])
        return np.stack(points)

    def explain(self, digits: int = 5) -> str:
        """The rows as formulas, one line a register that changes."""
        r = self.record
        kind = f"stochastic, {self.noises} noise(s) a row" if self.stochastic else "deterministic"
        lines = [
            f"{r.name}: order {r.order}, {self.nfe} NFE, {self.registers} register(s), {kind}",
            f"  on {r.process}",
        ]
        lines += [f"  {ref}" for ref in r.references]
        start = [(name, [(self.h0[i], "x"), *_noise(self.c0[i])]) for i, name in enumerate(r.names[0])]
        formulas = [f"{name} = {_terms(terms, digits)}" for name, terms in start if name]
        lines.append(f"start           {', '.join(formulas)}")
        for k in range(self.nfe):
            label = f"  [{r.labels[k]}]" if r.labels[k] else ""
            lines.append(f"{k:3d}  t = {_number(self.t[k], 6):<9} D{k} = denoise({r.names[k][0]}, t){label}")
            for i, name in enumerate(r.names[k + 1]):
                outputs = [f"D{k}"] if r.outputs == 1 else [f"D{k}.{o}" for o in range(r.outputs)]
                terms = list(zip(self.A[k, i], r.names[k], strict=False)) + list(
                    zip(self.B[k, i], outputs, strict=True)
                )
                constant = [] if self.E is None else [(self.E[k, i], "1")]
                formula = _terms(terms + _noise(self.C[k, i]) + constant, digits)
                if name and formula != name:
                    lines.append(f"                {name} = {formula}")
        return "\n".join(lines)


def stack(tables: Sequence[Tableau], shape: tuple[int, ...]) -> Tableau:
    """One tableau from prod(shape) scalar ones of equal K: element e of the sample runs tables[e].

    How a time grid an element (a frame, a token, a pixel) becomes a solver: registers and noises are elementwise, so
    each element may use them in its own way; the widest sets their number.
    """
    R, Z = max(T.registers for T in tables), max(T.noises for T in tables)
    tables = [T.pad(R, Z) for T in tables]
    if len({T.nfe for T in tables}) > 1:
        raise ValueError(f"stack: the tableaux have {sorted({T.nfe for T in tables})} evaluations; expected one number")
    join = lambda *arrays: np.stack(arrays, -1).reshape(*np.shape(arrays[0]), *shape)
    arrays = {name: join(*(getattr(T, name) for T in tables)) for name in ("t", "A", "B", "C", "h0", "c0")}
    if any(T.E is not None for T in tables):
        arrays["E"] = join(*(np.zeros((T.nfe, R)) if T.E is None else T.E for T in tables))
    return tables[0].replace(**arrays)


def join(tables: Sequence[Tableau], system: System) -> Tableau:
    """One tableau for a system from one a part: `*d` of A, B, C, h0 and c0 ends in an axis over the parts.

    ValueError where the parts' tables differ in their times or number of evaluations: one network call serves all.
    """
    first = tables[0]
    for (name, _), T in zip(system.parts, tables, strict=True):
        if T.nfe != first.nfe or not np.allclose(T.t, first.t, rtol=1e-12, atol=0):
            raise ValueError(
                f"{first.record.name} evaluates {name} and {system.parts[0][0]} at different times, and one network "
                "call serves all parts of a system; take a solver whose evaluations lie on the grid (multistep, Heun)"
            )
    joined = stack(tables, (len(tables),))
    return joined.replace(t=first.t, record=replace(joined.record, process=system))


def _noise(row: Any) -> list[tuple[Any, str]]:
    return [(c, f"z{j}" if len(row) > 1 else "z") for j, c in enumerate(row)]


def _number(value: Any, digits: int) -> str:
    value = np.asarray(value)
    return (
        f"{float(value):.{digits}g}" if value.ndim == 0 else f"[{value.min():.{digits}g} .. {value.max():.{digits}g}]"
    )


def _terms(terms: list[tuple[Any, str]], digits: int) -> str:
    kept = [(c, n) for c, n in terms if np.any(np.asarray(c) != 0)]
    text = " + ".join(n if np.all(np.asarray(c) == 1) else f"{_number(c, digits)} {n}" for c, n in kept)
    return text.replace("+ -", "- ") or "0"
