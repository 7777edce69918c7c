"""Denoising losses: E_{t, eps} w(t) |F(x_t, t) - target|^2, for each of the five things a network may predict.

A prediction's error is that of x0 seen through a linear map: error_x0 = J(t) error_kind, with x_t held fixed. So
a weighting is defined once, on the error of x0, and reaches every prediction kind through J(t)^2:

    weighting     on |error of x0|^2                   source
    "none"        1 / J^2: uniform on the prediction's own error
    "edm"         (r^2 + d^2) / (r d)^2                Karras et al. 2022, table 1; r = sigma / alpha, d = sigma_data
    "min_snr"     min(SNR, gamma)                      Hang et al. 2023, section 3.4; SNR = (alpha / sigma)^2
    "flow"        uniform on the error of dx/dt        conditional flow matching, Lipman et al. 2023, eq. 23

A time sampler maps uniform numbers in (0, 1) to times, by the inverse of its distribution function. So a sample's
time, its noise and whether its label is dropped depend on the key and on the sample's global index alone: its loss
is the same in any batch and on any mesh.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jdiff import noise
from jdiff.denoiser import cast_like
from jdiff.predict import check_kind, wide
from jdiff.process import Process

Weighting = Literal["none", "edm", "min_snr", "flow"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)
TimeSampler = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]
Loss = Callable[..., Float[Array, " batch"]]


# ------------------------------------------------------------------------------------------------------- times
def uniform(process: Process) -> TimeSampler:
    """Times uniform on [t_min, t_max]."""
    return lambda u: process.t_min + u * (process.t_max - process.t_min)


def log_normal(process: Process, mean: float = -1.2, std: float = 1.2) -> TimeSampler:
    """log(sigma / alpha) normal (Karras et al. 2022, table 1: P_mean, P_std), cut to [t_min, t_max]."""
    if not std > 0:
        raise ValueError(f"log_normal: expected std > 0, got {std=}")

    def sampler(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        lam = -(mean + std * jax.scipy.special.ndtri(u))
        return jnp.clip(process.t_of_lam(lam), process.t_min, process.t_max)

    return sampler


def logit_normal(process: Process, mean: float = 0.0, std: float = 1.0) -> TimeSampler:
    """logit of the flow time normal (Esser et al. 2024, eq. 19); another process gets the same sigma / alpha.

    Flow time is sigma / (sigma + alpha), so its logit is log(sigma / alpha): this is `log_normal` with the
    defaults of Stable Diffusion 3.
    """
    return log_normal(process, mean, std)


def beta(mean: Any, concentration: Any = 4.0) -> TimeSampler:
    """Beta distributed numbers in (0, 1), a = mean c and b = (1 - mean) c: times of `discrete.masked_loss`, of `flow`.

    SDAR-VL's curriculum (PBNC) raises the mean over training and keeps the concentration c: mean and c may be traced,
    so `beta(0.3 + 0.4 * step / steps)` inside a training step compiles once. Mean 1/2 and c = 2 is uniform. By
    bisection, to 2^-24. ValueError for numbers outside 0 < mean < 1, c > 0.
    """
    for name, value, top in (("mean", mean, 1.0), ("concentration", concentration, math.inf)):
        if isinstance(value, (int, float)) and not 0 < value < top:
            raise ValueError(f"beta: {name} is {value}; expected a number in (0, {top:g})")

    def sampler(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        a, b = (jnp.asarray(v, u.dtype) for v in (mean * concentration, (1 - mean) * concentration))

        def halve(k: Any, low: Array) -> Array:
            step = 0.5 ** (jnp.asarray(k, u.dtype) + 1.0)
            return jnp.where(jax.scipy.special.betainc(a, b, low + step) < u, low + step, low)

        return jax.lax.fori_loop(0, 24, halve, jnp.zeros_like(u)) + 2.0**-25

    return sampler


TIMES = {"uniform": uniform, "logit_normal": logit_normal, "log_normal": log_normal}


def uniforms(
    key: Array,
    index: Int[Array, " batch"],
    stratified: bool = False,
    dtype: Any = None,
) -> Float[Array, " batch"]:
    """Numbers in the open interval (0, 1), one a sample, from the key and the sample's global index alone.

    Independent, or `stratified`: the additive recurrence u_i = frac(u_0 + i / golden ratio), whose points spread
    evenly over any run of indices, so over any batch. 23 bits each, so that float32 reaches neither 0 nor 1.
    """
    index = index.astype(jnp.uint32)
    if stratified:  # modulo 2^32, in integers: exact however large the index
        bits = jax.random.bits(key, (), jnp.uint32) + index * jnp.uint32(2654435769)
    else:
        bits = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i), (), jnp.uint32))(index)
    return noise.fraction(bits, jnp.float32 if dtype is None else dtype)


# ----------------------------------------------------------------------------------------------------- weights
def weight(
    process: Process,
    prediction: str,
    weighting: str,
    t: Float[Array, "*shape"],
    *,
    sigma_data: float = 0.5,
    gamma: float = 5.0,
) -> Float[Array, "*shape"]:
    """What multiplies the squared error of a `prediction` made at time t > 0; shaped like t.

    sigma_data: standard deviation of the data ("edm"); gamma: where min-SNR cuts ("min_snr").
    ValueError for an unknown prediction or weighting.
    """
    check_kind(prediction)
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}; expected one of {', '.join(WEIGHTINGS)}")
    if weighting == "none":
        return jnp.ones_like(t)
    a, s = jnp.maximum(process.alpha(t), 1e-12), process.sigma(t)  # alpha = 0: the limit, not 0 / 0
    da, ds = process.dalpha(t), process.dsigma(t)
    # |J| / sigma; the missing sigma^2 cancels below, where SNR = alpha^2 / sigma^2 would overflow
    k = {
        "x0": 1.0 / s,
        "eps": 1.0 / a,
        "score": s / a,
        "v": 1.0 / (a * a + s * s),
        "velocity": 1.0 / (a * ds - s * da),
    }
    on_x0 = {
        "edm": (s * s + (sigma_data * a) ** 2) / sigma_data**2,
        "min_snr": jnp.minimum(a * a, gamma * s * s),
        "flow": k["velocity"] ** -2,
    }
    return on_x0[weighting] * k[prediction] ** 2


# -------------------------------------------------------------------------------------------------------- loss
def _target(process: Process, prediction: str, t: Array, x0: Array, eps: Array) -> Array:
    """What a perfect network would return. From (x0, eps), not from x_t: dividing by sigma loses digits."""
    if prediction == "x0":
        return x0
    if prediction == "eps":
        return eps
    a, s = process.alpha(t), process.sigma(t)
    if prediction == "score":
        return -eps / s
    c0, c1 = (-s, a) if prediction == "v" else (process.dalpha(t), process.dsigma(t))
    return c0 * x0 + c1 * eps


def drop_labels(
    key: Array, y: Int[Array, " batch"], probability: float, null_label: int, index: Int[Array, " batch"]
) -> Int[Array, " batch"]:
    """Labels, each replaced by `null_label` with this probability: for classifier-free guidance (Ho and Salimans)."""
    return jnp.where(uniforms(key, index) < probability, jnp.asarray(null_label, y.dtype), y)


def uncertain(
    key: Array, condition: Float[Array, "batch tokens channels"], probability: float = 0.5
) -> Float[Array, "batch tokens channels"]:
    """A condition whose statistics are uncertain, for a network that will be conditioned on a model's own errors.

    Each sample's mean and standard deviation over tokens, a number a channel, are moved by normal noise as large as
    they vary over the batch, with this probability a sample: ARLON's uncertainty sampling (Li et al. 2024, arXiv
    2410.20502) in the form of DSU (Li et al. 2022, arXiv 2202.03958), since ARLON has no public code. In training only:
    unlike noise, it depends on the other samples of the batch. ValueError for no probability.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"uncertain: probability is {probability}; expected a number in [0, 1]")
    which, *keys = jax.random.split(key, 3)
    mean = condition.mean(1, keepdims=True)
    std = jnp.sqrt(condition.var(1, keepdims=True) + 1e-6)
    move = lambda k, v: v + jax.random.normal(k, v.shape, v.dtype) * v.std(0, keepdims=True)
    new = move(keys[1], std) * (condition - mean) / std + move(keys[0], mean)
    chosen = jax.random.bernoulli(which, probability, (len(condition), 1, 1))
    return jnp.where(chosen, new, condition)


def _beside(t: Array, leaf: Array) -> Array:
    """Times (batch, *elements) with axes of length 1 between, as many as the leaf has."""
    return t.reshape(*t.shape[:1], *[1] * (leaf.ndim - t.ndim), *t.shape[1:])


def denoising_loss(
    apply: Callable[..., PyTree],
    process: Process,
    prediction: str,
    *,
    weighting: str = "none",
    time: TimeSampler | None = None,
    stratified: bool = False,
    sigma_data: float = 0.5,
    gamma: float = 5.0,
    label_dropout: float = 0.0,
    null_label: int | None = None,
    elements: Callable[[Array], Array] | None = None,
) -> Loss:
    """The function loss(params, key, x0, y=None, index=None) -> (batch,) of weighted squared errors.

    x0: clean samples, an array or a pytree of arrays, batch axis first, float32 (or float64). y: integer labels
    (batch,), what else the network is told (a text), or None. index: global index of each sample, (batch,); default
    0, 1, .... Each entry is the mean over the sample's elements, in x0's dtype, and depends on (key, index[i], x0[i],
    y[i]) alone.

    apply(params, x_t, t, y) -> output of kind `prediction`, shaped like x0; t is (batch, 1, ..., 1), y is None
    where there are no labels. time: a sampler such as `uniform(process)` (the default). stratified: see `uniforms`.
    elements: a time an element, a law of `schedules.training`: key -> numbers in (0, 1) that broadcast against one
    sample, which `time` maps to times; t is then (batch, *elements), and each element has the weight of its own time.
    For a `process.system` a number a part, sorted by name: t is a dict of times, (batch, 1, ..., 1) each.
    Raises ValueError for an unknown prediction or weighting, a dropout outside [0, 1), or one without a null label.
    """
    check_kind(prediction)
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}; expected one of {', '.join(WEIGHTINGS)}")
    if not 0 <= label_dropout < 1:
        raise ValueError(f"label_dropout is a probability in [0, 1), got {label_dropout}")
    if label_dropout and null_label is None:
        raise ValueError(f"{label_dropout=} needs null_label, the label that stands for 'none' (net.null_label)")
    sampler = uniform(process) if time is None else time

    def loss(
        params: PyTree,
        key: Array,
        x0: PyTree[Float[Array, "batch ..."]],
        y: PyTree | None = None,
        index: Int[Array, " batch"] | None = None,
    ) -> Float[Array, " batch"]:
        leaves = jax.tree.leaves(x0)
        n, dtype = leaves[0].shape[0], wide(leaves[0].dtype)
        index = jnp.arange(n, dtype=jnp.int32) if index is None else index
        time_key, noise_key, label_key = (jax.random.fold_in(key, i) for i in range(3))
        if (law := elements) is None:
            u = uniforms(time_key, index, stratified, dtype)
        else:
            u = jax.vmap(lambda i: law(jax.random.fold_in(time_key, i)))(index).astype(dtype)
        t = sampler(u)
        each = process.told(t) if u.ndim > 1 else t  # a dict, where parts of a system have times of their own
        if each is t and len(ranks := {leaf.ndim for leaf in leaves}) > 1:
            raise ValueError(f"the sample's arrays have {sorted(ranks)} axes; one time a sample needs the same number")
        t = jax.tree.map(_beside, process.at(each, x0), x0) if each is not t else _beside(t, leaves[0])
        for part, own in zip(leaves, jax.tree.leaves(process.at(t, x0)), strict=True):
            if own.ndim != part.ndim or any(a not in (1, b) for a, b in zip(own.shape, part.shape, strict=True)):
                raise ValueError(
                    f"elements gives times of shape {u.shape[1:]}, which do not broadcast against a sample of shape "
                    f"{part.shape[1:]}; see schedules.training.along"
                )
        eps = process.kernel(noise_key, x0, index)
        x = process.mix(x0, eps, t)
        if y is not None and label_dropout and null_label is not None:
            y = drop_labels(label_key, y, label_dropout, null_label, index)
        output = cast_like(apply(params, x, t, y), x)

        def leaf(p: Process, t: Array, x0: Array, eps: Array, output: Array) -> Array:
            w = weight(p, prediction, weighting, t, sigma_data=sigma_data, gamma=gamma)
            return (w * jnp.square(output - _target(p, prediction, t, x0, eps))).reshape(n, -1).sum(-1)

        errors = jax.tree.leaves(jax.tree.map(leaf, process.each(x0), process.at(t, x0), x0, eps, output))
        return jnp.stack(errors).sum(0) / sum(leaf[0].size for leaf in leaves)

    return loss
