"""How results leave the Hopper kernels: through shared memory, in pieces, and only rows of a tile's own group."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.pipeline_mosaic_gpu import HEIGHT, f32, piece_width, swizzled
from pallas_kernels.grouped_matmul.tiles import ALIGNMENT, SWIZZLES, WARPGROUPS, TileConfig, choose_swizzle


def staging(dtype, config: TileConfig, columns: int):
    """Room for pieces of arrays that wide on their way out: swizzled, as whole rows, or as rows of float32."""
    swizzle = choose_swizzle(dtype, columns)
    slots = config.slots * SWIZZLES[0] // swizzle  # as many bytes of each kind: no warpgroup writes another's part
    pieces = (WARPGROUPS, slots, HEIGHT, piece_width(dtype, swizzle))
    rows, numbers = ((WARPGROUPS, config.slots, HEIGHT, piece_width(kind)) for kind in (dtype, f32))
    return plgpu.RefUnion(
        swizzled(*pieces, dtype=dtype, swizzle=swizzle),
        swizzled(*rows, dtype=dtype, swizzle=swizzle, height=1),
        plgpu.SMEM(numbers, f32),
    )


class Pieces:
    """Stores all rows of a warpgroup, one swizzled piece of columns after the other, through a few slots in turn."""

    def __init__(self, slots_ref):
        self.slots, self.used = slots_ref, 0

    def store(self, value, target: Callable[[Any], Any]) -> None:
        """`target(columns)` is the place of the piece with these columns of the value."""
        slots, width = self.slots.shape[0], self.slots.shape[2]
        for column in range(0, value.shape[1], width):
            slot = self.slots.at[self.used % slots]
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            slot[...] = value[:, column : column + width]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slot, target(pl.ds(column, width)))
            self.used += 1


class OwnRows:
    """Stores those rows of a warpgroup's part of a tile that belong to the tile's group.

    Args:
      tile: has the rows `start` to `end` of the group and the first `row` of the tile.
      staged: see `staging`.
    """

    def __init__(self, tile, staged):
        warpgroup = lax.axis_index("warpgroup")
        slots, self.rows, self.numbers = (ref.at[warpgroup] for ref in staged)
        self.pieces = Pieces(slots)
        self.top = pl.multiple_of(tile.row + warpgroup * HEIGHT, ALIGNMENT)
        self.first = jnp.clip(tile.start - self.top, 0, HEIGHT)
        self.number = jnp.maximum(jnp.clip(tile.end - self.top, 0, HEIGHT) - self.first, 0)

    def store(self, results: Sequence[tuple[Any, Any, Any]]) -> None:
        """`results`: (value, the whole array, the first of its columns)."""
        width = self.rows.shape[2]

        def all_rows():
            for value, y, column in results:
                self.pieces.store(value, lambda c, y=y, first=column: self._place(y, pl.ds(0, HEIGHT), c, first))

        def some_rows():
            for value, y, column in results:
                for c in range(0, value.shape[1], width):
                    c = min(c, value.shape[1] - width)  # the last may store columns of the one before once more
                    self._store_rows(value[:, c : c + width], self.rows.at[0], y, pl.ds(column + c, width))

        lax.cond(self.number == HEIGHT, all_rows, some_rows)

    def store_number(self, value, y) -> None:
        """One float32 per row, repeated over the columns of y."""
        width = y.shape[1]
        repeated = lax.broadcast_in_dim(value, (HEIGHT, width), (0,))
        self._store_rows(repeated, self.numbers.at[0], y, pl.ds(0, width))

    def _store_rows(self, value, buffer, y, columns) -> None:
        """Copies eights of rows, then single ones: the size of a copy is static."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = value
        plgpu.commit_smem()
        eights = self.number >> 3
        for size, first, times in ((8, self.first, eights), (1, self.first + 8 * eights, self.number & 7)):

            def copy(i, _, size=size, first=first):
                rows = pl.ds(first + i * size, size)
                plgpu.copy_smem_to_gmem(buffer.at[rows], self._place(y, rows, columns))

            lax.fori_loop(0, times, copy, None)

    def _place(self, y, rows, columns, first=0):
        return y.at[pl.ds(self.top + rows.start, rows.size), pl.ds(first + columns.start, columns.size)]
