"""Guidance by a gradient: of a classifier, or of any loss of the predicted clean sample.

One hook, `loss_guidance`, and its configurations: `classifier` (with EluCD's calibrations), `dps` and `flowchef`.
A gradient through the network ("full") costs a backward pass of it beside the evaluation; "identity" none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from jdiff.denoiser import Denoiser, cast_like
from jdiff.predict import convert

from .branches import Interval, as_rule, check_interval, check_number
from .schedule import Weight, as_weight, at, at_steps, score_units, step_gain

Loss = Callable[[PyTree], Array]
Jacobian = Literal["full", "identity"]


def loss_guidance(
    denoiser: Denoiser,
    loss: Loss,
    weight: Weight,
    *,
    jacobian: Jacobian = "identity",
    inner: int = 1,
    gain: Weight = 1.0,
    normalize: bool = False,
    interval: Interval | None = None,
) -> Denoiser:
    """The x0 prediction moved down a loss: D' = D - gain weight G, with G a gradient of loss(D), a number a sample.

    loss      loss(x0) -> (batch,); one for all samples would tie them together. Put data into it with
              `jax.tree_util.Partial`, so that other data compile nothing
    weight    in units of x0: a number, an array, a function of t. `guidance.score_units(process, w)` makes it one of
              the score: the energy w loss is then added to -log p
    jacobian  "full": G = d loss(D(x)) / dx, through the network (DPS, Chung et al. 2023)
              "identity": G = d loss(D) / dD, as if dD/dx were 1 (MPGD, He et al. 2024; FlowChef, Patel et al. 2024)
    inner     gradient steps on D, for "identity": D <- D - weight d loss(D) / dD, at no evaluation
    gain      of the whole move; `at_steps(times[:-1], step_gain(process, times))` turns moves of the state after
              DDIM's (or flow Euler's) step into moves of D
    normalize the gradient takes the length of the sample x (EluCD's for EDM)
    interval  (t_low, t_high] in time where it acts; no gradient is computed elsewhere (one time for the batch)

    1 evaluation; "full" adds its backward pass. Predicts x0. ValueError for an unknown jacobian, inner < 1, or more
    than 1 with "full", a loss that is not (batch,).
    """
    if jacobian not in ("full", "identity"):
        raise ValueError(f"loss_guidance: jacobian is {jacobian!r}; expected 'full' or 'identity'")
    if inner < 1 or (inner > 1 and jacobian == "full"):
        raise ValueError(f"loss_guidance: inner is {inner}; expected at least 1, and 1 with jacobian='full'")
    move = _Loss(jacobian, inner, normalize)
    weights = as_weight(weight, "loss_guidance: weight"), as_weight(gain, "loss_guidance: gain")
    span = check_interval(interval, denoiser.process, "loss_guidance")
    return Denoiser(
        denoiser.init, Partial(_Gradient(move), denoiser, as_rule(loss), weights, span), denoiser.process, "x0"
    )


@dataclass(frozen=True)
class _Loss:
    jacobian: str
    inner: int
    normalize: bool

    def __call__(self, denoiser: Denoiser, loss: Partial, weights: Any, x: PyTree, t: Any, carry: PyTree) -> Any:
        weight, gain = weights
        look = lambda x: predict(denoiser, x, t, carry)
        if self.jacobian == "full":
            D, back, carry = jax.vjp(look, x, has_aux=True)
            moved = self._step(weight, back(gradient(loss, D))[0], D, x, t)
        else:
            D, carry = look(x)
            moved = D
            for _ in range(self.inner):
                moved = self._step(weight, gradient(loss, moved), moved, x, t)
        return jax.tree.map(lambda D, m: D + at(gain, t, D) * (m - D), D, moved), carry

    def _step(self, weight: Any, G: PyTree, D: PyTree, x: PyTree, t: Any) -> PyTree:
        def leaf(D: jax.Array, G: jax.Array, x: jax.Array) -> jax.Array:
            if self.normalize:
                norm = lambda v: jnp.sqrt(jnp.sum(v * v, axis=tuple(range(1, v.ndim)), keepdims=True))
                G = G * (norm(x) / jnp.maximum(norm(G), 1e-12))
            return D - at(weight, t, D) * G.astype(D.dtype)

        return jax.tree.map(leaf, D, G, x)


@dataclass(frozen=True)
class _Gradient:
    """A move inside an interval of time, the plain x0 prediction outside."""

    move: Any

    def __call__(self, denoiser: Denoiser, loss: Partial, weights: Any, span: Any, x: PyTree, t: Any, carry: Any):
        moved = lambda carry: self.move(denoiser, loss, weights, x, t, carry)
        if span is None:
            return moved(carry)
        low, high = (v.astype(t.dtype) for v in span)
        inside, plain = (low < t) & (t <= high), lambda carry: predict(denoiser, x, t, carry)
        if t.size == 1:
            return jax.lax.cond(inside.reshape(()), moved, plain, carry)
        (out, carry), (rest, _) = moved(carry), plain(carry)
        return jax.tree.map(lambda a, b: jnp.where(inside, a, b), out, rest), carry


def predict(denoiser: Denoiser, x: PyTree, t: Any, carry: PyTree) -> tuple[PyTree, PyTree]:
    """(x0 prediction, carry)."""
    out, carry = denoiser.apply(x, t, carry)
    return convert(denoiser.process, x, t, cast_like(out, x), denoiser.prediction, "x0"), carry


def gradient(loss: Callable[..., Array], x: PyTree) -> PyTree:
    """Each sample's gradient of its own loss. ValueError for a loss that is not one number a sample."""

    def total(x: PyTree) -> Array:
        each, n = loss(x), jax.tree.leaves(x)[0].shape[0]
        if jnp.shape(each) != (n,):
            raise ValueError(
                f"the loss returned shape {jnp.shape(each)} for {n} samples; expected one number a sample, ({n},)"
            )
        return jnp.sum(each)

    return jax.grad(total)(x)


# --- configurations
def dps(denoiser: Denoiser, loss: Loss, zeta: Weight, times: Any) -> Denoiser:
    """Diffusion posterior sampling (Chung et al. 2023): after DDIM's step, x <- x - zeta d loss(D(x_t)) / dx_t.

    The paper's loss is |y - A x0|, not squared. For `solvers.ddim` on `times`. 1 evaluation and its backward pass.
    """
    return loss_guidance(denoiser, loss, zeta, jacobian="full", gain=_in_state(denoiser, times))


def flowchef(
    denoiser: Denoiser, loss: Loss, rate: Weight, times: Any, *, inner: int = 1, interval: Interval | None = None
) -> Denoiser:
    """FlowChef (Patel et al. 2024, arXiv 2412.00100): x_t <- x_t - rate d loss(D) / dD, `inner` times, then the step.

    The network is skipped by the gradient, and its velocity is kept for the step, so that D = x_t - t v moves with
    x_t. For flow Euler (`solvers.euler`, `ddim`) on `times`. 1 evaluation, no backward pass.
    """
    gain = _in_state(denoiser, times)
    return loss_guidance(denoiser, loss, rate, inner=inner, gain=gain, interval=interval)


def _in_state(denoiser: Denoiser, times: Any) -> Partial:
    t = denoiser.process.check_times(times)
    return at_steps(t[:-1], step_gain(denoiser.process, t))


def classifier(
    denoiser: Denoiser,
    logits: Callable[..., Array],
    labels: Array,
    scale: Weight = 1.0,
    *,
    on: Literal["x", "x0"] = "x",
    jacobian: Jacobian = "identity",
    tau1: float = 1.0,
    tau2: float = 1.0,
    normalize: bool = False,
    interval: Interval | None = None,
) -> Denoiser:
    """Classifier guidance (Dhariwal and Nichol 2021): the score plus scale times the gradient of log p(labels | .).

    logits    on="x": logits(x, t) -> (batch, classes) of a classifier of noised samples; on="x0": logits(x0) of an
              ordinary one, which sees the x0 prediction (EluCD, Ma et al. 2023, arXiv 2310.11311)
    labels    (batch,) integers
    scale     a number, an array or a function of t (`guidance.sine` is EluCD's); 1 is Bayes' rule
    jacobian  on="x0" only: "identity", EluCD's, does not differentiate the network; "full" does
    tau1      log-ratio of joint over tempered marginal: tau1 f_y - log sum_c exp(tau2 f_c), f the logits. 1 and 1 is
    tau2      log-softmax; EluCD's is tau2 = 0.5 (and `softplus(5.0)` for the classifier's ReLU)
    normalize the gradient takes the length of x, and scale is in units of x0 (EluCD's for EDM)

    1 evaluation of the denoiser; "full" adds its backward pass. Predicts x0.
    """
    if on not in ("x", "x0"):
        raise ValueError(f"classifier: on is {on!r}; expected 'x' (a noise-aware classifier) or 'x0'")
    if not callable(logits):
        raise ValueError(f"classifier: logits is {logits!r}; expected a function of the sample that returns logits")
    check_number(tau1, "classifier: tau1", 0.0, 1e6)
    check_number(tau2, "classifier: tau2", 0.0, 1e6)
    p = denoiser.process
    taus = as_weight(float(tau1)), as_weight(float(tau2))
    ratio = Partial(_minus_log_ratio, as_rule(logits), jnp.asarray(labels), taus)
    weight = as_weight(scale, "classifier: scale") if normalize else score_units(p, scale)
    if on == "x0":
        return loss_guidance(denoiser, ratio, weight, jacobian=jacobian, normalize=normalize, interval=interval)
    span = check_interval(interval, p, "classifier")
    move = Partial(_Gradient(_Noised(normalize)), denoiser, ratio, (weight, as_weight(1.0)), span)
    return Denoiser(denoiser.init, move, p, "x0")


def softplus(beta: float) -> Callable[[Array], Array]:
    """EluCD's smooth stand-in for ReLU: log(1 + e^(beta x)) / beta; the paper's beta is 3 to 5."""
    return lambda x: jax.nn.softplus(beta * x) / beta


def _minus_log_ratio(logits: Partial, labels: Array, taus: Any, *args: Any) -> Array:
    f = logits(*args)
    tau1, tau2 = (v.astype(f.dtype) for v in taus)
    chosen = jnp.take_along_axis(f, labels.reshape(-1, 1), 1)[:, 0]
    return jax.nn.logsumexp(tau2 * f, axis=1) - tau1 * chosen


@dataclass(frozen=True)
class _Noised:
    """The gradient at the noised sample itself."""

    normalize: bool

    def __call__(self, denoiser: Denoiser, loss: Partial, weights: Any, x: PyTree, t: Any, carry: PyTree) -> Any:
        D, carry = predict(denoiser, x, t, carry)
        G = gradient(lambda x: loss(x, t), x)
        return _Loss("identity", 1, self.normalize)._step(weights[0], G, D, x, t), carry
