"""Kill a training run with SIGKILL at random moments, start it again each time, and compare it bitwise.

    python benchmarks/kill_resume.py --kills 10

A reference run is never stopped and keeps every checkpoint. The other run has the same configuration. Of three
kills one comes a random time after a random step, one then waits for a checkpoint that is being written, and one
comes like the first or, every other time, while the process still starts.
After each kill every finished checkpoint must be readable and bitwise equal to the reference's of the same step;
at the end all of the state (parameters, optimizer, averages), all snapshots and all rows of metrics must be.
Exit status 1 where anything differs. About 6 seconds a kill.
"""

import argparse
import csv
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

EVERY = 8


def child(out: str, steps: int, keep: int) -> None:
    """Train a tiny DiT on digits; programs come compiled from a cache that all runs share."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(Path(out).parent / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    from jdiff.train import TrainConfig, train

    net = {"width": 16, "depth": 1, "heads": 2, "patch": 4}
    train(
        TrainConfig(
            out=out, net="DiT", net_options=net, batch=16, steps=steps, warmup=10, log_every=4,
            checkpoint_every=EVERY, snapshot_every=3 * EVERY, keep=keep, tensorboard=False,
        )
    )  # fmt: skip


def start(out: Path, steps: int, keep: int = 2) -> subprocess.Popen:
    command = [sys.executable, __file__, "--child", str(out), "--steps", str(steps), "--keep", str(keep)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def unfinished(out: Path, since: float) -> bool:
    """Whether a checkpoint is being written that was begun after `since`: older ones are rests of earlier kills."""
    try:
        return any(p.stat().st_ctime > since for p in (out / "checkpoints").glob("*tmp*"))
    except FileNotFoundError:  # finished between two looks
        return False


def logged(out: Path) -> int:
    """The last step in metrics.csv."""
    try:
        return int((out / "metrics.csv").read_text().split("\n")[-2].split(",")[0])
    except (OSError, IndexError, ValueError):
        return 0


def wait(process: subprocess.Popen, done: Callable[[], bool], seconds: float = 0.0) -> None:
    """Until `done()` and then `seconds` more, or the end of the process."""
    while process.poll() is None and not done():
        time.sleep(0.0005)
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.0005)


def arrays(folder: Path) -> dict[str, bytes]:
    """Every array of a finished step, read without knowing what is in it."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    items, found = [p.name for p in folder.iterdir() if p.is_dir() and p.name != "meta"], {}
    host = ocp.RestoreArgs(restore_type=np.ndarray)  # whatever the devices were that it was saved from
    with ocp.PyTreeCheckpointer() as reader:
        for name in items:
            shapes = reader.metadata(folder / name).item_metadata.tree
            found[name] = reader.restore(folder / name, restore_args=jax.tree.map(lambda _: host, shapes))
    leaves = jax.tree.leaves_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def differences(run: Path, reference: Path, kind: str) -> list[str]:
    from jdiff import checkpoint

    wrong = []
    for step in checkpoint.steps(run / kind):
        a, b = arrays(run / kind / str(step)), arrays(reference / kind / str(step))
        wrong += [f"{kind}/{step}{name}" for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
    return wrong


def rows(out: Path) -> list[list[str]]:
    with open(out / "metrics.csv") as file:
        return [row[:4] for row in csv.reader(file)]  # not the two columns that are times


def main(kills: int, steps: int, seed: int, base: Path) -> int:
    from jdiff import checkpoint

    reference, run, rng = base / "reference", base / "run", random.Random(seed)
    shutil.rmtree(reference, ignore_errors=True), shutil.rmtree(run, ignore_errors=True)
    process = start(base / "warm", steps, keep=1)  # fills the cache
    if not process.stdout.readline():
        raise SystemExit("the run itself fails: see python benchmarks/kill_resume.py --child FOLDER --keep 1")
    process.kill(), process.wait()
    began = time.monotonic()
    process = start(reference, steps, keep=steps)
    process.stdout.readline()
    startup = time.monotonic() - began
    process.wait()
    print(f"reference: {startup:.1f} s to the first row, {time.monotonic() - began:.1f} s in all", flush=True)

    wrong, killed, during, last = [], 0, 0, None
    while killed < kills:
        began, process = time.time(), start(run, steps)
        if killed % 6 == 5:
            wait(process, lambda: True, rng.uniform(0, startup))
        else:
            goal = (last or 0) + rng.randint(1, int(1.6 * steps / kills))
            wait(process, lambda goal=goal: logged(run) >= min(goal, steps - 20), rng.uniform(0, 0.2))
        if killed % 3 == 1:
            wait(process, lambda began=began: unfinished(run, began))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        killed, during = killed + 1, during + unfinished(run, began)
        found = checkpoint.latest_step(run / "checkpoints")
        if last is not None and (found is None or found < last):
            wrong.append(f"the checkpoint of step {last} was lost")
        wrong += differences(run, reference, "checkpoints")
        last = found
        state = "in the middle of a write" if unfinished(run, began) else "between writes"
        print(f"kill {killed}: {state}; last finished step {found}; differences so far: {len(wrong)}", flush=True)
    if start(run, steps).wait():
        wrong.append("the last start failed")
    wrong += differences(run, reference, "checkpoints") + differences(run, reference, "snapshots")
    if checkpoint.steps(run / "snapshots") != checkpoint.steps(reference / "snapshots"):
        wrong.append("the snapshots are of other steps")
    if checkpoint.latest_step(run / "checkpoints") != steps:
        wrong.append("the run did not reach its last step")
    if rows(run) != rows(reference):
        wrong.append("metrics.csv")
    print(f"{killed} kills, {during} of them in the middle of a write:", wrong or "bitwise equal")
    return int(bool(wrong) or killed < kills)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=240, help="of the run, with a checkpoint every eighth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the runs (default: a temporary one)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=int, default=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.steps, arguments.keep)
    elif arguments.out:
        sys.exit(main(arguments.kills, arguments.steps, arguments.seed, arguments.out))
    else:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(main(arguments.kills, arguments.steps, arguments.seed, Path(folder)))
