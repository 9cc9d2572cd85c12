"""How results leave the Hopper kernels: through shared memory, in pieces, and only rows of a tile's own group."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.tiles import ALIGNMENT, TileConfig
from pallas_kernels.tiles_mosaic_gpu import HEIGHT, WARPGROUPS, Pieces, f32, piece_width, swizzled


def staging(dtype, config: TileConfig):
    """Room for pieces on their way out: swizzled, as whole rows, or as rows of float32."""
    shape = (WARPGROUPS, config.slots, HEIGHT)  # the same for all, so that no warpgroup writes another's part
    whole, rows = (*shape, piece_width(dtype)), (*shape, piece_width(f32))
    return plgpu.RefUnion(swizzled(*whole, dtype=dtype), plgpu.SMEM(whole, dtype), plgpu.SMEM(rows, f32))


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
        width = piece_width(self.rows.dtype)

        def all_rows():
            for value, y, column in results:
                self.pieces.store(value, lambda c, y=y, first=column: self._place(y, first + c, pl.ds(0, HEIGHT)))

        def some_rows():
            for value, y, column in results:
                for c in range(0, value.shape[1], width):
                    self._store_rows(value[:, c : c + width], self.rows.at[0], y, column + c)

        lax.cond(self.number == HEIGHT, all_rows, some_rows)

    def store_number(self, value, y) -> None:
        """One float32 per row, repeated over the columns of y."""
        self._store_rows(lax.broadcast_in_dim(value, (HEIGHT, y.shape[1]), (0,)), self.numbers.at[0], y, 0)

    def _store_rows(self, value, buffer, y, column) -> None:
        """Copies eights of rows, then single ones: the size of a copy is static."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = value
        plgpu.commit_smem()
        eights = self.number >> 3
        for size, first, times in ((8, self.first, eights), (1, self.first + 8 * eights, self.number & 7)):

            def copy(i, _, size=size, first=first):
                rows = pl.ds(first + i * size, size)
                plgpu.copy_smem_to_gmem(buffer.at[rows], self._place(y, column, rows))

            lax.fori_loop(0, times, copy, None)

    def _place(self, y, column, rows):
        width = piece_width(y.dtype)
        return y.at[pl.ds(self.top + rows.start, rows.size), pl.ds(column, width)]
