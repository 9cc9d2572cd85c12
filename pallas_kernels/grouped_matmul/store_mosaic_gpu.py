"""How results leave the Hopper kernels: through shared memory, in pieces, and only rows of a tile's own group."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.grouped_matmul.tiles import ALIGNMENT, TileConfig
from pallas_kernels.tiles_mosaic_gpu import (
    HEIGHT,
    WARPGROUPS,
    await_slot,
    f32,
    piece_width,
    swizzled,
    write_one,
)

NUMBERS = 8  # times that a number per row is stored: the layout of a result of products has no fewer columns


def staging(dtype, config: TileConfig):
    """Room for pieces on their way out: swizzled, or as whole rows."""
    shape = (WARPGROUPS, config.slots, HEIGHT, piece_width(dtype))
    return plgpu.RefUnion(swizzled(*shape, dtype=dtype), plgpu.SMEM(shape, dtype))


def row_staging(dtype) -> list:
    """Room for rows of an incomplete tile on their way out, as they are or as rows of float32; for numbers per row."""
    rows = (plgpu.SMEM((WARPGROUPS, HEIGHT, piece_width(t)), t) for t in (dtype, f32))  # rows of 128 bytes: aligned
    return [plgpu.RefUnion(*rows), plgpu.SMEM((WARPGROUPS, HEIGHT, NUMBERS), f32)]


class OwnRows(NamedTuple):
    """Those rows of a warpgroup's part of a tile that belong to the tile's group."""

    top: Array
    """The first row of that part."""
    first: Array
    """The first row of the group, counted from there."""
    number: Array


NO_ROWS = OwnRows(0, 0, 0)


def own_rows(tile) -> OwnRows:
    """`tile` has the rows `start` to `end` of the group and the first `row` of the tile."""
    top = tile.row + lax.axis_index("warpgroup") * HEIGHT
    first = jnp.clip(tile.start - top, 0, HEIGHT)
    return OwnRows(top, first, jnp.maximum(jnp.clip(tile.end - top, 0, HEIGHT) - first, 0))


def store_rows(staged, rows: OwnRows, number, values: Sequence, which, y, column) -> None:
    """Stores one piece of columns.

    Args:
      staged: see `staging`.
      number: of the piece among those of this tile, in order of time.
      values: pieces in the dtype of y.
      which: of them it is.
      column: of y, where the piece starts.
    """
    pieces, plain = (ref.at[lax.axis_index("warpgroup")] for ref in staged)
    slots = pieces.shape[0]
    slot, buffer, whole = pieces.at[lax.rem(number, slots)], plain.at[0], rows.number == HEIGHT
    await_slot(jnp.where(whole, number, 0), slots)
    lax.cond(whole, lambda: write_one(values, which, slot), lambda: write_one(values, which, buffer))
    plgpu.commit_smem()
    place = functools.partial(_place, y, rows, column)
    copy_all = lambda: plgpu.copy_smem_to_gmem(slot, place(pl.ds(0, HEIGHT)))
    lax.cond(whole, copy_all, lambda: _copy_some(buffer, rows, place))


def store_from(rooms: Sequence, spare, rows: OwnRows, results: Sequence[tuple[Any, Any, Any]]) -> None:
    """Stores a piece of each result, as the latest group of copies.

    Args:
      rooms: shared memory for each, swizzled, that nothing else reads or writes until its copy has left.
      spare: see `row_staging`.
      results: (value, the whole array, its column where the piece starts).
    """
    plain = spare[0].at[lax.axis_index("warpgroup")]

    def all_rows():
        for room, (value, _, _) in zip(rooms, results, strict=True):
            room[...] = value
        plgpu.commit_smem()
        for room, (_, y, column) in zip(rooms, results, strict=True):
            plgpu.copy_smem_to_gmem(room, _place(y, rows, column, pl.ds(0, HEIGHT)), commit_group=False)
        plgpu.commit_smem_to_gmem_group()

    def some_rows():
        for value, y, column in results:
            _store_some(value, plain, rows, functools.partial(_place, y, rows, column))

    lax.cond(rows.number == HEIGHT, all_rows, some_rows)


def store_number(staged, spare, rows: OwnRows, value, y) -> None:
    """One float32 per row, repeated over the columns of y; `staged`, `spare`: see `row_staging`."""
    warpgroup = lax.axis_index("warpgroup")

    def write(room):
        room[...] = lax.broadcast_in_dim(value, room.shape, (0,))
        plgpu.commit_smem()

    def all_rows():
        write(staged.at[warpgroup])
        plgpu.copy_smem_to_gmem(staged.at[warpgroup], y.at[pl.ds(pl.multiple_of(rows.top, ALIGNMENT), HEIGHT)])

    def some_rows():
        room = spare[1].at[warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        write(room)

        def copy(i, _):
            row = pl.ds(rows.first + i, 1)
            place = y.at[pl.ds(rows.top + row.start, 1)]
            plgpu.copy_smem_to_gmem(room.at[row, pl.ds(0, NUMBERS)], place, commit_group=False)

        lax.fori_loop(0, rows.number, copy, None)
        plgpu.commit_smem_to_gmem_group()

    lax.cond(rows.number == HEIGHT, all_rows, some_rows)


def _store_some(value, buffer, rows: OwnRows, place) -> None:
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    buffer[...] = value
    plgpu.commit_smem()
    _copy_some(buffer, rows, place)


def _copy_some(buffer, rows: OwnRows, place) -> None:
    """Copies eights of rows, then single ones: the size of a copy is static."""
    eights = rows.number >> 3
    for size, first, times in ((8, rows.first, eights), (1, rows.first + 8 * eights, rows.number & 7)):

        def copy(i, _, size=size, first=first):
            part = pl.ds(first + i * size, size)
            plgpu.copy_smem_to_gmem(buffer.at[part], place(part), commit_group=False)

        lax.fori_loop(0, times, copy, None)
    plgpu.commit_smem_to_gmem_group()


def _place(y, rows: OwnRows, column, part):
    top = pl.multiple_of(rows.top, ALIGNMENT)
    return y.at[pl.ds(top + part.start, part.size), pl.ds(column, piece_width(y.dtype))]
