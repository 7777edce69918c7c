"""`jdiff plan`: plans in processes of their own, one, or a sweep of them with the best marked."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import chips
from .estimate import Plan
from .program import PlanConfig
from .report import amount, report, table

LIBTPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # no question to a metadata server that is not there
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # not used, but its absence is complained of
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans at once
    "JAX_ENABLE_COMPILATION_CACHE": "0",  # which writes programs for absent devices and cannot read them; see `kept`
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class PlanOptions(PlanConfig):
    """Compile a training step, or sampling, for devices that are not there, and say what it needs and costs: memory
    against what a chip has, FLOPs, collectives, a model of the step time.

      jdiff plan --net DiT-XL/2 --topology v5e:16x16 --mesh data=16,fsdp=16 --batch 2048
      jdiff plan --net DiT-XL/2 --topology v5e:4x4 --mesh fsdp=16 --batch 256 --remat full --sweep
      jdiff plan --net DiT-XL/2 --topology v6e:4x4 --batch 128 --sample 50
      jdiff plan --net DiT-S/2 --topology cpu:8 --mesh data=2,fsdp=4 --batch 64

    TPU topologies want TPU's compiler, not a TPU: pip install 'jdiff[aot]'. A plan of DiT-XL/2 takes a minute or two.
    """

    sweep: bool = False  # a table over meshes, batches and remat policies, the best marked
    meshes: tuple[str, ...] = ()  # of the sweep; none: data and fsdp in powers of two
    batches: tuple[int, ...] = ()  # of the sweep; none: batch
    remats: tuple[str, ...] = ("none", "full")  # of the sweep
    timeout: float = 900.0  # seconds that one compilation may take
    how: bool = True  # say how each figure was come by
    out: Path | None = None  # write the sweep's table to this file too


def plan(config: PlanConfig, timeout: float = 900.0) -> Plan:
    """`jdiff.plan.plan` in a process of its own. ValueError for what does not fit together, a compiler that is not
    installed, gave up, or took longer than `timeout` seconds."""
    topology = chips.parse(config.topology)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([_root(), *filter(None, [os.environ.get("PYTHONPATH")])])}
    if topology.kind == "cpu":
        flags = env.get("XLA_FLAGS", "")
        env |= {"JAX_PLATFORMS": "cpu"}
        env["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={topology.shape[0]}"
    else:
        if importlib.util.find_spec("libtpu") is None:
            raise ValueError(
                f"{config.topology} wants TPU's compiler, which is not installed (no TPU is needed): "
                "pip install 'jdiff[aot]'"
            )
        env |= LIBTPU
        env.pop("XLA_FLAGS", None)  # meant for this machine: TPU's compiler ends the process at a flag it does not know
    names = {f.name for f in dataclasses.fields(PlanConfig)}
    options = json.dumps({k: v for k, v in dataclasses.asdict(config).items() if k in names})
    command = [sys.executable, "-m", "jdiff.plan.worker", options]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{_short(config)}: not compiled within {timeout:.0f} s; --timeout allows more") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ValueError(f"{_short(config)}: the compiler gave up: {said[-1][:400] if said else done.returncode}")
    found = json.loads(lines[-1])
    if "error" in found:
        raise ValueError(found["error"])
    return Plan.from_json(found)


def _root() -> str:
    return str(Path(__file__).parents[2])


def _short(c: PlanConfig) -> str:
    return f"{c.net} on {c.topology}, mesh {c.mesh or 'data'}, batch {c.batch}, remat {c.remat}"


def run(options: PlanOptions) -> None:
    """Print what options ask for."""
    base = PlanConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(PlanConfig)})
    if options.sweep:
        _sweep(options, base)
        return
    found = plan(base, options.timeout)
    print(report(found, options.how), flush=True)
    if not found.fits:
        print(f"\n{_short(base)} does not fit by {amount(found.over)}; looking for what would:", flush=True)
        print(remedy(base, options.timeout))


def _sweep(options: PlanOptions, base: PlanConfig) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    all_of = list(candidates(base, options.meshes, options.batches, options.remats))
    plans, refused = [], []
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True)) as bar:  # beside the table, which may go to a file
        task = bar.add_task("", total=len(all_of))
        for c in all_of:
            bar.update(task, description=f"mesh {c.mesh or 'data'}, batch {c.batch}, remat {c.remat}")
            try:
                plans.append(plan(c, options.timeout))
            except ValueError as error:
                refused.append(f"- {_short(c)}: {error}")
            bar.advance(task)
        bar.update(task, description="")
    text = table(plans) + "".join(f"\n{line}" for line in ["", *refused] if refused)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def candidates(
    base: PlanConfig, over: tuple[str, ...] = (), batches: tuple[int, ...] = (), remats: tuple[str, ...] = ("none",)
) -> Iterator[PlanConfig]:
    """The configurations of a sweep."""
    n = math.prod(chips.parse(base.topology).shape)
    if base.topology.split(":")[0] in chips.CHIPS:
        n *= chips.CHIPS[base.topology.split(":")[0]].devices
    over = over or tuple(f"data={n // k},fsdp={k}" for k in (2**i for i in range(n.bit_length())) if n % k == 0)
    remats = ("none",) if base.sample else remats
    for mesh, batch, remat in itertools.product(over, batches or (base.batch,), remats):
        yield dataclasses.replace(base, mesh=mesh, batch=batch, remat=remat)


def remedy(base: PlanConfig, timeout: float = 900.0) -> str:
    """What would fit in base's place: remat on the same mesh, then larger fsdp axes; each is compiled to be sure."""
    from jdiff.mesh import parse

    now, tried = parse(base.mesh).get("fsdp", 1), []
    more = [c for c in candidates(base) if parse(c.mesh)["fsdp"] > now]
    options = [] if base.sample or base.remat == "full" else [dataclasses.replace(base, remat="full")]
    options += list(reversed(more)) + ([dataclasses.replace(c, remat="full") for c in more[-1:]] if options else [])
    for c in options:
        try:
            found = plan(c, timeout)
        except ValueError:  # an axis that does not divide
            continue
        tried.append(f"mesh {c.mesh or 'data'}, remat {c.remat}")
        if found.fits:
            needs = amount(sum(found.memory.values()))
            return f"--mesh {c.mesh or repr('')} --remat {c.remat} fits, with {needs} a device"
    return f"none of these does: {'; '.join(tried) or 'no other mesh divides'}. Take a smaller batch or more chips"
