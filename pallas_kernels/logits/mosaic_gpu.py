"""Exponentials of logits on Hopper, formed and summed before they leave the chip."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import refuse_device
from pallas_kernels.logits import relative
from pallas_kernels.logits.relative import HIGHEST
from pallas_kernels.partition import refuse_cut_matrices
from pallas_kernels.tiles_mosaic_gpu import (
    HEIGHT,
    ROWS,
    WARPGROUPS,
    Work,
    barriers,
    cut,
    f32,
    launch,
    nothing_kept,
    piece_width,
    run_tiles,
    store_piece,
    swizzled,
)

DTYPE = jnp.bfloat16  # of what enters and leaves: exponentials need the exponents of float32
DEPTH = PIECE = piece_width(DTYPE)  # columns of a step, and of a piece of the result on its way out
GROUP = 16  # tiles one below the other, which are done column by column
WIDTHS = (256, 192, 128)  # of tiles; the first that divides the vocabulary, else the first, and the last tile is masked
ALIGNMENT = 8  # rows, to whole multiples of which zeros are added: of a swizzled layout
STAGES, SLOTS = 4, 2  # steps in shared memory; pieces per warpgroup on their way
LOG2_E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA


class Tile(NamedTuple):
    """One tile of the logits."""

    row: Array
    column: Array
    steps: Array


def refuse(x, *_, **__) -> str | None:
    """Refuses all but Hopper GPUs and bfloat16 rows of whole layouts."""
    return refuse_device() or refuse_cut_matrices() or unserved(x)


def unserved(x) -> str | None:
    """The part of `refuse` that does not ask for devices."""
    if x.dtype != DTYPE:
        return f"x must be {DTYPE.__name__}, got {x.dtype}"
    if x.shape[1] % DEPTH:
        return f"rows must be multiples of {DEPTH} wide, got {x.shape[1]}"
    return None


def cross_entropy_gradients(
    x: Float[Array, "M D"],
    weight: Float[Array, "D A"],
    targets: Int[Array, "M"],
    scale: Float[Array, "M"],
    *,
    z_weight: float,
    cut_over: tuple[str, ...],
) -> tuple[Float[Array, "M"], Float[Array, "M"], Float[Array, "M D"], Float[Array, "D A"]]:
    """See `api.cross_entropy_gradients`; the vocabulary is cut over axes of the mesh."""
    return relative.cross_entropy_gradients(exponentials, x, weight, targets, scale, z_weight, cut_over)


@jax.custom_batching.sequential_vmap
def exponentials(
    x: Float[Array, "M D"], weight: Float[Array, "D A"], reference: Float[Array, "M"]
) -> tuple[Float[Array, "M A"], Float[Array, "M"]]:
    """See `relative.Exponentials`; a tile leaves behind the products of the next one."""
    (num_rows, D), A = x.shape, weight.shape[1]
    x = jnp.pad(x, ((0, -num_rows % ALIGNMENT), (0, 0)))
    weight = jnp.pad(weight, ((0, 0), (0, max(WIDTHS[0] - A, -A % PIECE))))  # whole layouts, at least a tile
    M = x.shape[0]
    width = next((width for width in WIDTHS if A % width == 0), WIDTHS[0])
    down, across, steps, pieces = -(-M // ROWS), -(-A // width), D // DEPTH, width // PIECE
    reference = jnp.pad(reference * LOG2_E, (0, down * ROWS - num_rows))

    def exponentials_of_logits(x, weight, reference, values, sums, left, right, staged, full, empty):
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * HEIGHT, HEIGHT)

        def describe(number):
            return Tile(*place(number, down, across), jnp.int32(steps))

        def load(tile, step, slot):
            ks, columns = pl.ds(step * DEPTH, DEPTH), pl.ds(tile.column * width, width)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(tile.row * ROWS, ROWS), ks], left.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(weight.at[ks, columns], right.at[slot], full.at[slot])

        def multiply(tile, step, slot, accumulators):
            plgpu.wgmma(accumulators[0], left.at[slot, mine], right.at[slot])

        def finish(tile, accumulated, take):
            rows = pl.ds(tile.row * ROWS + warpgroup * HEIGHT, HEIGHT)
            relative_to = plgpu.load(reference.at[rows], layout=WGMMA.reduce(1), optimized=False)
            exponents = accumulated[0] * LOG2_E - lax.broadcast_in_dim(relative_to, (HEIGHT, width), (0,))
            powers = jnp.exp2(jnp.minimum(exponents, HIGHEST))
            if A % width:
                column = plgpu.broadcasted_iota(jnp.int32, powers.shape, 1, layout=WGMMA)
                powers = jnp.where(column < A - tile.column * width, powers, 0.0)
            # Without the barrier the compiler reads accumulators while products run, and serialises these.
            rounded, total = lax.optimization_barrier((cut(powers, DTYPE), jnp.sum(powers, 1)))
            sums.at[tile.column, rows][...] = total
            return tile.row, tile.column, rounded

        def store(kept, i):
            row, column, rounded = kept
            rows, columns = pl.ds(row * ROWS + warpgroup * HEIGHT, HEIGHT), pl.ds(column * width + i * PIECE, PIECE)
            store_piece(staged.at[warpgroup], i, rounded, i, values.at[rows, columns])

        nothing = (0, 0, nothing_kept(pieces, DTYPE))
        work = Work(describe, load, multiply, finish, store=store, parts=pieces, nothing=nothing)
        run_tiles(work, jnp.int32(down * across), [(HEIGHT, width)], full, empty)

    scratch = [
        swizzled(STAGES, ROWS, DEPTH, dtype=DTYPE),
        swizzled(STAGES, DEPTH, width, dtype=DTYPE),
        swizzled(WARPGROUPS, SLOTS, HEIGHT, PIECE, dtype=DTYPE),
        *barriers(STAGES, 2),
    ]
    results = [jax.ShapeDtypeStruct((M, weight.shape[1]), DTYPE), jax.ShapeDtypeStruct((across, down * ROWS), f32)]
    values, sums = launch(exponentials_of_logits, results, scratch)(x, weight, reference)
    return values[:num_rows, :A], jnp.sum(sums[:, :num_rows], axis=0)


def place(number, down: int, across: int):
    """(row, column) of a tile.

    What blocks read at a time, rows of a group and some columns, is small next to the cache, so that memory is read
    once for the rows, and once per group for the weight.
    """
    first = lax.div(number, GROUP * across) * GROUP
    height, rest = jnp.minimum(GROUP, down - first), number - first * across
    return first + lax.rem(rest, height), lax.div(rest, height)
