"""What guidance rules share: several denoisers looked at from one point, in one batch where they are one network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import PyTree

from jdiff.denoiser import Denoiser, _call, cast_like
from jdiff.predict import check_kind, convert
from jdiff.process import Process

Interval = tuple[float, float]


def combine(
    rule: Callable[..., PyTree],
    denoisers: Sequence[Denoiser | None],
    *,
    kind: str | None = None,
    interval: Interval | None = None,
    together: bool = True,
    name: str = "combine",
) -> Denoiser:
    """A Denoiser of your own rule: rule(x, t, (out_0, out_1, ..)) -> the output, all of them predictions of `kind`.

    kind      what the rule is given and returns; default: what denoisers[0] predicts
    interval  (t_low, t_high): the rule holds where t_low < t <= t_high, and elsewhere denoisers[0] does, which alone
              is evaluated there where t is one time for the whole batch
    together  denoisers that are one lifted function with the same parameters, but for the values of `cond`, are
              evaluated as one batch; False: one after the other, at the memory of one

    Arrays that the rule needs are arguments of the program if it is a `jax.tree_util.Partial`. ValueError for
    denoisers on different processes, a denoiser that is missing, an interval outside [0, t_max].
    """
    first = present(denoisers, name)[0]
    kind, p = check_kind(first.prediction if kind is None else kind), first.process
    init, evaluate = branches(denoisers, kind=kind, together=together, name=name)
    span = check_interval(interval, p, name)
    return Denoiser(init, Partial(_Rule(p, first.prediction, kind), first, evaluate, as_rule(rule), span), p, kind)


def branches(
    denoisers: Sequence[Denoiser | None],
    *,
    kind: str,
    together: bool = True,
    name: str = "combine",
    shapes: Sequence[Any] | None = None,
) -> tuple[Partial, Partial]:
    """(init, evaluate): evaluate(xs, t, carry) -> (one output of `kind` a denoiser, carry); xs one point for each.

    shapes: anything that differs between branches whose points cannot share a batch.
    """
    models = present(denoisers, name)
    groups: list[list[int]] = []
    for i, d in enumerate(models):
        alike = lambda g, i=i: shapes is None or shapes[g[0]] == shapes[i]
        home = next((g for g in groups if together and alike(g) and _one_network(models[g[0]], d)), None)
        groups.append([i]) if home is None else home.append(i)
    calls = tuple(_group([models[i] for i in g]) for g in groups)
    evaluate = _Evaluate(models[0].process, kind, tuple(map(tuple, groups)), tuple(d.prediction for d in models))
    return Partial(_init, tuple(d.init for d in models)), Partial(evaluate, calls)


def present(denoisers: Sequence[Denoiser | None], name: str) -> list[Denoiser]:
    """The denoisers, all there and on one process; ValueError otherwise, TypeError for what is no Denoiser."""
    if not denoisers:
        raise ValueError(f"{name}: no models; expected one or more Denoisers on one process")
    found = []
    for i, d in enumerate(denoisers):
        if d is None:
            raise ValueError(
                f"{name}: branch {i} is None; expected a Denoiser, for an unconditional branch for instance "
                "denoiser.with_cond(null labels) of a network trained with label dropout"
            )
        if not isinstance(d, Denoiser):
            raise TypeError(f"{name}: models[{i}] is {type(d).__name__}; expected a jdiff.denoiser(..)")
        found.append(d)
    for i, d in enumerate(found):
        if d.process != found[0].process:
            raise ValueError(
                f"{name} needs all models on one process; models[{i}] is on {d.process}, models[0] on "
                f"{found[0].process}: their scores are of different noised laws"
            )
    return found


def check_interval(interval: Interval | None, process: Process, name: str) -> Any:
    """(t_low, t_high) as arrays, or None; float64, so that a bound that is a time of the grid compares as it."""
    if interval is None:
        return None
    low, high = (float(v) for v in interval)
    if not low < high:
        raise ValueError(f"{name}: interval is {interval}; expected (t_low, t_high) with t_low < t_high")
    if not (low >= 0 and high <= process.t_max):
        raise ValueError(
            f"{name}: interval is {interval}, outside the process's times [0, {process.t_max:g}]; it is given in the "
            "time of the process (process.t_of_lam turns log-SNR into it)"
        )
    return np.asarray(low, np.float64), np.asarray(high, np.float64)


def check_number(value: Any, name: str, low: float, high: float) -> None:
    """ValueError for a plain number outside [low, high] or NaN; arrays pass (their values may be traced)."""
    if isinstance(value, (int, float)) and not low <= value <= high:
        raise ValueError(f"{name} is {value}; expected a number in [{low:g}, {high:g}]")


def as_rule(fn: Callable[..., Any]) -> Partial:
    return fn if isinstance(fn, Partial) else Partial(fn)


@dataclass(frozen=True)
class _Rule:
    process: Process
    own: str
    kind: str

    def __call__(self, first: Denoiser, evaluate: Partial, rule: Partial, span: Any, x: PyTree, t: Any, carry: Any):
        def guided(carry: Any) -> Any:
            outs, carry = evaluate((x,) * len(carry), t, carry)
            return rule(x, t, outs), carry

        if span is None:
            return guided(carry)

        def alone(carry: Any) -> Any:
            out, mine = first.apply(x, t, carry[0])
            out = convert(self.process, x, t, cast_like(out, x), self.own, self.kind)
            return out, (mine, *carry[1:])

        low, high = (v.astype(t.dtype) for v in span)
        inside = (low < t) & (t <= high)
        if t.size == 1:
            return jax.lax.cond(inside.reshape(()), guided, alone, carry)
        (out, carry), (plain, _) = guided(carry), alone(carry)
        return jax.tree.map(lambda a, b: jnp.where(inside, a, b), out, plain), carry


@dataclass(frozen=True)
class _Evaluate:
    """One call a group of denoisers; outputs in the order of the denoisers, converted to `kind`."""

    process: Process
    kind: str
    groups: tuple[tuple[int, ...], ...]
    predictions: tuple[str, ...]

    def __call__(self, calls: tuple[Any, ...], xs: tuple[PyTree, ...], t: Any, carry: tuple[Any, ...]) -> Any:
        outs: list[Any] = [None] * len(xs)
        carries = list(carry)
        for group, call in zip(self.groups, calls, strict=True):
            if len(group) == 1:
                i = group[0]
                outs[i], carries[i] = call(xs[i], t, carry[i])
            else:
                for i, out in zip(group, call(tuple(xs[i] for i in group), t), strict=True):
                    outs[i] = out
        convert_one = lambda x, out, kind: convert(self.process, x, t, cast_like(out, x), kind, self.kind)
        return tuple(map(convert_one, xs, outs, self.predictions)), tuple(carries)


def _init(inits: tuple[Partial, ...], x: PyTree) -> tuple[PyTree, ...]:
    return tuple(init(x) for init in inits)


def _one_network(a: Denoiser, b: Denoiser) -> bool:
    """The same lifted function with the same parameters, but for the values of `cond`."""
    f, g = a.apply, b.apply
    if not (isinstance(f, Partial) and isinstance(g, Partial) and f.func is g.func is _call):
        return False
    (leaves_a, tree_a), (leaves_b, tree_b) = jax.tree.flatten(f.args[0]), jax.tree.flatten(g.args[0])
    same = tree_a == tree_b and all(p is q for p, q in zip(leaves_a, leaves_b, strict=True))
    conds = jax.tree.structure(f.args[1]), jax.tree.structure(g.args[1])
    return same and a.prediction == b.prediction and f.args[1] is not None and conds[0] == conds[1]


def _group(members: list[Denoiser]) -> Any:
    if len(members) == 1:
        return members[0].apply
    return Partial(_as_one_batch, members[0].apply.args[0], tuple(d.apply.args[1] for d in members))  # type: ignore


def _as_one_batch(bound: Partial, conds: tuple[PyTree, ...], xs: tuple[PyTree, ...], t: Any) -> list[PyTree]:
    n = jax.tree.leaves(xs[0])[0].shape[0]
    join = lambda *arrays: jnp.concatenate(arrays)
    varies = t.ndim == jax.tree.leaves(xs[0])[0].ndim and t.shape[0] > 1
    time = jnp.concatenate([t] * len(xs)) if varies else t
    rows = lambda c: jnp.broadcast_to(c, (n, *jnp.shape(c)[1:]))  # a condition of batch 1 is everybody's
    cond = jax.tree.map(join, *(jax.tree.map(lambda c: rows(jnp.asarray(c)), c) for c in conds))
    batch = jax.tree.map(join, *xs)
    out = cast_like(bound(batch, time, cond), batch)
    return [jax.tree.map(lambda a, i=i: a[i * n : (i + 1) * n], out) for i in range(len(xs))]
