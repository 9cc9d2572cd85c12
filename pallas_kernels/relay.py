"""What devices hand each other when sequences are cut in time over an axis of `shard_map`: states, inputs, documents.

Over the span of one device a recurrent state changes by an affine map, S [V, K] -> S M + H. Every device gathers the
maps of all, and applies those of the devices before it to find the state that enters its own span; the gradient of the
state that leaves it comes from the devices behind in the same way. What travels does not depend on the span's length.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def continues(segment_ids: Int[Array, "B T"] | None, axis: str) -> Bool[Array, "B"] | None:
    """Whether this span's first document is the one that is open at the end of the devices before.

    True, too, in rows that have no token here, and in those that have none before.

    Args:
      segment_ids: int32, of this device's span; 0 is padding. None: rows are one document each, and None comes back.
      axis: name of the mesh axis, whose devices have the spans in order.
    """
    if segment_ids is None:
        return None
    tokens = segment_ids != 0
    first, last = (_at(segment_ids, index) for index in (jnp.argmax(tokens, 1), _last(tokens)))
    lasts = lax.all_gather(last, axis)
    before = (lasts != 0) & (jnp.arange(lasts.shape[0]) < lax.axis_index(axis))[:, None]
    open_document = jnp.take_along_axis(lasts, _last(before.T)[None], 0)[0]
    return (first == open_document) | (first == 0) | ~jnp.any(before, 0)


def _last(marked: Bool[Array, "B N"]) -> Int[Array, "B"]:
    """Where the last mark of each row stands; somewhere, if there is none."""
    return marked.shape[1] - 1 - jnp.argmax(marked[:, ::-1], 1)


def _at(x: Int[Array, "B T"], index: Int[Array, "B"]) -> Int[Array, "B"]:
    return jnp.take_along_axis(x, index[:, None], 1)[:, 0]


def keep(continued: Bool[Array, "B"] | None, x: Float[Array, "B *N"]) -> Float[Array, "B *N"]:
    """Zero in rows whose first document starts here."""
    return x if continued is None else jnp.where(continued.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


def of_last_device(x: Float[Array, "..."], axis: str) -> Float[Array, "..."]:
    """What the device of the last span has, on every device."""
    return lax.psum(jnp.where(lax.axis_index(axis) == lax.axis_size(axis) - 1, x, 0), axis)


# ------------------------------------------------------------------ states
def entering_state(added: Float[Array, "*B V K"], applied: Float[Array, "*B K K"], axis: str) -> Float[Array, "*B V K"]:
    """The state after the spans of all devices before, which enters this one's.

    Args:
      added, applied: H and M of this device's span, float32; M is 0 in rows whose first document starts here, and
        where a document starts inside.
      axis: name of the mesh axis.

    Returns:
      float32; zero on the first device. In rows whose first document starts here it is the state of another one.
    """
    added, applied = lax.all_gather((added, applied), axis)
    return _compose(jnp.zeros_like(added[0]), added, applied, jnp.arange(len(added)) < lax.axis_index(axis))


def leaving_gradient(
    d_entering: Float[Array, "*B V K"], applied: Float[Array, "*B K K"], axis: str
) -> Float[Array, "*B V K"]:
    """What the devices behind add to the gradient of the state that leaves this device's span.

    Args:
      d_entering: gradient of the state entering this span, from what this device alone computes of it; float32, and 0
        in rows whose first document starts here.
      applied: as for `entering_state`.
    """
    added, applied = lax.all_gather((d_entering, applied.mT), axis)
    behind = jnp.arange(len(added)) > lax.axis_index(axis)
    return _compose(jnp.zeros_like(added[0]), added[::-1], applied[::-1], behind[::-1])


def _compose(state, added, applied, active: Bool[Array, "N"]):
    """Applies the active ones of N maps in order; the others come after them, or before."""

    def apply(state, span):
        added, applied, active = span
        moved = jnp.einsum("...vk,...kc->...vc", state, applied, precision=lax.Precision.HIGHEST) + added
        return jnp.where(active, moved, state), None

    return lax.scan(apply, state, (added, applied, active))[0]


# ------------------------------------------------------------------ the last inputs of a convolution
def entering_inputs(
    last: Float[Array, "B W D"], number: Int[Array, "B"], continued: Bool[Array, "B"] | None, axis: str
) -> Float[Array, "B W D"]:
    """The last W inputs of the open document on all devices before, oldest first, zero where there are none.

    Args:
      last: the same of this device's span alone.
      number: how many of `last` are inputs, 0 to W; W in rows in which a document starts after the first token, since
        nothing older is seen through it.
      continued: as `continues` returns it.
      axis: name of the mesh axis.
    """
    W = last.shape[1]
    number = number if continued is None else jnp.where(continued, number, W)
    last, number = lax.all_gather((last, number), axis)
    before = jnp.arange(len(last)) < lax.axis_index(axis)
    marked = (jnp.arange(W)[None, None] >= W - number[..., None]) & before[:, None, None]
    spans, marked = (jnp.concatenate(tuple(x), axis=1) for x in (last, marked))  # [B, devices W, ...]
    place, found = places_of_last(marked, W)
    return keep(continued, jnp.where(found[..., None], jnp.take_along_axis(spans, place[..., None], 1), 0))


def places_of_last(marked: Bool[Array, "B N"], number: int) -> tuple[Int[Array, "B M"], Bool[Array, "B M"]]:
    """(where the last M marks of each row stand, in order; which of them there are)."""
    behind = jnp.cumsum(marked[:, ::-1], axis=1)[:, ::-1]  # marks from here on
    wanted = marked[:, None] & (behind[:, None] == jnp.arange(number, 0, -1)[None, :, None])
    return jnp.argmax(wanted, axis=2), jnp.any(wanted, axis=2)
