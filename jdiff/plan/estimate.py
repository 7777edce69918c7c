"""What a plan says: bytes, FLOPs, collectives, and a roofline of a step."""

import re
import time
from dataclasses import asdict, dataclass
from typing import Any

from . import chips, hlo, kept
from .program import Built, PlanConfig, build


@dataclass(frozen=True)
class Plan:
    """One compiled configuration; numbers are those of one device, bytes and seconds, unless said.

    fits: whether it compiles into the device's memory; over: by how much it does not, where the compiler says so.
    memory: {what: bytes}. collectives: (kind, axes, times, bytes received). seconds: {"arithmetic", "memory", "links"}:
    the least that each alone takes, from published peaks; empty where there are none.
    """

    config: PlanConfig
    devices: int
    fits: bool
    over: float
    capacity: float
    memory: dict[str, float]
    kept: float | None
    flops: float
    useful: float
    collectives: tuple[tuple[str, str, int, float], ...]
    seconds: dict[str, float]
    compile_seconds: float

    @property
    def at_least(self) -> float:
        """Seconds a step if arithmetic, memory and links overlap wholly."""
        return max(self.seconds.values(), default=float("nan"))

    @property
    def at_most(self) -> float:
        """Seconds a step if nothing overlaps, each still at its peak."""
        return sum(self.seconds.values()) if self.seconds else float("nan")

    def mfu(self, seconds: float) -> float:
        """Useful FLOPs a second over the published peak."""
        return self.useful / seconds / self._peak()

    def _peak(self) -> float:
        chip = chips.CHIPS[chips.parse(self.config.topology).kind]
        return chip.flops / chip.devices

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(found: dict[str, Any]) -> "Plan":
        config = PlanConfig(**{**found["config"], "ema": tuple(found["config"]["ema"])})
        return Plan(**{**found, "config": config, "collectives": tuple(map(tuple, found["collectives"]))})


def plan(config: PlanConfig) -> Plan:
    """Compile config's program for its topology in this process, and read it.

    The process must see the topology: as many CPU devices as cpu:N names, or libtpu's environment (`command.plan` makes
    a process that does). ValueError for what does not fit together.
    """
    topology = chips.parse(config.topology)
    devices = find_devices(topology)
    built = build(config, devices)
    n = len(devices)
    start = time.perf_counter()
    try:
        found = kept.compiled(built.traced.lower(), topology.name)
    except Exception as error:  # XLA's own, of no public kind
        over, capacity = _out_of_memory(str(error))
        if not over:
            raise
        memory, counts = dict(built.parts), built.counted()
        seconds = time.perf_counter() - start
        return Plan(
            config, n, False, over, capacity, memory, counts.kept, counts.flops / n, counts.useful / n, (), {}, seconds
        )  # fmt: skip
    return read(config, built, *found)


def read(config: PlanConfig, built: Built, text: str, sizes: Any, seconds: float) -> Plan:
    """The plan of a compiled program: its text, its memory as `memory_analysis` gives it, seconds that it took.

    seconds: 0 for a program that was compiled for an earlier plan.
    """
    topology, n, counts = chips.parse(config.topology), built.mesh.size, built.counted()
    moved = hlo.Program(text).moved(dict(built.mesh.shape))
    memory = built.parts | {
        "batch and padding": sizes.argument_size_in_bytes - sum(built.parts.values()),
        "results": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
    }
    chip = chips.CHIPS.get(topology.kind)
    capacity = chip.hbm / chip.devices if chip else float("nan")
    collectives = tuple((*key, moved.counts[key], size) for key, size in sorted(moved.collectives.items()))
    return Plan(
        config, n, True, 0.0, capacity, memory, counts.kept, counts.flops / n, counts.useful / n, collectives,
        _roofline(chip, counts.flops / n, moved), seconds,
    )  # fmt: skip


def _roofline(chip: chips.Chip | None, flops: float, moved: hlo.Moved) -> dict[str, float]:
    if chip is None:
        return {}
    received = sum(moved.collectives.values())
    rates = {
        "arithmetic": (flops, chip.flops),
        "memory": (moved.hbm, chip.hbm_rate),
        "links": (received, chip.link_rate),
    }
    return {name: amount / (rate / chip.devices) for name, (amount, rate) in rates.items()}


def _out_of_memory(message: str) -> tuple[float, float]:
    """(bytes too many, bytes there are) of the compiler's message; zeros for another error."""
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    size = r"([\d.]+)([KMG]?)"
    found = re.search(rf"Used {size} of {size} hbm", message)
    found = found or re.search(rf"\({size}\) exceeds available HBM \({size}\)", message)
    if not found:
        return 0.0, 0.0
    used, there = float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]
    return used - there, there


def find_devices(topology: chips.Topology) -> list[Any]:
    """The devices of a topology; ValueError that says what is missing."""
    import jax

    if topology.kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < topology.shape[0]:
            raise ValueError(
                f"{topology.name} asks for {topology.shape[0]} devices, but this process has {len(devices)}: set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.shape[0]} before JAX starts"
            )
        return devices[: topology.shape[0]]
    from jax.experimental import topologies

    one = {"chips_per_host_bounds": [1, 1, 1]} if max(topology.shape) == 1 else {}  # a host has four chips otherwise
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **one).devices)
    except Exception as error:  # libtpu's own, of no public kind
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"the TPU compiler knows no topology {topology.name}; known: {chips.known()} ({reason})"
        ) from error
