"""Symmetric products on Hopper: blocks on and below the diagonal are computed, stored and read, no others."""

import functools
import itertools
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
    PAIR,
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
STAGES = {ROWS: 6, WIDE: 4}  # steps in shared memory, by the width of a tile
WGMMA = plgpu.Layout.WGMMA
ROLES = COLUMN, ROW, BOTH = range(3)  # what the operand that two blocks have in common is in a tile; both: of a square
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
    return _multiply(x, x, forms=(ROWS_ROWS if x.shape[1] <= x.shape[2] else COLUMNS_COLUMNS,), half=True, square=True)


def multiply(x: Float[Array, "N S S"], y: Float[Array, "N S S"]) -> Float[Array, "N S S"]:
    """See `api.multiply`."""
    return _multiply(x, y, forms=FORMS, half=True)


def quadratic(x: Float[Array, "N S S"], *, a: float, b: float, c: float) -> Float[Array, "N S S"]:
    """See `api.quadratic`."""
    terms = (a, b, c) if (a, b, c) != (0, 0, 1) else None
    return _multiply(x, x, forms=FORMS, half=True, square=True, terms=terms, backwards=True)


def apply(q: Float[Array, "N S S"], x: Float[Array, "N R C"]) -> Float[Array, "N R C"]:
    """See `api.apply`."""
    if x.shape[1] <= x.shape[2]:
        return _multiply(q, x, forms=(ROWS_COLUMNS, COLUMNS_COLUMNS), backwards=True)
    return _multiply(x, q, forms=(ROWS_ROWS, ROWS_COLUMNS), backwards=True)


class Tile(NamedTuple):
    """What one block of a pair computes: a tile of the result of one matrix of the stack."""

    matrix: Array
    row: Array
    column: Array
    steps: Array
    role: Array
    """One of `ROLES`."""


def pair_tiles(side: int) -> list[tuple[int, int, int]]:
    """Pairs the tiles up to the diagonal such that each two have an index in common; gives it first, then the others.

    Of an odd number of tiles one is its own partner.
    """
    pairs, handed_down = [], []
    for i in reversed(range(side)):
        others, handed_down = [*handed_down, *range(i + 1)], []
        if len(others) % 2 and i:  # (i, i - 1) is a tile of i - 1 as well
            others.remove(i - 1)
            handed_down = [i]
        others += others[-1:] * (len(others) % 2)
        pairs += [(i, *two) for two in zip(others[::2], others[1::2], strict=True)]
    return pairs


def describe_half(side: int, steps: int, *, square: bool):
    """(number of a pair, whether the second of it -> Tile, pairs per matrix) of a symmetric result."""
    pairs = pair_tiles(side)

    def describe(number, second):
        matrix, place = lax.div(number, len(pairs)), lax.rem(number, len(pairs))
        look_up = lambda i: sum((jnp.where(place == n, pair[i], 0) for n, pair in enumerate(pairs)), jnp.int32(0))
        common, own = look_up(0), jnp.where(second, look_up(2), look_up(1))
        role = jnp.where(common > own, ROW, COLUMN)
        role = jnp.where(common == own, BOTH, role) if square else role
        return Tile(matrix, jnp.maximum(common, own), jnp.minimum(common, own), jnp.int32(steps), role)

    return describe, len(pairs)


def describe_all(down: int, across: int, steps: int):
    """The same of a result that is not symmetric: two tiles of one column; of an odd number the last one is empty."""
    number_of = -(-down // 2) * across

    def describe(number, second):
        matrix, place = lax.div(number, number_of), lax.rem(number, number_of)
        row = 2 * lax.div(place, across) + second
        return Tile(matrix, row, lax.rem(place, across), jnp.int32(steps), jnp.int32(COLUMN))

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
    square: bool = False,
    terms: tuple[float, float, float] | None = None,
    backwards: bool = False,
) -> Float[Array, "N M P"]:
    """Returns x y of each matrix, or a I + b x + c x y for the terms (a, b, c).

    Args:
      forms: those of the steps, in order. A symmetric matrix is not read beyond its diagonal but in its mirror image,
        where k comes first.
      half: only tiles up to the diagonal are computed, as x y = y x is symmetric.
      square: x and y are the same, or one the other's transpose.
      backwards: the last matrix comes first. What the product before has read and written last is then still in the
        cache, if it went the other way.
    """
    K, M = x.shape[1:] if forms[0] == COLUMNS_COLUMNS else x.shape[:0:-1]
    P = M if half else y.shape[2]
    width = ROWS if half or P == ROWS else WIDE
    stages, pieces, dtype = STAGES[width], width // PIECE, x.dtype
    down, across, steps = -(-M // ROWS), -(-P // width), -(-K // DEPTH)
    describe, pairs = describe_half(down, steps, square=square) if half else describe_all(down, across, steps)
    x_mirrored, y_mirrored = (forms[0][i] != forms[-1][i] for i in (0, 1))

    def symmetric_product(x, y, out, own, common, staged, full, empty):
        """Each block of a pair loads one operand for itself, and half of the one that both have in common."""
        warpgroup, second = lax.axis_index("warpgroup"), lax.axis_index(PAIR)
        mine = pl.ds(warpgroup * HEIGHT, HEIGHT)

        def by_form(tile, step, act):
            """Calls act(role, form) as this step of the tile needs it."""
            k = lax.div(step, ROWS // DEPTH)
            index = tile.role * len(forms)
            index += (k > tile.row).astype(jnp.int32) if x_mirrored else 0
            index += (k > tile.column * (width // ROWS)).astype(jnp.int32) if y_mirrored else 0
            roles = ROLES[: 1 + half + square]
            lax.switch(index, [functools.partial(act, *case) for case in itertools.product(roles, forms)])

        def load(tile, step, slot):
            rows, columns = pl.ds(tile.row * ROWS, ROWS), pl.ds(tile.column * width, width)

            def copy(matrices, places, k_first, views, **settings):
                ks = pl.ds(step * DEPTH, DEPTH)
                part = matrices.at[tile.matrix, ks, places] if k_first else matrices.at[tile.matrix, places, ks]
                plgpu.copy_gmem_to_smem(part, views[k_first].at[slot], full.at[slot], **settings)

            def copy_both(role, form):
                row_side, column_side = (rows, form[0]), (columns, form[1])
                copy(y, *(row_side if role == ROW else column_side), common, collective_axes=PAIR)
                if role == BOTH:
                    plgpu.barrier_arrive(full.at[slot])
                else:
                    copy(x, *(column_side if role == ROW else row_side), own)

            @pl.when(step < tile.steps)
            def _():
                by_form(tile, step, copy_both)

            if terms:  # the same places of x, a half per copy: as many copies as a product takes

                @pl.when(step >= tile.steps)
                def _():
                    piece = pl.ds(tile.column * width + (step - tile.steps) * PIECE, PIECE)
                    for top in (0, HEIGHT):
                        part = x.at[tile.matrix, pl.ds(tile.row * ROWS + top, HEIGHT), piece]
                        plgpu.copy_gmem_to_smem(part, own[0].at[slot, pl.ds(top, HEIGHT)], full.at[slot])

        def multiply_step(tile, step, slot, accumulators):
            def product(role, form):
                left, right = own if role == COLUMN else common, own if role == ROW else common
                rows = left[1].at[slot, :, mine].T if form[0] else left[0].at[slot, mine]
                plgpu.wgmma(accumulators[0], rows, right[1].at[slot] if form[1] else right[0].at[slot].T)

            by_form(tile, step, product)

        def add_terms(value, take, piece, offset):
            a, b, c = terms
            x_piece = take(piece, lambda slot: plgpu.load(own[0].at[slot, mine], layout=WGMMA).astype(f32))
            row, column = (plgpu.broadcasted_iota(jnp.int32, value.shape, i, layout=WGMMA) for i in (0, 1))
            value = c * value + b * x_piece
            return jnp.where(row - column == offset, value + a, value)

        def finish(tile, values, take):
            top = tile.row * ROWS + warpgroup * HEIGHT
            for i in range(pieces):
                first, buffer = tile.column * width + i * PIECE, staged.at[warpgroup, i % SLOTS]
                value = values[0][:, i * PIECE : (i + 1) * PIECE]
                value = (add_terms(value, take, i, first - top) if terms else value).astype(dtype)
                plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
                buffer[...] = value
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(buffer, out.at[tile.matrix, pl.ds(top, HEIGHT), pl.ds(first, PIECE)])

        def describe_tile(number):
            tile = describe(number, second)
            return tile._replace(matrix=x.shape[0] - 1 - tile.matrix) if backwards else tile

        work = Work(describe_tile, load, multiply_step, finish, pieces if terms else 0)
        run_tiles(work, jnp.int32(x.shape[0] * pairs), [(HEIGHT, width)], full, empty)

    def views(length: int):  # the same memory with k last and with k first
        return plgpu.RefUnion(*(swizzled(stages, *sides, dtype=dtype) for sides in ((length, DEPTH), (DEPTH, length))))

    scratch = [
        views(ROWS),
        views(width),
        swizzled(WARPGROUPS, SLOTS, HEIGHT, PIECE, dtype=dtype),
        *barriers(stages, 2, paired=True),
    ]
    out_type = jax.ShapeDtypeStruct((x.shape[0], M, P), dtype)
    return launch(symmetric_product, out_type, scratch, paired=True)(x, y)
