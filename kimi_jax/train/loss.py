"""Cross-entropy over a large vocabulary, a chunk of tokens at a time, so that the logits never exist at once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kimi_jax.parallel.context import over_tokens
from kimi_jax.parallel.rules import axes_of
from kimi_jax.parallel.weights import gather_rounded
from pallas_kernels.logits.api import Logits, cross_entropy_gradients, logits

CHUNK_TOKENS = 32768  # per chunk: of fewer, the products and the sum of the weight's gradient become slow,
CHUNK_BYTES = 6 * 2**30  # unless logits (4 bytes) and their gradient (2) take more than this; the kernel has a third
LOGIT_BYTES = 6


class Losses(NamedTuple):
    """Means over the scored tokens."""

    cross_entropy: Float[Array, ""]
    """In nats."""
    z_loss: Float[Array, ""]
    """Squared log-sum-exp of the logits."""


class TokenLosses(NamedTuple):
    """Per token; 0 and false where the mask is false."""

    cross_entropy: Float[Array, "B T"]
    """In nats, float32."""
    log_sum_exp: Float[Array, "B T"]
    """Of the logits, float32."""
    correct: Bool[Array, "B T"]
    """Whether no logit is larger than the target's."""


def choose_chunk(vocab: int) -> int:
    """Tokens per chunk: the fewer chunks, the less often the weight's gradient is read and written."""
    return max(1, min(CHUNK_TOKENS, CHUNK_BYTES // (LOGIT_BYTES * vocab)))


def token_cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    weight_DA: Float[Array, "D A"],
    targets_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    chunk: int | None = None,
) -> TokenLosses:
    """Computes the loss of every token, and whether its target is the likeliest one.

    Args:
      hidden_BTD: after the final norm, bfloat16 or float32; products run in this dtype and accumulate in float32.
      weight_DA: head, any float dtype.
      targets_BT: int32 in [0, A); any value where the mask is false.
      mask_BT: which tokens count.
      chunk: tokens whose logits exist on a device at one time, rounded down to whole columns of its rows, at least one;
        None: see `choose_chunk`.

    Returns:
      See `TokenLosses`.
    """
    run = lambda weight, *arrays: _token_cross_entropy(arrays[0], weight, *arrays[1:], chunk)
    return over_tokens(run, weight_DA, hidden_BTD, targets_BT, mask_BT)


def _token_cross_entropy(hidden_BTD, weight_DA, targets_BT, mask_BT, chunk: int | None) -> TokenLosses:
    weight = weight_DA.astype(hidden_BTD.dtype)

    def per_chunk(_, inputs):
        hidden_BCD, targets_BC, mask_BC = inputs
        values, lse, target = _logits(hidden_BCD, weight, targets_BC)
        losses = TokenLosses(
            cross_entropy=_masked(mask_BC, lse - target),
            log_sum_exp=_masked(mask_BC, lse),
            correct=mask_BC & (jnp.argmax(values, axis=-1) == targets_BC),
        )
        return None, losses

    _, losses = lax.scan(per_chunk, None, _to_chunks((hidden_BTD, targets_BT, mask_BT), weight_DA.shape[1], chunk))
    return TokenLosses(*(_from_chunks(x, hidden_BTD.shape[1]) for x in losses))


def mean_cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    weight_DA: Float[Array, "D A"],
    targets_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    count: Float[Array, ""],
    z_weight: float,
    chunk: int | None,
) -> tuple[Float[Array, ""], Losses]:
    """Computes cross-entropy + z_weight times squared log-sum-exp, each summed over tokens and divided by `count`.

    The forward pass forms the gradient while a chunk's logits are there, so they are never computed again.

    Args:
      hidden_BTD, weight_DA, targets_BT, mask_BT, chunk: as for `token_cross_entropy`.
      count: float32, what the sums are divided by.
      z_weight: factor on the squared log-sum-exp.

    Returns:
      (the sum, differentiable in hidden and weight; its two terms, which are not). The weight's gradient is accumulated
      in float32 and returned in the weight's dtype.
    """

    rows = axes_of("batch", hidden_BTD.shape[0])
    over = tuple(axis for axis in axes_of("embed", weight_DA.shape[0]) if axis in rows)

    def run(whole, hidden, targets, mask):
        weight, count = whole
        weight = gather_rounded(weight, over, 0, hidden.dtype) if over else weight
        return _mean_cross_entropy(hidden, weight, targets, mask, count, z_weight, chunk)

    cuts = (jax.P(over or None), jax.P())
    return over_tokens(run, (weight_DA, count), hidden_BTD, targets_BT, mask_BT, total=True, cuts=cuts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _mean_cross_entropy(hidden_BTD, weight_DA, targets_BT, mask_BT, count, z_weight: float, chunk: int | None):
    loss, lse, _ = _token_cross_entropy(hidden_BTD, weight_DA, targets_BT, mask_BT, chunk)
    losses = Losses(jnp.sum(loss) / count, jnp.sum(jnp.square(lse)) / count)
    return losses.cross_entropy + z_weight * losses.z_loss, losses


def _forward(hidden_BTD, weight_DA, targets_BT, mask_BT, count, z_weight, chunk):
    weight = weight_DA.astype(hidden_BTD.dtype)

    def per_chunk(carry, inputs):
        (loss_sum, square_sum), d_weight = carry
        hidden, targets, mask = (x.reshape(-1, *x.shape[2:]) for x in inputs)
        rows = cross_entropy_gradients(hidden, weight, targets, _masked(mask, 1 / count), z_weight=z_weight)
        lse = _masked(mask, rows.log_sum_exp)
        sums = loss_sum + jnp.sum(lse - _masked(mask, rows.target)), square_sum + jnp.sum(jnp.square(lse))
        return (sums, d_weight + rows.d_weight), rows.d_x.reshape(inputs[0].shape)

    zeros = ((jnp.zeros(()), jnp.zeros(())), jnp.zeros(weight_DA.shape, jnp.float32))
    inputs = _to_chunks((hidden_BTD, targets_BT, mask_BT), weight_DA.shape[1], chunk)
    ((loss_sum, square_sum), d_weight), d_hidden = lax.scan(per_chunk, zeros, inputs)
    losses = Losses(loss_sum / count, square_sum / count)
    gradients = _from_chunks(d_hidden, hidden_BTD.shape[1]), d_weight.astype(weight_DA.dtype)
    return (losses.cross_entropy + z_weight * losses.z_loss, losses), (*gradients, targets_BT, mask_BT)


def _backward(z_weight, chunk, saved, cotangents):
    d_hidden, d_weight, targets_BT, mask_BT = saved
    d_total = cotangents[0]
    no_gradient = [np.zeros(x.shape, jax.dtypes.float0) for x in (targets_BT, mask_BT)]
    scaled = ((d_total * d.astype(jnp.float32)).astype(d.dtype) for d in (d_hidden, d_weight))
    return *scaled, *no_gradient, None


_mean_cross_entropy.defvjp(_forward, _backward)


# ------------------------------------------------------------------ one chunk
def _logits(hidden_BCD: Array, weight_DA: Array, targets_BC: Array) -> Logits:
    rows = logits(hidden_BCD.reshape(-1, hidden_BCD.shape[2]), weight_DA, targets_BC.reshape(-1))
    return jax.tree.map(lambda x: x.reshape(*targets_BC.shape, *x.shape[1:]), rows)


def _masked(mask: Bool[Array, "..."], x: Array) -> Array:
    return jnp.where(mask, x, 0)


# ------------------------------------------------------------------ cutting
def _to_chunks(arrays: tuple[Array, ...], vocab: int, chunk: int | None) -> tuple[Array, ...]:
    """[B, T, ...] -> [N, B, C, ...], zeros after T."""
    B, T = arrays[0].shape[:2]
    C = min(T, max(1, (chunk or choose_chunk(vocab)) // B))
    N = -(-T // C)
    C = -(-T // N)  # even chunks: what fills up the last one is computed, too

    def cut(x):
        padded = jnp.pad(x, ((0, 0), (0, N * C - T), *((0, 0) for _ in x.shape[2:])))
        return jnp.moveaxis(padded.reshape(B, N, C, *x.shape[2:]), 1, 0)

    return tuple(cut(x) for x in arrays)


def _from_chunks(x_NBC: Array, length: int) -> Array:
    N, B, C, *rest = x_NBC.shape
    return jnp.moveaxis(x_NBC, 0, 1).reshape(B, N * C, *rest)[:, :length]
