"""Several processes on one machine (gloo): train, kill one at a random moment, start all again, compare bitwise.

    python benchmarks/processes.py --layouts 2x2 4x1 --kills 2

A layout is PROCESSESxDEVICES. For each: a reference run that nothing stops; the same run with one process of it killed
(SIGKILL) at random moments, the others left to end by themselves, all started again; the finished checkpoints must be
bitwise the reference's. Then SIGTERM to one process: all save the same step and end with status 143. Then the
reference's middle checkpoint goes on in other layouts and meshes: the same losses, and parameters to 1e-5. Then
processes that disagree: all name the entry. Exit status 1 where anything differs.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

from kill_resume import differences, logged, rows, wait

if TYPE_CHECKING:
    from jdiff.train import TrainConfig

EVERY, HEARTBEAT, JOINING = 6, 20, 60


def config(out: str, steps: int, mesh: str, batch: int = 16) -> "TrainConfig":
    """A run of a tiny DiT on digits."""
    from jdiff.train import TrainConfig

    net = {"width": 16, "depth": 1, "heads": 2, "patch": 4}
    return TrainConfig(
        out=out, net="DiT", net_options=net, batch=batch, steps=steps, warmup=2, log_every=3, optimizer="sgd",
        schedule="constant", checkpoint_every=EVERY, snapshot_every=2 * EVERY, keep=steps, tensorboard=False, mesh=mesh,
    )  # fmt: skip


def child(out: str, steps: int, processes: str, mesh: str, batch: int) -> int:
    """One process of a run."""
    from jdiff import pod
    from jdiff.train import train

    try:
        pod.start(processes, heartbeat=HEARTBEAT, joining=JOINING)
        train(config(out, steps, mesh, batch))
    except pod.Preempted:
        return 143
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def start(out: Path, layout: str, steps: int, mesh: str = "fsdp=4", batches: tuple[int, ...] = (16,)) -> list:
    """All processes of a run; process i takes the i-th batch size, or the last."""
    n, devices = map(int, layout.split("x"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    which = lambda i: f"127.0.0.1:{port},{n},{i}" if n > 1 else ""
    run = [sys.executable, __file__, "--child", str(out), "--steps", str(steps), "--mesh", mesh]
    each = lambda i: [*run, "--processes", which(i), "--batch", str(batches[min(i, len(batches) - 1)])]
    out.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(n):
        with said(out, i).open("w") as complaints:
            found.append(subprocess.Popen(each(i), env=env, stdout=subprocess.DEVNULL, stderr=complaints))
    return found


def said(out: Path, i: int) -> Path:
    """The file with what process i has complained of."""
    return out.parent / f"{out.name}.{i}.txt"


def ended(processes: list) -> list[int]:
    return [p.wait() for p in processes]


def kills(layout: str, base: Path, n: int, steps: int, rng: random.Random) -> list[str]:
    """A run with one process killed n times against one that nothing stops."""
    reference, run, wrong, last = base / "reference", base / "run", [], 0
    began = time.monotonic()
    if any(ended(start(reference, layout, steps))):
        return [f"{layout}: the reference run failed"]
    print(f"{layout}: reference {time.monotonic() - began:.0f} s", flush=True)
    for k in range(n):
        processes = start(run, layout, steps)
        goal = min(last + rng.randint(1, 2 * EVERY), steps - 3)
        wait(processes[0], lambda goal=goal: logged(run) >= goal, rng.uniform(0, 0.5))
        victim = rng.randrange(len(processes))
        processes[victim].kill()
        began = time.monotonic()
        codes = ended(processes)
        last = max((int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()), default=0)
        wrong += differences(run, reference, "checkpoints")
        print(
            f"{layout}: kill {k + 1} of {n}: process {victim}; the others ended {time.monotonic() - began:.0f} s later"
            f" with {codes}; last checkpoint {last}; differences {len(wrong)}",
            flush=True,
        )
    if any(ended(start(run, layout, steps))):
        wrong.append("the last start failed")
    wrong += differences(run, reference, "checkpoints") + differences(run, reference, "snapshots")
    wrong += ["metrics.csv"] if rows(run) != rows(reference) else []
    print(f"{layout}: after {n} kills:", wrong or "bitwise equal", flush=True)
    return wrong


def preempted(layout: str, base: Path, steps: int) -> list[str]:
    """SIGTERM to the last process: all save one step and end; the run goes on to bitwise the same end."""
    run = base / "preempted"
    processes = start(run, layout, steps)
    wait(processes[0], lambda: logged(run) >= 3)
    processes[-1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    codes = ended(processes)
    saved = max((int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()), default=0)
    print(
        f"{layout}: SIGTERM: ended {time.monotonic() - began:.1f} s later with {codes}, saved step {saved}", flush=True
    )
    wrong = [] if codes == [143] * len(codes) and 3 <= saved < steps else [f"SIGTERM: {codes}, step {saved}"]
    wrong += ["the start after SIGTERM failed"] if any(ended(start(run, layout, steps))) else []
    if saved % EVERY:
        shutil.rmtree(run / "checkpoints" / str(saved))  # the reference has none of that step
    return wrong + differences(run, base / "reference", "checkpoints")


def moved(layout: str, base: Path, steps: int) -> list[str]:
    """The reference's middle checkpoint goes on elsewhere."""
    import numpy as np
    from kill_resume import arrays

    wrong, middle = [], steps // 2 // EVERY * EVERY
    for other, mesh in (("2x2", "data=2,fsdp=2"), ("4x1", "data=4"), ("1x4", "data=2,tensor=2"), ("1x2", "")):
        if other == layout:
            continue
        run = base / f"moved-{other}"
        shutil.copytree(
            base / "reference", run, ignore=lambda d, names: [s for s in names if s.isdigit() and int(s) > middle]
        )
        if any(ended(start(run, other, steps, mesh))):
            wrong.append(f"{layout} to {other} failed")
            continue
        a, b = (arrays(folder / "checkpoints" / str(steps)) for folder in (run, base / "reference"))
        close = lambda x, y: np.allclose(
            np.frombuffer(x, np.float32), np.frombuffer(y, np.float32), rtol=1e-5, atol=1e-5
        )
        values = [name for name in b if "params" in name and "sums" not in name]  # equal checksums are equal bits
        far = [name for name in values if not close(a[name], b[name])]
        loss = np.array([[r[1] for r in rows(f)[1:]] for f in (run, base / "reference")], float)
        far += [] if np.allclose(*loss, rtol=1e-5) else ["the losses"]
        print(
            f"{layout} to {other} on {mesh or 'data'}: {far or 'the same'}, loss apart by {np.ptp(loss, 0).max():.1e}",
            flush=True,
        )
        wrong += far
    return wrong


def disagreement(layout: str, base: Path, steps: int) -> list[str]:
    """Processes with other batch sizes: all must say so."""
    codes = ended(start(base / "disagree", layout, steps, batches=(16, 32)))
    words = [said(base / "disagree", i).read_text().strip() for i in range(len(codes))]
    good = all("disagree on batch: 16 in process 0; 32 in process 1" in text for text in words)
    print(f"{layout}: {words[0][-200:]}", flush=True)
    return [] if good and codes == [2] * len(codes) else [f"disagreement: {codes} {words}"]


def main(layouts: list[str], n: int, steps: int, seed: int, base: Path) -> int:
    wrong, rng = [], random.Random(seed)
    for layout in layouts:
        here = base / layout
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir(parents=True)
        wrong += kills(layout, here, n, steps, rng) + preempted(layout, here, steps) + moved(layout, here, steps)
        wrong += disagreement(layout, here, steps)
    print("differences:", wrong or "none")
    return int(bool(wrong))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["2x2", "4x1"], help="PROCESSESxDEVICES")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the runs (default: a temporary one)")
    for hidden in ("--child", "--processes", "--mesh"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=16, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        sys.exit(child(a.child, a.steps, a.processes, a.mesh, a.batch))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(main(a.layouts, a.kills, a.steps, a.seed, a.out or Path(folder)))
