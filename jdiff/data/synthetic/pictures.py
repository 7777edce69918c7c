"""Contact sheets of graphs, point sets, videos and signals, as PNG. What draws imports Matplotlib itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .points import Points

COLOURS = ("#444444", "#3355dd", "#dd3322", "#22aa44")  # C, N, O, F, and then around


def _sheet(count: int, columns: int, **options: Any) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.8 * columns, 1.8 * rows), squeeze=False, layout="constrained", **options
    )
    for axis in axes.ravel():
        axis.set_axis_off()
    return figure, list(axes.ravel())[:count]


def _save(figure: Any, path: str | Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=100)
    plt.close(figure)
    return Path(path)


def layout(adj: np.ndarray, steps: int = 200) -> np.ndarray:
    """Positions (n, 2) of a graph's nodes: edges pull, pairs push (Fruchterman and Reingold 1991); from a circle."""
    n = len(adj)
    angle = 2 * np.pi * np.arange(n) / max(n, 1)
    at = np.stack([np.cos(angle), np.sin(angle)], 1)
    for step in range(steps):
        apart = at[:, None] - at[None]
        far = np.linalg.norm(apart, axis=-1) + np.eye(n) + 1e-9
        force = (apart / far[..., None] * (1 / (n * far) - (adj > 0) * far**2)[..., None]).sum(1)
        size = np.linalg.norm(force, axis=1, keepdims=True) + 1e-9
        at = at + force / size * np.minimum(size, 0.1 * (1 - step / steps))
    return at


def graph_sheet(graphs: Mapping[str, np.ndarray], path: str | Path, columns: int = 6) -> Path:
    """Draw a batch of graphs: nodes coloured by their largest feature, edges as thick as their order; no padding."""
    x, adj = np.asarray(graphs["x"]), np.asarray(graphs["adj"])
    figure, axes = _sheet(len(x), columns)
    for axis, features, edges in zip(axes, x, adj, strict=True):
        there = (features != 0).any(-1) | (edges != 0).any(-1)
        edges, kinds = edges[np.ix_(there, there)], features[there].argmax(-1)
        at = layout(edges)
        for i, j in np.argwhere(np.triu(edges, 1) > 0):
            axis.plot(*at[[i, j]].T, color="#888888", lw=1.2 * edges[i, j] ** 1.5, zorder=1)
        axis.scatter(*at.T, c=[COLOURS[k % len(COLOURS)] for k in kinds], s=30, zorder=2)
        axis.margins(0.15)
        axis.set_aspect("equal")
    return _save(figure, path)


def point_sheet(sets: Mapping[str, Points], path: str | Path, columns: int = 4) -> Path:
    """Draw point sets of 2 or 3 coordinates (of more: the first 3), with a few of their normals."""
    figure, axes = _sheet(len(sets), columns)
    for axis, (name, found) in zip(axes, sets.items(), strict=True):
        x = found.x[:, :3]
        turn = np.eye(2) if x.shape[1] == 2 else np.array([[0.9, 0.2], [-0.4, 0.5], [0.1, 0.85]])  # a view from aside
        flat = x @ turn
        axis.scatter(*flat.T, s=2, c=x[:, -1], cmap="viridis")
        if found.normals is not None:
            reach = 0.12 * np.ptp(x) * (found.normals[:12, :3] @ turn)
            axis.quiver(*flat[:12].T, *reach.T, angles="xy", scale_units="xy", scale=1, width=0.006, color="#dd3322")
        axis.set(title=f"{name}, {found.dimension}-d", aspect="equal")
    return _save(figure, path)


def video_sheet(frames: np.ndarray, path: str | Path, rows: int = 6) -> Path:
    """Draw clips (n, frames, h, w, 1) in [-1, 1], a row each, from left to right in time."""
    from .video import sheet

    figure, (axis,) = _sheet(1, 1)
    figure.set_size_inches(0.8 * frames.shape[1], 0.8 * min(rows, len(frames)))
    axis.imshow(sheet(frames, rows), cmap="gray", interpolation="nearest")
    return _save(figure, path)


def signal_sheet(clean: np.ndarray, noisy: np.ndarray, path: str | Path, rows: int = 6) -> Path:
    """Draw signals (n, length), a row each: clean over noisy."""
    figure, axes = _sheet(min(rows, len(clean)), 1)
    figure.set_size_inches(8, 1.2 * len(axes))
    for axis, x, y in zip(axes, clean, noisy, strict=False):
        axis.plot(y, color="#bbbbbb", lw=0.8)
        axis.plot(x, color=COLOURS[1], lw=1.2)
    return _save(figure, path)


KINDS = ("graphs", "points", "video", "audio")


def show(what: Sequence[str] = KINDS, folder: str | Path = ".") -> list[Path]:
    """The sheets of this package's own sets: molecules, communities, point sets, moving shapes, chirps in noise.

    ValueError for a kind that is none of KINDS.
    """
    from . import audio, graphs, points, video

    if unknown := [kind for kind in what if kind not in KINDS]:
        raise ValueError(f"show: unknown kind {unknown[0]!r}; expected some of {', '.join(KINDS)}")
    folder, out = Path(folder), []
    if "graphs" in what:
        out.append(graph_sheet(graphs.molecules(18), folder / "molecules.png"))
        out.append(graph_sheet(graphs.communities(18), folder / "communities.png"))
    if "points" in what:
        out.append(point_sheet({k: f(800) for k, f in points.ALL.items()}, folder / "points.png"))
    if "video" in what:
        out.append(video_sheet(video.moving_shapes(6, frames=8, size=16, radius=3).frames, folder / "video.png"))
    if "audio" in what:
        out.append(signal_sheet(*audio.noisy_chirps(6, 256), folder / "audio.png"))
    return out
