"""GDSS: graphs by a system of SDEs, its S4 solver against Euler-Maruyama and predictor-corrector at equal evaluations.

    jdiff reproduce gdss

Two seeded sets (jdiff.data.synthetic.graphs) with the processes of the official configurations: molecules as QM9's (VE,
0.1 to 1, snr 0.2), communities as community-small's (VP, beta 0.1 to 1, snr 0.05). Networks are small and trained here.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jdiff
from jdiff import graphs, losses, metrics, nets, process, reproduce, solvers, times
from jdiff.data.synthetic import graphs as data
from jdiff.experiments._claims import Claim
from jdiff.experiments._graphs import JointGaussian
from jdiff.experiments._kept import kept
from jdiff.process import System
from jdiff.reproduce import Published, Table
from jdiff.solvers import markov, splitting


@dataclass(frozen=True)
class Settings:
    """Options of the experiment."""

    out: str = "runs/gdss"  # folder of the finished cells and the report
    n: int = 150  # graphs a cell, and as many held-out ones
    steps: int = 600  # of training, batches of 64 (communities: two thirds of it)
    seed: int = 0  # of data, training and noise


@dataclass(frozen=True, eq=False)
class Set:
    """A data set, its system, and what the official configuration gives the samplers."""

    make: Callable[..., dict[str, np.ndarray]]
    system: System
    levels: int
    snr: float
    share: float  # of the training steps

    def graphs(self, n: int, seed: int) -> dict[str, np.ndarray]:
        return self.make(n, seed)


VE, VP = process.ve(0.1, 1.0), process.vp_linear(0.1, 1.0)
SETS = {
    "molecules": Set(data.molecules, graphs.system(VE, VE), 3, 0.2, 1.0),
    "communities": Set(functools.partial(data.communities, nodes=(10, 12)), graphs.system(VP, VP), 1, 0.05, 2 / 3),
}
TEMPERATURE = 0.7  # their scale_eps
SAMPLERS = {  # on VE the published S4 is ours
    "molecules": ("Euler-Maruyama", "PC, Euler-Maruyama", "S4", "S4, independent"),
    "communities": ("Euler-Maruyama", "PC, Euler-Maruyama", "S4", "S4, as published", "S4, independent"),
}
ROWS = tuple(f"{name}: {row}" for name, rows in SAMPLERS.items() for row in rows)
NFE, EXACT = (50, 100), (50, 100, 200, 400)


@dataclass(frozen=True)
class Network:
    """eps of both parts; joint, or each part without the other: the features see no edges, the edges no features."""

    graph: Any
    joint: bool

    def __call__(self, params: Any, g: Mapping[str, Any], t: Any, y: None = None) -> dict[str, Any]:
        net = nnx.merge(self.graph, params)
        if self.joint:
            return net(g, t)
        alone = [net({**g, other: jnp.zeros_like(g[other])}, t)[name] for name, other in (("x", "adj"), ("adj", "x"))]
        return graphs.masked(dict(zip(("x", "adj"), alone, strict=True)), graphs.flags(g))


def trained(name: str, joint: bool, settings: Settings) -> jdiff.Denoiser:
    """Adam, cosine rate from 4e-3, moving average of the parameters over the last steps; kept in `out`."""
    case = SETS[name]
    train = jax.tree.map(jnp.asarray, case.graphs(1000, settings.seed))
    net = nets.GraphNet(train["x"].shape[-1], width=16, layers=3, rngs=nnx.Rngs(settings.seed))
    graph, params = nnx.split(net)
    network, steps = Network(graph, joint), round(case.share * settings.steps)
    loss = losses.denoising_loss(network, case.system, "eps", stratified=True)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(4e-3, steps)))

    @jax.jit
    def run(params: Any, key: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            params, average, state = carry
            which = jax.random.choice(key, 1000, (64,), replace=False)
            batch = jax.tree.map(lambda a: a[which], train)
            value, slope = jax.value_and_grad(lambda p: loss(p, key, batch).mean())(params)
            change, state = optimiser.update(slope, state)
            params = optax.apply_updates(params, change)
            average = jax.tree.map(lambda a, p: 0.995 * a + 0.005 * p, average, params)
            return (params, average, state), value

        carry = (params, params, optimiser.init(params))
        return jax.lax.scan(step, carry, jax.random.split(key, steps))[0][1]

    file = Path(settings.out) / f"{name}-{'joint' if joint else 'independent'}.npz"
    params = kept(file, params, lambda: run(params, jax.random.key(settings.seed)))
    return jdiff.denoiser(network, case.system, "eps", params=params)


@dataclass(frozen=True, eq=False)
class Context:
    settings: Settings
    models: dict[tuple[str, bool], jdiff.Denoiser]


def sampler(row: str, case: Set, den: jdiff.Denoiser, nfe: int) -> Callable[..., Any]:
    """(x, key) -> graphs, at `nfe` network evaluations to t = 0, uniform times."""
    options: dict[str, Any] = {"temperature": TEMPERATURE, "norms": "batch"}
    if row.startswith("S4"):
        grid = times.uniform(case.system, nfe)
        return splitting.s4(den, grid, case.snr, as_published="published" in row, **options).sample
    pair = row.startswith("PC")
    table = solvers.euler_maruyama()(case.system, times.uniform(case.system, nfe // 2 if pair else nfe))
    if pair:
        return markov.langevin_corrector(den, table, case.snr, **options).sample
    return lambda x, key: jdiff.sample(den, table, x, key)


def cell(context: Context, row: str, nfe: int) -> dict[str, Any]:
    name, how = row.split(": ")
    case, settings, joint = SETS[name], context.settings, "independent" not in how
    if (name, joint) not in context.models:
        context.models[name, joint] = trained(name, joint, settings)
    den, n = context.models[name, joint], settings.n
    held, other = (case.graphs(n, settings.seed + 1 + i) for i in range(2))
    keys = jax.random.split(jax.random.key(settings.seed + 1))
    start = graphs.masked(case.system.prior(keys[0], {k: v.shape for k, v in held.items()}), graphs.flags(held))
    found = jax.jit(sampler(how, case, den, nfe))(start, keys[1])
    graphs.check(found, graphs.flags(held))
    found = jax.tree.map(np.asarray, graphs.quantised(found, case.levels))
    binary = lambda g: (g["adj"] > 0).astype(int)
    off = {k: float(v) for k, v in metrics.graph_mmd(binary(found), binary(held)).items()}
    floor = metrics.graph_mmd(binary(other), binary(held))
    out = {
        "MMD": float(np.mean(list(off.values()))),
        **off,
        "floor": float(np.mean([float(v) for v in floor.values()])),
    }
    if name == "molecules":
        out["valid"] = float(data.valid(found).mean())
        out["connected"] = float(data.connected(found).mean())
    return out


def gaussian_lines() -> list[str]:
    """The closed forms: relative error of the covariance on a jointly Gaussian graph."""
    model, system = JointGaussian.random(), graphs.system(process.vp_linear(), process.ve(0.1, 1.0))

    def error(kind: str, n: int, snr: float = 0.0, as_published: bool = False) -> str:
        grid = np.linspace(1.0, 1e-3, n + 1)
        return f"{model.error(system, 1e-3, *model.law(system, grid, kind, snr, as_published=as_published))[1]:.2g}"

    rows = [
        ("Euler-Maruyama", lambda n: error("em", n)),
        ("Euler-Maruyama and a Langevin step of its own, snr 0.1", lambda n: error("em", n // 2, 0.1)),
        ("S4 without its corrector", lambda n: error("s4", n)),
        ("S4, snr 0.1", lambda n: error("s4", n, 0.1)),
        ("S4, snr 0.1, as published", lambda n: error("s4", n, 0.1, True)),
    ]
    table = reproduce.grid(["sampler", *map(str, EXACT)], [[name, *map(of, EXACT)] for name, of in rows])
    what = (
        "Jointly Gaussian x and adj (9 numbers, VP 0.1 to 20 and VE 0.1 to 1): relative error of the covariance, by "
        "NFE, in closed form, from the exact law at t = 1 to t = 0.001."
    )
    return ["", "## Exact scores", "", what, "", *table]


CLAIMS = (
    *(
        Claim(
            f"{name}, NFE {n}: MMD of S4 over that of {other}",
            lambda e, name=name, n=n, other=other: e(f"{name}: S4", n) / e(f"{name}: {other}", n),
            at_most=1.0,
        )
        for name in SETS
        for n in NFE
        for other in ("PC, Euler-Maruyama", "Euler-Maruyama")
    ),
    *(
        Claim(
            f"{name}, NFE 100: MMD of the joint system over that of independent parts (S4)",
            lambda e, name=name: e(f"{name}: S4", 100) / e(f"{name}: S4, independent", 100),
            at_most=0.5,
        )
        for name in SETS
    ),
    Claim("molecules, NFE 100: within their valencies, S4", lambda e: e("molecules: S4", 100, "valid"), at_least=0.85),
)


def finish(context: Context, cells: Mapping[tuple[str, Any], reproduce.Cell], out: Path) -> Sequence[str]:
    e: Callable[..., Any] = lambda row, column, what="MMD": cells[row, column].get(what)
    header = ["graphs", "degree", "clustering", "orbit", "within valencies", "in one piece"]
    shown = lambda row: [
        reproduce.number(e(row, 100, k)) for k in ("degree", "clustering", "orbit", "valid", "connected")
    ]
    return [
        "MMD is the mean of the squared MMDs of degrees, clustering and orbits; `floor` in table.csv is that of two "
        "held-out sets. A PC row of NFE 2N has N predictor steps. One training, one draw: no error bars.",
        "", "At NFE 100:", "", *reproduce.grid(header, [[row, *shown(row)] for row in ROWS]),
        "", "## Claims", "", *(claim.line(e) for claim in CLAIMS), *gaussian_lines(),
    ]  # fmt: skip


TABLE = Table(
    name="gdss",
    summary="MMD of generated graphs from held-out ones.",
    needs="nothing: trains small networks (about four minutes on two cores)",
    rows=ROWS,
    columns=NFE,
    row_title="graphs and sampler",
    column_title="NFE",
    metric="MMD",
    settings=Settings,
    prepare=lambda settings: Context(settings, {}),
    cell=cell,
    finish=finish,
    published=(Published.load("gdss.toml"),),
)
