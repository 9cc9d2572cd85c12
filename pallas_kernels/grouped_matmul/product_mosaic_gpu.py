"""Grouped products on Hopper: rows times the matrices of their groups, and sums of two such products."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.store_mosaic_gpu import NO_ROWS, own_rows, staging, store_rows
from pallas_kernels.grouped_matmul.tiles import ALIGNMENT, TileConfig, choose_width
from pallas_kernels.tiles_mosaic_gpu import (
    HEIGHT,
    ROWS,
    Work,
    barriers,
    cut,
    keep,
    launch,
    nothing_kept,
    piece_width,
    run_tiles,
    swizzled,
)


class Tile(NamedTuple):
    """One tile of the result; rows are counted in the whole array."""

    group: Array
    row: Array
    start: Array
    end: Array
    column: Array
    steps: Array


def multiply_rows(
    plan: tuple[Int[Array, "N 4"], Int[Array, "1"]],
    pairs: list[tuple[Float[Array, "M K"], Float[Array, "E ..."]]],
    *,
    transposed: bool,
    config: TileConfig,
) -> Float[Array, "M N"]:
    """Returns the sum over the pairs (x, w) of x times the matrix of each row's group; zero behind the last group.

    Args:
      plan: see `plan_tiles`.
      pairs: x and w, [E, K, N] or, if `transposed`, [E, N, K]; all of one shape and 16-bit dtype; K and N multiples
        of 64, N at least 128. Tiles may reach beyond N: what is copied from there is zero, what goes there is dropped.
    """
    (x, w), depth, stages = pairs[0], config.depth, config.stages
    num_rows, K = x.shape
    N = w.shape[1] if transposed else w.shape[2]
    width = tile_width(N, config.columns)
    steps, across = K // depth, -(-N // width)
    at_a_time = piece_width(x.dtype)

    def grouped_product(tiles, count, *refs):
        operands, (y, left, right, staged, full, empty) = refs[: 2 * len(pairs)], refs[2 * len(pairs) :]
        warpgroup = lax.axis_index("warpgroup")

        def load(tile, step, slot):
            for i, (x, w) in enumerate(zip(operands[::2], operands[1::2], strict=True)):

                @pl.when(lax.div(step, steps) == i)
                def _(x=x, w=w, k=step - i * steps):
                    ks, columns = pl.ds(k * depth, depth), pl.ds(tile.column * width, width)
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(tile.row, ROWS), ks], left.at[slot], full.at[slot])
                    source = w.at[tile.group, columns, ks] if transposed else w.at[tile.group, ks, columns]
                    plgpu.copy_gmem_to_smem(source, right.at[slot], full.at[slot])

        def multiply(tile, step, slot, accumulators):
            matrix = right.at[slot].T if transposed else right.at[slot]
            plgpu.wgmma(accumulators[0], left.at[slot, pl.ds(warpgroup * HEIGHT, HEIGHT)], matrix)

        def finish(tile, values, take):
            return own_rows(tile), tile.column, keep(cut(values[0], y.dtype))

        def store(kept, part):
            rows, column, pieces = kept
            store_rows(staged, rows, part, pieces, part, y, column * width + part * at_a_time)

        describe = describe_tiles(tiles, w.shape[0], across, steps * len(pairs))
        nothing = NO_ROWS, 0, nothing_kept(width // at_a_time, y.dtype)
        work = Work(describe, load, multiply, finish, store=store, parts=width // at_a_time, nothing=nothing)
        run_tiles(work, count[0] * across, [(HEIGHT, width)], full, empty)

    scratch = [
        swizzled(stages, ROWS, depth, dtype=x.dtype),
        swizzled(stages, *((width, depth) if transposed else (depth, width)), dtype=x.dtype),
        staging(x.dtype, config),
        *barriers(stages, 2),
    ]
    run = launch(grouped_product, jax.ShapeDtypeStruct((num_rows, N), x.dtype), scratch)
    return run(*plan, *[array for pair in pairs for array in pair])


def tile_width(columns: int, widest: int) -> int:
    """Whole steps of the product behind it, and at least as many columns as a tile has rows."""
    return choose_width(columns, tuple(width for width in (128, 192, 256) if width <= widest))


def describe_tiles(tiles, num_groups: int, across: int, steps: int):
    """Tile number -> Tile; neighbours share their rows of x, so that the cache serves all but one of them."""

    def describe(number):
        down, column = lax.div(number, across), lax.rem(number, across)
        group, row, start, end = (tiles[down, i] for i in range(4))
        row = pl.multiple_of(row, ALIGNMENT)
        return Tile(group, row, start, end, column, jnp.where(group == num_groups, 0, steps))

    return describe
