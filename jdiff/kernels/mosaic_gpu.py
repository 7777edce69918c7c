"""The kernels of flash attention on a Hopper GPU, and the call that runs one over the blocks of a mask; see `gpu`.

A thread block has three warpgroups and owns a row of blocks: 64 queries (for dk and dv: keys) for each of the first
two, which compute. The third copies what the row meets into a ring of buffers in shared memory, block by block from
the row's list (`grid.rows`): a skipped block costs neither arithmetic nor a copy. In the scores what is owned are the
rows and what is met are the columns, so that the left side of each product that is summed up stays in registers.

Matrix products are of bfloat16 or float16 and accumulate in float32. A float32 array comes as TERMS terms of
bfloat16 that sum to it, and a product is the sum of those products of terms that matter: BF16_BF16_F32_X6 of jax.lax's
DotAlgorithmPreset (1904.06376). One kernel serves both: its arrays have a leading axis of terms, of size 1 for 16 bits.
TF32 would be one product, but wgmma takes it with the summed axis last only, so that half of the operands would come
transposed as well, and ten bits are not float32: it misses logits of 1e4 by units. Two terms (X3) miss them by tenths:
docs/kernels.md has the errors.

Patterns, biases and segments are read from global memory straight into the registers that need them.

Interpreted on a CPU, all of this is executed but the matrix unit (`Part.product` and `Part.add` are `jnp.dot` there)
and the layouts of registers.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.typing import DTypeLike
from jaxtyping import Array

from . import flash, grid, masks, softmax
from .flash import Options
from .masks import EMPTY

plgpu: Any = mosaic_gpu  # whose signatures are not the same in any two versions

TILE = 64  # rows of a warpgroup
COMPUTE = 2  # warpgroups that compute, or 1 where the buffers of two are more than shared memory holds
OWNED = COMPUTE * TILE  # tokens of a thread block
TERMS = 3  # of a float32 number, of 8 bits each: all of it
STAGES = 2  # buffers of the ring
REGISTERS = (40, 232)  # of a thread that copies, and that computes: together all that a multiprocessor has

# Which index each dimension follows. s: the terms of a number. x: what is owned, y: what is met, as tokens; X, Y: the
# same within the block.
_LAYOUTS = {
    **dict.fromkeys(("q", "dout"), "sbqhd"),
    **dict.fromkeys(("k", "v"), "sbkhd"),
    **dict.fromkeys(("out", "dq"), "bqhd"),
    **dict.fromkeys(("dk", "dv"), "bkhd"),
    **dict.fromkeys(("lse", "delta"), "bhq"),
    "bias": "bhxy",
    "q_segments": "bq",
    "k_segments": "bk",
    "pattern": "pXY",
}


def in_terms(name: str) -> bool:
    return _LAYOUTS[name][0] == "s"


@dataclasses.dataclass(frozen=True)
class Part:
    """What a warpgroup works on: a place in the arrays of global memory, and its buffers in shared memory."""

    by: str  # what is owned: "q" or "k"
    at: dict[str, Any]  # the index that a letter of _LAYOUTS stands for
    arrays: dict[str, Any]
    buffers: dict[str, Any]
    options: Options

    def ref(self, name: str) -> Any:
        """The part of an array in global memory."""
        ref, at = self.arrays[name], self.at
        if "y" in at:
            at = at | dict(zip("qk" if self.by == "q" else "kq", (at["x"], at["y"]), strict=True))
        else:
            at = at | {self.by: at["x"]}
        # a bias may have one head, or one sample, for all
        size = zip(_LAYOUTS[name], ref.shape, strict=True)
        return ref.at[tuple(0 if a in "bh" and n == 1 else at.get(a, slice(None)) for a, n in size)]

    def copies(self, name: str) -> list[tuple[Any, Any]]:
        """What one copy each takes, in global and in shared memory: a term, which has all dimensions that one may."""
        ref, buffer = self.ref(name), self.buffers[name]
        return [(ref.at[i], buffer.at[i]) for i in range(ref.shape[0])] if in_terms(name) else [(ref, buffer)]

    def read(self, name: str, layout: Any) -> Array:
        """Into registers, from shared memory if a copy is there."""
        ref = self.buffers[name] if name in self.buffers else self.ref(name)
        return ref[...] if self.options.interpret else plgpu.load(ref, layout=layout, optimized=False)

    def write(self, name: str, value: Array, buffer: Any) -> None:
        """From registers, to the buffer from which it is copied if there is one."""
        if buffer is not None:
            buffer[...] = value
        elif self.options.interpret:
            self.ref(name)[...] = value
        else:
            plgpu.store(self.ref(name), value, optimized=False)

    def rows(self, name: str, shape: tuple[int, ...]) -> Array:
        """A number of each token that is owned, the same in each column of scores."""
        return softmax.spread(self.read(name, plgpu.Layout.WGMMA.reduce(1)), shape, 1)

    def columns(self, name: str, shape: tuple[int, ...]) -> Array:
        """A number of each token that is met, the same in each row of scores."""
        return softmax.spread(self.read(name, plgpu.Layout.WGMMA.reduce(0)), shape, 0)

    def scores(self) -> Array:
        """The logits, -inf where the mask or different segments forbid."""
        owned, met = ("q", "k") if self.by == "q" else ("k", "q")
        s = self.product(owned, met) * self.options.scale
        if "bias" in self.arrays:
            s = s + self.read("bias", plgpu.Layout.WGMMA).astype(jnp.float32)
        if "q_segments" in self.arrays:
            same = self.rows(f"{owned}_segments", s.shape) == self.columns(f"{met}_segments", s.shape)
            s = jnp.where(same, s, -jnp.inf)
        if "pattern" not in self.arrays:
            return s
        kept = lambda s: jnp.where(self.read("pattern", plgpu.Layout.WGMMA).astype(jnp.int32) != 0, s, -jnp.inf)
        return lax.cond(self.at["p"] >= 0, kept, lambda s: s, s)

    def product(self, a: str, b: str) -> Array:
        """a b' of two buffers, float32."""
        left, right = self.buffers[a], self.buffers[b]
        if self.options.interpret:
            return _simulated(left[...], right[...].swapaxes(1, 2))

        def run(ref: Any) -> Array:
            for i, j in products(right.shape[0]):
                plgpu.wgmma(ref, left.at[i], right.at[j].transpose((1, 0)))
            return ref[...]

        return pl.run_scoped(run, plgpu.ACC((left.shape[1], right.shape[1]), jnp.float32))

    def add(self, total: Array, a: Array, b: str) -> Array:
        """total + a b, in place, of a in registers and a buffer b, in whose dtype and terms a is taken."""
        right = self.buffers[b]
        left = list(split(a, right.shape[0], right.dtype))
        if self.options.interpret:
            return total + _simulated(left, right[...])

        def run(ref: Any) -> None:
            for i, j in products(right.shape[0]):
                plgpu.wgmma(ref, left[i], right.at[j])

        return pl.run_state(run)(plgpu.ACC.init(total))


def split(a: Array, terms: int, dtype: DTypeLike) -> Iterator[Array]:
    """Arrays of `dtype` that sum to a, the largest first: a itself, or of float32 the leading bits of bfloat16, those
    that follow, and so on. Cut off and not rounded, by the bits: a compiler may take x - float32(bfloat16(x)) for 0."""
    for _ in range(terms - 1):
        bits = lax.bitcast_convert_type(a, jnp.int32) & jnp.int32(-(1 << 16))
        leading = lax.bitcast_convert_type(bits, jnp.float32)
        yield leading.astype(dtype)
        a = a - leading
    yield a.astype(dtype)


def products(terms: int) -> list[tuple[int, int]]:
    """Which terms of two arrays are multiplied, the smallest first; the others are below the last term's last bit."""
    return sorted(((i, j) for i in range(terms) for j in range(terms - i)), key=sum, reverse=True)


def _simulated(a: Any, b: Array) -> Array:
    """a b, by terms, where there is no matrix unit. That reads shared memory in the way of copies, ordinary reads do
    not; the interpreter looks for races, and `commit_smem` lets it take these reads as done before the next copy."""
    i, j = zip(*products(len(b)), strict=True)
    left, right = jnp.concatenate([a[n] for n in i], axis=1), jnp.concatenate([b[n] for n in j])
    out = jnp.dot(left, right, preferred_element_type=jnp.float32)
    plgpu.commit_smem()
    return out


# ----------------------------------------------------------------------------------------------------------- kernels
# Of a part that is loaded: where the sums start, the sums after one more block, and the results by name.
Kernel = Callable[[Part], tuple[Any, Callable[[Part, Any], Any], Callable[[Any], dict[str, Array]]]]


def forward_kernel(part: Part) -> Any:
    shape = part.buffers["q"].shape[1:]

    def update(part: Part, sums: Any) -> Any:
        m, l, acc = sums
        m, l, p, c = softmax.step(m, l, part.scores(), axis=1)
        return m, l, part.add(softmax.spread(c, shape, 1) * acc, p, "v")

    def finish(sums: Any) -> dict[str, Array]:
        m, l, acc = sums
        share = softmax.normalise(l, jnp.ones_like(l))
        return {"out": acc * softmax.spread(share, shape, 1), "lse": softmax.logsumexp(m, l)}

    m, l = jnp.full(shape[:1], -jnp.inf, jnp.float32), jnp.zeros(shape[:1], jnp.float32)
    return (m, l, jnp.zeros(shape, jnp.float32)), update, finish


def dq_kernel(part: Part) -> Any:
    scores = (TILE, part.options.block[1])
    lse, delta = part.rows("lse", scores), part.rows("delta", scores)

    def update(part: Part, dq: Array) -> Array:
        p = jnp.exp(part.scores() - lse)
        return part.add(dq, p * (part.product("dout", "v") - delta) * part.options.scale, "k")

    return jnp.zeros(part.buffers["q"].shape[1:], jnp.float32), update, lambda dq: {"dq": dq}


def dkv_kernel(part: Part) -> Any:
    zeros = jnp.zeros(part.buffers["k"].shape[1:], jnp.float32)

    def update(part: Part, sums: Any) -> Any:
        dk, dv = sums
        s = part.scores()
        p = jnp.exp(s - part.columns("lse", s.shape))
        dv = part.add(dv, p, "dout")
        ds = p * (part.product("v", "dout") - part.columns("delta", s.shape)) * part.options.scale
        return part.add(dk, ds, "q"), dv

    return (zeros, zeros), update, lambda sums: {"dk": sums[0], "dv": sums[1]}


# What is copied once for a row; what block by block; and the buffer through which each result leaves.
_BUFFERS: dict[Kernel, tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]] = {
    forward_kernel: (("q",), ("k", "v"), {"out": "q", "lse": "lse"}),
    dq_kernel: (("q", "dout"), ("k", "v"), {"dq": "q"}),
    dkv_kernel: (("k", "v"), ("q", "dout", "lse", "delta"), {"dk": "k", "dv": "v"}),
}


# ---------------------------------------------------------------------------------------------------------- the call
def call(
    kernel: Kernel, options: Options, by: str, inputs: dict[str, Array], outputs: Mapping[str, DTypeLike]
) -> tuple[Array, ...]:
    """Run `kernel` on padded inputs, over the mask's blocks by rows (by = "q") or by columns (by = "k")."""
    cut = masks.blocks(options.mask, *options.block)
    kind, patterns = (cut.kind, cut.patterns) if by == "q" else (cut.kind.T, cut.patterns.swapaxes(1, 2))
    own, width = options.block if by == "q" else options.block[::-1]
    groups = own // TILE  # that compute
    if len(patterns):
        inputs = inputs | {"pattern": jnp.asarray(patterns, jnp.int8)}
    terms, b, n, h, d = inputs["q"].shape
    sizes = {"s": terms, "b": b, "h": h, "q": n, "k": inputs["k"].shape[2], "d": d}
    owned, met, ways = _BUFFERS[kernel]

    def body(start: Any, inner: Any, pattern: Any, *refs: Any) -> None:
        *whole, own_buffers, ring, loaded, ready, free = refs
        arrays = dict(zip([*inputs, *outputs], whole, strict=True))
        group, row = lax.axis_index("group"), lax.axis_index("row")
        first, last = start[row], start[row + 1]
        at = {"b": lax.axis_index("batch"), "h": lax.axis_index("head"), "X": pl.ds(group * TILE, TILE)}
        at["x"] = pl.ds(row * own + group * TILE, TILE)

        slot_of = lambda t: lax.rem(t - first, jnp.int32(STAGES))

        def meet(t: Any) -> tuple[Any, Part]:
            """The slot of the ring that step t uses, and its part."""
            slot = slot_of(t)
            here = at | {"y": pl.ds(inner[t] * width, width), "p": pattern[t]}
            return slot, Part(by, here, arrays, {name: ref.at[slot] for name, ref in ring.items()}, options)

        @pl.when(group == groups)
        def _() -> None:
            if groups == COMPUTE:  # one and the copying one have as many as they can use
                plgpu.set_max_registers(REGISTERS[0], action="decrease")

            def fill(t: Any, _: None) -> None:
                slot, part = meet(t)

                @pl.when(t - first >= STAGES)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                for ref, buffer in itertools.chain.from_iterable(map(part.copies, met)):
                    plgpu.copy_gmem_to_smem(ref, buffer, ready.at[slot])

            lax.fori_loop(first, last, fill, None)
            drain = lambda t, _: plgpu.barrier_wait(free.at[slot_of(t)])
            lax.fori_loop(jnp.maximum(first, last - STAGES), last, drain, None)

        @pl.when(group < groups)
        def _() -> None:
            if groups == COMPUTE:
                plgpu.set_max_registers(REGISTERS[1], action="increase")
            mine = lambda group: {name: ref.at[group] for name, ref in own_buffers.items()}
            part = Part(by, at, arrays, mine(group), options)
            for ref, buffer in itertools.chain.from_iterable(map(part.copies, owned)):
                plgpu.copy_gmem_to_smem(ref, buffer, loaded.at[group])
            plgpu.barrier_wait(loaded.at[group])
            sums, update, finish = kernel(part)

            def step(t: Any, sums: Any) -> Any:
                slot, here = meet(t)
                plgpu.barrier_wait(ready.at[slot])
                # the barrier: else where each operand of each product starts is computed before the loop, and kept in
                # more registers than there are
                buffers = mine(lax.optimization_barrier(group)) | here.buffers
                sums = update(dataclasses.replace(here, buffers=buffers), sums)
                plgpu.barrier_arrive(free.at[slot])
                return sums

            results = finish(lax.fori_loop(first, last, step, sums))
            through = {o: part.buffers[w].at[0] if in_terms(w) else part.buffers[w] for o, w in ways.items()}
            same = lambda o: through[o].dtype == outputs[o]  # float32 goes straight from registers
            leaving = {o: buffer for o, buffer in through.items() if same(o)}
            for name, value in results.items():
                part.write(name, value.astype(outputs[name]), leaving.get(name))
            plgpu.commit_smem()
            for name, buffer in leaving.items():
                plgpu.copy_smem_to_gmem(buffer, part.ref(name))
            plgpu.wait_smem_to_gmem(0)

    body.__name__ = f"jdiff_attention_{kernel.__name__.removesuffix('_kernel')}"

    def arrivals(names: tuple[str, ...]) -> int:
        return sum(terms if in_terms(name) else 1 for name in names)

    def buffer(name: str, count: int, tokens: int) -> Any:
        if name in ("lse", "delta"):
            return plgpu.SMEM((count, tokens), jnp.float32)
        dtype = inputs[name].dtype
        tile = min(64, width)  # a product over what is met takes it a tile at a time
        tiled = (plgpu.TilingTransform((8, tile)), plgpu.SwizzleTransform(tile * dtype.itemsize))
        return plgpu.SMEM((count, terms, tokens, d), dtype, transforms=tiled)

    pairs = b * h * int((kind != EMPTY).sum()) * options.block[0] * options.block[1]
    # JAX 0.10, where the kernel can be interpreted but not compiled, does not take a cost
    known = {} if options.interpret else {"cost_estimate": flash.cost(kernel, pairs, d, inputs, len(products(terms)))}
    return plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(tuple(sizes[a] for a in _LAYOUTS[o]), t) for o, t in outputs.items()),
        scratch_types=[
            {name: buffer(name, groups, TILE) for name in dict.fromkeys((*owned, *ways.values()))},
            {name: buffer(name, STAGES, width) for name in met},
            plgpu.Barrier(num_arrivals=arrivals(owned), num_barriers=groups),
            plgpu.Barrier(num_arrivals=arrivals(met), num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=groups, num_barriers=STAGES),
        ],
        grid=(h, len(kind), b),
        grid_names=("head", "row", "batch"),
        num_threads=groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=terms == 1),
        interpret=options.interpret or None,
        **known,
    )(*(jnp.asarray(a) for a in grid.rows(kind)), *inputs.values())
