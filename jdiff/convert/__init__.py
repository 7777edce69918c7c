"""Weights of published nets to ours and back: `jdiff convert`.

    net, left = convert.load("DiT-XL-2-256x256.pt", "dit", net)        # net: one of ours, of any parameters
    convert.save(net, "dit", "back.safetensors")                       # under their names again

Nothing in a file is executed (`torch_file`); which array goes where is a table (`layouts`).
"""

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdiff.nets.patches import resize_positions

from .layouts import LAYOUTS as LAYOUTS
from .layouts import Layout
from .torch_file import WeightsError as WeightsError
from .torch_file import read as read

__all__ = ["LAYOUTS", "WeightsError", "load", "read", "save", "to_ours", "to_theirs"]

N = TypeVar("N", bound=nnx.Module)


def load(path: str | Path, layout: str, net: N, *, ema: bool = True, resize: bool = False) -> tuple[N, tuple[str, ...]]:
    """(net with the parameters of the file, names in it that are left aside).

    net may be abstract (`nnx.eval_shape`). ema: take the averaged weights where the file has them beside the others.
    resize: weights of another image size are welcome: learned positions are interpolated (`patches.resize_positions`),
    fixed ones are the net's (`rope_scale`). WeightsError for a file that `read` refuses, or that does not fit.
    """
    try:
        return to_ours(read(path), layout, net, ema=ema, resize=resize)
    except WeightsError as error:
        text = str(error)
        raise WeightsError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def to_ours(
    arrays: Mapping[str, np.ndarray], layout: str, net: N, *, ema: bool = True, resize: bool = False
) -> tuple[N, tuple[str, ...]]:
    """`load` of arrays under their names. WeightsError lists missing, extra and misshapen entries, the first ten."""
    form = _layout(layout, net)
    moves = list(form.rows(net))
    names = [name for move in moves for name in move.theirs]
    inside, others = _choose(arrays, form, names, ema)
    if arrays and not any(name in inside for name in names):
        first = ", ".join(list(arrays)[:5])
        raise WeightsError(
            f"no name of layout {layout} is in the file, which has {first}, ..: another layout? {', '.join(LAYOUTS)}"
        )
    spare = [name for name in inside if name not in set(names)]
    left = [name for name in spare if re.fullmatch(form.ignored, name)]
    problems = [("missing", name) for name in names if name not in inside]
    extra = [("not of this net", name) for name in spare if name not in left]
    flat: dict[str, Any] = {"/".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(net))}
    found: dict[str, Any] = {}
    for move in moves:
        if any(name not in inside for name in move.theirs):
            continue
        shape = flat[move.ours].shape
        want = shape if move.slice is None else shape[1:]
        given = [np.asarray(inside[name], np.float32) for name in move.theirs]
        try:
            array = move.here(given)
        except (ValueError, IndexError) as error:
            problems.append((f"shape {[a.shape for a in given]} cannot be {want}: {error}", move.theirs[0]))
            continue
        if resize and move.extras is not None and array.shape != want:
            try:
                array = resize_positions(array, getattr(net, "grid"), move.extras)  # noqa: B009
            except ValueError as error:
                problems.append((f"cannot be resized: {error}", move.theirs[0]))
                continue
        if array.shape != want:
            shown = ", ".join(str(a.shape) for a in given)
            problems.append((f"shape {shown}, as ours {array.shape}; expected {want}", " and ".join(move.theirs)))
        elif move.slice is None:
            found[move.ours] = array
        else:
            found.setdefault(move.ours, np.zeros(shape, np.float32))[move.slice] = array
    patches = math.prod(getattr(net, "grid", ()))
    for name in left:  # fixed positions are not read, but tell the image size
        if name.endswith("pos_embed") and not resize and (rows := inside[name].shape[-2]) != patches:
            problems.append((f"positions of {rows} patches, where the net has {patches}", name))
    if problems or extra:
        raise WeightsError(_report(layout, net, [*problems, *extra], len(names)))
    if unset := [path for path in flat if path not in found]:
        raise WeightsError(f"layout {layout} says nothing of {', '.join(unset[:10])}, which this net has")
    place = lambda path, v: v.replace(jnp.asarray(found["/".join(map(str, path))], v.dtype))
    state = nnx.from_flat_state([(path, place(path, v)) for path, v in nnx.to_flat_state(nnx.state(net))])
    return nnx.merge(nnx.graphdef(net), state), (*left, *others)


def _choose(
    arrays: Mapping[str, np.ndarray], form: Layout, names: Sequence[str], ema: bool
) -> tuple[Mapping[str, np.ndarray], list[str]]:
    """(the arrays that hold the net, without their prefix; the other names): averages if asked for and there."""
    for old, new in form.older:
        arrays = {name.replace(old, new): a for name, a in arrays.items()}
    if ema and (place := form.averages(arrays, names)):
        used = set(place.values())
        return {name: arrays[there] for name, there in place.items()}, [name for name in arrays if name not in used]
    hits = {p: sum(f"{p}{name}" in arrays for name in names) for p in form.prefixes}
    prefix = max([p for p in hits if ema or not p.startswith("ema")] or [""], key=lambda p: hits.get(p, 0))
    if not hits.get(prefix) and any(hits.values()):
        raise WeightsError("the file holds averaged weights alone; read those (leave out --no-ema)")
    return (
        {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)},
        [name for name in arrays if not name.startswith(prefix)],
    )


def to_theirs(net: nnx.Module, layout: str) -> dict[str, np.ndarray]:
    """The net's parameters under the layout's names, without a prefix and without what the layout ignores."""
    flat = {"/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(net))}
    found: dict[str, np.ndarray] = {}
    for move in _layout(layout, net).rows(net):
        ours = flat[move.ours] if move.slice is None else flat[move.ours][move.slice]
        found |= dict(zip(move.theirs, move.there(ours), strict=True))
    return found


def save(net: nnx.Module, layout: str, path: str | Path) -> Path:
    """Write `to_theirs` as safetensors, whole or not at all."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(a) for name, a in to_theirs(net, layout).items()}
    temporary = f"{path}.tmp"
    save_file(arrays, temporary)
    os.replace(temporary, path)
    return Path(path)


def _layout(name: str, net: Any) -> Layout:
    if name not in LAYOUTS:
        nearest = difflib.get_close_matches(name, LAYOUTS, n=1, cutoff=0.0)
        raise ValueError(f"unknown layout {name!r}; did you mean {nearest[0]!r}? Known: {', '.join(LAYOUTS)}")
    if not isinstance(net, LAYOUTS[name].nets):
        fits = " or ".join(kind.__name__ for kind in LAYOUTS[name].nets)
        raise ValueError(f"layout {name} is {LAYOUTS[name].doc}: it fits a {fits}, not a {type(net).__name__}")
    return LAYOUTS[name]


def _report(layout: str, net: Any, problems: Sequence[tuple[str, str]], total: int) -> str:
    shown = "\n".join(f"  {name}: {what}" for what, name in problems[:10])
    more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
    return (
        f"{len(problems)} entries do not fit layout {layout} of {net.name}, which has {total}:\n{shown}{more}\n"
        "Check --net and its options (num_classes, learn_sigma, null_class, ..), and --size: --resize takes weights of "
        "another one"
    )
