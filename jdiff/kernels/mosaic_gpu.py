"""The kernels of flash attention on a Hopper GPU, and the call that runs one over the blocks of a mask; see `gpu`.

A thread block has three warpgroups and owns one row of blocks: 64 queries (for dk and dv: keys) for each of the first
two, which compute. The third copies what the row meets into a ring of buffers in shared memory, block by block from
the row's list (`grid.rows`): a skipped block costs neither arithmetic nor a copy. The scores have what is owned as
rows and what is met as columns, so that the left side of each product that is summed up stays in registers.

Matrix products are of bfloat16 or float16 and accumulate in float32. Patterns, biases, segments and the statistics of
queries are read from global memory straight into the registers that need them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from . import grid, masks, softmax
from .flash import Options

TILE = 64  # rows of a warpgroup
COMPUTE = 2  # warpgroups that compute
STAGES = 2  # buffers of the ring

# Which index each dimension of an array follows. x: what is owned, y: what is met; X, Y: the same within the block.
_LAYOUTS = {
    **dict.fromkeys(("q", "dout", "out", "dq"), "bqhd"),
    **dict.fromkeys(("k", "v", "dk", "dv"), "bkhd"),
    **dict.fromkeys(("lse", "delta"), "bhq"),
    "bias": "bhxy",
    "q_segments": "bq",
    "k_segments": "bk",
    "pattern": "pXY",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """What one warpgroup sees: where it is in the arrays of global memory, and its buffers in shared memory."""

    by: str
    at: dict[str, Any]  # the index of each dimension
    arrays: dict[str, Any]
    buffers: dict[str, Any]
    options: Options

    def ref(self, name: str) -> Any:
        """The part of an array in global memory."""
        ref, layout = self.arrays[name], _LAYOUTS[name]
        own, met = ("q", "k") if self.by == "q" else ("k", "q")
        at = self.at | {own: self.at["x"], met: self.at.get("y"), "Y": slice(None), "d": slice(None)}
        # a bias may have one head, or one sample, for all
        return ref.at[tuple(0 if a in "bh" and n == 1 else at[a] for a, n in zip(layout, ref.shape, strict=True))]

    def read(self, name: str, layout: Any) -> Array:
        return plgpu.load(self.ref(name), layout=layout, optimized=False)

    def rows(self, name: str, shape: tuple[int, ...]) -> Array:
        """A statistic of what is owned, along the columns of scores."""
        return softmax.spread(self.read(name, plgpu.Layout.WGMMA.reduce(1)), shape, 1)

    def columns(self, name: str, shape: tuple[int, ...]) -> Array:
        """A statistic of what is met, along the rows of scores."""
        return softmax.spread(self.read(name, plgpu.Layout.WGMMA.reduce(0)), shape, 0)

    def scores(self, owned: str, met: str) -> Array:
        """Logits, -inf where the mask or different segments forbid."""
        s = product(self.buffers[owned], self.buffers[met].transpose((1, 0))) * self.options.scale
        if "bias" in self.arrays:
            s = s + self.read("bias", plgpu.Layout.WGMMA).astype(jnp.float32)
        if "q_segments" in self.arrays:
            owned_ids, met_ids = ("q_segments", "k_segments") if self.by == "q" else ("k_segments", "q_segments")
            s = jnp.where(self.rows(owned_ids, s.shape) == self.columns(met_ids, s.shape), s, -jnp.inf)
        if "pattern" not in self.arrays:
            return s
        kept = lambda s: jnp.where(self.read("pattern", plgpu.Layout.WGMMA).astype(jnp.int32) != 0, s, -jnp.inf)
        return lax.cond(self.at["p"] >= 0, kept, lambda s: s, s)

    def add(self, total: Array, a: Array, met: str) -> Array:
        """total + a @ met, in place; a in registers."""
        b = self.buffers[met]
        if self.options.interpret:  # which knows no accumulator that starts from a value
            total = total + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # before a copy overwrites what was read here, as a matrix product would not
            return total
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(total))


def product(a: Any, b: Any) -> Array:
    """a @ b of shared memory, float32."""

    def run(ref: Any) -> Array:
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


# ----------------------------------------------------------------------------------------------------------- kernels
# Each gives where the sums start, what a block adds, and the results, of a part.
def forward_kernel(part: Part) -> tuple[Any, Callable[[Part, Any], Any], Callable[[Any], dict[str, Array]]]:
    q = part.buffers["q"]

    def update(part: Part, sums: Any) -> Any:
        m, l, acc = sums
        m, l, p, c = softmax.step(m, l, part.scores("q", "k"), axis=1)
        return m, l, part.add(softmax.spread(c, acc.shape, 1) * acc, p.astype(q.dtype), "v")

    def finish(sums: Any) -> dict[str, Array]:
        m, l, acc = sums
        share = softmax.spread(softmax.normalise(l, jnp.ones_like(l)), acc.shape, 1)
        return {"out": acc * share, "lse": softmax.logsumexp(m, l)}

    row = lambda value: plgpu.layout_cast(jnp.full((TILE,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    return (row(-jnp.inf), row(0.0), zeros(q.shape)), update, finish


def dq_kernel(part: Part) -> tuple[Any, Callable[[Part, Any], Any], Callable[[Any], dict[str, Array]]]:
    q, width = part.buffers["q"], part.options.block[1]
    lse, delta = (part.rows(name, (TILE, width)) for name in ("lse", "delta"))

    def update(part: Part, dq: Array) -> Array:
        p = jnp.exp(part.scores("q", "k") - lse)
        dp = product(part.buffers["dout"], part.buffers["v"].transpose((1, 0)))
        return part.add(dq, (p * (dp - delta) * part.options.scale).astype(q.dtype), "k")

    return zeros(q.shape), update, lambda dq: {"dq": dq}


def dkv_kernel(part: Part) -> tuple[Any, Callable[[Part, Any], Any], Callable[[Any], dict[str, Array]]]:
    k = part.buffers["k"]

    def update(part: Part, sums: Any) -> Any:
        dk, dv = sums
        s = part.scores("k", "q")
        p = jnp.exp(s - part.columns("lse", s.shape))
        dv = part.add(dv, p.astype(k.dtype), "dout")
        dp = product(part.buffers["v"], part.buffers["dout"].transpose((1, 0)))
        ds = p * (dp - part.columns("delta", s.shape)) * part.options.scale
        return part.add(dk, ds.astype(k.dtype), "q"), dv

    return (zeros(k.shape), zeros(k.shape)), update, lambda sums: {"dk": sums[0], "dv": sums[1]}


def zeros(shape: tuple[int, ...]) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


# kernel: what is copied for the whole row, and block by block; the buffer that each result leaves by
_BUFFERS = {
    forward_kernel: (("q",), ("k", "v"), {"out": "q", "lse": "lse"}),
    dq_kernel: (("q", "dout"), ("k", "v"), {"dq": "q"}),
    dkv_kernel: (("k", "v"), ("q", "dout"), {"dk": "k", "dv": "v"}),
}


# ---------------------------------------------------------------------------------------------------------- the call
def call(
    kernel: Callable[..., Any], options: Options, by: str, inputs: dict[str, Array], outputs: dict[str, DTypeLike]
) -> tuple[Array, ...]:
    """Run `kernel` on padded inputs, over the rows of the mask's blocks (by = "q") or the columns (by = "k")."""
    owned, met, ways = _BUFFERS[kernel]
    cut = masks.blocks(options.mask, *options.block)
    kind, patterns = (cut.kind, cut.patterns) if by == "q" else (cut.kind.T, cut.patterns.swapaxes(1, 2))
    width = options.block[1 if by == "q" else 0]
    if len(patterns):
        inputs = inputs | {"pattern": jnp.asarray(patterns, jnp.int8)}
    b, n, h, d = inputs["q"].shape
    sizes = {"b": b, "h": h, "q": n, "k": inputs["k"].shape[1], "d": d}
    dtype = inputs["q"].dtype
    names = [*inputs, *outputs]

    def body(start: Any, inner: Any, pattern: Any, *refs: Any) -> None:
        *refs, own_buffers, ring, loaded, ready, free = refs
        arrays = dict(zip(names, refs, strict=True))
        group = lax.axis_index("group")
        row = lax.axis_index("row")
        first, last = start[row], start[row + 1]
        at = {"b": lax.axis_index("batch"), "h": lax.axis_index("head"), "X": pl.ds(group * TILE, TILE)}
        at["x"] = pl.ds(row * (COMPUTE * TILE) + group * TILE, TILE)

        def blocks(t: Any) -> Part:
            """The step t, with its buffers of the ring."""
            slot = lax.rem(t - first, STAGES)
            here = at | {"y": pl.ds(inner[t] * width, width), "p": pattern[t]}
            return Part(by, here, arrays, {name: ref.at[slot] for name, ref in ring.items()}, options)

        @pl.when(group == COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def fill(t: Any, _: None) -> None:
                slot, part = lax.rem(t - first, STAGES), blocks(t)

                @pl.when(t - first >= STAGES)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                for name in met:
                    plgpu.copy_gmem_to_smem(part.ref(name), part.buffers[name], ready.at[slot])

            lax.fori_loop(first, last, fill, None)

        @pl.when(group < COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            buffers = {name: ref.at[group] for name, ref in own_buffers.items()}
            part = Part(by, at, arrays, buffers, options)
            for name in owned:
                plgpu.copy_gmem_to_smem(part.ref(name), buffers[name], loaded.at[group])
            plgpu.barrier_wait(loaded.at[group])
            sums, update, finish = kernel(part)

            def step(t: Any, sums: Any) -> Any:
                slot, met_part = lax.rem(t - first, STAGES), blocks(t)
                plgpu.barrier_wait(ready.at[slot])
                sums = update(dataclasses.replace(met_part, buffers=met_part.buffers | buffers), sums)
                plgpu.barrier_arrive(free.at[slot])
                return sums

            for name, value in finish(lax.fori_loop(first, last, step, sums)).items():
                buffers[ways[name]][...] = value.astype(outputs[name])
            plgpu.commit_smem()
            for name in outputs:
                plgpu.copy_smem_to_gmem(buffers[ways[name]], part.ref(name))
            plgpu.wait_smem_to_gmem(0)

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    own_buffers = {name: plgpu.SMEM((COMPUTE, TILE, d), dtype, transforms=tiled) for name in owned}
    if "lse" in outputs:
        own_buffers["lse"] = plgpu.SMEM((COMPUTE, TILE), jnp.float32)
    return plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(tuple(sizes[a] for a in _LAYOUTS[o]), t) for o, t in outputs.items()),
        scratch_types=[
            own_buffers,
            {name: plgpu.SMEM((STAGES, width, d), dtype, transforms=tiled) for name in met},
            plgpu.Barrier(num_arrivals=len(owned), num_barriers=COMPUTE),
            plgpu.Barrier(num_arrivals=len(met), num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=STAGES),
        ],
        grid=(h, len(kind), b),
        grid_names=("head", "row", "batch"),
        num_threads=COMPUTE + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=options.interpret or None,
    )(*(jnp.asarray(a) for a in grid.rows(kind)), *inputs.values())
