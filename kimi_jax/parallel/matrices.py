"""Whole matrices of parameters that are cut over devices: each device gets some of them whole, and gives them back."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

MOST_ZEROS = 4  # times the matrices of a stack: what it may be filled up to, so that devices have equal shares


class Layout(NamedTuple):
    """How a stack of matrices lies on the mesh, inside `shard_map`: names of mesh axes."""

    rows: tuple[str, ...] = ()
    """Those that cut the rows."""
    columns: tuple[str, ...] = ()
    """Those that cut the columns."""
    copies: tuple[str, ...] = ()
    """Those whose devices hold the same parts of the same matrices."""

    @property
    def cuts(self) -> tuple[str, ...]:
        return self.rows + self.columns


HERE = Layout()  # all on this device


def layout_of(spec: P, batch: int, rows: int, axes: Sequence[str]) -> Layout:
    """Reads the layout off a parameter's partition.

    Args:
      spec: an entry per dimension.
      batch: leading dimensions that count matrices.
      rows: dimensions after them that form the rows; the others form the columns.
      axes: of the mesh, those that have more than one device.
    """

    def names(entries: Sequence) -> tuple[str, ...]:
        return tuple(name for entry in entries if entry for name in (entry if isinstance(entry, tuple) else (entry,)))

    used = names(spec)
    copies = tuple(name for name in axes if name not in used)
    return Layout(names(spec[batch : batch + rows]), names(spec[batch + rows :]), copies)


def whole_shape(part: Float[Array, "N r c"], layout: Layout) -> tuple[int, int]:
    """Rows and columns of the whole matrices."""
    return part.shape[1] * _size(layout.rows), part.shape[2] * _size(layout.columns)


def sharers(layout: Layout, number: int, size: Callable[[Sequence[str]], int]) -> tuple[str, ...]:
    """Axes of copies over which that many matrices are shared out, near ones first; along the others all do the same.

    Of a stack over a thousand devices nearly all would be zeros, and these travel, too.

    Args:
      size: devices of some axes together.
    """
    taken: tuple[str, ...] = ()
    for name in reversed(layout.copies):
        if size((name, *taken, *layout.cuts)) <= MOST_ZEROS * number:
            taken = (name, *taken)
    return taken


def collect(part: Float[Array, "N r c"], layout: Layout) -> Float[Array, "n R C"]:
    """Puts this device's share of the matrices together: N over the devices that take part, rounded up."""
    copies = sharers(layout, part.shape[0], _size)
    devices = _size(layout.cuts + copies)
    x = jnp.pad(part, ((0, -part.shape[0] % devices), (0, 0), (0, 0)))
    if copies:
        share = x.shape[0] // _size(copies)
        x = lax.dynamic_slice_in_dim(x, lax.axis_index(copies) * share, share)
    for dim, names in ((1, layout.rows), (2, layout.columns)):
        x = lax.all_to_all(x, names, split_axis=0, concat_axis=dim, tiled=True) if names else x
    return x


def give_back(share: Float[Array, "n R C"], layout: Layout, number: int) -> Float[Array, "N r c"]:
    """Undoes `collect` of `number` matrices."""
    x = share
    for dim, names in ((2, layout.columns), (1, layout.rows)):
        x = lax.all_to_all(x, names, split_axis=dim, concat_axis=0, tiled=True) if names else x
    copies = sharers(layout, number, _size)
    x = lax.all_gather(x, copies, axis=0, tiled=True) if copies else x
    return x[:number]


def _size(names: Sequence[str]) -> int:
    return math.prod(lax.axis_size(name) for name in names)
