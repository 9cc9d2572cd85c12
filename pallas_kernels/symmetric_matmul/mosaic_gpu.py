"""Symmetric products on Hopper: tiles on and below the diagonal are computed, stored and read, no others."""

import functools
from collections.abc import Sequence
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
    store_piece,
    swizzled,
)

DTYPES = (jnp.bfloat16, jnp.float16)
DEPTH = PIECE = piece_width(jnp.bfloat16)  # columns of a step, and of a piece of the result on its way out
MULTIPLE = PIECE  # of both sides
WIDE, SLOTS = 256, 2  # widest tile of a product that is not symmetric; pieces per warpgroup on their way
STAGES = {ROWS: 6, WIDE: 4}  # steps in shared memory, by the width of a tile
WGMMA = plgpu.Layout.WGMMA
# Whether k is the first axis of the block of x and of that of y, as they lie in memory.
FORMS = ROWS_ROWS, ROWS_COLUMNS, COLUMNS_COLUMNS = (False, False), (False, True), (True, True)


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
    return _multiply(x, x, forms=(ROWS_ROWS if x.shape[1] <= x.shape[2] else COLUMNS_COLUMNS,), half=True)


def multiply(x: Float[Array, "N S S"], y: Float[Array, "N S S"]) -> Float[Array, "N S S"]:
    """See `api.multiply`."""
    return _multiply(x, y, forms=FORMS, half=True)


def quadratic(x: Float[Array, "N S S"], *, a: float, b: float, c: float) -> Float[Array, "N S S"]:
    """See `api.quadratic`."""
    return _multiply(x, x, forms=FORMS, half=True, terms=(a, b, c))


def apply(q: Float[Array, "N S S"], x: Float[Array, "N R C"]) -> Float[Array, "N R C"]:
    """See `api.apply`."""
    if x.shape[1] <= x.shape[2]:
        return _multiply(q, x, forms=(ROWS_COLUMNS, COLUMNS_COLUMNS))
    return _multiply(x, q, forms=(ROWS_ROWS, ROWS_COLUMNS))


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
    forms: Sequence[tuple[bool, bool]],
    half: bool = False,
    terms: tuple[float, float, float] | None = None,
) -> Float[Array, "N M P"]:
    """Returns x y of each matrix, or a I + b x + c x y for the terms (a, b, c).

    Args:
      forms: those of the steps, in order. A symmetric matrix is not read beyond its diagonal but in its mirror image,
        where k comes first.
      half: only tiles up to the diagonal are computed, as the result is symmetric.
    """
    K, M = x.shape[1:] if forms[0] == COLUMNS_COLUMNS else x.shape[:0:-1]
    P = M if half else y.shape[2]
    width = ROWS if half or P == ROWS else WIDE
    stages, pieces, dtype = STAGES[width], width // PIECE, x.dtype
    describe, tiles = describe_tiles(-(-M // ROWS), -(-P // width), -(-K // DEPTH), symmetric=half)
    x_mirrored, y_mirrored = (forms[0][i] != forms[-1][i] for i in (0, 1))

    def symmetric_product(x, y, out, left, right, staged, full, empty):
        """Of `left` and `right` each is two views of the same memory: with k last and with k first."""
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * HEIGHT, HEIGHT)

        def by_form(tile, step, act):
            """Calls act(k first in x, k first in y) as this step of the tile needs it."""
            k, index = lax.div(step, ROWS // DEPTH), jnp.int32(0)
            index += (k > tile.row).astype(jnp.int32) if x_mirrored else 0
            index += (k > tile.column * (width // ROWS)).astype(jnp.int32) if y_mirrored else 0
            lax.switch(index, [functools.partial(act, *form) for form in forms])

        def load(tile, step, slot):
            rows, columns, barrier = pl.ds(tile.row * ROWS, ROWS), pl.ds(tile.column * width, width), full.at[slot]

            def copy(matrices, places, views, k_first):
                ks = pl.ds(step * DEPTH, DEPTH)
                part = matrices.at[tile.matrix, ks, places] if k_first else matrices.at[tile.matrix, places, ks]
                plgpu.copy_gmem_to_smem(part, views[k_first].at[slot], barrier)

            def copy_both(x_first, y_first):
                copy(x, rows, left, x_first)
                copy(y, columns, right, y_first)

            @pl.when(step < tile.steps)
            def _():
                by_form(tile, step, copy_both)

            if terms:  # the same places of x, a half per copy: as many copies as a product takes

                @pl.when(step >= tile.steps)
                def _():
                    piece = pl.ds(tile.column * width + (step - tile.steps) * PIECE, PIECE)
                    for top in (0, HEIGHT):
                        part = x.at[tile.matrix, pl.ds(tile.row * ROWS + top, HEIGHT), piece]
                        plgpu.copy_gmem_to_smem(part, left[0].at[slot, pl.ds(top, HEIGHT)], barrier)

        def multiply_step(tile, step, slot, accumulators):
            def product(x_first, y_first):
                rows = left[1].at[slot, :, mine].T if x_first else left[0].at[slot, mine]
                plgpu.wgmma(accumulators[0], rows, right[1].at[slot] if y_first else right[0].at[slot].T)

            by_form(tile, step, product)

        def add_terms(value, take, piece, offset):
            a, b, c = terms
            x_piece = take(piece, lambda slot: plgpu.load(left[0].at[slot, mine], layout=WGMMA).astype(f32))
            row, column = (plgpu.broadcasted_iota(jnp.int32, value.shape, i, layout=WGMMA) for i in (0, 1))
            value = c * value + b * x_piece
            return jnp.where(row - column == offset, value + a, value)

        def finish(tile, values, take):
            top = tile.row * ROWS + warpgroup * HEIGHT
            for i in range(pieces):
                first = tile.column * width + i * PIECE
                value = values[0][:, i * PIECE : (i + 1) * PIECE]
                value = (add_terms(value, take, i, first - top) if terms else value).astype(dtype)
                place = out.at[tile.matrix, pl.ds(top, HEIGHT), pl.ds(first, PIECE)]
                store_piece(staged.at[warpgroup], i, [value], 0, place)

        work = Work(describe, load, multiply_step, finish, pieces if terms else 0)
        run_tiles(work, jnp.int32(x.shape[0] * tiles), [(HEIGHT, width)], full, empty)

    def views(length: int):
        return plgpu.RefUnion(*(swizzled(stages, *sides, dtype=dtype) for sides in ((length, DEPTH), (DEPTH, length))))

    buffer = swizzled(WARPGROUPS, SLOTS, HEIGHT, PIECE, dtype=dtype)
    scratch = [views(ROWS), views(width), buffer, *barriers(stages, 2)]
    return launch(symmetric_product, jax.ShapeDtypeStruct((x.shape[0], M, P), dtype), scratch)(x, y)
