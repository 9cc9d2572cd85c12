"""Cross-entropy over a large vocabulary, a chunk of tokens at a time, so that the logits never exist at once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kimi_jax.parallel.context import over_tokens

CHUNK_ELEMENTS = 2**27  # float32 logits that exist at once on a device unless the caller says otherwise: 512 MiB

LOWEST = -1e30  # finite: the difference of two of them is 0, not NaN


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
    return max(1, CHUNK_ELEMENTS // vocab)


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
        None: as many as `CHUNK_ELEMENTS` allows.

    Returns:
      See `TokenLosses`.
    """
    run = lambda weight, *arrays: _token_cross_entropy(arrays[0], weight, *arrays[1:], chunk)
    return over_tokens(run, weight_DA, hidden_BTD, targets_BT, mask_BT)


def _token_cross_entropy(hidden_BTD, weight_DA, targets_BT, mask_BT, chunk: int | None) -> TokenLosses:
    weight = weight_DA.astype(hidden_BTD.dtype)

    def per_chunk(_, inputs):
        hidden_BCD, targets_BC, mask_BC = inputs
        logits = _logits(hidden_BCD, weight)
        lse = _log_sum_exp(logits)
        losses = TokenLosses(
            cross_entropy=_masked(mask_BC, lse - _target_logit(logits, targets_BC)),
            log_sum_exp=_masked(mask_BC, lse),
            correct=mask_BC & (jnp.argmax(logits, axis=-1) == targets_BC),
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

    def run(whole, hidden, targets, mask):
        weight, count = whole
        return _mean_cross_entropy(hidden, weight, targets, mask, count, z_weight, chunk)

    return over_tokens(run, (weight_DA, count), hidden_BTD, targets_BT, mask_BT, total=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _mean_cross_entropy(hidden_BTD, weight_DA, targets_BT, mask_BT, count, z_weight: float, chunk: int | None):
    loss, lse, _ = _token_cross_entropy(hidden_BTD, weight_DA, targets_BT, mask_BT, chunk)
    losses = Losses(jnp.sum(loss) / count, jnp.sum(jnp.square(lse)) / count)
    return losses.cross_entropy + z_weight * losses.z_loss, losses


def _forward(hidden_BTD, weight_DA, targets_BT, mask_BT, count, z_weight, chunk):
    weight = weight_DA.astype(hidden_BTD.dtype)

    def per_chunk(carry, inputs):
        (loss_sum, square_sum), d_weight = carry
        hidden, targets, mask = inputs
        logits = _logits(hidden, weight)
        lse = _log_sum_exp(logits)
        sums = (
            loss_sum + jnp.sum(_masked(mask, lse - _target_logit(logits, targets))),
            square_sum + jnp.sum(_masked(mask, jnp.square(lse))),
        )
        scale = _masked(mask, 1 / count)[..., None]
        slope = scale * (1 + 2 * z_weight * lse[..., None])
        d_logits = slope * jnp.exp(logits - lse[..., None]) - jnp.where(_is_target(targets, logits), scale, 0.0)
        d_logits = _masked(mask[..., None], d_logits).astype(hidden.dtype)  # both products run in the compute dtype
        d_weight += jnp.einsum("BCD,BCA->DA", hidden, d_logits, preferred_element_type=jnp.float32)
        d_hidden = jnp.einsum("BCA,DA->BCD", d_logits, weight, preferred_element_type=jnp.float32)
        return (sums, d_weight), d_hidden.astype(hidden.dtype)

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
def _logits(hidden_BCD: Array, weight_DA: Array) -> Float[Array, "B C A"]:
    return jnp.einsum("BCD,DA->BCA", hidden_BCD, weight_DA, preferred_element_type=jnp.float32)


def _log_sum_exp(logits_BCA: Float[Array, "B C A"]) -> Float[Array, "B C"]:
    two_passes = functools.partial(jax.nn.logsumexp, axis=-1)  # XLA vectorises it on a CPU, the other one not
    return lax.platform_dependent(logits_BCA, cpu=two_passes, default=log_sum_exp_in_one_pass)


def log_sum_exp_in_one_pass(logits_BCA: Float[Array, "B C A"]) -> Float[Array, "B C"]:
    """Reads the logits once: (largest so far, sum relative to it) is merged pairwise, in any order."""

    def merge(a, b):
        peak = jnp.maximum(a[0], b[0])
        return peak, a[1] * jnp.exp(a[0] - peak) + b[1] * jnp.exp(b[0] - peak)

    empty = (jnp.float32(LOWEST), jnp.float32(0))
    peak, total = lax.reduce((logits_BCA, jnp.ones_like(logits_BCA)), empty, merge, (2,))
    return peak + jnp.log(total)


def _is_target(targets_BC: Array, logits_BCA: Array) -> Bool[Array, "B C A"]:
    # A comparison instead of a gather: it fuses into the reductions and needs no exchange when A is sharded.
    return targets_BC[..., None] == lax.broadcasted_iota(targets_BC.dtype, logits_BCA.shape, 2)


def _target_logit(logits_BCA: Array, targets_BC: Array) -> Float[Array, "B C"]:
    return jnp.sum(jnp.where(_is_target(targets_BC, logits_BCA), logits_BCA, 0.0), axis=-1)


def _masked(mask: Bool[Array, "..."], x: Array) -> Array:
    return jnp.where(mask, x, 0)


# ------------------------------------------------------------------ cutting
def _to_chunks(arrays: tuple[Array, ...], vocab: int, chunk: int | None) -> tuple[Array, ...]:
    """[B, T, ...] -> [N, B, C, ...], zeros after T."""
    B, T = arrays[0].shape[:2]
    C = min(T, max(1, (chunk or choose_chunk(vocab)) // B))
    N = -(-T // C)

    def cut(x):
        padded = jnp.pad(x, ((0, 0), (0, N * C - T), *((0, 0) for _ in x.shape[2:])))
        return jnp.moveaxis(padded.reshape(B, N, C, *x.shape[2:]), 1, 0)

    return tuple(cut(x) for x in arrays)


def _from_chunks(x_NBC: Array, length: int) -> Array:
    N, B, C, *rest = x_NBC.shape
    return jnp.moveaxis(x_NBC, 0, 1).reshape(B, N * C, *rest)[:, :length]
