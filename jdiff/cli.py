"""The command line: `jdiff train`, `sample`, `statistics`, `plan`, `encode`, `convert`, `reproduce NAME`, ..."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELP = """\
[bold]jdiff[/]: diffusion and flow models in JAX

[bold]Commands[/]
  train             train a DiT or a UNet on images; started again, it goes on exactly where it was
  sample RUN        sample a trained model with any solver; writes a PNG grid and an .npz
  statistics RUN    measure what DPM-Solver-v3 wants to know of a model; a file for `sample`
  plan              compile a run for a TPU pod that is not there: memory, FLOPs, collectives, a model of its speed
  fit-solver RUN    fit a solver to a model and a number of network evaluations; writes a .safetensors file
  encode IMAGES     images through an autoencoder, once, to latents that `train` reads
  convert FILE      weights of published nets (DiT, SiT, EDM, ADM, Stable Diffusion, diffusers) to ours, and back
  reproduce NAME    compute a paper's table again, with a plot and sample grids
  list [GROUP]      what there is: processes, time grids, solvers, nets, experiments; `list solvers` says more of them

[bold]Examples[/]
  jdiff train --out runs/digits --steps 2000
  jdiff train --out runs/cifar --data cifar10.zip --net UNet-CIFAR --batch 64
  jdiff sample runs/digits --solver unipc --nfe 10
  jdiff sample runs/digits --solver auto --nfe 8
  jdiff sample runs/digits --solver "dpm_solver_pp(order=2, eta=1.0)" --nfe 25 --guidance 1.5 --label 7
  jdiff reproduce fast-sampling

`jdiff COMMAND --help` explains a command's options.
"""


TRAIN_HELP = """Train a diffusion or flow model on images. Killed and started again with the same command, it goes on
exactly where it was; it refuses to go on with other options, except --log-every, --checkpoint-every, --keep and
--tensorboard.

  jdiff train                                                         digits, a small DiT, EDM: a few minutes on a CPU
  jdiff train --process flow --prediction velocity --weighting flow --time logit_normal --out runs/flow
  jdiff train --data images.zip --size 32 --net UNet-CIFAR --batch 64 --out runs/images
  jdiff train --mesh fsdp=8 --processes auto --out /shared/run        on every host of a pod: docs/pods.md
  jdiff train --net DiT --net-options patch 2 width 96 depth 6 heads 4 --steps 5000 --out runs/small
"""


@dataclass(frozen=True)
class SampleConfig:
    """Sample a trained model: RUN is a folder that `jdiff train` wrote, or a .safetensors file.

    Sample i depends on the seed and on i alone: another --batch, or more samples, give the same first ones.

      jdiff sample runs/digits --solver unipc --nfe 10
      jdiff sample runs/digits --solver "deis(order=3, variable='lam')" --grid karras --nfe 8 --n 100 --label 3
      jdiff sample runs/digits --solver solver.safetensors
    """

    solver: str = "unipc"  # a name, or one as above; a file of `jdiff fit-solver`; auto: tries them on this model
    nfe: int | None = None  # network evaluations that may be spent (guidance doubles each); 20, or what the file has
    grid: str | None = None  # uniform, logsnr, karras, quadratic, cubic; logsnr, or what the file or auto has
    n: int = 64  # how many samples
    batch: int = 256  # how many at a time
    label: int | None = None  # one class for all; none: the classes in turn, where the model has classes
    guidance: float = 1.0  # classifier-free guidance scale; 1: none
    ema: float | None = 0.10  # which average of the parameters, by sigma_rel; None: the raw ones
    seed: int = 0  # of the noise
    out: Path = Path("samples")  # writes OUT.png and OUT.npz
    check: bool = False  # stop at non-finite values, naming the evaluation and its time


def sample(run: Path, config: SampleConfig) -> None:
    """Sample the model in `run`, a folder that `jdiff train` wrote or a .safetensors file, into config.out."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from rich.progress import track

    import jdiff
    from jdiff import checkpoint, data, guidance, solvers, train

    make = _table(config)
    if config.n < 1 or config.batch < 1:
        raise ValueError(f"--n and --batch must be at least 1, got n={config.n}, batch={config.batch}")
    batch = min(config.batch, config.n)
    net, _, meta = checkpoint.load_params(run, config.ema)
    _check_condition(net, meta, config)
    classes = meta["net"]["num_classes"]
    labels = np.full(config.n, config.label) if config.label is not None else np.arange(config.n) % max(classes, 1)
    null = np.full(config.n, net.null_label if config.guidance != 1.0 else 0)
    model, images = train.denoiser_from(run, config.ema), []
    p, keys = model.process, jax.random.split(jax.random.key(config.seed))
    table = make(p)
    for start in track(range(0, config.n, batch), "sampling"):
        index = jnp.arange(start, start + batch)  # the last batch is full too, and cut afterwards
        rows = np.minimum(np.asarray(index), config.n - 1)
        cond = lambda y, rows=rows: jnp.asarray(y[rows], jnp.int32) if classes else None
        denoiser = model.with_cond(cond(labels)) if classes else model
        if config.guidance != 1.0:
            denoiser = guidance.cfg(denoiser, model.with_cond(cond(null)), config.guidance)
        x = p.prior(keys[0], (batch, *net.shape), index)
        if table is None:  # on other noise than the samples', under the first batch's labels
            print(f"choosing a solver and a grid for {config.nfe or 20} network evaluations", flush=True)
            table, report = solvers.auto(denoiser, config.nfe or 20, *_calibration(p, x, config.seed))
            print(report)
        images.append(np.asarray(jdiff.sample(denoiser, table, x, keys[1], index=index, check=config.check)))
    x = np.concatenate(images)[: config.n]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(config.out.with_suffix(".npz"), images=x, labels=labels if classes else np.zeros(0, int))
    grid = data.save_grid(np.clip(x[:100], -1, 1), config.out.with_suffix(".png"), columns=10)
    assert table is not None  # n >= 1
    spent = f"{table.nfe} network evaluations each ({table.record.name})"
    print(f"{config.n} samples, {spent}: {grid}, {grid.with_suffix('.npz')}")


def _calibration(p: Any, x: Any, seed: int) -> tuple[Any, Any]:
    """Noise of the samples' shape, and a key, for `solvers.auto`."""
    import jax

    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1))
    return p.prior(keys[0], x.shape), keys[1]


def _table(config: SampleConfig) -> Callable[[Any], Any]:
    """process -> Tableau; what can be refused without the model is refused here."""
    from jdiff import solvers, times

    if config.solver == "auto":
        return lambda p: None
    if not config.solver.endswith(".safetensors"):
        solver, grid = solvers.parse(config.solver), config.grid or "logsnr"
        if grid not in times.ALL:
            raise ValueError(solvers.unknown("time grid", grid, times.ALL))
        steps = solver.steps(20 if config.nfe is None else config.nfe)
        return lambda p: solver(p, times.ALL[grid](p, steps))
    table = solvers.load(config.solver)
    if config.grid is not None or config.nfe not in (None, table.nfe):
        raise ValueError(
            f"{config.solver} has its own times and {table.nfe} network evaluations; leave --grid and --nfe out"
        )

    def checked(p: Any) -> Any:
        if table.record.process != p:
            raise ValueError(
                f"{config.solver} was fitted for {table.record.process}, but the model's process is {p}; fit one to "
                "this model with jdiff fit-solver"
            )
        return table

    return checked


@dataclass(frozen=True)
class StatisticsConfig:
    """Measure the statistics of a trained model that the solver dpm_solver_v3 uses: once a model, and once a guidance
    scale. RUN is a folder that `jdiff train` wrote, or a .safetensors file.

    Points of the model's own trajectories are looked at, so no data is needed. Then sample with

      jdiff statistics runs/digits --out stats.safetensors
      jdiff sample runs/digits --solver "dpm_solver_v3(statistics='stats.safetensors')" --nfe 6

    Cost: about (3 + 2 probes) x n x n_lam evaluations. Published: n_lam 1200 and n 1024 for fewer than 10 evaluations,
    120 and 4096 above.
    """

    out: Path = Path("stats.safetensors")  # the file to write
    n: int = 1024  # how many trajectories; more give less noise in the statistics
    n_lam: int = 120  # intervals of the table in log-SNR
    batch: int = 256  # trajectories at a time
    probes: int = 1  # random signs a point for the Jacobian's diagonal; 0: exact, one a pixel
    label: int | None = None  # one class for all; none: the classes in turn, where the model has classes
    guidance: float = 1.0  # classifier-free guidance scale: measure at the scale that you sample with
    ema: float | None = 0.10  # which average of the parameters, by sigma_rel; None: the raw ones
    seed: int = 0  # of the noise


def statistics(run: Path, config: StatisticsConfig) -> None:
    """Measure the statistics of the model in `run` and write them to config.out."""
    import jax
    import numpy as np
    from rich.progress import track

    from jdiff import checkpoint, guidance, train
    from jdiff.statistics import estimate

    net, _, meta = checkpoint.load_params(run, config.ema)
    _check_condition(net, meta, config)
    classes, model = meta["net"]["num_classes"], train.denoiser_from(run, config.ema)
    denoiser, batch = model, min(config.batch, config.n)
    if classes:
        y = np.full(batch, config.label) if config.label is not None else np.arange(batch) % classes
        denoiser = model.with_cond(jax.numpy.asarray(y, np.int32))
        if config.guidance != 1.0:
            null = jax.numpy.full(batch, net.null_label, np.int32)
            denoiser = guidance.cfg(denoiser, model.with_cond(null), config.guidance)
    shape = net.shape
    found = estimate(
        denoiser, shape, jax.random.key(config.seed), n=config.n, n_lam=config.n_lam, batch=batch, probes=config.probes,
        progress=lambda steps: track(steps, "measuring"),
    )  # fmt: skip
    path = found.save(config.out)
    how = f"jdiff sample {run} --solver \"dpm_solver_v3(statistics='{path}')\" --nfe 6"
    print(f"{path}: {found.note}; next: {how}")


def _check_condition(net: Any, meta: Any, config: Any) -> None:
    """Labels and guidance that the model does not know end in one line."""
    classes = meta["net"]["num_classes"]
    if config.label is not None and not 0 <= config.label < max(classes, 1):
        raise ValueError(f"--label {config.label}: the model has {classes} classes, numbered from 0")
    if config.label is not None and not classes:
        raise ValueError("--label was given, but the model was trained without classes")
    if config.guidance != 1.0 and not classes:
        raise ValueError("--guidance needs a model with classes; this one was trained without")
    if config.guidance != 1.0 and not (net.null_class and meta["config"]["label_dropout"] > 0):
        raise ValueError("--guidance needs a model with a null class: train it with --label-dropout 0.1, say")


def reproduce(name: str, args: Sequence[str]) -> None:
    import tyro
    from rich.console import Console
    from rich.markdown import Markdown

    from jdiff import reproduce

    table = reproduce.find(name)
    settings = tyro.cli(table.settings, args=args, prog=f"jdiff reproduce {name}", description=table.summary)
    report = reproduce.run(table, settings)
    Console().print(Markdown(report.read_text()))
    print(f"written: {report}, table.csv and plot.png beside it")


def listing(group: str | None = None) -> None:
    """Print processes, time grids, solvers, guidance, nets and experiments, a line each; or one group of them.

    ValueError for an unknown group. `listing("solvers")` prints order, cost, prediction, noise, use and source.
    """
    from rich.console import Console
    from rich.table import Table

    from jdiff import guidance, nets, process, reproduce, solvers, times

    line = lambda fn: (fn.__doc__ or "").strip().splitlines()[0]
    groups: dict[str, Callable[[], dict[str, str]]] = {
        "processes": lambda: {k: line(f) for k, f in process.ALL.items()},
        "grids": lambda: {k: line(f) for k, f in times.ALL.items()},
        "solvers": lambda: {k: line(f) for k, f in solvers.ALL.items()},
        "guidance": lambda: {k: line(f) for k, f in guidance.ALL.items()},
        "nets": lambda: {k: preset.doc for k, preset in nets.PRESETS.items()},
        "experiments": lambda: {k: reproduce.find(k).summary.splitlines()[0] for k in reproduce.names()},
    }
    if group is not None and group not in groups:
        raise ValueError(solvers.unknown("group", group, groups))
    if group == "solvers":
        return _list_solvers()
    for title, entries in groups.items():
        if group in (None, title):
            table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
            for name, text in entries().items():
                table.add_row(f"[bold]{name}[/]", text)
            Console().print(table)


def _list_solvers() -> None:
    from rich.console import Console
    from rich.table import Table

    from jdiff import solvers

    table = Table(
        "solver", "order", "NFE a step", "holds", "noise", "when to use it", "source", box=None, padding=(0, 1)
    )
    for name, make in solvers.ALL.items():
        s = make()
        each = s.cost(13) - s.cost(12)
        noise = "yes" if s.stochastic else "no"
        table.add_row(f"[bold]{name}[/]", str(s.order), str(each), s.prediction, noise, s.when, "; ".join(s.references))
    Console().print(table)
    print("Defaults shown; options: python -c 'import jdiff; help(jdiff.solvers.unipc)'")


def _train(args: Sequence[str]) -> None:
    import tyro

    from jdiff import pod, train

    @dataclass(frozen=True)
    class Options(train.TrainConfig):
        processes: str = ""  # several processes as one run: auto, or HOST:PORT,COUNT,INDEX; the same command in each

    options = vars(tyro.cli(Options, args=args, prog="jdiff train", description=TRAIN_HELP)).copy()
    pod.start(options.pop("processes"))
    result = train.train(train.TrainConfig(**options))
    print(f"trained: {result.out}; next: jdiff sample {result.out}")


def _with_run(command: str, config: type, work: Callable[[Path, Any], Any]) -> Callable[[Sequence[str]], None]:
    """A command whose first argument is the run."""

    def run(args: Sequence[str]) -> None:
        import tyro

        named = bool(args) and not args[0].startswith("-")
        options = tyro.cli(config, args=args[named:], prog=f"jdiff {command} RUN")
        if not named:
            what = "a folder that `jdiff train` wrote or a .safetensors file"
            raise ValueError(f"name the run first: jdiff {command} RUN, {what}")
        work(Path(args[0]), options)

    return run


def _fit_solver(args: Sequence[str]) -> None:
    from jdiff.fit.command import FitConfig, fit_solver

    _with_run("fit-solver", FitConfig, fit_solver)(args)


def _plan(args: Sequence[str]) -> None:
    import tyro

    from jdiff.plan.command import PlanOptions, run

    run(tyro.cli(PlanOptions, args=args, prog="jdiff plan"))


def _convert(args: Sequence[str]) -> None:
    from jdiff.convert.command import run

    run(args)


def _encode(args: Sequence[str]) -> None:
    from jdiff.encode import run

    run(args)


def _reproduce(args: Sequence[str]) -> None:
    from jdiff import reproduce as tables

    if not args or args[0] in ("-h", "--help"):
        print("usage: jdiff reproduce NAME [options]; jdiff reproduce NAME --help explains them. Names:")
        for name in tables.names():
            table = tables.find(name)
            print(f"  {name:20s} {table.summary.splitlines()[0]}\n{'':23s}needs {table.needs}")
        return
    reproduce(args[0], args[1:])


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "sample": _with_run("sample", SampleConfig, sample),
    "statistics": _with_run("statistics", StatisticsConfig, statistics),
    "plan": _plan,
    "fit-solver": _fit_solver,
    "encode": _encode,
    "convert": _convert,
    "reproduce": _reproduce,
    "list": lambda args: listing(*args[:1]),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends in one line on standard error and exit code 2."""
    from rich.console import Console

    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        Console().print(HELP, highlight=False)
        return 0
    from jdiff.solvers import unknown

    if args[0] not in COMMANDS:
        Console(stderr=True).print(f"jdiff: {unknown('command', args[0], COMMANDS)}", markup=False)
        return 2
    from jdiff.checkpoint import CheckpointError
    from jdiff.pod import Preempted

    try:
        COMMANDS[args[0]](args[1:])
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, FloatingPointError, CheckpointError) as error:
        Console(stderr=True).print(f"jdiff {args[0]}: {error}", markup=False, highlight=False)
        return 2
    except Preempted as stopped:
        Console(stderr=True).print(f"{stopped}; the same command goes on from there", markup=False)
        return 143
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on where it was")
        return 130
    return 0
