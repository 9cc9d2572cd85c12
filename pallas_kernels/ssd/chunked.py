"""Scalar-decay linear attention chunk by chunk in plain JAX: any device, any length; every exponent is <= 0.

With L_ij = exp(sum of g over j < l <= i), a chunk that starts from state S gives
  o_i = exp(g_1 + ... + g_i) S q_i + sum_{j <= i} L_ij beta_j (q_i . k_j) v_j  and
  S'  = exp(g_1 + ... + g_C) S + sum_j L_Cj beta_j v_j k_j^T.
The sums are formed per pair, not as differences of cumulative sums, which would cancel after one strong decay.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import relay
from pallas_kernels.segments import segment_starts

CHUNK = 64  # tokens per chunk unless the caller says otherwise


def refuse(q, k, v, g, beta, *, tile: int | None, **settings) -> str | None:
    """Returns why these arguments cannot be served, or None."""
    return f"{tile=} must be at least 1" if tile is not None and tile < 1 else None


def chunk_ssd(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV"],
    beta: Float[Array, "B T HV"],
    *,
    scale: float,
    initial_state: Float[Array, "B HV V K"] | None,
    segment_ids: Int[Array, "B T"] | None,
    tile: int | None,
    axis: str | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV V K"]]:
    """See `pallas_kernels.ssd.api.chunk_ssd`; the backward pass keeps one state per chunk and recomputes the rest."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    chunk = min(tile or CHUNK, T)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    starts = jnp.zeros((B, T), bool) if segment_ids is None else segment_starts(segment_ids)

    def clean(x):  # padding may hold anything
        if segment_ids is None:
            return x
        return jnp.where((segment_ids != 0).reshape(B, T, *(1,) * (x.ndim - 2)), x, 0)

    def split(x):  # [B, T, ...] -> [N, B, C, ...], the last chunk filled up with g = beta = 0
        x = jnp.pad(x, [(0, 0), (0, -T % chunk), *((0, 0),) * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(state, inputs):
        starts_BC, q, k, v, g, beta = inputs
        q, k = (jnp.repeat(x.astype(dtype), HV // H, axis=2) for x in (q, k))
        return _run_chunk(state, q * scale, k, v.astype(dtype), g.astype(dtype), beta.astype(dtype), starts_BC)

    first = jnp.zeros((B, HV, V, K), dtype) if initial_state is None else initial_state.astype(dtype)
    inputs = (split(starts), *(split(clean(x)) for x in (q, k, v, g, beta)))
    if axis is not None:
        first = _state_of_devices_before(jax.lax.scan(body, first, inputs)[0], clean(g), segment_ids, axis)
    final, o = jax.lax.scan(body, first, inputs)
    o = jnp.moveaxis(o, 0, 1).reshape(B, -1, HV, V)[:, :T]
    return clean(o).astype(v.dtype), relay.of_last_device(final, axis) if axis else final


def _state_of_devices_before(
    added: Float[Array, "B HV V K"], g: Float[Array, "B T HV"], segment_ids: Int[Array, "B T"] | None, axis: str
) -> Float[Array, "B HV V K"]:
    """The state that enters this device's span; it leaves the span decayed by all of g, plus `added`.

    `added` is what a pass from a zero state ends with: XLA drops the outputs of that pass.
    """
    decay = jnp.exp(jnp.sum(g.astype(added.dtype), axis=1))
    continued = relay.continues(segment_ids, axis)
    if segment_ids is not None:
        decay = jnp.where(jnp.any(segment_starts(segment_ids), axis=1, keepdims=True), 0, relay.keep(continued, decay))
    applied = decay[..., None, None] * jnp.eye(added.shape[-1], dtype=added.dtype)[None, None]
    return relay.keep(continued, relay.entering_state(added, applied, axis))


def _run_chunk(state: Float[Array, "B H V K"], q, k, v, g, beta, starts: Bool[Array, "B C"]):
    """One chunk, all heads: q, k [B, C, H, K], v [B, C, H, V], g, beta [B, C, H]."""
    document_BC = jnp.cumsum(starts, axis=1)  # 0: the document that the state belongs to
    g_BHC, beta_BHC = jnp.moveaxis(g, 1, 2), jnp.moveaxis(beta, 1, 2)
    decay_BHCC = _pair_decay(g_BHC, document_BC)
    scores_BHCC = jnp.einsum("BIHK,BJHK->BHIJ", q, k) * decay_BHCC * beta_BHC[:, :, None, :]
    carry_BHC = jnp.exp(jnp.cumsum(g_BHC, axis=2)) * (document_BC == 0)[:, None]
    o = jnp.einsum("BHIJ,BJHV->BIHV", scores_BHCC, v)
    o += jnp.einsum("BHVK,BIHK,BHI->BIHV", state, q, carry_BHC)
    kept = jnp.einsum("BHJ,BJHV,BJHK->BHVK", decay_BHCC[:, :, -1] * beta_BHC, v, k)
    return carry_BHC[:, :, -1, None, None] * state + kept, o


def _pair_decay(g_BHC: Float[Array, "B H C"], document_BC: Int[Array, "B C"]) -> Float[Array, "B H C C"]:
    """exp(sum of g over j < l <= i) for j <= i of one document, else 0."""
    C = g_BHC.shape[2]
    row, column = jnp.arange(C)[:, None], jnp.arange(C)[None, :]
    after = jnp.where((row > column)[None, None], g_BHC[..., None], 0)  # g_l where l > j
    visible_BCC = (document_BC[:, :, None] == document_BC[:, None, :]) & (row >= column)[None]
    return jnp.exp(jnp.where(visible_BCC[:, None], jnp.cumsum(after, axis=2), -jnp.inf))
