"""A denoiser is an (init, apply) pair, as an optax transformation is: what it remembers lives in its carry.

    carry = denoiser.init(x)
    output, carry = denoiser.apply(x, t, carry)

It knows its process and what it predicts. It is a pytree: arrays that it holds (parameters, labels, a guidance
scale) are leaves and so arguments of the compiled program; functions, process and prediction kind are static.
Guidance, caches and thresholds are functions Denoiser -> Denoiser.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import PyTree

from jdiff.predict import check_kind, convert, model_time
from jdiff.process import Process, Time
from jdiff.process.base import reciprocal


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Denoiser:
    """The pair, its process and its prediction kind. Build one with `jdiff.denoiser`."""

    init: Callable[[PyTree], PyTree]
    apply: Callable[[PyTree, Time, PyTree], tuple[PyTree, PyTree]]
    process: Process = field(metadata={"static": True})
    prediction: str = field(metadata={"static": True})

    def __post_init__(self) -> None:
        for name in ("init", "apply"):  # plain functions become pytrees, so that a Denoiser is one
            fn = getattr(self, name)
            if callable(fn) and not isinstance(fn, Partial):
                object.__setattr__(self, name, Partial(fn))

    def with_cond(self, cond: PyTree | None) -> "Denoiser":
        """The same lifted function with another `cond`. TypeError for a denoiser that `jdiff.denoiser` did not make."""
        if not isinstance(self.apply, Partial) or self.apply.func is not _call:
            raise TypeError("with_cond: only a function or module lifted by jdiff.denoiser has a condition to replace")
        return replace(self, apply=Partial(_call, self.apply.args[0], cond))

    def __call__(self, x: PyTree, t: Time, kind: str = "x0") -> PyTree:
        """The prediction at (x, t) as `kind`, with a fresh carry: one look at the model, outside any sampler.

        t: a scalar, or what broadcasts against every array of x, such as (batch, 1, 1, 1). ValueError for any other.
        """
        t = model_time(t, x)
        if not isinstance(t, dict):
            for leaf in jax.tree.leaves(x):
                pairs = zip(t.shape[::-1], leaf.shape[::-1], strict=False)
                if t.ndim > leaf.ndim or any(n not in (1, m) for n, m in pairs):
                    raise ValueError(
                        f"the time has shape {t.shape}, which does not broadcast against a sample of shape "
                        f"{leaf.shape}; give a scalar, or for a time a sample {(len(leaf), *[1] * (leaf.ndim - 1))}"
                    )
        output, _ = self.apply(x, t, self.init(x))
        return convert(self.process, x, t, cast_like(output, x), self.prediction, kind)


def denoiser(
    fn: Callable[..., PyTree],
    process: Process,
    prediction: str,
    *,
    params: PyTree | None = None,
    cond: PyTree | None = None,
) -> Denoiser:
    """Lift a function, or a Flax NNX module, to a Denoiser.

    fn(x, t), or fn(params, x, t) where `params` is given, or with `cond` (labels, embeddings; batch axis first) as
    one more last argument. x is the sample, batch axis first; t is the model time, float32, a scalar () in ordinary
    sampling, otherwise an array that broadcasts against x. fn returns what `prediction` names, shaped like x.
    An NNX module is split here, so that samplers see arrays only; `cond` may be a dict of its keyword arguments.

    Pass parameters through `params`: an array that `fn` merely closes over becomes a constant of the program, and
    new values mean a new compilation. Raises ValueError for an unknown prediction, TypeError for a bad fn or process.
    """
    check_kind(prediction)
    if not isinstance(process, Process):
        raise TypeError(f"process is {process!r}; expected a jdiff.process.Process such as jdiff.process.vp_linear()")
    if not callable(fn):
        raise TypeError(f"fn is {fn!r}; expected a function fn(x, t) or a Flax NNX module")
    if "flax.nnx" in sys.modules and isinstance(fn, (nnx := sys.modules["flax.nnx"]).Module):
        if params is not None:
            raise TypeError("an NNX module carries its own parameters: pass params=None, or a function and its params")
        graph, state = nnx.split(fn)
        fn, params = _ModuleCall(graph), state
    bound = Partial(fn) if params is None else Partial(fn, params)
    return Denoiser(_no_carry, Partial(_call, bound, cond), process, prediction)


@dataclass(frozen=True)
class _ModuleCall:
    """An NNX graph as a function of its state: equal graphs compare equal, so nothing is compiled twice."""

    graph: Any

    def __call__(self, state: PyTree, x: PyTree, t: Time, *cond: PyTree) -> PyTree:
        return call_net(sys.modules["flax.nnx"].merge(self.graph, state), x, t, *cond)


def call_net(net: Callable[..., PyTree], x: PyTree, t: Time, cond: PyTree | None = None) -> PyTree:
    """net(x, t, y): the condition is the labels, or a dict of keyword arguments ({"y": labels, "perturb": u})."""
    return net(x, t, **cond) if isinstance(cond, dict) else net(x, t, cond) if cond is not None else net(x, t)


def _no_carry(x: PyTree) -> PyTree:
    return ()


def _call(bound: Partial, cond: PyTree | None, x: PyTree, t: Time, carry: PyTree) -> tuple[PyTree, PyTree]:
    return (bound(x, t) if cond is None else bound(x, t, cond)), carry


def cast_like(output: PyTree, x: PyTree) -> PyTree:
    """The network's output in the state's dtype; one clear error where its structure or a shape is another."""
    if jax.tree.structure(output) != jax.tree.structure(x):
        raise ValueError(
            f"the denoiser returned {jax.tree.structure(output)} for a sample {jax.tree.structure(x)}; "
            "it must return one array for each array of the sample"
        )

    def leaf(out: Any, x: Any) -> jax.Array:
        out = jnp.asarray(out)
        if out.shape != x.shape:
            raise ValueError(
                f"the denoiser returned shape {out.shape} for a sample of shape {x.shape}; it must keep the shape "
                "(a network that also predicts a variance needs its extra channels cut off)"
            )
        return out.astype(x.dtype)

    return jax.tree.map(leaf, output, x)


@dataclass(frozen=True)
class _Preconditioned:
    """edm_precondition's result; equal ones compare equal, so nothing is compiled twice."""

    fn: Callable[..., PyTree]
    process: Process
    sigma_data: float

    def __call__(self, params: PyTree, x: jax.Array, t: Time, *cond: PyTree) -> jax.Array:
        p, d2 = self.process, self.sigma_data**2
        a, s = p.alpha(t), p.sigma(t)
        # in (a, s), so that alpha = 0 divides by nothing: c_in y = x / sqrt(s^2 + d2 a^2)
        norm = jnp.sqrt(s * s + d2 * a * a)
        r = s * reciprocal(jnp.maximum(a, 1e-6))
        lowest = float(p.sigma(p.t_min) / p.alpha(p.t_min))
        out = self.fn(params, x / norm, 0.25 * jnp.log(jnp.maximum(r, lowest)), *cond)
        return (d2 * a / norm**2) * x + (self.sigma_data * s / norm) * out


def edm_precondition(fn: Callable[..., PyTree], process: Process, sigma_data: float = 0.5) -> Callable[..., PyTree]:
    """EDM's preconditioning (Karras et al. 2022, table 1) of a raw network F, for any process.

    With r = sigma / alpha and y = x / alpha the result D = c_skip y + c_out F(c_in y, log(r) / 4) predicts x0.
    `fn(params, x, t, *cond)` becomes a function of the same arguments; pair it with prediction="x0". At sigma = 0
    the network's time is clipped to that of t_min.
    """
    if not sigma_data > 0:
        raise ValueError(f"edm_precondition: sigma_data is {sigma_data}; expected the data's standard deviation, > 0")
    return _Preconditioned(fn, process, float(sigma_data))
