"""Packed documents: where a new one starts, given the segment id of every token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def segment_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Marks the tokens at which a recurrent state must be cleared first.

    Args:
      segment_ids: int32; 0 is padding.

    Returns:
      True at a non-padding token whose id differs from that of the last non-padding token before it. The first
      non-padding token of a row is not marked: it continues from the initial state.
    """
    T = segment_ids.shape[1]
    position = jnp.where(segment_ids != 0, jnp.arange(T, dtype=jnp.int32), -1)
    last = jax.lax.cummax(position, axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous_id = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    return (segment_ids != 0) & (before >= 0) & (segment_ids != previous_id)
