"""Feynman-Kac correctors: weighted samples of prod_i p_i^b_i exp(U) (Skreta et al. 2025, arXiv 2503.02819).

At every time the target is pi_t = prod_i p_{i,t}^b_i exp(U_t), p_{i,t} the noised law of model i. Particles follow

    dz = (v + n/2 grad log pi) dtau + sqrt(n) dW,          d log w = [(d/dtau + v grad) log pi + div v] dtau

for ANY velocity v and ANY noise n >= 0: the part with n leaves pi invariant and so weighs nothing. Here z = x / alpha,
where forward noising is dz = dW of time r = sigma^2 / alpha^2: the linear drift of the process is gone, and with it its
divergence. v = 1/2 sum_i c_i S_i (S the score in z) runs backwards from noise, tau = -r, and the weight becomes

    d log w = 1/2 [<S_c, S_b> - sum_i b_i |S_i|^2 + div(S_c - S_b)] dtau + dU (along v),      S_b = sum_i b_i S_i.

c = b, the default, needs no divergence: annealing weighs b (b - 1) / 2 |S|^2, geometric means and guidance
b (b - 1) / 2 |S_1 - S_2|^2, products <S_1, S_2>, as published. (The paper's f and div f terms, for x instead of z,
change the normalising constant alone.) c = b / sum(b) keeps the weights of a pure-noise law constant, whatever b, but
needs a divergence.

log Z is that of int prod_i p_i(x)^b_i exp(U(x)) dx at the grid's end, of densities of x: the start is a draw of
N(0, sigma^2 / sum(b)), the prior's power, whose constant is known and enters with the first weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float

from jdiff import execute, noise
from jdiff.denoiser import Denoiser
from jdiff.predict import array_of, model_time, wide
from jdiff.steering.corrector_rows import Rows, rows
from jdiff.steering.fk import reward_of
from jdiff.steering.running import Result, run
from jdiff.steering.together import Together, check_divergence, combine, inner, probes, together


class Info(NamedTuple):
    """The point evaluated, the x0 prediction there (sum_i b_i D_i over sum b), and the log-weight of the step."""

    x: Array
    outputs: tuple[Array, ...]
    log_w: Float[Array, " batch"]


@dataclass(frozen=True)
class Corrector:
    """A target and the way to it; made by `product`, `anneal`, `geometric`, `corrected_cfg` and `tilt`."""

    models: Together
    powers: tuple[float, ...]
    velocity: tuple[float, ...]
    noise: Any
    order: int
    divergence: str
    probes: int
    reward: Callable[[Array], Any] | None
    strength: Any
    on: str
    as_published: bool

    def start(self, x: Array) -> Array:
        """Noise of the process's prior as a draw of the prior's power: divided by sqrt(sum b)."""
        return x / jnp.asarray(np.sqrt(sum(self.powers)), x.dtype)

    def rows(self, times: Any, d: int) -> Rows:
        """The rows over a time grid for samples of d elements: float64, on the host."""
        return rows(self.models.process, times, d, self)

    def stepper(self) -> execute.Stepper:
        """The Stepper whose info carries `log_w`: `steering.run(stepper, rows, corrector.start(x), key)`."""
        reward = None if self.reward is None else Partial(self.reward)
        return _stepper(self.models, reward, *self.switches)

    @property
    def switches(self) -> tuple[str | None, int, int, str, bool]:
        """What its program is compiled for: which divergence, if it needs one, probes, order, on, as_published."""
        divergence = self.divergence if self.velocity != self.powers else None
        return divergence, self.probes, self.order, self.on, self.as_published


def product(
    models: Sequence[Denoiser], powers: Sequence[float] | None = None, *, noise: Any = 1.0,
    velocity: Sequence[float] | None = None, order: int = 1, divergence: str = "exact", probes: int = 1,
    reward: Callable[[Array], Any] | None = None, strength: Any = 1.0, on: str = "x", as_published: bool = False,
) -> Corrector:  # fmt: skip
    """prod_i p_i^b_i exp(U), the general form: product of experts by default (all b_i = 1).

    powers      b; their sum must be positive, single ones may be negative
    noise       n >= 0, a number or one a step: 1 is the reverse SDE, 0 an ODE. The target does not depend on it
    velocity    c of v = 1/2 sum c_i S_i; default b. Another needs the divergence of a difference of scores, "exact"
                (d Jacobian-vector products) or "hutchinson" (`probes` of them; biased by a term of the step size)
    order       1: x0 predictions held over a step (n = 1 and one model: DDPM's ancestral step, n = 0: DDIM's);
                2: Heun's method on them, two evaluations a step. The step into sigma = 0 is of order 1. Weights:
                trapezoid
    reward      x (batch, ...) -> (batch,), differentiable: U_t = beta_t r(x_t), or with on="x0" beta_t r(x0 prediction)
    strength    beta at the end, rising as alpha^2 / (alpha^2 + sigma^2); or (n + 1,), beta at each time
    as_published  Euler-Maruyama in sigma, each step's weights less their mean and clipped to [-1, 1] (the official
                image code): biased, and log Z means nothing

    ValueError for models on different processes and whatever else does not fit.
    """
    pair = together(models, "corrector")
    b = tuple(float(v) for v in (np.ones(len(pair)) if powers is None else powers))
    c = b if velocity is None else tuple(float(v) for v in velocity)
    for what, values in (("powers", b), ("velocity", c)):
        if len(values) != len(pair) or not np.isfinite(values).all():
            raise ValueError(f"corrector: {what} are {values} for {len(pair)} models; expected one finite number each")
    if not sum(b) > 0:
        raise ValueError(f"corrector: powers {b} sum to {sum(b):g}; expected a positive sum, or no law is left of it")
    if not (np.isfinite(noise).all() and np.min(noise) >= 0):
        raise ValueError(f"corrector: noise is {noise}; expected n >= 0, a number or one a step")
    if order not in (1, 2):
        raise ValueError(f"corrector: order is {order}; expected 1 or 2")
    check_divergence("corrector", divergence, probes)
    if on not in ("x", "x0"):
        raise ValueError(f"corrector: on is {on!r}; expected 'x', the noised sample, or 'x0', its prediction")
    if as_published and (order != 1 or reward is not None):
        raise ValueError("corrector: as_published is the Euler step of the official image code: order=1, no reward")
    return Corrector(pair, b, c, noise, order, divergence, probes, reward, strength, on, as_published)


def anneal(model: Denoiser, beta: float, form: str = "target", **options: Any) -> Corrector:
    """p^beta. form: "target", noise 1 around the target's score, or "tempered", noise 1 / beta, both published; or
    "flow", noise 1 and the velocity of p itself, whose weights vary least and need a divergence. Options of `product`.
    """
    forms = {"target": (1.0, beta), "tempered": (1.0 / beta if beta else 1.0, beta), "flow": (1.0, 1.0)}
    if form not in forms:
        raise ValueError(f"anneal: form is {form!r}; expected one of {', '.join(forms)}")
    if not beta > 0:
        raise ValueError(f"anneal: beta is {beta}; expected a positive power")
    n, c = forms[form]
    return product([model], [beta], **{"noise": n, "velocity": [c], **options})


def geometric(models: Sequence[Denoiser], powers: Sequence[float], **options: Any) -> Corrector:
    """prod p_i^b_i with sum b = 1: the geometric mean. Options of `product`."""
    if abs(sum(powers) - 1.0) > 1e-6:
        raise ValueError(f"geometric: powers {tuple(powers)} sum to {sum(powers):g}; expected 1 (or use product)")
    return product(models, powers, **options)


def corrected_cfg(denoiser: Denoiser, unconditional: Denoiser, scale: float, **options: Any) -> Corrector:
    """p_u^(1 - scale) p_c^scale: what classifier-free guidance means to sample, and without weights does not."""
    return geometric([unconditional, denoiser], [1.0 - scale, scale], **options)


def tilt(model: Denoiser, reward: Callable[[Array], Any], strength: Any = 1.0, **options: Any) -> Corrector:
    """p exp(strength r). Its log Z is log E_p exp(strength r). Options of `product`: `on`, `noise`, `order`."""
    return product([model], [1.0], reward=reward, strength=strength, **options)


def correct(
    corrector: Corrector, times: Any, x: Array, key: Array, *, window: tuple[float, float] | None = None,
    at: Sequence[int] | None = None, groups: int = 1, threshold: float = 0.5, scheme: str = "systematic",
    share: float = 1.0, final: bool = True, mesh: Mesh | None = None, shards: int | None = None,
    trajectory: bool = False,
) -> Result:  # fmt: skip
    """Sample the corrector's target: one XLA program, in which powers, noise, times and strength are arguments.

    times    (n + 1,) from t_max, whose law is taken to be the prior's; where they end above 0, one more evaluation
             completes the weights. Out of alpha = 0 the first step is deterministic
    x        (groups * n, ...) noise of the process's prior, `process.prior(key, shape)`
    window   (t_low, t_high): resample after steps that end in it alone; weights accumulate outside
    Other options as in `steering.sample`. The plain uncorrected sampler is the same with at=(), final=False, weights
    not looked at. Raises what `steering.sample` raises.
    """
    x = array_of(x, "correct")
    rows = corrector.rows(times, x[0].size)
    t = np.asarray(times, np.float64)
    if window is not None:
        if at is not None or not 0 <= window[0] < window[1]:
            raise ValueError(f"correct: window is {window}, at is {at}; expected (t_low, t_high), and one of the two")
        at = [k for k in range(1, len(t)) if window[0] <= t[k] <= window[1]]
    over = jax.tree.map(lambda a: jnp.asarray(a, wide(x.dtype)), rows)
    reward = None if corrector.reward is None else Partial(corrector.reward)
    make = Partial(_Make(*corrector.switches), corrector.models, reward)
    options: dict[str, Any] = {"groups": groups, "threshold": threshold, "scheme": scheme, "share": share, "at": at}
    options |= {"final": final, "mesh": mesh, "shards": shards, "trajectory": trajectory, "times": rows.t}
    return run(make, over, corrector.start(x), key, **options)


@dataclass(frozen=True)
class _Make:
    """The Stepper of a corrector, for `run`; equal ones compare equal, so nothing is compiled twice."""

    divergence: str | None
    probes: int
    order: int
    on: str
    as_published: bool

    def __call__(self, models: Together, reward: Partial | None) -> execute.Stepper:
        return _stepper(models, reward, self.divergence, self.probes, self.order, self.on, self.as_published)


def _stepper(models, reward, divergence, number, order, on, as_published) -> execute.Stepper:
    def worth(x: Array, t: Array, carry: Any, row: Rows) -> Array:
        if on == "x0":
            x0 = models.apply(x, t, carry)[0]
            x = combine(row.powers / jnp.sum(row.powers), x0)
        return reward_of(reward, x).astype(x.dtype)

    def pull(x: Array, t: Array, carry: Any, row: Rows, tilt: Array) -> Array:
        """The reward's part of the step, (1, batch, ...): (sigma^2 / alpha) grad U."""
        if reward is None:
            return jnp.zeros((1, *x.shape), x.dtype)
        return tilt * jax.grad(lambda x: jnp.sum(worth(x, t, carry, row)))(x)[None]

    def look(key: Array | None, x: Array, t: Array, carry: Any, row: Rows) -> tuple[Any, Any]:
        """What the models say, and div(eps_c - eps_b)."""
        if divergence is None:
            return models.apply(x, t, carry), jnp.zeros((), x.dtype)
        both = lambda x: (combine(row.velocity - row.powers, (out := models.apply(x, t, carry))[1]), out)
        _, slope, out = jax.linearize(both, x, has_aux=True)
        e = probes(jax.random.fold_in(execute._key(key), 1 << 20), x, divergence, number)
        return out, jnp.sum(jax.vmap(lambda e: inner(e, slope(e)))(e), 0)

    def step(key: Array | None, state: execute.State, row: Rows) -> tuple[execute.State, Info]:
        x, t, t1 = state.x, model_time(row.t, state.x), model_time(row.t1, state.x)
        (D, eps, carry), divergent = look(key, x, t, state.carry, row)
        x0 = jnp.concatenate([D, pull(x, t, state.carry, row, row.tilt[0])])
        new = row.keep * x + combine(row.gain, x0) + row.noise * noise.normal(execute._key(key), x)
        if order == 2:
            again, _, after = models.apply(new, t1, carry)
            again = jnp.concatenate([again, pull(new, t1, carry, row, row.tilt[1])])
            new, carry = new + combine(row.heun, again - x0), after
        b, c = row.powers, row.velocity
        # d log w / d lam: S = -eps / rho, and dr = -2 r d lam
        rate = inner(combine(c, eps), combine(b, eps)) - combine(b, jax.vmap(inner)(eps, eps)) - row.sigma * divergent
        log_w = row.share * rate
        if as_published:
            log_w = jnp.clip(log_w - jnp.mean(log_w), -1.0, 1.0)
        if reward is not None:
            going = row.along[0] * x - row.sigma * combine(c, eps)  # dx / d lam along v
            f = lambda x, t: worth(x, t, state.carry, row)
            r, slope = jax.jvp(f, (x, t), (going, row.along[1]))
            log_w += row.worth[0] * r + row.worth[1] * slope + row.worth[2] * reward_of(reward, new).astype(x.dtype)
        seen = combine(b / jnp.sum(b), D)
        return execute.State((new,), carry), Info(x, (seen,), (log_w + row.offset).astype(jnp.float32))

    return execute.Stepper(lambda key, x: execute.State((x,), models.init(x)), step)
