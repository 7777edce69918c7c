"""Running particles: `run` for any Stepper, `sample` for a tableau; what is checked before, and said after."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float, Integer, PyTree

from jdiff import execute
from jdiff.denoiser import Denoiser
from jdiff.steering import meshes, resampling
from jdiff.steering.smc import NONE, Info, Particles, Potential, gather, smc
from jdiff.tableau import Tableau


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


def run(
    stepper: execute.Stepper | Partial,
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

    stepper: a Stepper, or a `Partial` of a function and arrays that makes one; then all of it is one compiled program,
    in which the arrays are arguments. A Stepper alone is not jitted: do so yourself. Options are those of `sample`.
    Outside jit, FloatingPointError where a weight is NaN or infinite, or all weights of a group are zero; `times` (K,)
    only serves that message.
    """
    K = jax.tree.leaves(rows)[0].shape[0]
    allowed = _allowed(x, K, groups, threshold, scheme, share, at, final)
    x, where, shards = meshes.place(x, groups, mesh, shards)
    rows = (rows, jnp.asarray(allowed), jnp.arange(K) == K - 1, jnp.arange(1, K + 1))
    how = _How(scheme, groups, float(share), shards, where, trajectory)
    potential = Potential(*(f if isinstance(f, Partial) else Partial(f) for f in potential))
    scan = _program if isinstance(stepper, Partial) else _scan
    return _check(scan(stepper, potential, rows, x, key, jnp.float32(threshold), how), times)


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
    dtype = jax.tree.leaves(x)[0].dtype
    start = [jnp.asarray(a).astype(dtype) for a in (tableau.h0, tableau.c0)]
    stepper = Partial(_Solver(tableau.record.prediction), denoiser, proposal, *start)
    options: dict[str, Any] = {"groups": groups, "threshold": threshold, "scheme": scheme, "share": share, "at": at}
    options |= {"final": final, "mesh": mesh, "shards": shards, "trajectory": trajectory, "times": tableau.t}
    return run(stepper, execute.rows(tableau, dtype), x, key, potential, **options)


@dataclass(frozen=True)
class _Solver:
    """The Stepper of a tableau, its steps drawn from a proposal where there is one."""

    prediction: str

    def __call__(self, denoiser: Denoiser, proposal: Any, h0: Array, c0: Array) -> execute.Stepper:
        base = execute.stepper(denoiser, h0, c0, prediction=self.prediction)
        return base if proposal is None else proposal(base)


class _How(NamedTuple):
    """What a program is compiled for, beside shapes."""

    scheme: str
    groups: int
    share: float
    shards: int
    where: tuple[Mesh, str] | None
    trajectory: bool


def _scan(stepper, potential, rows, x, key, threshold, how: _How) -> Result:
    stepper = stepper() if isinstance(stepper, Partial) else stepper
    move = gather if how.where is None else meshes.exchange(*how.where)
    weighed = smc(
        stepper, potential, threshold=threshold, scheme=how.scheme, groups=how.groups, share=how.share,
        shards=how.shards, move=move, trajectory=how.trajectory,
    )  # fmt: skip
    state, info = execute.run(weighed, rows, x, key)
    log_z = state.log_z + resampling.log_mean(state.log_w)
    error = jax.vmap(_error)(state.log_w, state.eve, state.times, state.spread)
    return Result(state.x, state.log_w, log_z, error, info, state)


_program = jax.jit(_scan, static_argnums=6)


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
