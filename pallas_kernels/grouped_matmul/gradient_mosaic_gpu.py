"""Gradient of the matrices on Hopper: x^T dy over the rows of every group."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.product_mosaic_gpu import tile_width
from pallas_kernels.grouped_matmul.tiles import ALIGNMENT, TileConfig, sum_before
from pallas_kernels.tiles_mosaic_gpu import (
    HEIGHT,
    WARPGROUPS,
    Work,
    barriers,
    cut,
    keep,
    launch,
    nothing_kept,
    piece_width,
    run_tiles,
    store_piece,
    swizzled,
)

TALL = WARPGROUPS * HEIGHT  # rows of a tile of the result, which are columns of x
KEPT_PIECES = 4  # 64 registers per thread beside the accumulators of the next tile; a float32 tile has 8


class Tile(NamedTuple):
    """One tile of one group's matrix."""

    group: Array
    start: Array
    end: Array
    row: Array
    down: Array
    across: Array
    steps: Array


def multiply_transposed(
    x: Float[Array, "M D"],
    dy: Float[Array, "M F"],
    group_sizes: Int[Array, "E"],
    *,
    dtype,
    config: TileConfig,
) -> Float[Array, "E D F"]:
    """Returns x_e^T dy_e of the rows of every group in `dtype`, accumulated in float32; empty groups give zeros.

    Args:
      x, dy: 16-bit; M a multiple of 8, D and F of 64 and at least 128. All of dy must be finite, also where no group
        lies: a step at a group's end also reads rows of others, which are cleared in x alone.
    """
    num_groups, D, F = group_sizes.shape[0], x.shape[1], dy.shape[1]
    width, depth, stages = tile_width(F, config.columns), config.depth, config.stages
    assert D >= TALL, f"{D=}: fill up to {TALL}"  # see `choose_width`
    down, across = -(-D // TALL), -(-F // width)
    at_a_time = piece_width(dtype)
    pieces = width // at_a_time
    at_once = max(0, pieces - KEPT_PIECES)
    bounds = _largest_first(group_sizes.astype(jnp.int32))
    layout = plgpu.Layout.WGMMA

    def grouped_matrix_gradient(bounds, x, dy, dw, left, right, slots, full, empty):
        warpgroup = lax.axis_index("warpgroup")
        mine = warpgroup * HEIGHT

        def describe(number):
            place, rest = lax.div(number, down * across), lax.rem(number, down * across)
            group, start, end = (bounds[place, i] for i in range(3))
            row = pl.multiple_of(start & -ALIGNMENT, ALIGNMENT)
            steps = jnp.where(end > start, lax.div(end - row + depth - 1, depth), 0)
            return Tile(group, start, end, row, lax.div(rest, across), lax.rem(rest, across), steps)

        def load(tile, step, slot):
            rows = pl.ds(pl.multiple_of(tile.row + step * depth, ALIGNMENT), depth)
            plgpu.copy_gmem_to_smem(x.at[rows, pl.ds(tile.down * TALL, TALL)], left.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(dy.at[rows, pl.ds(tile.across * width, width)], right.at[slot], full.at[slot])

        def multiply(tile, step, slot, accumulators):
            part = left.at[slot, :, pl.ds(mine, HEIGHT)]
            top = tile.row + step * depth

            @pl.when((top < tile.start) | (top + depth > tile.end))
            def _():
                row = top + plgpu.broadcasted_iota(jnp.int32, (depth, HEIGHT), 0, layout=layout)
                value = plgpu.load(part, layout=layout)
                part[...] = jnp.where((row >= tile.start) & (row < tile.end), value, jnp.zeros_like(value))
                plgpu.commit_smem()

            plgpu.wgmma(accumulators[0], part.T, right.at[slot])

        def store_one(group, down, across, values, which, number):
            rows = pl.ds(down * TALL + mine, HEIGHT)
            columns = pl.ds(across * width + number * at_a_time, at_a_time)
            store_piece(slots.at[warpgroup], number, values, which, dw.at[group, rows, columns])

        def finish(tile, values, take):
            place, parts = (tile.group, tile.down, tile.across), cut(values[0], dtype)
            for i in range(at_once):
                store_one(*place, parts, i, i)
            return *place, keep(parts[at_once:])

        def store(kept, part):
            store_one(*kept, part, at_once + part)

        nothing = 0, 0, 0, nothing_kept(pieces - at_once, dtype)
        work = Work(describe, load, multiply, finish, store=store, parts=pieces - at_once, nothing=nothing)
        run_tiles(work, jnp.int32(num_groups * down * across), [(HEIGHT, width)], full, empty)

    scratch = [
        swizzled(stages, depth, TALL, dtype=x.dtype),
        swizzled(stages, depth, width, dtype=x.dtype),
        swizzled(WARPGROUPS, config.slots, HEIGHT, piece_width(dtype), dtype=dtype),
        *barriers(stages, 2),
    ]
    return launch(grouped_matrix_gradient, jax.ShapeDtypeStruct((num_groups, D, F), dtype), scratch)(bounds, x, dy)


def _largest_first(group_sizes: Int[Array, "E"]) -> Int[Array, "E 3"]:
    """(group, its first row, first row behind it), so that the longest tiles come first and the last ones are short."""
    number, start = jnp.arange(group_sizes.shape[0], dtype=jnp.int32), sum_before(group_sizes)
    ahead = (group_sizes[None] > group_sizes[:, None]) | (
        (group_sizes[None] == group_sizes[:, None]) & (number[None] < number[:, None])
    )
    place = jnp.sum(ahead, 1, dtype=jnp.int32)
    table = jnp.stack([number, start, start + group_sizes], 1)
    return jnp.sum(jnp.where((place[None] == number[:, None])[..., None], table[None], 0), 1, dtype=jnp.int32)
