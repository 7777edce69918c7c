"""Log-likelihoods along the probability flow."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jdiff import noise
from jdiff.denoiser import Denoiser
from jdiff.predict import array_of

from .diffeq import Info, integrate
from .variables import scale


def log_likelihood(
    denoiser: Denoiser, x0: Any, key: Array | None = None, *, divergence: str = "exact", probes: int = 1,
    probe: str = "rademacher", start: float = 0.0, prior: Callable[[Array], Array] | None = None, rtol: float = 1e-5,
    atol: float = 1e-5, variable: str = "angle", solver: Any = "Tsit5", per_sample: bool = True, max_steps: int = 4096,
    index: Array | None = None,
) -> tuple[Array, Array, Info]:  # fmt: skip
    """log p(x0) in nats, (batch,), of the model's probability flow (Song et al. 2021, eq. 39): exact for any model.

        log p(x0) = log p_T(x_T) + int div(dx/dt) dt,   integrated from x0 at `start` to t_max

    divergence  "exact": the trace by d Jacobian-vector products an evaluation; "hutchinson": unbiased, from `probes`
                random vectors a sample ("rademacher" or "gaussian"), fixed along the path; needs key
    start       the time at which x0 is taken to be a draw. 0 is exact; the official score_sde takes 1e-5 with x0 as
                it is, and so does a network here that is not to be asked below t_min: start=process.t_min
    prior       log-density of x_T, (batch, ...) -> (batch,); default the process's own, N(0, prior_std^2)
    index       as in `jdiff.sample`: sample i's probes depend on key and index[i] alone

    Returns (log p, its standard error over probes, Info); the error is NaN for one probe and 0 for "exact". info.nfe
    counts slopes: each is one evaluation with d ("exact") or `probes` Jacobian-vector products. As published: one
    Rademacher probe, rtol = atol = 1e-5, the Dormand-Prince pair, but over the batch jointly (per_sample=False).
    """
    p = denoiser.process
    if divergence not in ("exact", "hutchinson"):
        raise ValueError(f"log_likelihood: divergence is {divergence!r}; expected 'exact' or 'hutchinson'")
    if probe not in ("rademacher", "gaussian"):
        raise ValueError(f"log_likelihood: probe is {probe!r}; expected 'rademacher' or 'gaussian'")
    hutchinson = divergence == "hutchinson"
    if hutchinson and (key is None or probes < 1):
        raise ValueError(f"log_likelihood: hutchinson needs key=jax.random.key(seed) and probes >= 1, got {probes=}")
    x0 = array_of(x0, "ode")
    d, e = x0[0].size, None
    if hutchinson and key is not None:
        draws = [noise.normal(jax.random.fold_in(key, j), x0, index) for j in range(probes)]
        e = jnp.stack(draws, 1)  # (batch, probes, ...)
        e = jnp.where(e < 0, -1.0, 1.0).astype(x0.dtype) if probe == "rademacher" else e
    (x, rise), info = integrate(
        denoiser, x0, p.t_max, start, variable, solver, rtol, atol, per_sample, max_steps, probes=e, forward=True
    )
    if prior is None:
        log_p = p.log_kernel(jnp.sum((x.reshape(len(x), -1) / p.prior_std) ** 2, -1), d) - d * np.log(p.prior_std)
    else:
        log_p = prior(x)
    change = d * np.log(scale(p, variable, p.t_max) / scale(p, variable, start))
    n = rise.shape[1]
    error = jnp.std(rise, 1, ddof=1) / np.sqrt(n) if n > 1 else jnp.full(len(x), 0.0 if e is None else np.nan, x.dtype)
    return log_p + rise.mean(1) + change, error, info


def bits_per_dim(log_p: Any, d: int, levels: int = 256, span: float = 2.0) -> Any:
    """-log2 p(image) / d of a log-density in nats of data that fill `span` (2 for [-1, 1]) in `levels` steps.

    For x0 dequantised uniformly, x0 = (value + u) span / levels - span / 2 with u in [0, 1), this bounds the bits a
    dimension of the discrete image from above (Theis et al. 2016). The offset log2(levels / span) is 7 for 8-bit
    images in [-1, 1], as in score_sde.
    """
    return -log_p / (d * np.log(2.0)) + np.log2(levels / span)
