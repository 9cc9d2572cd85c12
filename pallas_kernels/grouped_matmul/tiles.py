"""How rows are cut into tiles for the Hopper kernels: a tile belongs to one group, its first row is a multiple of 8."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.tiles_mosaic_gpu import ROWS

ALIGNMENT = 8  # rows; copies into swizzled shared memory start at multiples of it
SPARE = 2 * ROWS  # rows behind the last group that kernels may read beside its own
TILE_COST = 40  # columns that a tile costs beside its own: in tiles of 128, products take an eighth longer than of 256


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Sizes of one step; the default is the fastest of those measured (docs/performance.md)."""

    columns: int = 256
    """Widest tile of the result."""
    depth: int = 64
    """Part of the contracted dimension per step: 128 bytes of 16-bit numbers."""
    stages: int = 4
    """Steps whose operands are in shared memory at a time."""
    slots: int = 2
    """Pieces of the result per warpgroup on their way to device memory."""


def choose_width(columns: int, widths: tuple[int, ...], extra: int = TILE_COST) -> int:
    """The width of tiles that cover the columns at the least cost; the last tile may reach beyond them.

    Fewer columns than ROWS are one layout wide, along which the copy engine has no bounds: results would be wrong.
    """
    assert columns >= ROWS, f"{columns=}: fill up to {ROWS}"
    return min(widths, key=lambda width: (-(-columns // width) * (width + extra), -width))


def plan_tiles(
    group_sizes: Int[Array, "E"], num_rows: int, clear: bool = True
) -> tuple[Int[Array, "N 4"], Int[Array, "1"]]:
    """Cuts every group, and what lies behind the last as group E, into tiles of ROWS rows.

    A group's tiles cover it from the multiple of 8 below its start; the last one ends at the multiple of 8 above its
    end, so that it may overlap the one before. Both compute the same bits there. Rows of other groups inside a tile are
    not stored.

    Args:
      num_rows: a multiple of 8, at least ROWS.
      clear: whether group E is all that lies behind; else the first `SPARE` rows of it.

    Returns:
      (group, first row of the tile, first row of the group, first row behind it) of every tile, in order of rows; how
      many of the N are in use.
    """
    groups = group_sizes.shape[0] + 1
    start = sum_before(jnp.append(group_sizes.astype(jnp.int32), 0))
    end = jnp.append(start[1:], num_rows if clear else jnp.minimum(start[-1] + SPARE, num_rows))
    low, high = start // ALIGNMENT * ALIGNMENT, -(-end // ALIGNMENT) * ALIGNMENT
    tiles = jnp.where(end > start, -(-(high - low) // ROWS), 0)
    first = sum_before(jnp.append(tiles, 0))
    most = (num_rows + groups * (ROWS + 2 * ALIGNMENT)) // ROWS
    tile, before, through = jnp.arange(most, dtype=jnp.int32)[:, None], first[None, :-1], first[None, 1:]
    row = jnp.minimum(low[None] + (tile - before) * ROWS, jnp.clip(high - ROWS, low, num_rows - ROWS)[None])
    columns = jnp.broadcast_arrays(jnp.arange(groups, dtype=jnp.int32)[None], row, start[None], end[None])
    mine = (before <= tile) & (tile < through)  # one masked sum, where rows of a table would be a kernel more
    return jnp.sum(jnp.where(mine[:, None], jnp.stack(columns, 1), 0), 2, dtype=jnp.int32), first[-1:]


def sum_before(x: Int[Array, "E"]) -> Int[Array, "E"]:
    """The sum of all earlier entries, as one masked sum: on a GPU a running sum takes several kernels."""
    index = jnp.arange(x.shape[0])
    return jnp.sum(jnp.where(index[:, None] > index[None], x[None], 0), 1, dtype=jnp.int32)
