"""Decayed products inside a chunk, by binary levels: how every exponent stays at or below zero without a bound on g."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Dot = Callable[..., Array]  # an einsum whose precision is chosen
_exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)  # errors of the inverse multiply level by level


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


def interleave(x: Float[Array, "*B C D"], y: Float[Array, "*B C D"]) -> Float[Array, "*B 2C D"]:
    """Rows x_1, y_1, x_2, y_2, ...: both then take part in one matrix product per level."""
    *lead, C, D = x.shape
    return jnp.stack([x, y], axis=-2).reshape(*lead, 2 * C, D)


def _decayed_rows(readers: Float[Array, "*B 2C K"], row: Float[Array, "*B M b K"]) -> Float[Array, "*B M w K"]:
    """The readers in odd blocks, each pair of rows decayed alike."""
    return halves(readers, 2 * row.shape[-2])[1] * jnp.repeat(row, 2, axis=-2)


def attention_and_solver(
    readers: Float[Array, "*B 2C K"], k: Float[Array, "*B C K"], levels: list[Level], dot: Dot
) -> tuple[Float[Array, "*B C C"], Float[Array, "*B C C"]]:
    """Builds, from single tokens up, what queries read inside the chunk and the inverse of the delta-rule system.

    Args:
      readers: q_i and beta_i k_i, interleaved.
      k: keys, the writers.
      levels: decay factors.
      dot: an einsum.

    Returns:
      (A, (I + L)^-1), lower triangular: A_ij = sum_d q_id k_jd decay_ijd for j <= i, and L_ij the same with beta_i k_i
      in place of q_i for j < i. The inverse of two coupled blocks is exact, [[X, 0], [-Y L X, Y]], so L is never kept.
    """
    attention = jnp.sum(readers[..., 0::2, :] * k, axis=-1)[..., None, None]
    solver = jnp.ones_like(attention)
    for level in levels:
        keys = halves(k, level.row.shape[-2])[0] * level.col
        products = dot("...ik,...jk->...ij", _decayed_rows(readers, level.row), keys)
        reads, coupling = products[..., 0::2, :], products[..., 1::2, :]
        even, odd = solver[..., 0::2, :, :], solver[..., 1::2, :, :]
        solver = _merge(solver, -_exact("...ij,...jl->...il", odd, _exact("...ij,...jl->...il", coupling, even)))
        attention = _merge(attention, reads)
    return attention[..., 0, :, :], solver[..., 0, :, :]


def pair_gradients(
    readers: Float[Array, "*B 2C K"],
    k: Float[Array, "*B C K"],
    d_rows: Float[Array, "*B 2C V"],
    new_values: Float[Array, "*B C V"],
    levels: list[Level],
    dot: Dot,
) -> tuple[Float[Array, "*B C K"], Float[Array, "*B C K"], Float[Array, "*B C K"]]:
    """Pulls gradients of the matrices A and L of `attention_and_solver` back to their factors, level by level.

    Those gradients are tril(d_o new_values^T) and -stril(adjoint new_values^T); only the blocks of one level are formed
    at a time.

    Args:
      readers, k, levels, dot: as in `attention_and_solver`.
      d_rows: d_o and -adjoint, interleaved.
      new_values: what each token wrote.

    Returns:
      Gradients of q_i, of beta_i k_i as readers, and of k_j as the writer.
    """
    d_diagonal = jnp.sum(d_rows[..., 0::2, :] * new_values, axis=-1, keepdims=True)
    d_readers, d_writers = jnp.zeros_like(readers), d_diagonal * readers[..., 0::2, :]
    for level in levels:
        b = level.row.shape[-2]
        keys = halves(k, b)[0] * level.col
        weights = dot("...iv,...jv->...ij", halves(d_rows, 2 * b)[1], halves(new_values, b)[0])
        d_odd = jnp.repeat(level.row, 2, axis=-2) * dot("...ij,...jk->...ik", weights, keys)
        d_even = level.col * dot("...ij,...ik->...jk", weights, _decayed_rows(readers, level.row))
        d_readers += join_halves(jnp.zeros_like(d_odd), d_odd)
        d_writers += join_halves(d_even, jnp.zeros_like(d_even))
    return d_diagonal * k + d_readers[..., 0::2, :], d_readers[..., 1::2, :], d_writers
