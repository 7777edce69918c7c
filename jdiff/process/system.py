"""Systems: a process for each part of a sample, all on one time, seen by one network (GDSS, arXiv 2202.02514).

    graphs = process.system({"x": process.vp_linear(0.1, 1.0), "adj": process.ve(0.1, 1.0)})
    table = jdiff.solvers.ddim()(graphs, jdiff.times.uniform(graphs, 50))    # a table a part, on shared times
    sample = jdiff.sample(denoiser, table, graphs.prior(key, {"x": (16, 9, 4), "adj": (16, 9, 9)}))

The sample is a dict with these keys. The parts are coupled by the network alone, which sees all of them.

Each part may have a time of its own: t is then a dict with the same keys, for `mix`, `diffuse`, conversions and the
network. A schedule over the parts, sorted by name, is a matrix with a column a part (`jdiff.schedules`), and in
training `losses.denoising_loss(.., elements=law)` has a law with a number a part (UniDiffuser, SFD).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .base import Process, Time

Structure = Callable[[PyTree, PyTree], PyTree]


@dataclass(frozen=True)
class System(Process):
    """`parts`: (name, process), sorted by name. `structure(noise, like)`: a linear projection of the noise, or None."""

    parts: tuple[tuple[str, Process], ...]
    structure: Structure | None = None

    def _none(self, t: Time) -> Any:
        names = ", ".join(name for name, _ in self.parts)
        raise TypeError(
            f"a system has a schedule for each of {names}, and none of its own: ask a part, system.part({names!r}); "
            "grids in log-SNR are a part's, uniform and quadratic ones are the system's"
        )

    alpha = sigma = dalpha = dsigma = _none

    def t_of_lam(self, lam: Any) -> Any:
        return self._none(lam)

    def part(self, name: str) -> Process:
        """The process of one part. KeyError for an unknown one."""
        return dict(self.parts)[name]

    def each(self, x: PyTree) -> PyTree:
        self.check(x)
        return {name: part.each(x[name]) for name, part in self.parts}

    def split(self, c: Any, x: PyTree) -> PyTree:
        return {name: part.split(c[..., i], x[name]) for i, (name, part) in enumerate(self.parts)}

    def at(self, t: Any, x: PyTree) -> PyTree:
        return {name: part.at(t[name] if isinstance(t, Mapping) else t, x[name]) for name, part in self.parts}

    def told(self, t: Any) -> Any:
        """A time for all, (), as it is; times (.., parts), sorted by name, as a dict."""
        return {name: t[..., i] for i, (name, _) in enumerate(self.parts)} if jnp.ndim(t) else t

    def check(self, x: PyTree) -> None:
        """ValueError where x is no dict with the system's keys, or breaks its structure."""
        names = [name for name, _ in self.parts]
        if not isinstance(x, Mapping) or sorted(x) != names:
            found = f"keys {sorted(x)}" if isinstance(x, Mapping) else f"{type(x).__name__}"
            raise ValueError(f"the sample of this system is a dict with keys {names}; got {found}")
        for check in (getattr(self.structure, "check", None), *(part.check for _, part in self.parts)):
            if check is not None and check != Process.check:
                check(x)

    def noise(self, key: Array, like: PyTree, index: Array | None = None) -> PyTree:
        z = super().noise(key, like, index)
        if self.structure is None:
            return z
        values = lambda v: jnp.ones(v.shape, v.dtype) if isinstance(v, jax.ShapeDtypeStruct) else v
        return self.structure(z, jax.tree.map(values, like))


def system(parts: Mapping[str, Process], structure: Structure | None = None) -> System:
    """The system of these parts, on t in [0, t_max], which they share.

    structure(noise, like) -> noise: what standard noise looks like in a sample like `like` (`jdiff.graphs.Symmetric`
    mirrors adjacency matrices and leaves padding out). It must be a projection that solvers' sums keep: linear,
    elementwise weights aside. ValueError for parts that end at different times, or none.
    """
    if not parts or len({p.t_max for p in parts.values()}) > 1:
        ends = ", ".join(f"{name}: {p.t_max:g}" for name, p in parts.items())
        raise ValueError(f"system: the parts share one time, and these end at t_max = {ends or 'none'}; try process.ve")
    if other := [name for name, p in parts.items() if not p.gaussian]:
        raise ValueError(
            f"system: the noise of {', '.join(other)} is not Gaussian; a system's parts share Gaussian noise"
        )
    t_min = max(p.t_min for p in parts.values())
    return System(t_min, next(iter(parts.values())).t_max, tuple(sorted(parts.items())), structure)
