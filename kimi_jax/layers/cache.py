"""What each mixer carries from one call to the next during generation; shapes are static, so decoding compiles once.

A cache holds one open document per row. The first non-padding token of the next call continues it, whatever its segment
id; a later change of segment id within that call closes it and opens another. Padding changes nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.partition import Axes, partition
from pallas_kernels.segments import segment_starts

PLACES = Axes(("BT", "B", "B"), ("BT", "BT", "B", "B"), exchanges=True)


class ConvCache(NamedTuple):
    """The last W - 1 inputs of each short convolution, in the compute dtype; None where there is no convolution."""

    query: Float[Array, "B W-1 D"] | None
    key: Float[Array, "B W-1 D"] | None
    value: Float[Array, "B W-1 D"] | None


class RecurrentCache(NamedTuple):
    """Cache of a linear-attention mixer: its size does not depend on the context."""

    state: Float[Array, "B HV V K"]
    """float32, V first."""
    conv: ConvCache


class MlaCache(NamedTuple):
    """Cache of an MLA mixer: R + P numbers per token, for all heads together."""

    latent: Float[Array, "B S R"]
    """Normalised latents, in the compute dtype."""
    shared_key: Float[Array, "B S P"]
    """The key that all heads share, rotated already if the layer rotates."""
    document: Int[Array, "B S"]
    """int32 number of the document that each slot belongs to; 0: empty or padding."""
    length: Int[Array, ""]
    """int32, slots written so far, the same for all rows; writing more than S of them is the caller's mistake."""
    open_document: Int[Array, "B"]
    """int32 number of the open document."""
    position: Int[Array, "B"]
    """int32, tokens of the open document so far."""


type Cache = RecurrentCache | MlaCache


class Placement(NamedTuple):
    """Where the tokens of one call stand in their documents."""

    document: Int[Array, "B T"]
    """int32, 0 for padding."""
    position: Int[Array, "B T"]
    """int32, 0 at the first token of a document."""
    open_document: Int[Array, "B"]
    next_position: Int[Array, "B"]


def place_tokens(
    segment_ids: Int[Array, "B T"], open_document: Int[Array, "B"], position: Int[Array, "B"]
) -> Placement:
    """Numbers documents and the tokens within them, continuing from the open document of a cache.

    Args:
      segment_ids: int32; 0 is padding.
      open_document: number of the document that the first non-padding token continues.
      position: tokens that this document has already.
    """
    return Placement(*partition(_place_rows, PLACES, (segment_ids, open_document, position), {}))


def _place_rows(segment_ids, open_document, position, axis: str | None = None) -> Placement:
    """Where rows are cut, each device counts through whole ones: XLA would count over devices token by token."""
    here = segment_ids.shape[1]
    if axis:
        segment_ids = lax.all_gather(segment_ids, axis, axis=1, tiled=True)
    valid, starts = segment_ids != 0, segment_starts(segment_ids)
    number = open_document[:, None] + jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    seen = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    first = lax.cummax(jnp.where(starts, seen - 1, -position[:, None]), axis=1)
    own = (lambda x: lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * here, here, 1)) if axis else lambda x: x
    return Placement(
        document=own(jnp.where(valid, number, 0)),
        position=own(jnp.where(valid, seen - 1 - first, 0)),
        open_document=number[:, -1],
        next_position=seen[:, -1] - first[:, -1],
    )
