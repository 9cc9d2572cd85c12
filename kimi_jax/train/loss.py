"""Cross-entropy over a large vocabulary, a chunk of tokens at a time, so that the logits never exist at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    weight_DA: Float[Array, "D A"],
    targets_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Computes the loss of every token and the log-sum-exp of its logits.

    Only `chunk` tokens' logits exist at one time, forward and backward; the backward pass computes them again.
    Chunks are cut along T, so a sharded batch axis stays as it is.

    Args:
      hidden_BTD: after the final norm, bfloat16 or float32; products run in this dtype and accumulate in float32.
      weight_DA: head, any float dtype.
      targets_BT: int32 in [0, A); any value where the mask is false.
      mask_BT: which tokens count.
      chunk: tokens per chunk, rounded down to whole columns of B, at least one.

    Returns:
      Loss in nats and log-sum-exp, float32; both 0 where the mask is false. Both are differentiable in hidden and
      weight; the weight's gradient is accumulated in float32 and returned in the weight's dtype.
    """
    return _forward(hidden_BTD, weight_DA, targets_BT, mask_BT, chunk)[0]


def _to_chunks(x_BT: Array, chunk: int) -> Array:
    """[B, T, ...] -> [N, B, C, ...], zeros after T."""
    B, T, *rest = x_BT.shape
    C = min(T, max(1, chunk // B))
    N = -(-T // C)
    padded = jnp.pad(x_BT, ((0, 0), (0, N * C - T), *((0, 0) for _ in rest)))
    return jnp.moveaxis(padded.reshape(B, N, C, *rest), 1, 0)


def _from_chunks(x_NBC: Array, length: int) -> Array:
    N, B, C, *rest = x_NBC.shape
    return jnp.moveaxis(x_NBC, 0, 1).reshape(B, N * C, *rest)[:, :length]


def _logits(hidden_BCD: Array, weight_DA: Array) -> Float[Array, "B C A"]:
    return jnp.einsum("BCD,DA->BCA", hidden_BCD, weight_DA, preferred_element_type=jnp.float32)


def _is_target(targets_BC: Array, vocab: int) -> Bool[Array, "B C A"]:
    # A comparison instead of a gather: it fuses into the reductions and needs no exchange when A is sharded.
    return targets_BC[..., None] == jnp.arange(vocab, dtype=targets_BC.dtype)[None, None, :]


def _forward(hidden_BTD, weight_DA, targets_BT, mask_BT, chunk):
    weight = weight_DA.astype(hidden_BTD.dtype)

    def per_chunk(_, inputs):
        hidden_BCD, targets_BC, mask_BC = inputs
        logits = _logits(hidden_BCD, weight)
        lse = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.sum(jnp.where(_is_target(targets_BC, logits.shape[-1]), logits, 0.0), axis=-1)
        return None, (jnp.where(mask_BC, lse - target, 0.0), jnp.where(mask_BC, lse, 0.0))

    inputs = [_to_chunks(x, chunk) for x in (hidden_BTD, targets_BT, mask_BT)]
    _, outputs = lax.scan(per_chunk, None, inputs)
    loss, lse = (_from_chunks(x, hidden_BTD.shape[1]) for x in outputs)
    return (loss, lse), (hidden_BTD, weight_DA, targets_BT, mask_BT, lse)


def _backward(chunk, saved, cotangents):
    hidden_BTD, weight_DA, targets_BT, mask_BT, lse_BT = saved
    weight = weight_DA.astype(hidden_BTD.dtype)

    def per_chunk(d_weight, inputs):
        hidden, targets, mask, lse, d_loss, d_lse = inputs
        probability = jnp.exp(_logits(hidden, weight) - lse[..., None])
        target = jnp.where(_is_target(targets, weight.shape[-1]), d_loss[..., None], 0.0)
        d_logits = jnp.where(mask[..., None], (d_loss + d_lse)[..., None] * probability - target, 0.0)
        d_logits = d_logits.astype(hidden.dtype)  # both products below run in the compute dtype
        d_weight += jnp.einsum("BCD,BCA->DA", hidden, d_logits, preferred_element_type=jnp.float32)
        d_hidden = jnp.einsum("BCA,DA->BCD", d_logits, weight, preferred_element_type=jnp.float32)
        return d_weight, d_hidden.astype(hidden.dtype)

    inputs = [_to_chunks(x, chunk) for x in (hidden_BTD, targets_BT, mask_BT, lse_BT, *cotangents)]
    d_weight, d_hidden = lax.scan(per_chunk, jnp.zeros(weight_DA.shape, jnp.float32), inputs)
    no_gradient = [np.zeros(x.shape, jax.dtypes.float0) for x in (targets_BT, mask_BT)]
    return _from_chunks(d_hidden, hidden_BTD.shape[1]), d_weight.astype(weight_DA.dtype), *no_gradient


cross_entropy.defvjp(_forward, _backward)
