"""Scalar-decay linear attention by chunks in plain JAX: any device, any length; every exponent is <= 0.

With L_ij = exp(sum of g over j < l <= i), a chunk that starts from state S gives
  o_i = exp(g_1 + ... + g_i) S q_i + sum_{j <= i} L_ij beta_j (q_i . k_j) v_j  and
  S'  = exp(g_1 + ... + g_C) S + sum_j L_Cj beta_j v_j k_j^T.
The sums are formed per pair, not as differences of cumulative sums, which would cancel after one strong decay.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

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
    """See `pallas_kernels.ssd.api.chunk_ssd`; the backward pass keeps one state per chunk and recomputes the rest.

    Chunks are worked on at the same time, as M = B N rows; only their states are passed on one after the other.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    chunk = min(tile or CHUNK, T)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    starts = jnp.zeros((B, T), bool) if segment_ids is None else segment_starts(segment_ids)

    def clean(x):  # padding may hold anything
        if segment_ids is None:
            return x
        return jnp.where((segment_ids != 0).reshape(B, T, *(1,) * (x.ndim - 2)), x, 0)

    def split(x):  # [B, T, ...] -> [B N, C, ...], the last chunk filled up with g = beta = 0
        x = jnp.pad(x, [(0, 0), (0, -T % chunk), *((0, 0),) * (x.ndim - 2)])
        return x.reshape(-1, chunk, *x.shape[2:])

    def in_order(x):  # [B N, ...] -> [N, B, ...]
        return jnp.moveaxis(x.reshape(B, -1, *x.shape[1:]), 1, 0)

    def pass_on(state, added_and_kept):
        added, kept = added_and_kept
        return kept[..., None, None] * state + added, state

    first = jnp.zeros((B, HV, V, K), dtype) if initial_state is None else initial_state.astype(dtype)
    starts_MC, *inputs = (split(starts), *(split(clean(x)) for x in (q, k, v, g, beta)))
    q_MCHK, k_MCHK = (jnp.repeat(x, HV // H, axis=2) for x in inputs[:2])
    q_MCHK = q_MCHK.astype(dtype)  # before it is used twice: gradients are summed in this dtype
    within = jax.checkpoint(functools.partial(_within_chunks, dtype))
    o, added, kept = within(starts_MC, q_MCHK, k_MCHK, *inputs[2:])
    chunks = in_order(added), in_order(kept)
    if axis is not None:
        ended = jax.lax.scan(pass_on, first, chunks)[0]
        first = _state_of_devices_before(ended, clean(g), segment_ids, axis)
    final, states = jax.lax.scan(pass_on, first, chunks)
    states_MHVK = jnp.moveaxis(states, 0, 1).reshape(added.shape)
    o += jax.checkpoint(_from_states)(starts_MC, q_MCHK, inputs[3], states_MHVK)
    o = (o * scale).reshape(B, -1, HV, V)[:, :T]
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


def _within_chunks(dtype: DTypeLike, starts: Bool[Array, "M C"], q, k, v, g, beta):
    """What chunks [M, C, HV, ...] do by themselves: outputs, what they add to the state, what they keep of it."""
    k, v, g, beta = (x.astype(dtype) for x in (k, v, g, beta))
    document_MC = jnp.cumsum(starts, axis=1)  # 0: the document that the state belongs to
    g_MHC, beta_MHC = jnp.moveaxis(g, 1, 2), jnp.moveaxis(beta, 1, 2)
    decay_MHCC = _pair_decay(g_MHC, document_MC)
    scores_MHCC = jnp.einsum("MIHK,MJHK->MHIJ", q, k) * decay_MHCC * beta_MHC[:, :, None, :]
    o = jnp.einsum("MHIJ,MJHV->MIHV", scores_MHCC, v)
    added = jnp.einsum("MHJ,MJHV,MJHK->MHVK", decay_MHCC[:, :, -1] * beta_MHC, v, k)
    return o, added, _carry(g_MHC, document_MC)[:, :, -1]


def _from_states(starts: Bool[Array, "M C"], q, g, states: Float[Array, "M H V K"]) -> Float[Array, "M C H V"]:
    """What the states that enter the chunks add to their outputs."""
    carry_MHC = _carry(jnp.moveaxis(g.astype(q.dtype), 1, 2), jnp.cumsum(starts, axis=1))
    return jnp.einsum("MHVK,MIHK,MHI->MIHV", states, q, carry_MHC)


def _carry(g_MHC: Float[Array, "M H C"], document_MC: Int[Array, "M C"]) -> Float[Array, "M H C"]:
    """What is left of the entering state at each token."""
    return jnp.exp(jnp.cumsum(g_MHC, axis=2)) * (document_MC == 0)[:, None]


def _pair_decay(g_MHC: Float[Array, "M H C"], document_MC: Int[Array, "M C"]) -> Float[Array, "M H C C"]:
    """exp(sum of g over j < l <= i) for j <= i of one document, else 0."""
    C = g_MHC.shape[2]
    row, column = jnp.arange(C)[:, None], jnp.arange(C)[None, :]
    after = jnp.where((row > column)[None, None], g_MHC[..., None], 0)  # g_l where l > j
    visible_MCC = (document_MC[:, :, None] == document_MC[:, None, :]) & (row >= column)[None]
    return jnp.exp(jnp.where(visible_MCC[:, None], jnp.cumsum(after, axis=2), -jnp.inf))
