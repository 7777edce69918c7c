"""Sequential Monte Carlo around any Stepper: Stepper -> Stepper, `run` for a Stepper and `sample` for a tableau.

Particles are the batch: n of them in each of `groups` independent groups (a group a prompt), batch = groups * n. A
step's log-weight is the potential's, plus `log_w` of the Stepper's own info where it has one (Feynman-Kac correctors,
guided proposals). Weights accumulate until a group is resampled, and resampling gathers the WHOLE state (registers,
carry, memory): a multistep solver whose history is not gathered with its sample is wrong.

The published FK-steering code drops the weights of steps at which it does not resample, and clamps them; here they
accumulate and are exact (Naesseth, Lindsten and Schön 2019, sections 1.2 and 2).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Integer, PyTree

from jdiff import execute
from jdiff.denoiser import Denoiser
from jdiff.steering import meshes, resampling
from jdiff.tableau import Tableau


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


class Result(NamedTuple):
    """x (batch, ...), its log-weights (zero after a last resampling), the log normalising constant of each group with
    its standard error (see `_error`), `info` stacked over steps, and the last state."""

    x: PyTree
    log_w: Float[Array, "groups n"]
    log_z: Float[Array, " groups"]
    log_z_error: Float[Array, " groups"]
    info: Info
    state: Particles

    def lineage(self) -> Integer[Array, "steps_1 groups n"]:
        """Where each final particle's forebears were: row 0 at the start, row k after step k (K + 1 rows)."""
        n = self.log_w.shape[-1]
        here = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), self.log_w.shape)
        back = lambda child, a: (parent := jnp.take_along_axis(a, child, -1), parent)
        _, rows = jax.lax.scan(back, here, self.info.ancestors, reverse=True)
        return jnp.concatenate([rows, here[None]])


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


def run(
    stepper: execute.Stepper,
    rows: PyTree,
    x: PyTree,
    key: Array,
    potential: Potential = NONE,
    *,
    groups: int = 1,
    threshold: float = 0.5,
    scheme: str = "systematic",
    share: float = 1.0,
    at: Sequence[int] | None = None,
    final: bool = True,
    mesh: Mesh | None = None,
    shards: int | None = None,
    trajectory: bool = False,
    times: Any = None,
) -> Result:
    """Run any Stepper with weights and resampling over `rows` (steps in front), from x (groups * n, ...).

    Options are those of `sample`. Not jitted, and no look at the weights under jit: outside, FloatingPointError where
    a weight is NaN or infinite, or all weights of a group are zero. `times` (K,) only serves that message.
    """
    K = jax.tree.leaves(rows)[0].shape[0]
    allowed = _allowed(x, K, groups, threshold, scheme, share, at, final)
    x, where, shards = meshes.place(x, groups, mesh, shards)
    rows = (rows, jnp.asarray(allowed), jnp.arange(K) == K - 1, jnp.arange(1, K + 1))
    how = (scheme, groups, share, shards, where, trajectory)
    out = _scan(stepper, _partial(potential), rows, x, key, jnp.float32(threshold), how)
    return _check(out, times)


def sample(
    denoiser: Denoiser,
    tableau: Tableau,
    x: PyTree,
    key: Array,
    potential: Potential = NONE,
    *,
    proposal: Any = None,
    groups: int = 1,
    threshold: float = 0.5,
    scheme: str = "systematic",
    share: float = 1.0,
    at: Sequence[int] | None = None,
    final: bool = True,
    mesh: Mesh | None = None,
    shards: int | None = None,
    trajectory: bool = False,
) -> Result:
    """Sample with weights and resampling: `jdiff.sample` with a potential, one XLA program.

    x          (groups * n, ...) noise; group g holds the particles g n .. (g + 1) n - 1
    proposal   `steering.guided(..)`: steps drawn from another law than the solver's; its weights correct for it
    threshold  of the effective sample size over n, in (0, 1]; 1 resamples at every step that `at` allows
    at         evaluations (1 .. K) after which resampling is allowed, and intermediate rewards are computed; default:
               after all but the last
    final      resample at the end, whatever the threshold, to equally weighted samples; otherwise `log_w` has weights
    scheme     "systematic", "stratified", "residual" or "multinomial"; `share` < 1: partial resampling (see `resample`)

    mesh       lay the particles over the mesh's first axis; then resampling moves only those that must (`exchange`).
               Without it, where x is already split over an axis, that one
    shards     devices that a group lies over, found from the mesh; the same number on one device gives the same samples

    trajectory keep the particles of each step, in `info.x` (K, batch, ...): for pictures

    log_z is the log of the estimated normalising constant, the weights that are left included.
    Raises ValueError for a bad threshold, scheme, group size or step, before compilation; FloatingPointError where all
    weights of a group are zero or one is NaN or infinite (step and particle named), when called outside jit.
    """
    x = execute._checked(denoiser, tableau, x, key)
    allowed = _allowed(x, tableau.nfe, groups, threshold, scheme, share, at, final)
    x, where, shards = meshes.place(x, groups, mesh, shards)
    dtype, K = jax.tree.leaves(x)[0].dtype, tableau.nfe
    start = [jnp.asarray(a).astype(dtype) for a in (tableau.h0, tableau.c0)]
    rows = (execute.rows(tableau, dtype), jnp.asarray(allowed), jnp.arange(K) == K - 1, jnp.arange(1, K + 1))
    how, kind = (scheme, groups, float(share), shards, where, trajectory), tableau.record.prediction
    out = _run(denoiser, proposal, _partial(potential), rows, *start, x, key, jnp.float32(threshold), kind, how)
    return _check(out, tableau.t)


def _partial(potential: Potential) -> Potential:
    return Potential(*(f if isinstance(f, Partial) else Partial(f) for f in potential))


@functools.partial(jax.jit, static_argnums=(9, 10))
def _run(denoiser, proposal, potential, rows, h0, c0, x, key, threshold, kind, how):
    base = execute.stepper(denoiser, h0, c0, prediction=kind)
    base = base if proposal is None else proposal(base)
    return _scan(base, potential, rows, x, key, threshold, how)


def _scan(stepper, potential, rows, x, key, threshold, how) -> Result:
    scheme, groups, share, shards, where, trajectory = how
    move = gather if where is None else meshes.exchange(*where)
    options: dict[str, Any] = {"threshold": threshold, "scheme": scheme, "groups": groups, "share": share}
    options |= {"shards": shards, "move": move, "trajectory": trajectory}
    state, info = execute.run(smc(stepper, potential, **options), rows, x, key)
    log_z = state.log_z + resampling.log_mean(state.log_w)
    return Result(
        state.x, state.log_w, log_z, jax.vmap(_error)(state.log_w, state.eve, state.times, state.spread), info, state
    )


def _error(log_w: Array, eve: Array, times: Array, spread: Array) -> Array:
    """Standard error of one group's log Z: the root of the larger of two estimates of Z's relative variance.

    From the ancestry, 1 - (n / (n - 1))^(r + 1) (1 - sum over families W^2), r resamplings (Lee and Whiteley 2018):
    unbiased for multinomial resampling, too small for the other schemes. And the sum over resamplings, and the end, of
    the weights' relative variance over n, which takes what came between to be independent.
    """
    n = log_w.shape[0]
    families = jnp.zeros(n, jnp.float32).at[eve].add(jax.nn.softmax(log_w))
    inflate = (n / (n - 1.0)) ** (times + 1).astype(jnp.float32)
    ancestry = 1.0 - inflate * (1.0 - jnp.sum(families**2))
    return jnp.sqrt(jnp.maximum(ancestry, spread + 1 / resampling.ess(log_w) - 1 / n))


def _allowed(x, K, groups, threshold, scheme, share, at, final) -> np.ndarray:
    batch = jax.tree.leaves(x)[0].shape[0]
    if not isinstance(threshold, jax.Array) and not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a share of the particles, in (0, 1]")
    if scheme not in resampling.SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; expected one of {', '.join(resampling.SCHEMES)}")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; expected the share of particles to resample, in (0, 1]")
    if groups < 1 or batch % groups or batch // groups < 2:
        raise ValueError(f"{batch} particles in {groups} groups; expected at least two in each, and as many in each")
    at = range(1, K) if at is None else at
    if any(not 1 <= k <= K for k in at):
        raise ValueError(f"at is {list(at)}; expected evaluations between 1 and {K}")
    allowed = np.isin(np.arange(1, K + 1), list(at))
    allowed[-1] |= final
    return allowed


def _check(out: Result, times: Any) -> Result:
    info = out.info
    if isinstance(info.log_w, Tracer):
        return out
    increment, log_w = np.asarray(info.increment), np.asarray(info.log_w)
    wrong = np.isnan(increment) | np.isposinf(increment)
    dead = ~(log_w > -np.inf).any(-1)
    if not wrong.any() and not dead.any():
        return out
    k = int(np.argmax(wrong.reshape(len(wrong), -1).any(-1) | dead.any(-1)))
    where = f"at step {k + 1} of {len(increment)}" + ("" if times is None else f" (t = {np.asarray(times)[k]:.4g})")
    if wrong[k].any():
        g, i = (int(v) for v in np.argwhere(np.asarray(wrong[k]))[0])
        raise FloatingPointError(
            f"steering: {where} particle {i} of group {g} got the log-weight {increment[k, g, i]}; a reward (or the "
            "model) is NaN or infinite there: return finite rewards, for example a large negative number for the worst"
        )
    g = int(np.argmax(np.asarray(dead)[k]))
    raise FloatingPointError(
        f"steering: {where} all weights of group {g} are zero; lower lambda, take more particles, or give the worst "
        "samples a finite reward"
    )
