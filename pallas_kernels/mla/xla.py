"""Multi-head latent attention in plain JAX: one block of queries at a time, recomputed in the backward pass."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK_T = 512  # queries whose scores exist at one time: B H BLOCK_T S float32 numbers
MASKED = -1e30  # finite, so that a row without any key stays free of NaN


def mla_attention(
    q_nope: Float[Array, "B T H N"],
    q_shared: Float[Array, "B T H P"],
    k_nope: Float[Array, "B S H N"],
    k_shared: Float[Array, "B S P"],
    v: Float[Array, "B S H V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None,
    key_segment_ids: Int[Array, "B S"] | None,
    query_offset: int | Int[Array, ""],
) -> tuple[Float[Array, "B T H V"], Float[Array, "H"]]:
    """See `pallas_kernels.mla.api.mla_attention`; gradients by automatic differentiation."""

    def scores(q_nope, q_shared):
        return _dot("BTHN,BSHN->BHTS", q_nope, k_nope) + _dot("BTHP,BSP->BHTS", q_shared, k_shared)

    def read(p_BHTS):
        return _dot("BHTS,BSHV->BTHV", p_BHTS.astype(v.dtype), v)

    return _attend(scores, read, (q_nope, q_shared), k_shared, scale, segment_ids, key_segment_ids, query_offset)


def mla_absorbed_attention(
    q_latent: Float[Array, "B T H R"],
    q_shared: Float[Array, "B T H P"],
    latent: Float[Array, "B S R"],
    k_shared: Float[Array, "B S P"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None,
    key_segment_ids: Int[Array, "B S"] | None,
    query_offset: int | Int[Array, ""],
) -> tuple[Float[Array, "B T H R"], Float[Array, "H"]]:
    """See `pallas_kernels.mla.api.mla_absorbed_attention`; gradients by automatic differentiation."""

    def scores(q_latent, q_shared):
        return _dot("BTHR,BSR->BHTS", q_latent, latent) + _dot("BTHP,BSP->BHTS", q_shared, k_shared)

    def read(p_BHTS):
        # Summed in this order of axes: XLA's CPU backend refuses the transposed product of bfloat16.
        return jnp.swapaxes(_dot("BHTS,BSR->BHTR", p_BHTS.astype(latent.dtype), latent), 1, 2)

    return _attend(scores, read, (q_latent, q_shared), k_shared, scale, segment_ids, key_segment_ids, query_offset)


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _attend(scores: Callable, read: Callable, queries, keys, scale, segment_ids, key_segment_ids, query_offset):
    B, T = queries[0].shape[:2]
    S = keys.shape[1]
    if segment_ids is None:
        segment_ids, key_segment_ids = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    index_T = query_offset + jnp.arange(T, dtype=jnp.int32)

    def attend_block(queries, segment_ids_BT, index_T):
        causal_TS = jnp.arange(S, dtype=jnp.int32)[None, :] <= index_T[:, None]
        same_BTS = (segment_ids_BT[:, :, None] == key_segment_ids[:, None, :]) & (segment_ids_BT != 0)[:, :, None]
        visible_BHTS = (same_BTS & causal_TS[None])[:, None]
        logits = jnp.where(visible_BHTS, scale * scores(*queries), MASKED)
        peak = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
        p_BHTS = jnp.exp(logits - peak)
        total_BTH1 = jnp.swapaxes(jnp.sum(p_BHTS, -1, keepdims=True), 1, 2)
        saw_any_BTH1 = jnp.swapaxes(peak > MASKED, 1, 2)
        o_BTHV = jnp.where(saw_any_BTH1, read(p_BHTS) / total_BTH1, 0)
        return o_BTHV.astype(queries[0].dtype), jnp.max(peak, (0, 2, 3))

    if T <= BLOCK_T:
        return attend_block(queries, segment_ids, index_T)
    blocks = (*(_split(x, 1) for x in (*queries, segment_ids)), _split(index_T, 0))
    block = jax.checkpoint(lambda xs: attend_block(xs[:-2], *xs[-2:]), prevent_cse=False)
    o, max_logit = jax.lax.map(block, blocks)
    o = jnp.moveaxis(o, 0, 1)
    return o.reshape(B, -1, *o.shape[3:])[:, :T], jnp.max(max_logit, 0)


def _split(x: Array, axis: int) -> Array:
    """Cuts a token axis into a leading axis of blocks; the last block is filled up with padding (segment id 0)."""
    pad = -x.shape[axis] % BLOCK_T
    x = jnp.pad(x, [(0, pad if a == axis else 0) for a in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], x.shape[axis] // BLOCK_T, BLOCK_T, *x.shape[axis + 1 :]), axis, 0)
