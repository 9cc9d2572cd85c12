"""Scalar-decay linear attention by chunks in plain JAX: any device, any length; every exponent is <= 0.

With L_ij = exp(sum of g over j < l <= i), a chunk that starts from state S gives
  o_i = exp(g_1 + ... + g_i) S q_i + sum_{j <= i} L_ij beta_j (q_i . k_j) v_j  and
  S'  = exp(g_1 + ... + g_C) S + sum_j L_Cj beta_j v_j k_j^T.
The sums are formed per pair, not as differences of cumulative sums, which would cancel after one strong decay. What
chunks add to the state and keep of it is to the sequence what tokens are to a chunk: the same pairs give all states.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from pallas_kernels import relay
from pallas_kernels.segments import segment_starts

CHUNK = 64  # tokens per chunk unless the caller says otherwise
CHUNKS = 64  # at most so many chunks find their states in one product, which grows with the square


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

    Chunks are worked on at the same time; so are the states of up to `CHUNKS` of them. Heads come first.
    """
    B, T, H, _ = q.shape
    HV, V = v.shape[2:]
    chunk = min(tile or CHUNK, T)
    blocks = -(-T // (chunk * CHUNKS))
    N = -(-T // (chunk * blocks))  # chunks of a block: even ones
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    starts = jnp.zeros((B, T), bool) if segment_ids is None else segment_starts(segment_ids)

    def clean(x):  # padding may hold anything
        if segment_ids is None:
            return x
        return jnp.where((segment_ids != 0).reshape(B, T, *(1,) * (x.ndim - 2)), x, 0)

    def split(x):  # [B, T, H, ...] -> [B, H, blocks N, C, ...], the last chunks filled up with g = beta = 0
        x = jnp.pad(x, [(0, 0), (0, chunk * N * blocks - T), *((0, 0),) * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 3, 1)

    first = None if initial_state is None else initial_state.astype(dtype)
    starts_B1NC, *inputs = (split(starts[..., None]), *(split(clean(x)) for x in (q, k, v, g, beta)))
    q_BHNCK, k_BHNCK = (jnp.repeat(x, HV // H, axis=1) for x in inputs[:2])
    q_BHNCK = q_BHNCK.astype(dtype)  # before it is used twice: gradients are summed in this dtype
    within = jax.checkpoint(functools.partial(_within_chunks, dtype))
    o, added = within(starts_B1NC, q_BHNCK, k_BHNCK, *inputs[2:])
    of_chunks = added, jnp.sum(inputs[3].astype(dtype), axis=3), jnp.sum(starts_B1NC, axis=3)
    if axis is not None:
        ended = _pass_on(first, *of_chunks, blocks)[1]
        first = _state_of_devices_before(ended, clean(g), segment_ids, axis)
    states, final = _pass_on(first, *of_chunks, blocks)
    o += jax.checkpoint(_from_states)(starts_B1NC, q_BHNCK, inputs[3], states)
    o = jnp.moveaxis(o * scale, 1, 3).reshape(B, -1, HV, V)[:, :T]
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


def _within_chunks(dtype: DTypeLike, starts: Bool[Array, "B 1 N C"], q, k, v, g, beta):
    """What chunks [B, H, N, C, ...] do by themselves: outputs, and what they add to the state."""
    k, v, g, beta = (x.astype(dtype) for x in (k, v, g, beta))
    decay_BHNCC = _pair_decay(g, jnp.cumsum(starts, axis=3))
    scores_BHNCC = jnp.einsum("BHNIK,BHNJK->BHNIJ", q, k) * decay_BHNCC * beta[..., None, :]
    o = jnp.einsum("BHNIJ,BHNJV->BHNIV", scores_BHNCC, v)
    weighted = v * (decay_BHNCC[..., -1, :] * beta)[..., None]
    return o, jnp.einsum("BHNJV,BHNJK->BHNVK", weighted, k)


def _from_states(starts: Bool[Array, "B 1 N C"], q, g, states: Float[Array, "B H N V K"]) -> Float[Array, "B H N C V"]:
    """What the states that enter the chunks add to their outputs."""
    carry_BHNC = _carry(g.astype(q.dtype), jnp.cumsum(starts, axis=3))
    return jnp.einsum("BHNIK,BHNVK->BHNIV", q * carry_BHNC[..., None], states)


# ------------------------------------------------------------------ states
def _pass_on(
    first: Float[Array, "B H V K"] | None,
    added: Float[Array, "B H N V K"],
    g: Float[Array, "B H N"],
    starts: Int[Array, "B 1 N"],
    blocks: int,
) -> tuple[Float[Array, "B H N V K"], Float[Array, "B H V K"]]:
    """(states that enter the chunks, the state after the last), of what chunks add and their sums of g and starts."""
    if blocks == 1:
        return _pass_on_block(first, added, g, starts)

    def in_order(x):  # [B, H, blocks N, ...] -> [blocks, B, H, N, ...]
        return jnp.moveaxis(x.reshape(*x.shape[:2], blocks, -1, *x.shape[3:]), 2, 0)

    def step(state, block):
        entering, state = _pass_on_block(state, *block)
        return state, entering

    first = jnp.zeros_like(added[:, :, 0]) if first is None else first
    final, states = jax.lax.scan(step, first, tuple(in_order(x) for x in (added, g, starts)))
    return jnp.moveaxis(states, 0, 2).reshape(added.shape), final


def _pass_on_block(first, added, g, starts):
    document_B1N = jnp.cumsum(starts, axis=2)
    decay_BHNN, carry_BHN = _pair_decay(g, document_B1N), _carry(g, document_B1N)

    rows = added.reshape(*added.shape[:3], -1)  # of V K numbers: XLA transposes what has more axes

    def after(decay_BHMN, carry_BHM):  # states keep the precision that a sum of float32 has
        states = jnp.einsum("BHMN,BHNR->BHMR", decay_BHMN, rows, precision="highest")
        states = states.reshape(*states.shape[:3], *added.shape[3:])
        return states if first is None else states + carry_BHM[..., None, None] * first[:, :, None]

    earlier = jnp.pad(decay_BHNN[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
    entering = after(earlier, jnp.pad(carry_BHN[:, :, :-1], ((0, 0), (0, 0), (1, 0)), constant_values=1))
    return entering, after(decay_BHNN[:, :, -1:], carry_BHN[:, :, -1:])[:, :, 0]


def _carry(g: Float[Array, "*B C"], document: Int[Array, "*B C"]) -> Float[Array, "*B C"]:
    """What is left of the entering state after each element; document 0 is the one that it belongs to."""
    return jnp.exp(jnp.cumsum(g, axis=-1)) * (document == 0)


def _pair_decay(g: Float[Array, "*B C"], document: Int[Array, "*B C"]) -> Float[Array, "*B C C"]:
    """exp(sum of g over j < l <= i) for j <= i of one document, else 0."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (*g.shape, g.shape[-1]), g.ndim - 1 + i) for i in range(2))
    after = jnp.where(row > column, g[..., None], 0)  # g_l where l > j
    visible = (document[..., :, None] == document[..., None, :]) & (row >= column)
    return jnp.exp(jnp.where(visible, jnp.cumsum(after, axis=-2), -jnp.inf))
