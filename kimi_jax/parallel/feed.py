"""How what single processes hold becomes arrays over all devices: rows of a batch, requests to stop."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class Share(NamedTuple):
    """Rows [index * B / count, (index + 1) * B / count) of a batch of B."""

    index: int
    count: int


def share_of_batch(sharding: NamedSharding, shape: tuple[int, int]) -> Share:
    """The smallest even share of the rows of a batch that holds all that this process's devices take.

    Processes whose devices differ along `context` or `tensor` alone take the same rows.

    Args:
      sharding: of the batch.
      shape: B, T of the whole batch.
    """
    batch_size = shape[0]
    taken = [rows.indices(batch_size) for rows, _ in sharding.addressable_devices_indices_map(shape).values()]
    first, last = min(start for start, _, _ in taken), max(stop for _, stop, _ in taken) - 1
    divisors = (count for count in range(batch_size, 0, -1) if batch_size % count == 0)
    count = next(count for count in divisors if first * count // batch_size == last * count // batch_size)
    return Share(first * count // batch_size, count)


def place(rows: np.ndarray, share: Share, sharding: NamedSharding) -> jax.Array:
    """Sends this process's rows [B / count, T] of a batch to its devices; returns the whole batch [B, T]."""
    if share.count == jax.process_count():  # each row is held by one process
        return jax.make_array_from_process_local_data(sharding, rows)
    shape = (len(rows) * share.count, *rows.shape[1:])
    offset = share.index * len(rows)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        return rows[start - offset : stop - offset, *index[1:]]

    return jax.make_array_from_callback(shape, sharding, part)


class StopVote:
    """Lets all processes learn at the same step that one of them was asked to stop.

    Each gives the number of its signal, or 0; the largest comes back as an array that every process reads with the
    metrics of that step. One small all-reduce per step.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._size = mesh.size
        self._largest = jax.jit(lambda numbers: numbers.max(), out_shardings=NamedSharding(mesh, P()))

    def __call__(self, number: int) -> jax.Array:
        here = np.full(1, number, np.int32)
        return self._largest(jax.make_array_from_callback((self._size,), self._sharding, lambda _: here))
