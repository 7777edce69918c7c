"""Running a solver: a Stepper is a pure (init, step) pair, and sampling is one `lax.scan` over the rows."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Integer, PyTree

from jdiff.denoiser import Denoiser, cast_like
from jdiff.predict import convert, model_time, wide
from jdiff.tableau import Tableau


class State(NamedTuple):
    """All that a tableau solver remembers, particle axis first in every leaf.

    Resampling gathers the registers together with the sample: `jax.tree.map(lambda a: a[ancestors], state)`.
    """

    registers: tuple[PyTree, ...]
    carry: PyTree

    @property
    def x(self) -> PyTree:
        return self.registers[0]


class Info(NamedTuple):
    """What a step saw: the point it evaluated and the outputs (x0 predictions), before the update."""

    x: PyTree
    outputs: tuple[PyTree, ...]


class Rows(NamedTuple):
    """The coefficients of a tableau in the sample's dtype; one row after `jax.tree.map(lambda a: a[k], rows)`."""

    t: Array
    A: Array
    B: Array
    C: Array
    E: Array | None = None


class Stepper(NamedTuple):
    """`init(key, x) -> state` and `step(key, state, row) -> (state, info)`, both pure; `state.x` is the sample."""

    init: Callable[[Array | None, PyTree], Any]
    step: Callable[[Array | None, Any, Any], tuple[Any, Any]]


class Trajectory(NamedTuple):
    """`x`: the K evaluation points and then the sample (K + 1, ...); `x0`: the K predictions (K, ...); `t` (K,)."""

    x: PyTree
    x0: PyTree
    t: Array


def rows(tableau: Tableau, dtype: Any) -> Rows:
    """The rows of `tableau` as scanned over; times stay float32 or better."""
    cast = lambda a, d: a.astype(d) if isinstance(a, jax.Array) else jnp.asarray(np.asarray(a), d)
    constants = None if tableau.E is None else cast(tableau.E, wide(dtype))
    t, A, B, C = (cast(a, wide(dtype)) for a in (tableau.t, tableau.A, tableau.B, tableau.C))
    return Rows(t, A, B, C, constants)


def stepper(
    denoiser: Denoiser, h0: Any, c0: Any, *, prediction: str = "x0", index: Integer[Array, " batch"] | None = None
) -> Stepper:
    """The Stepper of a tableau whose start is (h0, c0); its rows come from `rows`. `index`: see `sample`."""
    process = denoiser.process

    def draw(key: Array | None, like: PyTree, Z: int) -> list[PyTree]:
        return [process.noise(jax.random.fold_in(_key(key), j), like, index) for j in range(Z)]

    def combine(r: int, terms: list[tuple[Any, list[PyTree]]]) -> PyTree:
        # Sums of scalar times array, not a matrix product: a TPU would round that to bfloat16.
        times = lambda c, v: jax.tree.map(lambda c, a: c * a, process.split(c, v), v)
        weighted = [times(M[r, j], v) for M, vs in terms for j, v in enumerate(vs)]
        return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), weighted)

    def init(key: Array | None, x: PyTree) -> State:
        R, Z = c0.shape[:2]
        terms = [(h0[:, None], [x]), (c0, draw(key, x, Z))]
        return State(tuple(combine(r, terms) for r in range(R)), denoiser.init(x))

    def step(key: Array | None, state: State, row: Rows) -> tuple[State, Info]:
        x, t = state.x, process.told(model_time(row.t, state.x))
        out, carry = denoiser.apply(x, t, state.carry)
        outs = (out,) if row.B.shape[1] == 1 else tuple(out)
        outs = tuple(convert(process, x, t, cast_like(o, x), denoiser.prediction, prediction) for o in outs)
        terms = [(row.A, list(state.registers)), (row.B, list(outs)), (row.C, draw(key, x, row.C.shape[1]))]
        new = tuple(combine(r, terms) for r in range(row.A.shape[0]))
        if (E := row.E) is not None:
            new = tuple(jax.tree.map(jnp.add, u, process.split(e, u)) for e, u in zip(E, new, strict=True))
        return State(new, carry), Info(x, outs)

    return Stepper(init, step)


def run(stepper: Stepper, rows: PyTree, x: PyTree, key: Array | None = None) -> tuple[Any, Any]:
    """The scan of any Stepper, your own too, over `rows` (a pytree whose leaves have the steps in front).

    Returns (the last state, the infos stacked over steps). Step k draws from fold_in(key, k), k = 1, 2, ..; init from
    fold_in(key, 0). Pure, and not jitted: `jax.jit(lambda x, key: jdiff.run(stepper, rows, x, key))`.
    """
    fold = lambda k: None if key is None else jax.random.fold_in(key, k)
    n = jax.tree.leaves(rows)[0].shape[0]
    body = lambda state, k_row: stepper.step(fold(k_row[0]), state, k_row[1])
    return jax.lax.scan(body, stepper.init(fold(0), x), (jnp.arange(1, n + 1, dtype=jnp.int32), rows))


def _key(key: Array | None) -> Array:
    if key is None:
        raise ValueError("this solver draws noise: pass key=jax.random.key(seed)")
    return key


def sample(
    denoiser: Denoiser,
    tableau: Tableau,
    x: PyTree,
    key: Array | None = None,
    *,
    index: Integer[Array, " batch"] | None = None,
    trajectory: bool = False,
    callback: Callable[[Any], None] | None = None,
    check: bool = False,
) -> Any:
    """Run a solver from the noise `x` (batch axis first, at the tableau's first time): one XLA program.

    x            array or pytree of arrays, float32 or float64; usually `process.prior(key, shape)`
    key          for solvers that draw noise. Sample i's noise depends on the key and on index[i] alone
    index        (batch,) global index of each sample, default 0, 1, ...: the same samples in other batches
    trajectory   also return a `Trajectory` (K + 1 states: costs that much memory)
    callback     called as callback(k) on the host after evaluation k = 1 .. K; progress bars
    check        look for non-finite values: FloatingPointError names the first evaluation and its time

    Returns the sample, or (sample, Trajectory). What it is compiled for are the shapes (K, R, Z) and x, the denoiser's
    structure and these switches: grids, solvers of the same shape, seeds and guidance scales are arguments.
    Raises ValueError or TypeError, before compilation, for inputs that do not fit.
    """
    x = _checked(denoiser, tableau, x, key)
    dtype = jax.tree.leaves(x)[0].dtype
    start = [jnp.asarray(a).astype(dtype) for a in (tableau.h0, tableau.c0)]
    kind = tableau.record.prediction
    out, path, bad = _run(denoiser, rows(tableau, dtype), *start, x, key, index, kind, trajectory, callback, check)
    if check:
        _report(bad, tableau)
    return (out, path) if trajectory else out


@functools.partial(jax.jit, static_argnums=(7, 8, 9, 10))
def _run(denoiser, rows, h0, c0, x, key, index, kind, trajectory, callback, check):
    init, step = stepper(denoiser, h0, c0, prediction=kind, index=index)
    fold = lambda k: None if key is None else jax.random.fold_in(key, k)

    def body(carry, k_row):
        (state, bad), (k, row) = carry, k_row
        state, info = step(fold(k), state, row)
        if check:
            here = jnp.stack([~_finite(info.outputs), ~_finite(state.registers)])
            bad = jnp.where((bad < 0) & here, k, bad)
        if callback is not None:  # the barrier makes the report wait for the work
            done, _ = jax.lax.optimization_barrier((k, state.x))
            jax.debug.callback(callback, done)
        return (state, bad), (info.x, info.outputs[0]) if trajectory else ()

    K = rows.A.shape[0]
    nothing = jnp.full(2, -1, jnp.int32)
    steps = (jnp.arange(1, K + 1, dtype=jnp.int32), rows)
    (state, bad), seen = jax.lax.scan(body, (init(fold(0), x), nothing), steps)
    if not seen:
        return state.x, None, bad
    points = jax.tree.map(lambda xs, last: jnp.concatenate([xs, last[None]]), seen[0], state.x)
    return state.x, Trajectory(points, seen[1], rows.t), bad


def _finite(tree: PyTree) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _report(bad: Array, tableau: Tableau) -> None:
    if isinstance(bad, Tracer):
        raise TypeError("check=True looks at values on the host: call sample outside jit, grad and vmap")
    found = [
        (int(k), what) for k, what in zip(bad, ("the network's output", "the solver's state"), strict=True) if k > 0
    ]
    if found:
        k, what = min(found, key=lambda f: f[0])
        raise FloatingPointError(
            f"{tableau.record.name}: non-finite values first in {what}, at evaluation {k} of {tableau.nfe}, "
            f"t = {np.array2string(np.asarray(tableau.t[k - 1]), precision=6)}"
        )


def _checked(denoiser: Denoiser, tableau: Tableau, x: PyTree, key: Array | None) -> PyTree:
    if not isinstance(denoiser, Denoiser):
        lift = "lift a function with jdiff.denoiser(fn, process, prediction)"
        raise TypeError(f"expected a Denoiser, got {type(denoiser).__name__}; {lift}")
    if not isinstance(tableau, Tableau):
        raise TypeError(
            f"expected a Tableau, got {type(tableau).__name__}; build one: jdiff.solvers.unipc()(process, times)"
        )
    if tableau.record.process != denoiser.process:
        raise ValueError(
            f"the tableau was built for {tableau.record.process}, but the denoiser's process is {denoiser.process}; "
            "build the tableau with denoiser.process"
        )
    if tableau.stochastic:
        _key(key)
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tableau)):
        tableau.validate()
    x = jax.tree.map(jnp.asarray, x)
    leaves = jax.tree.leaves(x)
    if not leaves:
        raise ValueError("x is empty; expected an array or a pytree of arrays, batch axis first")
    denoiser.process.check(x)
    coefficients = jax.tree.leaves(denoiser.process.split(np.zeros(tableau.A.shape[3:]), x))
    for leaf, d in zip(leaves, map(np.shape, coefficients), strict=True):
        if leaf.dtype not in (jnp.float32, jnp.float64):
            raise TypeError(
                f"x has dtype {leaf.dtype}; the state is kept in float32 (or float64) even where the network is "
                "bfloat16: pass x.astype(jnp.float32)"
            )
        if leaf.ndim < 1 or leaf.shape[0] != leaves[0].shape[0]:
            shapes = [v.shape for v in leaves]
            raise ValueError(f"x holds shapes {shapes}; all leaves need the same leading batch axis")
        if not _broadcasts(d, leaf.shape[1:]):
            raise ValueError(
                f"the tableau has coefficients of shape {d} (a time grid an element), which do not broadcast against "
                f"one sample of shape {leaf.shape[1:]}"
            )
        if leaf.dtype != leaves[0].dtype:
            raise TypeError(f"x mixes dtypes {sorted({str(v.dtype) for v in leaves})}; use one")
        with jax.ensure_compile_time_eval():  # also where the caller is being traced, and x is a constant there
            finite = isinstance(leaf, Tracer) or bool(jnp.isfinite(leaf).all())
        if not finite:
            raise ValueError(
                "the initial sample x holds NaN or infinite values; draw it with process.prior(key, shape)"
            )
    return x


def _broadcasts(d: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(d) <= len(shape) and all(a in (1, b) for a, b in zip(d[::-1], shape[::-1], strict=False))
