"""KDA chunk by chunk in plain JAX: matrix products inside a chunk, a scan between chunks, a hand-written backward."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import relay
from pallas_kernels.kda.gates import Gate
from pallas_kernels.kda.levels import Decays, Dot, attention_and_solver, chunk_decays, interleave, pair_gradients
from pallas_kernels.kda.reference import read_and_write_vectors
from pallas_kernels.segments import segment_starts

TILES = (16, 32, 64)


class _Options(NamedTuple):
    """What is fixed at trace time."""

    scale: float
    normalize_qk: bool
    tile: int
    axis: str | None


class _Inputs(NamedTuple):
    """The arrays of the public signature; also the residuals of the backward."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T HV V"]
    g: Float[Array, "B T HV K"]
    beta: Float[Array, "B T HV"]
    gate: Gate
    initial_state: Float[Array, "B HV V K"] | None
    segment_ids: Int[Array, "B T"] | None


class _Chunks(NamedTuple):
    """Inputs after the front end, float32, one chunk per leading index; the gate is -inf where a document starts."""

    q: Float[Array, "N B HV C K"]  # normalised and scaled
    k: Float[Array, "N B HV C K"]
    v: Float[Array, "N B HV C V"]
    g: Float[Array, "N B HV C K"]
    beta: Float[Array, "N B HV C"]


class _Operands(NamedTuple):
    """What one chunk brings to the recurrence over chunks."""

    v: Float[Array, "N B HV C V"]
    beta: Float[Array, "N B HV C"]
    q_in: Float[Array, "N B HV C K"]  # reads the state that enters the chunk
    k_in: Float[Array, "N B HV C K"]
    k_out: Float[Array, "N B HV C K"]  # writes the state that leaves it
    whole: Float[Array, "N B HV K"]
    attention: Float[Array, "N B HV C C"]
    solver: Float[Array, "N B HV C C"]


class _Span(NamedTuple):
    """What the backward needs to know of the state that came from the devices before."""

    entering: Float[Array, "B HV V K"]
    applied: Float[Array, "B HV K K"]  # M of this device's span
    continued: Bool[Array, "B"] | None


def default_tile(key_dim: int) -> int:
    """The fastest on a CPU: longer chunks do more work per token, shorter ones keep more states (docs/kda.md)."""
    return 16 if key_dim < 128 else 32


def refuse(q, k, v, g, beta, *, tile, **_) -> str | None:
    """Refuses chunk lengths that nobody measured."""
    return None if tile is None or tile in TILES else f"tile={tile} must be one of {TILES}"


def chunk_kda(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV K"],
    beta: Float[Array, "B T HV"],
    *,
    gate: Gate,
    scale: float,
    initial_state: Float[Array, "B HV V K"] | None,
    segment_ids: Int[Array, "B T"] | None,
    normalize_qk: bool,
    tile: int | None,
    axis: str | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV V K"]]:
    """See `pallas_kernels.kda.api.chunk_kda`; the backward keeps the inputs alone and recomputes the rest."""
    shortest = 1 << (q.shape[1] - 1).bit_length()  # a shorter sequence is one shorter chunk
    options = _Options(scale, normalize_qk, min(tile or default_tile(q.shape[-1]), shortest), axis)
    o, final = _chunk_kda(options, _Inputs(q, k, v, g, beta, gate, initial_state, segment_ids))
    return o, relay.of_last_device(final, axis) if axis else final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_kda(options: _Options, inputs: _Inputs):
    return _forward_rule(options, inputs)[0]


def _forward_rule(options: _Options, inputs: _Inputs):
    chunks, state = _prepare(options, inputs)
    operands, _ = _operands(chunks, _dot(inputs))
    state, span = _enter(options, inputs, operands, state)
    final, o = _forward_scan(operands, state, _dot(inputs))
    return (_join_chunks(o, inputs), final), (inputs, span)


def _backward_rule(options: _Options, saved, cotangents):
    (inputs, span), (d_o, d_final) = saved, cotangents
    dot = _dot(inputs)
    (chunks, state), pull_back = jax.vjp(functools.partial(_prepare, options), inputs)
    d_o = _split_chunks(_keep_valid(d_o, inputs.segment_ids).astype(state.dtype), options.tile)
    operands, decays = _operands(chunks, dot)
    if span is not None:
        state = span.entering
        d_final += _leave(options, span, _backward_scan(operands, d_o, d_final, dot)[0])
    states, new_values = _states_scan(operands, state, dot)
    d_initial, (d_states, adjoint) = _backward_scan(operands, d_o, d_final, dot)
    same = _same_document(inputs, options.tile)
    d_chunks = _chunk_gradients(chunks, operands, decays, states, new_values, d_o, d_states, adjoint, same, dot)
    return pull_back((d_chunks, d_initial))


_chunk_kda.defvjp(_forward_rule, _backward_rule)


def _enter(options: _Options, inputs: _Inputs, operands: _Operands, state: Float[Array, "B HV V K"]):
    """(state that enters, what the backward needs of it): the caller's, or that of the devices before."""
    if options.axis is None:
        return state, None
    continued = relay.continues(inputs.segment_ids, options.axis)
    added, applied = _span_map(operands, _dot(inputs))
    applied = relay.keep(continued, applied)
    state = relay.keep(continued, relay.entering_state(added, applied, options.axis))
    return state, _Span(state, applied, continued)


def _leave(options: _Options, span: _Span, d_entering: Float[Array, "B HV V K"]) -> Float[Array, "B HV V K"]:
    """What the devices behind add to the gradient of the final state."""
    return relay.leaving_gradient(relay.keep(span.continued, d_entering), span.applied, options.axis)


def _span_map(operands: _Operands, dot: Dot) -> tuple[Float[Array, "B HV V K"], Float[Array, "B HV K K"]]:
    """(H, M) of all chunks: a state S leaves them as S M + H. One scan finds both, H from zero and M without values."""
    _, B, HV, _, V = operands.v.shape
    K = operands.k_in.shape[-1]

    def chunk(maps, x):
        values = jnp.pad(x.v, ((0, 0), (0, 0), (0, 0), (0, K)))
        return _update(maps, x._replace(v=values), dot)[1], None

    first = jnp.broadcast_to(jnp.eye(V + K, K, -V, dtype=operands.v.dtype), (B, HV, V + K, K))
    maps, _ = lax.scan(chunk, first, operands)
    return maps[..., :V, :], maps[..., V:, :]


def _dot(inputs: _Inputs) -> Dot:
    """Half-precision inputs carry no more than the fast float32 product of a GPU keeps; float32 inputs do."""
    half = jnp.dtype(inputs.q.dtype).itemsize < 4
    precision = lax.Precision.DEFAULT if half else lax.Precision.HIGHEST
    return functools.partial(jnp.einsum, precision=precision)


def _keep_valid(x: Float[Array, "B T *D"], segment_ids: Int[Array, "B T"] | None) -> Float[Array, "B T *D"]:
    """Zero at padding, which may hold anything."""
    if segment_ids is None:
        return x
    return jnp.where((segment_ids != 0).reshape(*segment_ids.shape, *(1,) * (x.ndim - 2)), x, 0)


def _split_chunks(x: Float[Array, "B T HV *D"], C: int) -> Float[Array, "N B HV C *D"]:
    """Pads with zeros (which leave the state alone) to whole chunks, and brings the chunks to the front."""
    B, T, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % C), *((0, 0),) * len(rest)))
    x = x.reshape(B, -1, C, *rest)
    return jnp.moveaxis(x, (1, 0, 3, 2), (0, 1, 2, 3))


def _join_chunks(o: Float[Array, "N B HV C V"], inputs: _Inputs) -> Float[Array, "B T HV V"]:
    N, B, HV, C, V = o.shape
    o = jnp.moveaxis(o, (0, 1, 2, 3), (1, 0, 3, 2)).reshape(B, N * C, HV, V)
    return _keep_valid(o[:, : inputs.v.shape[1]], inputs.segment_ids).astype(inputs.v.dtype)


def _prepare(options: _Options, inputs: _Inputs) -> tuple[_Chunks, Float[Array, "B HV V K"]]:
    """Everything before the recurrence: padding, norm, gate, document starts, chunks. Differentiated automatically."""
    dtype = jnp.promote_types(inputs.q.dtype, jnp.float32)
    ids = inputs.segment_ids
    q, k, v, g, beta = (_keep_valid(x, ids).astype(dtype) for x in inputs[:5])
    q, k = read_and_write_vectors(
        q, k, scale=options.scale, normalize_qk=options.normalize_qk, num_value_heads=v.shape[2]
    )
    if inputs.gate is not None:
        g = _keep_valid(inputs.gate.log_decay(g), ids)
    if ids is not None:
        g = jnp.where(segment_starts(ids)[..., None, None], -jnp.inf, g)
    chunks = _Chunks(*(_split_chunks(x, options.tile) for x in (q, k, v, g, beta)))
    if inputs.initial_state is None:
        return chunks, jnp.zeros((*v.shape[:1], *v.shape[2:], k.shape[-1]), dtype)
    return chunks, inputs.initial_state.astype(dtype)


def _operands(chunks: _Chunks, dot: Dot) -> tuple[_Operands, Decays]:
    q, k, v, g, beta = chunks
    decays = chunk_decays(g)
    attention, solver = attention_and_solver(interleave(q, beta[..., None] * k), k, decays.levels, dot)
    q_in, k_in, k_out = q * decays.from_start, k * decays.from_start, k * decays.to_end
    return _Operands(v, beta, q_in, k_in, k_out, decays.whole, attention, solver), decays


def _update(state: Float[Array, "B HV V K"], x: _Operands, dot: Dot):
    """Solves the delta rule of one chunk given the state that enters it: (values it writes, state that leaves it)."""
    error = x.v - dot("...ck,...vk->...cv", x.k_in, state)
    new_values = dot("...ij,...jv->...iv", x.solver, x.beta[..., None] * error)
    return new_values, x.whole[..., None, :] * state + dot("...cv,...ck->...vk", new_values, x.k_out)


def _forward_scan(operands: _Operands, state: Float[Array, "B HV V K"], dot: Dot):
    def chunk(state, x):
        new_values, after = _update(state, x, dot)
        o = dot("...ck,...vk->...cv", x.q_in, state) + dot("...ij,...jv->...iv", x.attention, new_values)
        return after, o

    return lax.scan(chunk, state, operands)


def _states_scan(operands: _Operands, state: Float[Array, "B HV V K"], dot: Dot):
    """The forward once more, for what its backward needs: the state that enters each chunk, and the new values."""

    def chunk(state, x):
        new_values, after = _update(state, x, dot)
        return after, (state, new_values)

    return lax.scan(chunk, state, operands)[1]


def _backward_scan(operands: _Operands, d_o: Float[Array, "N B HV C V"], d_final: Float[Array, "B HV V K"], dot: Dot):
    """The serial part of the backward, last chunk first.

    Returns:
      (gradient of the initial state, (gradients of the states that leave the chunks, solver^T d_new_values)).
    """

    def chunk(d_after, inputs):
        x, d_o = inputs
        d_new = dot("...ij,...iv->...jv", x.attention, d_o) + dot("...ck,...vk->...cv", x.k_out, d_after)
        adjoint = dot("...ij,...iv->...jv", x.solver, d_new)
        d_state = x.whole[..., None, :] * d_after + dot("...cv,...ck->...vk", d_o, x.q_in)
        d_state -= dot("...cv,...ck->...vk", x.beta[..., None] * adjoint, x.k_in)
        return d_state, (d_after, adjoint)

    return lax.scan(chunk, d_final, (operands, d_o), reverse=True)


def _same_document(inputs: _Inputs, C: int) -> Bool[Array, "_ _ 1 C C"]:
    """True at [i, t] where t <= i and no document starts in (t, i]: the gate of t acts on what i reads."""
    causal = jnp.tril(jnp.ones((1, 1, 1, C, C), bool))
    if inputs.segment_ids is None:
        return causal
    starts = _split_chunks(segment_starts(inputs.segment_ids)[..., None], C)
    document = jnp.cumsum(starts, axis=-1)
    return causal & (document[..., :, None] == document[..., None, :])


def _chunk_gradients(
    chunks: _Chunks,
    operands: _Operands,
    decays: Decays,
    states: Float[Array, "N B HV V K"],
    new_values: Float[Array, "N B HV C V"],
    d_o: Float[Array, "N B HV C V"],
    d_states: Float[Array, "N B HV V K"],
    adjoint: Float[Array, "N B HV C V"],
    same: Bool[Array, "_ _ 1 C C"],
    dot: Dot,
) -> _Chunks:
    """The part of the backward that is parallel over chunks.

    Every gradient of k is kept apart by the sign with which the decay sum enters beside it: the gate gradient is
    their difference, and what cancels in it must be the same numbers.
    """
    q, k, v, _, beta = chunks
    dv = beta[..., None] * adjoint
    error = v - dot("...ck,...vk->...cv", operands.k_in, states)
    readers, d_rows = interleave(q, beta[..., None] * k), interleave(d_o, -adjoint)
    dq, d_reader, d_writer = pair_gradients(readers, k, d_rows, new_values, decays.levels, dot)
    dq += decays.from_start * dot("...cv,...vk->...ck", d_o, states)
    dk_reader = beta[..., None] * d_reader - decays.from_start * dot("...cv,...vk->...ck", dv, states)
    dk_out = decays.to_end * dot("...cv,...vk->...ck", new_values, d_states)
    dk_writer = d_writer + dk_out
    d_beta = jnp.sum(adjoint * error, axis=-1) + jnp.sum(d_reader * k, axis=-1)
    d_sum = q * dq + k * (dk_reader - dk_writer)
    d_whole = decays.whole * jnp.sum(states * d_states, axis=-2) + jnp.sum(k * dk_out, axis=-2)
    d_sum = d_sum.at[..., -1, :].add(d_whole)
    dg = jnp.matmul(same.mT.astype(d_sum.dtype), d_sum, precision=lax.Precision.HIGHEST)
    return _Chunks(dq, dk_reader + dk_writer, dv, dg, d_beta)
