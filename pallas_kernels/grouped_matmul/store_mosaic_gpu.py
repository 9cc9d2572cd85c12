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
    store_piece,
    swizzled,
    write_one,
)


def staging(dtype, config: TileConfig):
    """Room for pieces on their way out: swizzled, as whole rows, or as rows of float32."""
    shape = (WARPGROUPS, config.slots, HEIGHT)  # the same for all, so that no warpgroup writes another's part
    whole, rows = (*shape, piece_width(dtype)), (*shape, piece_width(f32))
    return plgpu.RefUnion(swizzled(*whole, dtype=dtype), plgpu.SMEM(whole, dtype), plgpu.SMEM(rows, f32))


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
    pieces, plain, _ = (ref.at[lax.axis_index("warpgroup")] for ref in staged)
    slots = pieces.shape[0]
    slot, buffer, whole = pieces.at[lax.rem(number, slots)], plain.at[0], rows.number == HEIGHT
    await_slot(jnp.where(whole, number, 0), slots)
    lax.cond(whole, lambda: write_one(values, which, slot), lambda: write_one(values, which, buffer))
    plgpu.commit_smem()
    place = functools.partial(_place, y, rows, column)
    copy_all = lambda: plgpu.copy_smem_to_gmem(slot, place(pl.ds(0, HEIGHT)))
    lax.cond(whole, copy_all, lambda: _copy_some(buffer, rows, place))


def store_together(staged, rows: OwnRows, results: Sequence[tuple[Any, Any, Any]]) -> None:
    """Stores a piece of each result; `results`: (value, the whole array, its column where the piece starts).

    In one branch: the values of the second are computed while the first leaves.
    """
    pieces, plain, _ = (ref.at[lax.axis_index("warpgroup")] for ref in staged)

    def all_rows():
        for number, (value, y, column) in enumerate(results):
            store_piece(pieces, number, [value], 0, _place(y, rows, column, pl.ds(0, HEIGHT)))

    def some_rows():
        for value, y, column in results:
            _store_some(value, plain.at[0], rows, functools.partial(_place, y, rows, column))

    lax.cond(rows.number == HEIGHT, all_rows, some_rows)


def store_number(staged, rows: OwnRows, value, y) -> None:
    """One float32 per row, repeated over the columns of y."""
    numbers = staged[2].at[lax.axis_index("warpgroup"), 0]
    value = lax.broadcast_in_dim(value, (HEIGHT, y.shape[1]), (0,))
    _store_some(value, numbers, rows, functools.partial(_place, y, rows, 0))


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
