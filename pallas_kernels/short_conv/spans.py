"""Short convolution of a sequence that is cut in time over devices: each needs the last inputs of those before it."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import relay
from pallas_kernels.segments import segment_starts


def over_spans(convolve: Callable) -> Callable:
    """Makes an implementation of `short_conv` take `axis`, over which tokens are cut: see `partition.Axes`."""

    @functools.wraps(convolve)
    def run(x, weight, *, cache, segment_ids, axis: str | None = None, **settings):
        if axis is None:
            return convolve(x, weight, cache=cache, segment_ids=segment_ids, **settings)
        last, number = last_inputs(x, segment_ids, weight.shape[1] - 1)
        cache = relay.entering_inputs(last, number, relay.continues(segment_ids, axis), axis)
        *ys, cache = convolve(x, weight, cache=cache, segment_ids=segment_ids, **settings)
        return *ys, relay.of_last_device(cache, axis)

    return run


def last_inputs(
    x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, number: int
) -> tuple[Float[Array, "B N D"], Int[Array, "B"]]:
    """The last N inputs of the last document of x, zero before its start; see `relay.entering_inputs`."""
    if segment_ids is None:
        history = jnp.zeros((x.shape[0], number, x.shape[2]), x.dtype)
        last = jnp.concatenate([history, x[:, -number:]], axis=1)[:, -number:]
        return last, jnp.full(x.shape[0], min(number, x.shape[1]), jnp.int32)
    tokens, starts = segment_ids != 0, segment_starts(segment_ids)
    place, found = relay.places_of_last(tokens, number)
    document = jnp.cumsum(starts, axis=1)
    mine = found & (jnp.take_along_axis(document, place, axis=1) == document[:, -1:])
    last = jnp.where(mine[..., None], jnp.take_along_axis(x, place[..., None], axis=1), 0)
    return last, jnp.where(document[:, -1] > 0, number, jnp.sum(found, axis=1, dtype=jnp.int32))
