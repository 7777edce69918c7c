"""Plans as text: one in full, with how each figure was come by, or several as a Markdown table."""

import math
from collections.abc import Sequence

from . import chips
from .estimate import Plan

HOW = """\
How each figure was come by
  parameters, optimizer state, averages: exact, from shapes and how they lie on the mesh
  temporaries, results: the compiler's own plan of memory
  activations: what the forward pass hands to the backward pass in the trace; the compiler may keep less or more. A part
    of the temporaries, not beside them
  FLOPs: matrix products and convolutions of the traced program, loops times their length. Useful ones: of training, 3
    times the forward pass; what is computed again does not count
  collectives: of the compiled program, loops times their trip counts; bytes that a device receives, (k - 1)/k of a
    gathered array over k devices, twice that for all-reduce
  memory traffic: operands and results of the compiled instructions that lie in the device's memory, slices as slices
  step time: a model, not a measurement: FLOPs, memory traffic and received bytes, each over the published peak. At
    least: all three overlap; without overlap: their sum. No step reaches a peak: real ones can be slower than both"""


def amount(n: float) -> str:
    """1.23 GB, 45.6 MB, 789 kB, 12 B."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} B"


def report(plan: Plan, how: bool = True) -> str:
    """The plan in full."""
    c = plan.config
    what = f"sampling, {c.sample} evaluations with {c.solver}" if c.sample else "a training step"
    mesh = c.mesh or f"data={plan.devices}"
    lines = [
        f"{c.net}, {what}, on {c.topology} ({plan.devices} devices), mesh {mesh}, batch {c.batch}, remat {c.remat}"
    ]
    lines += ["", "Memory of one device"]
    lines += [f"  {name:32s}{amount(size):>10s}" for name, size in plan.memory.items()]
    if plan.fits:
        lines += [f"  {'in all':32s}{amount(sum(plan.memory.values())):>10s}" + _of(plan)]
    if plan.kept is not None:
        lines += [f"  {'of temporaries, activations':32s}{amount(plan.kept):>10s}  (estimate)"]
    lines += ["  fits" if plan.fits else f"  does not fit by {amount(plan.over)} ({amount(plan.capacity)} can be used)"]
    lines += ["", f"FLOPs of one device: {plan.flops:.3g}, of them useful {plan.useful:.3g}"]
    if plan.fits:
        lines += ["", "Collectives, a device" + ("" if plan.collectives else ": none")]
        lines += [f"  {kind:20s}over {axes:16s}{n:6d} times{amount(b):>10s}" for kind, axes, n, b in plan.collectives]
    if plan.seconds:
        chip = chips.CHIPS[chips.parse(c.topology).kind]
        each = ", ".join(f"{name} {s * 1e3:.3g} ms" for name, s in plan.seconds.items())
        low, high = plan.at_least, plan.at_most
        lines += [
            "",
            f"Step time, modelled: at least {low * 1e3:.3g} ms (MFU {plan.mfu(low):.0%}), without overlap "
            f"{high * 1e3:.3g} ms (MFU {plan.mfu(high):.0%}); {c.batch / high:.4g} to {c.batch / low:.4g} images/s",
            f"  {each}; peaks: {chip.source}",
        ]
    elif plan.fits:
        lines += ["", "Step time: not modelled, a simulated CPU device has no published peaks"]
    took = f"Compiled in {plan.compile_seconds:.1f} s" if plan.compile_seconds else "Compiled before, and kept"
    lines += ["", took]
    return "\n".join([*lines, "", HOW] if how else lines)


def _of(plan: Plan) -> str:
    return "" if math.isnan(plan.capacity) else f" of {amount(plan.capacity)}"


def table(plans: Sequence[Plan]) -> str:
    """A Markdown table of plans, a row each; the most images a second, by the model, is marked."""
    speed = lambda p: p.config.batch / p.at_most if p.fits and p.seconds else 0.0
    best = max(map(speed, plans), default=0.0)
    head = [
        "topology",
        "mesh",
        "batch",
        "remat",
        "state",
        "temporaries",
        "FLOPs",
        "received",
        "step, ms",
        "MFU",
        "fits",
    ]
    rows = [head, ["---"] * len(head)]
    for p in plans:
        c, rest = p.config, {"temporaries", "batch and padding", "results"}
        state = sum(v for k, v in p.memory.items() if k not in rest)
        low, high = p.at_least, p.at_most
        known = p.fits and p.seconds
        rows.append([
            c.topology,
            c.mesh or f"data={p.devices}",
            str(c.batch),
            c.remat,
            amount(state),
            amount(p.memory["temporaries"]) if p.fits else "-",
            f"{p.flops:.3g}",
            amount(sum(b for *_, b in p.collectives)) if p.fits else "-",
            f"{low * 1e3:.3g} to {high * 1e3:.3g}" if known else "-",
            f"{p.mfu(high):.0%} to {p.mfu(low):.0%}" if known else "-",
            ("yes" if p.fits else f"no, by {amount(p.over)}") + (" (best)" if best and speed(p) == best else ""),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
