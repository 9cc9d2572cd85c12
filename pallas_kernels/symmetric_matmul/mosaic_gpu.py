"""Symmetric products on Hopper: tiles on and below the diagonal are computed, and those below stored twice."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.batching import by_rows
from pallas_kernels.hopper import refuse_device
from pallas_kernels.tiles_mosaic_gpu import (
    HEIGHT,
    ROWS,
    WARPGROUPS,
    Work,
    barriers,
    f32,
    launch,
    piece_width,
    run_tiles,
    swizzled,
)

DTYPES = (jnp.bfloat16, jnp.float16)
DEPTH = PIECE = piece_width(jnp.bfloat16)  # columns of a step, and of a piece of the result on its way out
MULTIPLE = PIECE  # of both sides
WIDE, SLOTS = 256, 2  # widest tile of a product that is not symmetric; pieces per warpgroup on their way
STAGES = {ROWS: 5, WIDE: 4}  # steps in shared memory, by the width of a tile
WGMMA = plgpu.Layout.WGMMA


def refuse(*stacks, **_) -> str | None:
    """Refuses all but Hopper GPUs, 16-bit matrices and sides that whole pieces cover."""
    return refuse_device() or unserved(*stacks)


def unserved(*stacks) -> str | None:
    """The part of `refuse` that does not ask for the device."""
    for x in stacks:
        if x.dtype not in DTYPES:
            return f"matrices must be bfloat16 or float16, got {x.dtype}"
        if x.shape[1] % MULTIPLE or x.shape[2] % MULTIPLE or min(x.shape[1:]) < ROWS:
            return f"sides must be multiples of {MULTIPLE}, at least {ROWS}, got {x.shape[1]} x {x.shape[2]}"
    return None


def gram(x: Float[Array, "N R C"]) -> Float[Array, "N S S"]:
    """See `api.gram`; neither side is transposed in memory."""
    return _multiply(x, x, transposed="right" if x.shape[1] <= x.shape[2] else "left", symmetric=True)


def multiply(x: Float[Array, "N S S"], y: Float[Array, "N S S"]) -> Float[Array, "N S S"]:
    """See `api.multiply`."""
    return _multiply(x, y, symmetric=True)


def quadratic(x: Float[Array, "N S S"], *, a: float, b: float, c: float) -> Float[Array, "N S S"]:
    """See `api.quadratic`."""
    return _multiply(x, x, symmetric=True, terms=(a, b, c))


def apply(q: Float[Array, "N S S"], x: Float[Array, "N R C"]) -> Float[Array, "N R C"]:
    """See `api.apply`."""
    return _multiply(q, x) if x.shape[1] <= x.shape[2] else _multiply(x, q)


class Tile(NamedTuple):
    """One tile of the result of one matrix of the stack."""

    matrix: Array
    row: Array
    column: Array
    steps: Array


def describe_tiles(down: int, across: int, steps: int, *, symmetric: bool):
    """(tile number -> Tile, tiles per matrix), row by row; of a symmetric result only up to the diagonal."""
    number_of = down * (down + 1) // 2 if symmetric else down * across

    def describe(number):
        matrix, place = lax.div(number, number_of), lax.rem(number, number_of)
        row = lax.div(place, across)
        if symmetric:  # row i starts at i (i + 1) / 2
            row = sum(((place >= i * (i + 1) // 2).astype(jnp.int32) for i in range(1, down)), jnp.int32(0))
        column = place - (lax.div(row * (row + 1), 2) if symmetric else row * across)
        return Tile(matrix, row, column, jnp.int32(steps))

    return describe, number_of


def _multiply(x: Float[Array, "N ..."], y: Float[Array, "N ..."], **settings) -> Float[Array, "N M P"]:
    """See `_multiply_stacks`."""
    return by_rows(functools.partial(_multiply_stacks, **settings))(x, y)


def _multiply_stacks(
    x: Float[Array, "N ..."],
    y: Float[Array, "N ..."],
    *,
    transposed: str = "",
    symmetric: bool = False,
    terms: tuple[float, float, float] | None = None,
) -> Float[Array, "N M P"]:
    """Returns x y of each matrix, or a I + b x + c x y for the terms (a, b, c).

    Args:
      transposed: which operand is, "left" or "right"; "": none.
      symmetric: whether the result is known to be; it is then square.
    """
    left_t, right_t = transposed == "left", transposed == "right"
    K, M = x.shape[1:] if left_t else x.shape[:0:-1]
    P = y.shape[1] if right_t else y.shape[2]
    width = ROWS if symmetric or P == ROWS else WIDE
    stages, pieces, dtype = STAGES[width], width // PIECE, x.dtype
    describe, tiles = describe_tiles(-(-M // ROWS), -(-P // width), -(-K // DEPTH), symmetric=symmetric)

    def symmetric_product(x, y, out, left, right, staged, full, empty):
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * HEIGHT, HEIGHT)

        def load(tile, step, slot):
            rows, columns, barrier = pl.ds(tile.row * ROWS, ROWS), pl.ds(tile.column * width, width), full.at[slot]

            @pl.when(step < tile.steps)
            def _():
                ks = pl.ds(step * DEPTH, DEPTH)
                x_part = x.at[tile.matrix, ks, rows] if left_t else x.at[tile.matrix, rows, ks]
                y_part = y.at[tile.matrix, columns, ks] if right_t else y.at[tile.matrix, ks, columns]
                plgpu.copy_gmem_to_smem(x_part, left.at[slot], barrier)
                plgpu.copy_gmem_to_smem(y_part, right.at[slot], barrier)

            if terms:  # the same places of x, a half per copy: as many copies as a product takes

                @pl.when(step >= tile.steps)
                def _():
                    piece = pl.ds(tile.column * width + (step - tile.steps) * PIECE, PIECE)
                    for half in (0, HEIGHT):
                        part = x.at[tile.matrix, pl.ds(tile.row * ROWS + half, HEIGHT), piece]
                        plgpu.copy_gmem_to_smem(part, left.at[slot, pl.ds(half, HEIGHT)], barrier)

        def multiply_step(tile, step, slot, accumulators):
            rows = left.at[slot, :, mine].T if left_t else left.at[slot, mine]
            plgpu.wgmma(accumulators[0], rows, right.at[slot].T if right_t else right.at[slot])

        def add_terms(value, take, piece, offset):
            a, b, c = terms
            x_piece = take(piece, lambda slot: plgpu.load(left.at[slot, mine], layout=WGMMA).astype(f32))
            row, column = (plgpu.broadcasted_iota(jnp.int32, value.shape, i, layout=WGMMA) for i in (0, 1))
            value = c * value + b * x_piece
            return jnp.where(row - column == offset, value + a, value)

        def store(value, buffer, target, *, mirrored: bool):
            plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
            (buffer.T if mirrored else buffer)[...] = value
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, target)

        def finish(tile, values, take):
            top = tile.row * ROWS + warpgroup * HEIGHT
            rows = pl.ds(top, HEIGHT)
            for i in range(pieces):
                first = tile.column * width + i * PIECE
                columns, value = pl.ds(first, PIECE), values[0][:, i * PIECE : (i + 1) * PIECE]
                value = (add_terms(value, take, i, first - top) if terms else value).astype(dtype)
                store(value, staged.at[warpgroup, i % SLOTS], out.at[tile.matrix, rows, columns], mirrored=False)
                if symmetric:

                    @pl.when(tile.row != tile.column)
                    def _(value=value, columns=columns):
                        store(value, staged.at[warpgroup, SLOTS], out.at[tile.matrix, columns, rows], mirrored=True)

        work = Work(describe, load, multiply_step, finish, pieces if terms else 0)
        run_tiles(work, jnp.int32(x.shape[0] * tiles), [(HEIGHT, width)], full, empty)

    buffer = functools.partial(swizzled, dtype=dtype)
    scratch = [
        buffer(stages, *((DEPTH, ROWS) if left_t else (ROWS, DEPTH))),
        buffer(stages, *((width, DEPTH) if right_t else (DEPTH, width))),
        buffer(WARPGROUPS, SLOTS + symmetric, HEIGHT, PIECE),
        *barriers(stages, 2),
    ]
    return launch(symmetric_product, jax.ShapeDtypeStruct((x.shape[0], M, P), dtype), scratch)(x, y)
