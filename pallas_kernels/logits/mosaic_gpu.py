"""Logits on Hopper: float32 sums rounded to float16 once, and their exponentials summed before they leave the chip."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import refuse_device
from pallas_kernels.partition import refuse_cut_matrices
from pallas_kernels.tiles_mosaic_gpu import (
    HEIGHT,
    ROWS,
    WARPGROUPS,
    Pieces,
    Work,
    barriers,
    f32,
    launch,
    piece_width,
    run_tiles,
    swizzled,
)

DTYPES = (jnp.bfloat16, jnp.float16)
RESULT = jnp.float16  # three bits more than bfloat16: errors like those of rounding the gradient of the logits
DEPTH = PIECE = piece_width(RESULT)  # columns of a step, and of a piece of the result on its way out
WIDTHS = (256, 192, 128)  # of tiles; the first that divides the vocabulary, else the first, and the last tile is masked
ALIGNMENT = 8  # rows, to whole multiples of which zeros are added: of a swizzled layout
STAGES, SLOTS = 4, 2  # steps in shared memory; pieces per warpgroup on their way
LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """One tile of the logits."""

    row: Array
    column: Array
    steps: Array


def refuse(x, weight, targets) -> str | None:
    """Refuses all but Hopper GPUs and 16-bit rows of whole layouts."""
    return refuse_device() or refuse_cut_matrices() or unserved(x)


def unserved(x) -> str | None:
    """The part of `refuse` that does not ask for devices."""
    if x.dtype not in DTYPES:
        return f"x must be bfloat16 or float16, got {x.dtype}"
    if x.shape[1] % DEPTH:
        return f"rows must be multiples of {DEPTH} wide, got {x.shape[1]}"
    return None


@jax.custom_batching.sequential_vmap
def logits(
    x: Float[Array, "M D"], weight: Float[Array, "D A"], targets: Int[Array, "M"]
) -> tuple[Float[Array, "M A"], Float[Array, "M"], Float[Array, "M"]]:
    """See `api.logits`; tiles that share columns of the weight are neighbours, so that it is read once."""
    (num_rows, D), A = x.shape, weight.shape[1]
    x = jnp.pad(x, ((0, -num_rows % ALIGNMENT), (0, 0)))
    weight = jnp.pad(weight, ((0, 0), (0, max(WIDTHS[0] - A, -A % PIECE))))  # whole layouts, at least a tile
    M = x.shape[0]
    width = next((width for width in WIDTHS if A % width == 0), WIDTHS[0])
    down, across, steps = -(-M // ROWS), -(-A // width), D // DEPTH

    def logits_and_sums(x, weight, values, sums, left, right, staged, vectors, full, empty):
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * HEIGHT, HEIGHT)

        def describe(number):
            return Tile(lax.rem(number, down), lax.div(number, down), jnp.int32(steps))

        def load(tile, step, slot):
            ks, columns = pl.ds(step * DEPTH, DEPTH), pl.ds(tile.column * width, width)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(tile.row * ROWS, ROWS), ks], left.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(weight.at[ks, columns], right.at[slot], full.at[slot])

        def multiply(tile, step, slot, accumulators):
            plgpu.wgmma(accumulators[0], left.at[slot, mine], right.at[slot])

        def finish(tile, accumulated, take):
            rows = pl.ds(tile.row * ROWS + warpgroup * HEIGHT, HEIGHT)
            # Without the barrier the compiler reads accumulators while products run, and serialises these.
            rounded = lax.optimization_barrier(accumulated[0].astype(RESULT))
            place = lambda column: values.at[rows, pl.ds(tile.column * width + column, PIECE)]
            Pieces(staged.at[warpgroup]).store(rounded, place)
            left_over = A - tile.column * width if A % width else None
            vectors[warpgroup] = _log_sum_exp(rounded.astype(f32), left_over)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(vectors.at[warpgroup], sums.at[tile.column, rows])

        work = Work(describe, load, multiply, finish)
        run_tiles(work, jnp.int32(down * across), [(HEIGHT, width)], full, empty)

    scratch = [
        swizzled(STAGES, ROWS, DEPTH, dtype=x.dtype),
        swizzled(STAGES, DEPTH, width, dtype=x.dtype),
        swizzled(WARPGROUPS, SLOTS, HEIGHT, PIECE, dtype=RESULT),
        plgpu.SMEM((WARPGROUPS, HEIGHT), f32),
        *barriers(STAGES, 2),
    ]
    results = [jax.ShapeDtypeStruct((M, weight.shape[1]), RESULT), jax.ShapeDtypeStruct((across, down * ROWS), f32)]
    values, sums = launch(logits_and_sums, results, scratch)(x, weight)
    values = values[:num_rows, :A]
    target = jnp.take_along_axis(values, targets[:, None], axis=1)[:, 0].astype(f32)
    return values, jax.nn.logsumexp(sums[:, :num_rows], axis=0), target


def _log_sum_exp(values: Float[Array, "R C"], num_columns: Array | None) -> Float[Array, "R"]:
    """Of each row, of its first columns alone if it ends inside the tile; a row's values are in four threads."""
    if num_columns is not None:
        column = plgpu.broadcasted_iota(jnp.int32, values.shape, 1, layout=plgpu.Layout.WGMMA)
        values = jnp.where(column < num_columns, values, -jnp.inf)
    peak = jnp.max(values, 1) * LOG2_E
    total = jnp.sum(jnp.exp2(values * LOG2_E - lax.broadcast_in_dim(peak, values.shape, (0,))), 1)
    return peak / LOG2_E + lax.log(total)
