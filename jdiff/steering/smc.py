"""Sequential Monte Carlo around any Stepper: Stepper -> Stepper. `running` has `run` and `sample`.

Particles are the batch: n of them in each of `groups` independent groups (a group a prompt), batch = groups * n. A
step's log-weight is the potential's, plus `log_w` of the Stepper's own info where it has one (Feynman-Kac correctors,
guided proposals). Weights accumulate until a group is resampled, and resampling gathers the WHOLE state (registers,
carry, memory): a multistep solver whose history is not gathered with its sample is wrong.

The published FK-steering code drops the weights of steps at which it does not resample, and clamps them; here they
accumulate and are exact (Naesseth, Lindsten and Schön 2019, sections 1.2 and 2).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Integer, PyTree

from jdiff import execute
from jdiff.steering import resampling


class Step(NamedTuple):
    """What a potential sees of step k (1 ..): the row, the state before and after, and the step's info."""

    k: Any
    row: Any
    before: Any
    info: Any  # of a tableau: x, the point evaluated, and outputs, the x0 predictions there
    after: Any
    at: Any  # () bool: resampling is allowed after this step, and so a reward is worth its price
    last: Any  # () bool: the sample is ready in `after`


class Potential(NamedTuple):
    """`init(x) -> memory` and `weigh(key, step, memory) -> (log increment (batch,), memory)`, both pure.

    memory: a pytree with the batch in front; it is resampled with the particles. Wrap functions that hold arrays in
    `jax.tree_util.Partial`, so that other values compile nothing.
    """

    init: Callable[[PyTree], PyTree]
    weigh: Callable[[Array, Step, PyTree], tuple[Float[Array, " batch"], PyTree]]


def _nothing(x: PyTree) -> tuple[()]:
    return ()


def _no_weight(key: Array, step: Step, memory: PyTree) -> tuple[Array, PyTree]:
    return jnp.zeros(jax.tree.leaves(step.after.x)[0].shape[0], jnp.float32), memory


NONE = Potential(Partial(_nothing), Partial(_no_weight))  # the Stepper's own weights alone


class Particles(NamedTuple):
    """The state: the Stepper's own, the potential's memory, and per group log-weights, the log normaliser so far, each
    particle's ancestor at the start, the number of times that the group was resampled and the weights' relative
    variance, over n, summed over those times."""

    inner: Any
    memory: PyTree
    log_w: Float[Array, "groups n"]
    log_z: Float[Array, " groups"]
    eve: Integer[Array, "groups n"]
    times: Integer[Array, " groups"]
    spread: Float[Array, " groups"]

    @property
    def x(self) -> PyTree:
        return self.inner.x


class Info(NamedTuple):
    """Of each step and group: effective sample size before resampling, whether it was resampled, the share of its
    particles that survived (`acceptance`; 1 where it was not), ancestors within the group, the accumulated
    log-weights before resampling, what the step added to them, and with `trajectory` the particles before it."""

    ess: Float[Array, "*steps groups"]
    resampled: Bool[Array, "*steps groups"]
    acceptance: Float[Array, "*steps groups"]
    ancestors: Integer[Array, "*steps groups n"]
    log_w: Float[Array, "*steps groups n"]
    increment: Float[Array, "*steps groups n"]
    x: PyTree = ()


def gather(state: PyTree, ancestors: Integer[Array, "groups n"]) -> PyTree:
    """Every leaf of the state at the ancestors: particle axis first, groups one after another."""
    groups, n = ancestors.shape
    flat = (ancestors + (jnp.arange(groups) * n)[:, None].astype(ancestors.dtype)).ravel()
    return jax.tree.map(lambda a: jnp.take(a, flat, axis=0), state)


def smc(
    stepper: execute.Stepper,
    potential: Potential = NONE,
    *,
    threshold: Any = 0.5,
    scheme: str = "systematic",
    groups: int = 1,
    share: float = 1.0,
    shards: int = 1,
    move: Callable[[PyTree, Array], PyTree] = gather,
    trajectory: bool = False,
) -> execute.Stepper:
    """The Stepper with weights and resampling. Its rows are (row, at, last, k), the last three with the steps in front.

    threshold: resample a group when its effective sample size falls below threshold * n, at rows whose `at` is true (at
    the last such row whenever the weights differ).
    `move(state, ancestors)` gathers; `share` and `shards`: see `resampling.resample`.
    """

    def init(key: Array | None, x: PyTree) -> Particles:
        n = jax.tree.leaves(x)[0].shape[0] // groups
        log_w, log_z = jnp.zeros((groups, n), jnp.float32), jnp.zeros(groups, jnp.float32)
        times = jnp.zeros(groups, jnp.int32)
        return Particles(stepper.init(key, x), potential.init(x), log_w, log_z, _places(log_w), times, log_z)

    def step(key: Array | None, state: Particles, row: Any) -> tuple[Particles, Info]:
        row, at, last, k = row
        weigh, draw = (jax.random.fold_in(execute._key(key), 1 << 20 | j) for j in (0, 1))  # apart from the solver's
        after, info = stepper.step(key, state.inner, row)
        increment, memory = potential.weigh(weigh, Step(k, row, state.inner, info, after, at, last), state.memory)
        increment = increment + getattr(info, "log_w", 0.0)
        increment = increment.astype(jnp.float32).reshape(state.log_w.shape)
        log_w = state.log_w + increment
        size = resampling.ess(log_w)
        n = log_w.shape[1]
        now = at & ((size < threshold * n) | (last & (size < (1 - 1e-4) * n)))  # at the end whatever the threshold

        def resampled(_: None) -> Any:
            chosen, after_w = resampling.resample(draw, log_w, scheme, share, shards)
            chosen = jnp.where(now[:, None], chosen, _places(log_w))
            eve = jnp.take_along_axis(state.eve, chosen, 1)
            return move((after, memory), chosen), chosen, jnp.where(now[:, None], after_w, log_w), eve

        def kept(_: None) -> Any:
            return (after, memory), _places(log_w), log_w, state.eve

        (inner, memory), chosen, new_w, eve = jax.lax.cond(now.any(), resampled, kept, None)
        factor = jnp.where(now, resampling.log_mean(new_w), 0.0)  # from the weights into the normaliser
        survived = jax.vmap(lambda a: jnp.zeros(a.shape, jnp.float32).at[a].set(1.0).mean())(chosen)
        log_z, times = state.log_z + factor, state.times + now.astype(jnp.int32)
        spread = state.spread + jnp.where(now, 1 / size - 1 / n, 0.0)
        particles = Particles(inner, memory, new_w - factor[:, None], log_z, eve, times, spread)
        seen = after.x if trajectory else ()
        return particles, Info(size, now, survived, chosen, log_w, increment, seen)

    return execute.Stepper(init, step)


def _places(like: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(like.shape[1], dtype=jnp.int32), like.shape)
