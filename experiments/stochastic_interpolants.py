"""Stochastic interpolants (Albergo, Boffi and Vanden-Eijnden 2023, arXiv 2303.08797) between two exact mixtures.

    jdiff reproduce stochastic-interpolants

Two blobs become a ring of eight, through small networks of b, v, s and eta whose exact fields are known. What does the
latent noise gamma do to what is learned, and the noise eps of the SDE to what is sampled with an imperfect b?
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jdiff
from jdiff import exact, interpolants, metrics, process, reproduce, times
from jdiff.interpolants import Between, Interpolant

ANGLES = 2 * np.pi * np.arange(8) / 8
RING = exact.mixture(np.ones(8) / 8, 2.0 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1), [0.15**2] * 8)
BLOBS = exact.mixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], [0.4**2] * 2)
MODELS = {name: interpolants.between(Interpolant(gamma=name), RING, BLOBS) for name in ("none", "brownian")}
NETS = ("none b", *(f"brownian {field}" for field in interpolants.FIELDS))
SMOOTH = 0.1  # standard deviation of the noise that both laws get before their KL is taken


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/stochastic-interpolants"  # folder of the finished cells and the report
    n: int = 5000  # samples a cell
    sampling_steps: int = 100
    training_steps: int = 2000  # a network, batch 256


class Row(NamedTuple):
    """How a row samples: gamma, the fields it has learned ("exact" in front: has exactly), eps, direction."""

    gamma: str
    fields: tuple[str, ...]
    eps: float | Callable[[Any], Any] = 0.0
    forward: bool = False
    learned: bool = True


def bump(t: Any) -> Any:
    """eps(t) that is 0 at both ends, where eta says nothing of the score."""
    return 4.0 * t * (1.0 - t)


ROWS = {
    "exact draws": None,
    "exact b, ODE": Row("brownian", ("b",), learned=False),
    "exact b and s, SDE, eps 1": Row("brownian", ("b", "s"), 1.0, learned=False),
    "gamma 0: b, ODE": Row("none", ("b",)),
    "b, ODE": Row("brownian", ("b",)),
    "v and s, ODE": Row("brownian", ("v", "s")),
    "v and eta, ODE": Row("brownian", ("v", "eta")),
    **{f"b and s, SDE, eps {e:g}": Row("brownian", ("b", "s"), e) for e in (0.1, 0.5, 1.0, 2.0, 5.0)},
    "b and eta, SDE, eps 4 t (1 - t)": Row("brownian", ("b", "eta"), bump),
    "forward: b, ODE": Row("brownian", ("b",), forward=True),
    "forward: b and s, SDE, eps 1": Row("brownian", ("b", "s"), 1.0, forward=True),
}
SDES = [name for name in ROWS if name.startswith("b and s, SDE")]


# A small network, trained ------------------------------------------------------------------------------------------


def apply(params: Any, x: jax.Array, t: jax.Array, y: Any = None) -> jax.Array:
    """Three hidden layers of 64, of x and t."""
    t = jnp.broadcast_to(jnp.reshape(t, (-1, 1)), (len(x), 1))
    h = jnp.concatenate([x, t, jnp.sin(np.pi * t), jnp.cos(np.pi * t), jnp.cos(2 * np.pi * t)], -1)
    for W, b in params[:-1]:
        h = jax.nn.silu(h @ W + b)
    W, b = params[-1]
    return h @ W + b


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def train(name: str, field: str, key: jax.Array, steps: int) -> Any:
    model, widths = MODELS[name], (6, 64, 64, 64, 2)
    loss = interpolants.objective(model.interpolant, field, apply, stratified=True)
    keys = jax.random.split(key, len(widths))
    params = [
        (jax.random.normal(k, (m, n)) / np.sqrt(m), jnp.zeros(n))
        for k, m, n in zip(keys[:-1], widths[:-1], widths[1:], strict=True)
    ]
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(3e-3, steps)))

    def step(state: Any, i: jax.Array) -> tuple[Any, None]:
        params, memory = state
        ends, noise = jax.random.split(jax.random.fold_in(keys[-1], i))
        x0, x1 = model.ends(ends, 256)
        gradient = jax.grad(lambda p: jnp.mean(loss(p, noise, x0, x1)))(params)
        updates, memory = optimiser.update(gradient, memory)
        return (optax.apply_updates(params, updates), memory), None

    (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), jnp.arange(steps))
    return params


class Context(NamedTuple):
    settings: Settings
    params: dict[tuple[str, int], Any]  # (gamma and field, seed)

    def fields(self, row: Row, seed: int) -> dict[str, jdiff.Denoiser]:
        model = MODELS[row.gamma]
        if not row.learned:
            return model.fields(*row.fields)
        nets = {f: self.params[f"{row.gamma} {f}", seed] for f in row.fields}
        return {f: interpolants.field(model.interpolant, apply, params=p) for f, p in nets.items()}


def prepare(settings: Settings) -> Context:
    """Trains the networks that the folder does not hold yet."""
    folder, found = Path(settings.out) / "nets", {}
    folder.mkdir(parents=True, exist_ok=True)
    for seed in TABLE.columns:
        for name in NETS:
            file = folder / f"{name.replace(' ', '-')}-{seed}.npz"
            if not file.exists():
                params = train(*name.split(), jax.random.key(seed), settings.training_steps)
                np.savez(file, *jax.tree.leaves(params))
            leaves = [jnp.asarray(a) for a in np.load(file).values()]
            found[name, seed] = list(zip(leaves[::2], leaves[1::2], strict=True))
    return Context(settings, found)


# What is measured ---------------------------------------------------------------------------------------------------


def smoothed_kl(key: jax.Array, samples: jax.Array, law: exact.Mixture, n: int = 4000) -> float:
    """KL(law | samples), both with noise of size SMOOTH: exact density against kernel density, at draws of the law."""
    broad = exact.mixture(law.weights, law.means, law.eigenvalues + SMOOTH**2)
    x = broad.sample(key, n)
    log_p = broad.log_density(process.edm(), x, 0.0)

    def kernel(x: jax.Array) -> jax.Array:
        square = jnp.sum((samples - x) ** 2, -1) / SMOOTH**2
        return jax.nn.logsumexp(-0.5 * square) - np.log(len(samples) * 2 * np.pi * SMOOTH**2)

    return float(jnp.mean(log_p - jax.lax.map(kernel, x, batch_size=100)))


def relative_error(model: Between, field: str, learned: Callable[[jax.Array, float], jax.Array]) -> float:
    """sqrt(E int |learned - exact|^2 / E int |exact|^2), of s times gamma: at 12 times, 2000 draws each."""
    gap = size = 0.0
    for i, t in enumerate(0.5 + 0.5 * np.polynomial.legendre.leggauss(12)[0]):
        x = model.sample(jax.random.key(100 + i), 2000, float(t))
        weight = float(model.interpolant.noise(t)[0]) ** 2 if field == "s" else 1.0
        true = getattr(model(x, float(t)), field)
        gap += weight * float(jnp.mean((learned(x, float(t)) - true) ** 2))
        size += weight * float(jnp.mean(true**2))
    return (gap / size) ** 0.5


def cell(context: Context, name: str, seed: int) -> dict[str, Any]:
    settings, row = context.settings, ROWS[name]
    law = BLOBS if row is not None and row.forward else RING
    keys = jax.random.split(jax.random.key(1000 + seed), 5)
    bound = None
    if row is None:
        found = RING.sample(keys[0], settings.n)
    else:
        model = MODELS[row.gamma]
        fields: dict[str, Any] = context.fields(row, seed)
        x0, x1 = model.ends(keys[0], settings.n)
        grid = times.uniform(process.flow(), settings.sampling_steps)
        drift, table = interpolants.stochastic(model.interpolant, grid, row.eps, forward=row.forward, **fields)
        found = jdiff.sample(drift, table, x0 if row.forward else x1, keys[1])
        if row.eps and row.fields == ("b", "s") and row.learned:
            true = interpolants.drift(model.interpolant, row.eps, forward=row.forward, **model.fields("b", "s"))
            bound, _ = interpolants.kl_bound(
                drift, true, lambda key, t: model.sample(key, 2000, t), row.eps, keys[4], 12
            )
    distance = metrics.sliced_wasserstein(keys[2], np.asarray(found), np.asarray(law.sample(keys[3], settings.n)))
    kl = smoothed_kl(jax.random.key(7), found, law)
    return {"KL": kl, "sliced Wasserstein": float(distance.value), "bound on KL": bound}


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    seeds = TABLE.columns
    mean = lambda row, what="KL": float(np.mean([cells[row, seed][what] for seed in seeds]))
    brownian, ip = MODELS["brownian"], MODELS["brownian"].interpolant
    net = lambda which, seed: lambda x, t: apply(context.params[which, seed], x, jnp.float32(t))
    lines = ["## Learned fields", "", "Relative L2 errors on the path, mean over the seeds (s weighted by gamma):", ""]
    errors = {
        which: np.mean([relative_error(MODELS[which.split()[0]], which.split()[1], net(which, seed)) for seed in seeds])
        for which in NETS
    }
    lines += [f"- {which.replace('none', 'gamma 0,')}: {error:.3f}" for which, error in errors.items()]

    def identity(seed: int) -> tuple[float, float]:
        b, v, s, eta = (net(f"brownian {f}", seed) for f in interpolants.FIELDS)
        gaps = np.zeros(4)
        for i, t in enumerate(np.linspace(0.05, 0.95, 10)):
            x, t = brownian.sample(jax.random.key(200 + i), 2000, float(t)), float(t)
            gamma, _, gdg = (float(c) for c in ip.noise(t))
            pairs = ((b(x, t), v(x, t) - gdg * s(x, t)), (eta(x, t), -gamma * s(x, t)))
            for j, (left, right) in enumerate(pairs):
                gaps[j] += float(jnp.mean((left - right) ** 2))
                gaps[2 + j] += float(jnp.mean(left**2))
        return float(np.sqrt(gaps[0] / gaps[2])), float(np.sqrt(gaps[1] / gaps[3]))

    gap_b, gap_eta = np.mean([identity(seed) for seed in seeds], 0)
    lines += [
        f"- identities between networks trained apart: b = v - gamma gamma' s to {gap_b:.3f}, eta = -gamma s to "
        f"{gap_eta:.3f} (relative L2)",
        "",
        "## Means over the seeds",
        "",
    ]
    for row in ROWS:
        known = [c for seed in seeds if (c := cells[row, seed]["bound on KL"]) is not None]
        tail = f", bound on KL {np.mean(known):.2f}" if known else ""
        lines.append(f"- {row}: KL {mean(row):.4f}, sliced Wasserstein {mean(row, 'sliced Wasserstein'):.4f}{tail}")
    best = min(SDES, key=mean)
    below = all(cells[row, seed]["KL"] <= cells[row, seed]["bound on KL"] for row in SDES for seed in seeds)
    verdict = lambda holds: "holds" if holds else "DOES NOT HOLD"
    claims = [
        (
            f"with the same imperfect b, the SDE has a lower KL than the ODE for some eps: best {best}",
            mean(best) / mean("b, ODE"), 1.0,
        ),
        ("gamma > 0: relative error of b over that at gamma 0", errors["brownian b"] / errors["none b"], 1.0),
        ("gamma > 0: KL of the ODE over that at gamma 0", mean("b, ODE") / mean("gamma 0: b, ODE"), 1.0),
        ("identities hold to 25 % (the larger gap over 0.25)", max(gap_b, gap_eta) / 0.25, 1.0),
        ("exact fields: KL of ODE and SDE, the larger over that of exact draws",
         max(mean("exact b, ODE"), mean("exact b and s, SDE, eps 1")) / mean("exact draws"), 1.5),
    ]  # fmt: skip
    lines += ["", "## Claims", ""]
    lines += [f"- {text}: {v:.3g}, expected at most {most:g}: {verdict(v <= most)}." for text, v, most in claims]
    lines += [f"- the KL of every SDE is below its bound: {verdict(below)}.", ""]
    lines += [
        "KL is of both laws with noise of standard deviation 0.1 added (a lower bound of the KL itself, and a kernel "
        "density estimate: compare with exact draws). The paper prints figures and no table for mixtures."
    ]
    return lines


TABLE = reproduce.Table(
    name="stochastic-interpolants",
    summary="KL of samples between two exact mixtures, with exact and with learned fields, ODE and SDE, both ways.",
    needs="nothing: small networks that it trains (about three minutes on one core)",
    rows=tuple(ROWS),
    columns=(1, 2),
    row_title="fields and sampler",
    column_title="seed",
    metric="KL",
    settings=Settings,
    prepare=prepare,
    cell=cell,
    finish=finish,
)
