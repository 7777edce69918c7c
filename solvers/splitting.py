"""GDSS's S4: symmetric splitting of the reverse SDE, a Langevin step and a predictor step for one evaluation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, PyTree

from jdiff.denoiser import Denoiser, cast_like
from jdiff.execute import Info, State, Stepper
from jdiff.predict import convert, model_time, wide
from jdiff.process import Process, System

from .markov import CORRECTOR, Chain, check_norms, langevin, parts_of


class Row(NamedTuple):
    """A step of S4: its time; factors and noises of the two halves (2, *L); the score's push; the corrector's scale.

    L is the number of a system's parts, or absent.
    """

    t: Any
    keep: Any
    std: Any
    push: Any
    scale: Any


def s4(
    denoiser: Denoiser,
    times: Any,
    snr: float = 0.1,
    *,
    temperature: float = 1.0,
    norms: str = "level",
    denoise: bool = True,
    as_published: bool = False,
    dtype: Any = np.float32,
    index: Integer[Array, " batch"] | None = None,
) -> Chain:
    """The S4 solver of GDSS (Jo et al. 2022, arXiv 2202.02514, algorithm 1): n evaluations for n steps t -> t - h.

        x <- x + e s + sqrt(2 e) temperature z      s the score at the step's start; e as in `langevin_corrector`
        x <- a(t - h/2)/a(t) x + std z              exact half step of dx = [-f x] dtau + g dW
        x <- x + g(t)^2 h s                         the score's part, in whole
        x <- a(t - h)/a(t - h/2) x + std' z         exact half step

    times: (n + 1,) falling, all parts of a system on one. snr = 0: no corrector. `temperature` is their scale_eps,
    norms as in `langevin_corrector` ("batch" is theirs). denoise: no noise in the last half step, as theirs.
    It works on any process, systems or not. Weak order 1: s is as old as the step (see tests/test_coupled.py).

    The half step's variance is int (a(t')/a(u))^2 g^2 du = (a(t')/a(t))^2 sigma(t)^2 - sigma(t')^2. as_published: that
    of the FORWARD kernel, sigma(t)^2 - (a(t)/a(t'))^2 sigma(t')^2, less by the factor (a(t)/a(t'))^2: too little on VP,
    the same on VE. There is no published form for sub-VP.
    """
    if snr < 0:
        raise ValueError(f"s4: snr must not be negative, got {snr=}")
    check_norms("s4", norms)
    p = denoiser.process
    t = p.check_times(times)
    if t.ndim != 1:
        raise ValueError(f"s4: times have shape {t.shape}; expected (n + 1,), one grid for all")
    columns = [_columns(part, t, norms, as_published) for part in parts_of(p)]
    keep, std, push, scale = (np.stack(c, -1) if isinstance(p, System) else c[0] for c in zip(*columns, strict=True))
    if denoise:
        std[-1, 1] = 0.0
    rows = Row(t[:-1], keep, std, push, scale)
    rows = jax.tree.map(lambda v: jnp.asarray(v, wide(dtype)), rows)

    def init(key: Array | None, x: PyTree) -> State:
        p.check(x)
        return State((x,), denoiser.init(x))

    def step(key: Any, state: State, row: Row) -> tuple[State, Info]:
        x, t = state.x, model_time(row.t, state.x)
        out, carry = denoiser.apply(x, t, state.carry)
        out = cast_like(out, x)
        score = convert(p, x, t, out, denoiser.prediction, "score")
        draw = lambda j: p.noise(jax.random.fold_in(key, j), state.x, index)
        new = langevin(p, x, score, draw(CORRECTOR), row.scale, snr, norms, temperature) if snr else x
        for half in (0, 1):
            part = lambda c, like=x, half=half: p.split(c[half], like)
            new = jax.tree.map(lambda k, w, v, z: k * v + w * z, part(row.keep), part(row.std), new, draw(half))
            if half == 0:
                new = jax.tree.map(lambda g, v, s: v + g * s, p.split(row.push, x), new, score)
        return State((new,), carry), Info(x, (convert(p, x, t, out, denoiser.prediction, "x0"),))

    return Chain(Stepper(init, step), rows, len(t) - 1)


def _columns(p: Process, t: np.ndarray, norms: str, as_published: bool) -> tuple[np.ndarray, ...]:
    """keep (n, 2), std (n, 2), push (n,), scale (n,) of one process; float64."""
    if not p.alpha(t[0]) > 0:
        raise ValueError(f"s4: alpha is 0 at t = {t[0]:g} of {p}, and its drift infinite; start the grid below it")
    points = np.stack([t[:-1], 0.5 * (t[:-1] + t[1:]), t[1:]], 1)
    a, var = p.alpha(points), p.sigma(points) ** 2
    keep = a[:, 1:] / a[:, :-1]
    v = np.maximum(keep**2 * var[:, :-1] - var[:, 1:], 0.0)
    std = np.sqrt(v) / keep if as_published else np.sqrt(v)
    scale = (a[:, 0] / a[:, 2]) * (p.sigma(t[:-1]) if norms == "level" else 1.0)
    return keep, std, p.diffusion(t[:-1]) ** 2 * -np.diff(t), scale
