"""What the fast implementations serve: queries and keys of the same tokens, with the parts of a key side by side."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.hopper import refuse_other_backends

DTYPES = (jnp.bfloat16, jnp.float16)


def refuse_others(q_nope, q_shared, k_nope, k_shared, v, *, segment_ids, key_segment_ids, query_offset) -> str | None:
    """Refuses all but 16-bit self-attention on an NVIDIA GPU."""
    return refuse_other_backends() or refuse_arguments(
        *(q_nope, q_shared, k_nope, k_shared, v),
        **dict(segment_ids=segment_ids, key_segment_ids=key_segment_ids, query_offset=query_offset),
    )


def refuse_arguments(
    q_nope, q_shared, k_nope, k_shared, v, *, segment_ids, key_segment_ids, query_offset
) -> str | None:
    """The part of `refuse_others` that does not ask for the device."""
    dtypes = {x.dtype for x in (q_nope, q_shared, k_nope, k_shared, v)}
    if len(dtypes) > 1 or q_nope.dtype not in DTYPES:
        return f"q, k, v must share bfloat16 or float16, got {', '.join(sorted(map(str, dtypes)))}"
    if not isinstance(query_offset, int) or query_offset or q_nope.shape[1] != k_nope.shape[1]:
        return "serves queries and keys of the same tokens only: S = T and query_offset = 0"
    if key_segment_ids is not segment_ids:
        return "serves queries and keys of the same tokens only: leave key_segment_ids out"
    return None


def join_queries(q_nope: Float[Array, "B T H N"], q_shared: Float[Array, "B T H P"]) -> Float[Array, "B T H N+P"]:
    """Puts the two parts side by side; XLA undoes a `jnp.split` of one array and copies nothing."""
    return jnp.concatenate([q_nope, q_shared], axis=-1)


def join_keys(k_nope: Float[Array, "B S H N"], k_shared: Float[Array, "B S P"]) -> Float[Array, "B S H N+P"]:
    """Gives every head its copy of the shared part."""
    *tokens, H, _ = k_nope.shape
    shared = jnp.broadcast_to(k_shared[:, :, None], (*tokens, H, k_shared.shape[-1]))
    return jnp.concatenate([k_nope, shared], axis=-1)
