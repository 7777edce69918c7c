"""Particles over a mesh: resampling that moves only the particles that must move.

A plain gather across devices is an all-gather of every particle's whole state. Here survivors stay where they are
(`resampling.in_place`), and surplus copies go by `ppermute`, in chunks, for as many rounds as there are copies to
send: the ancestors are known to every device, so all of them agree on the number of rounds.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Integer, PyTree


def place(x: PyTree, groups: int, mesh: Mesh | None, shards: int | None) -> tuple[PyTree, tuple[Mesh, str] | None, int]:
    """x over the mesh's first axis, (mesh, axis) or None for one device, and the devices that a group lies over.

    ValueError where the particles cannot be divided evenly.
    """
    where = _layout(x) if mesh is None else (mesh, str(mesh.axis_names[0]))
    batch = jax.tree.leaves(x)[0].shape[0]
    D = 1 if where is None else where[0].shape[where[1]]
    if batch % D or (groups % D and D % groups):
        raise ValueError(
            f"{batch} particles in {groups} groups on {D} devices; expected a multiple of {D} particles, and whole "
            "groups on each device or whole devices for each group"
        )
    if where is not None and mesh is not None:
        x = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(where[1]))), x)
    lies = max(1, D // groups) if shards is None else shards
    if lies < 1 or (batch // groups) % lies:
        raise ValueError(f"{batch // groups} particles a group on {lies} devices; expected a multiple of {lies}")
    return x, where if D > 1 else None, lies


def _layout(x: PyTree) -> tuple[Mesh, str] | None:
    """The mesh and the axis that the particle axis of x is split over."""
    sharding = getattr(jax.tree.leaves(x)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None
    axis = sharding.spec[0]
    axis = axis[0] if isinstance(axis, tuple) and len(axis) == 1 else axis
    if not isinstance(axis, str) or not isinstance(sharding.mesh, Mesh):
        raise ValueError(f"particles lie over {sharding.spec[0]}; expected one axis of a concrete mesh")
    return sharding.mesh, axis


def exchange(mesh: Mesh, axis: str, chunk: int | None = None) -> Callable[[PyTree, Array], PyTree]:
    """`move(state, ancestors)` for particles split over `axis`: `gather` with point-to-point copies.

    chunk: particles in one message; default a sixteenth of a device's. The last message of a round is padded.
    """
    D = mesh.shape[axis]

    def move(state: PyTree, ancestors: Integer[Array, "groups n"]) -> PyTree:
        groups, n = ancestors.shape
        size = groups * n // D
        c = max(1, size // 16) if chunk is None else chunk
        flat = (ancestors + (jnp.arange(groups, dtype=ancestors.dtype) * n)[:, None]).ravel()

        def local(state: PyTree, flat: Array) -> PyTree:
            me = jax.lax.axis_index(axis).astype(jnp.int32)
            home = (flat // size).reshape(D, size)  # of the particle that each device's slot asks for
            wants = lambda d: jnp.take(home, d, axis=0)
            place = lambda d: jnp.take(flat.reshape(D, size), d, axis=0) % size
            out = jax.tree.map(lambda a: jnp.take(a, jnp.where(wants(me) == me, place(me), 0), axis=0), state)
            out = jax.tree.map(lambda a, b: _where(wants(me) == me, a, b), out, state)
            for shift in () if groups % D == 0 else range(1, D):  # whole groups a device: nothing travels
                to, source = (me + shift) % D, (me - shift) % D
                asked, mine = wants(to) == me, wants(me) == source  # what I send, and what I shall get
                d = jnp.arange(D, dtype=jnp.int32)
                most = jnp.max(jnp.sum(home[(d + shift) % D] == d[:, None], axis=1, dtype=jnp.int32))
                pairs = [(i, (i + shift) % D) for i in range(D)]

                def round(carry: Any, asked=asked, mine=mine, to=to, pairs=pairs) -> Any:
                    i, out = carry
                    want = i * c + jnp.arange(c, dtype=jnp.int32)
                    send = jnp.take(place(to), _nth(asked, want), axis=0)
                    slot = _nth(mine, want)  # `size`, and so dropped, beyond the last
                    got = jax.tree.map(lambda a: jax.lax.ppermute(jnp.take(a, send, axis=0), axis, pairs), state)
                    return i + 1, jax.tree.map(lambda o, g: o.at[slot].set(g, mode="drop"), out, got)

                more = lambda carry, most=most: carry[0] * c < most
                _, out = jax.lax.while_loop(more, round, (jnp.zeros((), jnp.int32), out))
            return out

        specs = jax.tree.map(lambda a: P(axis), state)
        return jax.shard_map(local, mesh=mesh, in_specs=(specs, P()), out_specs=specs, check_vma=False)(state, flat)

    return move


def _where(keep: Array, a: Array, b: Array) -> Array:
    return jnp.where(keep.reshape(-1, *(1,) * (a.ndim - 1)), a, b)


def _nth(marked: Array, want: Array) -> Array:
    """The place of the want-th marked entry (from 0); len(marked) where there are fewer."""
    n = len(marked)
    rank = jnp.cumsum(marked.astype(jnp.int32), dtype=jnp.int32) - 1
    places = jnp.full(n + 1, n, jnp.int32).at[jnp.where(marked, rank, n)].set(jnp.arange(n, dtype=jnp.int32))
    return places.at[n].set(n)[jnp.minimum(want, n)]


def traffic(ancestors: Any, devices: int, state: PyTree) -> tuple[np.ndarray, int]:
    """(particles that changed device at each step (K,), bytes of one particle's state), on the host, for reports.

    ancestors: `result.info.ancestors` (K, groups, n), the particles laid over the devices in order; state:
    `result.state.inner`, or whatever is gathered.
    """
    found = np.asarray(ancestors)
    K, groups, n = found.shape
    flat = (found + (np.arange(groups) * n)[:, None]).reshape(K, -1)
    size = flat.shape[1] // devices
    crossed = (flat // size != np.arange(flat.shape[1]) // size).sum(1)
    return crossed, sum(leaf.nbytes // leaf.shape[0] for leaf in jax.tree.leaves(state))
