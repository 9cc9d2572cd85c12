"""Decayed products inside a chunk, by binary levels: how every exponent stays at or below zero without a bound on g."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Dot = Callable[..., Array]  # an einsum whose precision is chosen


class Level(NamedTuple):
    """Decay factors, in [0, 1], of one level: the odd block of b tokens reads the even block before it.

    A pair (i, j) decays by row[i] * col[j]: from j to the end of the even block, then from there to i.
    """

    row: Float[Array, "*B M b K"]  # M = C / 2b pairs of blocks
    col: Float[Array, "*B M b K"]


class Decays(NamedTuple):
    """All decay factors of a chunk: between its tokens, and between its tokens and its two ends."""

    levels: list[Level]  # b = 1, 2, 4, ..., C / 2
    from_start: Float[Array, "*B C K"]  # exp(g_1 + ... + g_i)
    to_end: Float[Array, "*B C K"]  # exp(g_{i+1} + ... + g_C)
    whole: Float[Array, "*B K"]  # exp(g_1 + ... + g_C)


def chunk_decays(g: Float[Array, "*B C K"]) -> Decays:
    """Sums g from each token to the ends of its block, for blocks of 1, 2, 4, ..., C tokens.

    Only sums of numbers <= 0 are taken, never a difference, so nothing cancels, nothing overflows, and g = -inf is
    exactly "forget everything". Factors between two tokens depend on the gates between them alone.
    """
    C = g.shape[-2]
    levels, prefix, suffix = [], g, jnp.zeros_like(g)
    b = 1
    while b < C:
        prefix, suffix = pair_blocks(prefix, b), pair_blocks(suffix, b)
        levels.append(Level(jnp.exp(prefix[..., b:, :]), jnp.exp(suffix[..., :b, :])))
        odd = lax.broadcasted_iota(jnp.int32, prefix.shape, prefix.ndim - 2) >= b
        sum_even, sum_odd = prefix[..., b - 1 : b, :], prefix[..., 2 * b - 1 :, :]
        suffix = (suffix + jnp.where(odd, 0, sum_odd)).reshape(g.shape)
        prefix = (prefix + jnp.where(odd, sum_even, 0)).reshape(g.shape)
        b *= 2
    return Decays(levels, jnp.exp(prefix), jnp.exp(suffix), jnp.exp(prefix[..., -1, :]))


def pair_blocks(x: Float[Array, "*B C D"], b: int) -> Float[Array, "*B M w D"]:
    """Splits the tokens of a chunk into C / 2b pairs of blocks of b tokens."""
    *lead, C, D = x.shape
    return x.reshape(*lead, C // (2 * b), 2 * b, D)


def halves(x: Float[Array, "*B C D"], b: int) -> tuple[Float[Array, "*B M b D"], Float[Array, "*B M b D"]]:
    """The even and the odd block of every pair."""
    pairs = pair_blocks(x, b)
    return pairs[..., :b, :], pairs[..., b:, :]


def join_halves(even: Float[Array, "*B M b D"], odd: Float[Array, "*B M b D"]) -> Float[Array, "*B C D"]:
    """Inverse of `halves`."""
    *lead, M, b, D = even.shape
    return jnp.concatenate([even, odd], axis=-2).reshape(*lead, 2 * M * b, D)


def _merge(diagonal: Float[Array, "*B N b b"], off: Float[Array, "*B M b b"]) -> Float[Array, "*B M w w"]:
    """Joins neighbouring diagonal blocks with the block that couples them into lower-triangular blocks of 2b."""
    *lead, M, b, _ = off.shape
    pairs = diagonal.reshape(*lead, M, 2, b, b)
    upper = jnp.concatenate([pairs[..., 0, :, :], jnp.zeros_like(off)], axis=-1)
    lower = jnp.concatenate([off, pairs[..., 1, :, :]], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def attention_and_solver(
    q: Float[Array, "*B C K"],
    k: Float[Array, "*B C K"],
    beta: Float[Array, "*B C"],
    levels: list[Level],
    dot: Dot,
) -> tuple[Float[Array, "*B C C"], Float[Array, "*B C C"]]:
    """Builds, from single tokens up, what queries read inside the chunk and the inverse of the delta-rule system.

    Returns:
      (A, S): A_ij = sum_d q_id k_jd decay_ijd for j <= i, and S = (I + L)^-1 where L_ij is beta_i times the same sum
      with k_i in place of q_i, for j < i. Both lower triangular. The inverse of two coupled blocks is exact:
      [[X, 0], [-Y L X, Y]], so L is never kept.
    """
    attention = jnp.sum(q * k, axis=-1)[..., None, None]
    solver = jnp.ones_like(attention)
    for level in levels:
        b = level.row.shape[-2]
        keys = halves(k, b)[0] * level.col
        reads = dot("...ik,...jk->...ij", halves(q, b)[1] * level.row, keys)
        coupling = dot("...ik,...jk->...ij", halves(beta[..., None] * k, b)[1] * level.row, keys)
        even, odd = solver[..., 0::2, :, :], solver[..., 1::2, :, :]
        solver = _merge(solver, -dot("...ij,...jl->...il", odd, dot("...ij,...jl->...il", coupling, even)))
        attention = _merge(attention, reads)
    return attention[..., 0, :, :], solver[..., 0, :, :]


class PairGradients(NamedTuple):
    """Gradients of the pairs inside a chunk; `writer` is the part in which k_j stands behind the decay."""

    dq: Float[Array, "*B C K"]
    reader: Float[Array, "*B C K"]  # d L / d k_i before the factor beta_i
    writer: Float[Array, "*B C K"]


def pair_gradients(
    q: Float[Array, "*B C K"],
    k: Float[Array, "*B C K"],
    beta: Float[Array, "*B C"],
    d_o: Float[Array, "*B C V"],
    adjoint: Float[Array, "*B C V"],
    new_values: Float[Array, "*B C V"],
    levels: list[Level],
    dot: Dot,
) -> PairGradients:
    """Pulls dA = tril(d_o new_values^T) and dL = -stril(adjoint new_values^T) back to q and k, level by level.

    Neither dA nor dL is formed beyond the block of the level at hand.
    """
    d_diagonal = jnp.sum(d_o * new_values, axis=-1, keepdims=True)
    dq, reader, writer = d_diagonal * k, jnp.zeros_like(k), d_diagonal * q
    for level in levels:
        b = level.row.shape[-2]
        values = halves(new_values, b)[0]
        d_attention = dot("...iv,...jv->...ij", halves(d_o, b)[1], values)
        d_coupling = -dot("...iv,...jv->...ij", halves(adjoint, b)[1], values)
        keys = halves(k, b)[0] * level.col
        none = jnp.zeros_like(keys)
        dq += join_halves(none, level.row * dot("...ij,...jk->...ik", d_attention, keys))
        reader += join_halves(none, level.row * dot("...ij,...jk->...ik", d_coupling, keys))
        back = dot("...ij,...ik->...jk", d_attention, halves(q, b)[1] * level.row)
        back += dot("...ij,...ik->...jk", d_coupling, halves(beta[..., None] * k, b)[1] * level.row)
        writer += join_halves(level.col * back, none)
    return PairGradients(dq, reader, writer)
