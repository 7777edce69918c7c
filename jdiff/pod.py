"""Several processes as one run: started, made sure to run the same thing, fed their rows of a batch, stopped together.

    jdiff train --processes auto ...                  # on a TPU pod or under Slurm: the same command on every host
    jdiff train --processes 10.0.0.2:1234,2,0 ...     # else: the first host's address, how many, which one this is

A run's folder must be one that all processes see. On CPU devices (gloo), give each process two devices or more, or
start four: two processes with one device each crash in gloo (jaxlib 0.10.2).
"""

import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int


class Preempted(RuntimeError):
    """The run was asked to stop (SIGTERM), has saved its last step, and can go on from it."""


def start(processes: str, heartbeat: int = 100, joining: int = 300) -> None:
    """Join this process to the others; "" does nothing. Before anything is computed.

    processes: "auto", what the cluster says, or "HOST:PORT,COUNT,INDEX". heartbeat: seconds after which the others give
    up when a process has died; joining: when one has not come at all. ValueError for another text, or where no cluster
    is found or joined.
    """
    if not processes:
        return
    options: dict[str, Any] = {}
    if processes != "auto":
        found = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", processes)
        if not found or not int(found[3]) < int(found[2]):
            raise ValueError(
                f"processes is {processes!r}; expected auto, or HOST:PORT,COUNT,INDEX with INDEX from 0 to COUNT - 1, "
                "such as 10.0.0.2:1234,2,0"
            )
        options = {"coordinator_address": found[1], "num_processes": int(found[2]), "process_id": int(found[3])}
    try:
        jax.distributed.initialize(**options, heartbeat_timeout_seconds=heartbeat, initialization_timeout=joining)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise ValueError(
            f"the processes of {processes!r} did not find one another: {reason}. Start the same command on every host; "
            "where auto finds no cluster, write HOST:PORT,COUNT,INDEX"
        ) from error
    if jax.device_count() != jax.process_count() * jax.local_device_count():
        raise ValueError(
            f"process {jax.process_index()} of {jax.process_count()} has {jax.local_device_count()} of the "
            f"{jax.device_count()} devices; every process must have the same number"
        )


def agree(**what: Any) -> None:
    """ValueError, in every process, that names the entries in which the processes differ, and who has what.

    what: values that JSON can hold. One process agrees with itself.
    """
    if jax.process_count() == 1:
        return
    for name, values in sorted(_gathered(what).items()):
        texts = [json.dumps(v) for v in values]
        if len(set(texts)) > 1:
            shown = "; ".join(
                f"{t} in process {', '.join(str(i) for i, u in enumerate(texts) if u == t)}"
                for t in dict.fromkeys(texts)
            )
            raise ValueError(f"the processes disagree on {name}: {shown}. Start the same command on every host")


def _gathered(what: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{name: its value in each process}."""
    from jax.experimental import multihost_utils

    mine = np.frombuffer(json.dumps(dict(what)).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.asarray(len(mine), np.int32))))
    padded = np.pad(mine, (0, longest - len(mine)), constant_values=ord(" "))
    each = [json.loads(bytes(row)) for row in np.asarray(multihost_utils.process_allgather(padded), np.uint8)]
    return {name: [one.get(name) for one in each] for name in {k for one in each for k in one}}


def rows(sharding: jax.sharding.Sharding, batch: int) -> Int[np.ndarray, "rows"]:
    """Which rows of a global batch this process's devices hold, ascending."""
    parts = sharding.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for index in parts]))


def place(host: np.ndarray, held: Int[np.ndarray, "rows"], sharding: jax.sharding.Sharding, batch: int) -> Array:
    """The global array of `batch` rows, of which `host` has those that `rows` says."""

    def part(index: Any) -> np.ndarray:  # a slice for each axis
        start, stop, _ = index[0].indices(batch)
        return host[np.searchsorted(held, np.arange(start, stop))]

    return jax.make_array_from_callback((batch, *host.shape[1:]), sharding, part)


class Stop:
    """`stop(step)`, called after every step: was the run asked to stop? True in all processes at the same step."""

    def __init__(self):
        self.asked = False

    def __call__(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self.asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


@contextmanager
def stopping() -> Iterator[Stop]:
    """A Stop that listens to SIGTERM while it is open (several processes: JAX's own service listens)."""
    stop = Stop()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
