"""The loop that kernels of matrix products share: persistent blocks, one warpgroup that loads and two that multiply."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import MULTIPROCESSORS

HEIGHT = 64  # rows of one wgmma
ROWS, WARPGROUPS = 128, 2  # of a tile: each of the warpgroups that multiply has half of the rows
SWIZZLE = 128  # bytes
MEMORY_REGISTERS, MULTIPLY_REGISTERS = 40, 232  # per thread; together they fill the register file
f32 = jnp.float32


class Work(NamedTuple):
    """What a kernel does with one tile; `tile` is whatever `describe` returned."""

    describe: Callable[[Any], Any]
    """Tile number -> the tile, with a field `steps`."""
    load: Callable[..., None]
    """(tile, step of the tile, slot) starts the copies of one step."""
    multiply: Callable[..., None]
    """(tile, step of the tile, slot, accumulators) starts one product per accumulator."""
    finish: Callable[..., Any]
    """(tile, accumulated values, take) stores the result, or returns what `store` gets of it.

    `take` serves the steps that are not products.
    """
    extra_steps: int = 0
    """Behind those of the products and loaded ahead like them.

    take(i, use) waits for the ith, gives use(slot) and lets the slot go; with release=False the kernel does that.
    """
    store: Callable[[Any, Any], None] | None = None
    """(what `finish` returned, number of a part) stores this part, behind the start of a product of the next tile."""
    parts: int = 0
    nothing: Any = ()
    """Of the types of what `finish` returns, for the time before the first tile."""


def swizzled(*shape: int, dtype):
    """A shared-memory buffer in the layout of the matrix unit."""
    transforms = (plgpu.TilingTransform((8, piece_width(dtype))), plgpu.SwizzleTransform(SWIZZLE))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def piece_width(dtype) -> int:
    """Columns in one swizzled row."""
    return SWIZZLE // jnp.dtype(dtype).itemsize


def barriers(stages: int, copies: int) -> list:
    """Those by which the loading warpgroup says that a step has come, and the others that it may go."""
    return [
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    ]


def keep(values):
    """For `finish`: values that stay in registers while products of the next tile run.

    Without the barrier the compiler makes them from the accumulators when they are used, and serialises these products.
    """
    return lax.optimization_barrier(values)


def nothing_kept(count: int, dtype) -> list:
    """Pieces of a warpgroup's part of a tile, in the layout of the accumulators, for `Work.nothing`."""
    return [plgpu.layout_cast(jnp.zeros((HEIGHT, piece_width(dtype)), dtype), plgpu.Layout.WGMMA)] * count


def cut(value, dtype) -> list:
    """Pieces of a warpgroup's part of a tile."""
    width = piece_width(dtype)
    return [value[:, i : i + width].astype(dtype) for i in range(0, value.shape[1], width)]


def write_one(pieces: Sequence, which, slot) -> None:
    """Writes pieces[which] into shared memory; registers have no addresses, so that there is a branch for each."""

    def write(piece):
        slot[...] = piece

    lax.switch(which, [functools.partial(write, piece) for piece in pieces])


def await_slot(number, slots: int) -> None:
    """Waits for the slot of a piece, all slots being taken in turn; before the first, for whatever was there."""
    lax.cond(
        number == 0,
        lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True),
        lambda: plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True),
    )


def store_piece(slots_ref, number, pieces: Sequence, which, place) -> None:
    """Stores pieces[which], all rows of a warpgroup, as the piece of this number of its tile."""
    slots = slots_ref.shape[0]
    slot = slots_ref.at[lax.rem(number, slots)]
    await_slot(number, slots)
    write_one(pieces, which, slot)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(slot, place)


def run_tiles(work: Work, num_tiles, shapes: Sequence[tuple[int, int]], full, empty) -> None:
    """Does all tiles, in rounds of one tile per block; every other round deals them out in reverse.

    So blocks get even shares of tiles that become shorter. Loads run ahead of products by as many steps as there are
    barriers, across the ends of tiles.

    Args:
      num_tiles: int32, may be known on the device alone.
      shapes: of the accumulators, per warpgroup.
      full, empty: see `barriers`.
    """
    stages = full.shape[0]
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    rounds = lax.div(num_tiles + blocks - 1, blocks)

    def number(i):
        return i * blocks + jnp.where(i & 1, blocks - 1 - block, block)

    mine = jnp.where(number(rounds - 1) < num_tiles, rounds, rounds - 1)

    def load_tile(tile, count):
        def load(step, count):
            slot = lax.rem(count, stages)

            @pl.when(count >= stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            work.load(tile, step, slot)
            return count + 1

        return lax.fori_loop(0, tile.steps + work.extra_steps, load, count)

    def store_from(kept, part):
        if work.parts:
            lax.fori_loop(part, work.parts, lambda i, _: work.store(kept, i), None)

    def multiply_tile(i, carry):
        count, kept = carry
        tile = work.describe(number(i))
        skipped = jnp.where(i > 0, 0, work.parts)  # before the first tile there is nothing to store

        def accumulate(*accumulators):
            def multiply(step, count):
                slot = lax.rem(count, stages)
                plgpu.barrier_wait(full.at[slot])
                work.multiply(tile, step, slot, accumulators)
                plgpu.wgmma_wait(len(accumulators))

                @pl.when(step > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[lax.rem(count - 1, stages)])

                if work.parts:
                    pl.when(step + skipped < work.parts)(lambda: work.store(kept, step + skipped))
                return count + 1

            total = lax.fori_loop(0, tile.steps, multiply, count)
            store_from(kept, tile.steps + skipped)
            values = [accumulator[...] for accumulator in accumulators]

            @pl.when(tile.steps > 0)
            def _():
                plgpu.barrier_arrive(empty.at[lax.rem(total - 1, stages)])

            def take(i, use, release=True):
                slot = lax.rem(total + i, stages)
                plgpu.barrier_wait(full.at[slot])
                result = use(slot)
                if release:
                    plgpu.barrier_arrive(empty.at[slot])
                return result

            result = work.finish(tile, values, take)
            return total + work.extra_steps, result if work.parts else ()

        return pl.run_scoped(accumulate, *[plgpu.ACC(shape, f32) for shape in shapes])

    def memory():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        total = lax.fori_loop(0, mine, lambda i, count: load_tile(work.describe(number(i)), count), jnp.int32(0))
        for slot in range(stages):  # no copy may be on its way when the block ends

            @pl.when(slot < total)
            def _(slot=slot):
                plgpu.barrier_wait(empty.at[slot])

    def math():
        plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
        numbers = lambda x: jnp.int32(x) if isinstance(x, int) else x
        start = jnp.int32(0), jax.tree.map(numbers, work.nothing)
        _, kept = lax.fori_loop(0, mine, multiply_tile, start)
        store_from(kept, jnp.where(mine > 0, 0, work.parts))

    lax.cond(lax.axis_index("warpgroup") == WARPGROUPS, memory, math)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def launch(kernel, out_type, scratch_types, *, auto_barriers: bool = True):
    """The kernel as a function of arrays.

    Args:
      auto_barriers: around everything that a warpgroup writes to shared memory. Not needed where others read it only
        behind `commit_smem`, and it is written only behind a wait of the warpgroup for those that read it before.
    """
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(MULTIPROCESSORS,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,  # exponentials and roots, to 22 bits
            unsafe_no_auto_barriers=not auto_barriers,
            reduction_scratch_bytes=0,  # nothing is reduced across warps, and memory is tight
        ),
        scratch_types=scratch_types,
    )
