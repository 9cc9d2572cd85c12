"""SwiGLU of every row's group on Hopper: in the epilogue of the products before it, and of the gradient's product."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.product_mosaic_gpu import describe_tiles, tile_width
from pallas_kernels.grouped_matmul.store_mosaic_gpu import (
    NO_ROWS,
    NUMBERS,
    own_rows,
    row_staging,
    staging,
    store_from,
    store_number,
    store_rows,
)
from pallas_kernels.grouped_matmul.tiles import TILE_COST, TileConfig, choose_width
from pallas_kernels.tiles_mosaic_gpu import (
    HEIGHT,
    ROWS,
    Work,
    barriers,
    cut,
    f32,
    keep,
    launch,
    nothing_kept,
    piece_width,
    run_tiles,
    swizzled,
)

LOG2_E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA


def swiglu_rows(
    plan: tuple[Int[Array, "N 4"], Int[Array, "1"]],
    x: Float[Array, "M D"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    scale: Float[Array, "M"] | None,
    *,
    config: TileConfig,
    joined: bool = False,
) -> tuple[Float[Array, "M F"], *tuple[Array, ...]]:
    """Returns (scale silu(g) u, g, u) with g and u the products of x with the matrices of each row's group.

    The first comes from the float32 products; all are zero behind the last group.

    Args:
      scale: None for 1; other arguments as for `multiply_rows`.
      joined: whether g and u are one array, [M, 2, F].
    """
    depth, stages, dtype = config.depth, config.stages, x.dtype
    (num_rows, D), F = x.shape, gate.shape[2]
    width, at_a_time = _half_width(F, config.columns // 2), piece_width(dtype)
    across, pieces = -(-F // width), width // at_a_time

    def grouped_swiglu(tiles, count, x, gate, up, *refs):
        *refs, left, right, staged, full, empty = refs
        scales, (h,), pair = _split(refs, len(scaled), 1, 2 - joined)
        g, u = _halves(pair)
        mine = pl.ds(lax.axis_index("warpgroup") * HEIGHT, HEIGHT)

        def load(tile, step, slot):
            ks, columns = pl.ds(step * depth, depth), pl.ds(tile.column * width, width)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(tile.row, ROWS), ks], left.at[slot], full.at[slot])
            for i, w in enumerate((gate, up)):
                plgpu.copy_gmem_to_smem(w.at[tile.group, ks, columns], right.at[slot, i], full.at[slot])

        def multiply(tile, step, slot, accumulators):
            for i, accumulator in enumerate(accumulators):
                plgpu.wgmma(accumulator, left.at[slot, mine], right.at[slot, i])

        def finish(tile, values, take):
            gated, raised = values
            scaled_raised = _by_row(scales[0], tile, width) * raised if scales else raised
            hidden = cut(scaled_raised * gated * _sigmoid(gated), dtype)
            rows = own_rows(tile)
            for i in range(pieces):  # at once: registers do not hold all three results
                store_rows(staged, rows, i, hidden, i, h, tile.column * width + i * at_a_time)
            return rows, tile.column, *(keep(cut(value, dtype)) for value in values)

        def store(kept, part):
            rows, column, *values = kept
            for i, y in enumerate((g, u)):
                which = part - i * pieces
                place = rows, pieces + part, values[i], which, y, column * width + which * at_a_time
                pl.when((which >= 0) & (which < pieces))(lambda place=place: store_rows(staged, *place))

        describe = describe_tiles(tiles, gate.shape[0], across, D // depth)
        nothing = NO_ROWS, 0, *[nothing_kept(pieces, dtype)] * 2
        work = Work(describe, load, multiply, finish, store=store, parts=2 * pieces, nothing=nothing)
        run_tiles(work, count[0] * across, [(HEIGHT, width)] * 2, full, empty)

    scratch = [
        swizzled(stages, ROWS, depth, dtype=dtype),
        swizzled(stages, 2, depth, width, dtype=dtype),
        staging(dtype, config),
        *barriers(stages, 3),
    ]
    scaled = [] if scale is None else [scale]
    results = [jax.ShapeDtypeStruct((num_rows, F), dtype), *_pair(num_rows, F, dtype, joined)]
    return launch(grouped_swiglu, results, scratch)(*plan, x, gate, up, *scaled)


def swiglu_gradients(
    plan: tuple[Int[Array, "N 4"], Int[Array, "1"]],
    dy: Float[Array, "M D"],
    down: Float[Array, "E F D"],
    pair: Sequence[Array],
    scale: Float[Array, "M"] | None,
    *,
    config: TileConfig,
) -> tuple[list[Array], Float[Array, "M"] | None]:
    """Takes dy back through the matrices `down` and through the SwiGLU of `swiglu_rows`.

    g and u come in through the buffers of the products, in pieces as deep as a step, loaded ahead like these; their
    gradients leave from where they were.

    Args:
      pair: g and u, or one array of both.

    Returns:
      (gradients of the pair, that of scale); zero behind the last group.
    """
    depth, stages, dtype = config.depth, config.stages, dy.dtype
    (num_rows, D), F = dy.shape, down.shape[1]
    width = tile_width(F, config.columns)
    across, pieces, joined = -(-F // width), width // depth, len(pair) == 1

    def grouped_swiglu_gradient(tiles, count, dy, down, *refs):
        *refs, left, right, spare, numbers, full, empty = refs
        pairs, scales, d_pairs, d_scales = _split(refs, *[len(pair), len(scaled)] * 2)
        (g, u), (dg, du) = _halves(pairs), _halves(d_pairs)
        mine = pl.ds(lax.axis_index("warpgroup") * HEIGHT, HEIGHT)

        def load(tile, step, slot):
            rows, column, barrier = pl.ds(tile.row, ROWS), tile.column * width, full.at[slot]

            @pl.when(step < tile.steps)
            def _():
                ks = pl.ds(step * depth, depth)
                plgpu.copy_gmem_to_smem(dy.at[rows, ks], left.at[slot], barrier)
                plgpu.copy_gmem_to_smem(down.at[tile.group, pl.ds(column, width), ks], right.at[slot], barrier)

            @pl.when(step >= tile.steps)
            def _():
                columns = pl.ds(column + (step - tile.steps) * depth, depth)
                plgpu.copy_gmem_to_smem(g.at[rows, columns], left.at[slot], barrier)
                plgpu.copy_gmem_to_smem(u.at[rows, columns], right.at[slot, pl.ds(0, ROWS)], barrier)

        def multiply(tile, step, slot, accumulators):
            plgpu.wgmma(accumulators[0], left.at[slot, mine], right.at[slot].T)

        def finish(tile, values, take):
            rows, sums = own_rows(tile), 0.0
            factor = _by_row(scales[0], tile, depth) if scales else 1.0

            def leave(slot, outstanding):
                plgpu.wait_smem_to_gmem(outstanding, wait_read_only=True)
                plgpu.barrier_arrive(empty.at[slot])

            for i in range(pieces):
                before, slot = slot if i else None, take(i, lambda slot: slot, release=False)
                rooms = [ref.at[slot, mine] for ref in (left, right)]
                gated, raised = (plgpu.load(room, layout=WGMMA).astype(f32) for room in rooms)
                d_hidden = values[0][:, i * depth : (i + 1) * depth]
                sigmoid = _sigmoid(gated)
                silu = gated * sigmoid
                if scales:
                    sums += jnp.sum(d_hidden * (silu * raised), axis=1)
                d_scaled = d_hidden * factor
                d_gated = d_scaled * raised * (sigmoid + silu * (1.0 - sigmoid))
                results, column = ((d_gated, dg), (d_scaled * silu, du)), tile.column * width + i * depth
                store_from(rooms, spare, rows, [(value.astype(dtype), y, column) for value, y in results])
                if i:
                    leave(before, 1)
            for d_scale in d_scales:
                store_number(numbers, spare, rows, sums, d_scale.at[tile.column])
            leave(slot, 0)

        work = Work(describe_tiles(tiles, down.shape[0], across, D // depth), load, multiply, finish, pieces)
        run_tiles(work, count[0] * across, [(HEIGHT, width)], full, empty)

    scratch = [
        swizzled(stages, ROWS, depth, dtype=dtype),
        swizzled(stages, width, depth, dtype=dtype),
        *row_staging(dtype),
        *barriers(stages, 2),
    ]
    scaled = [] if scale is None else [scale]
    sums = [jax.ShapeDtypeStruct((across, num_rows, NUMBERS), f32)] * len(scaled)
    results = [*_pair(num_rows, F, dtype, joined), *sums]
    run = launch(grouped_swiglu_gradient, results, scratch, auto_barriers=False)
    results = run(*plan, dy, down, *pair, *scaled)
    return results[: len(pair)], jnp.sum(results[-1][:, :, 0], 0) if scaled else None


def _pair(rows: int, columns: int, dtype, joined: bool) -> list[jax.ShapeDtypeStruct]:
    """Two arrays, or one of both."""
    shape = (rows, 2, columns) if joined else (rows, columns)
    return [jax.ShapeDtypeStruct(shape, dtype)] * (2 - joined)


def _split(refs: Sequence, *numbers: int) -> list[list]:
    """The first of them, those behind these, and so on."""
    remaining = iter(refs)
    return [list(itertools.islice(remaining, number)) for number in numbers]


def _halves(refs: Sequence) -> Sequence:
    """Both arrays of a `_pair`."""
    return refs if len(refs) == 2 else [refs[0].at[:, i] for i in range(2)]


def _half_width(columns: int, widest: int) -> int:
    """Two products share a tile: each has half of its columns."""
    return choose_width(columns, tuple(width for width in (64, 128) if width <= widest), TILE_COST // 2)


def _by_row(scale, tile, columns: int):
    """This warpgroup's part of the factors of a tile's rows, for every column."""
    rows = pl.ds(tile.row + lax.axis_index("warpgroup") * HEIGHT, HEIGHT)
    value = plgpu.load(scale.at[rows], layout=WGMMA.reduce(1), optimized=False)
    return lax.broadcast_in_dim(value, (HEIGHT, columns), (0,))


def _sigmoid(z):
    """Two instructions of the special function unit and no division; 0 for the most negative z."""
    root = lax.rsqrt(1.0 + jnp.exp2(z * -LOG2_E))
    return root * root
