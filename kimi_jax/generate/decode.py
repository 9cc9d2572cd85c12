"""One token after another: from a hidden state to the next token, and from a token to the next hidden state."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from kimi_jax.generate.sampling import Rule, pick
from kimi_jax.models.decoder import Caches, merge
from kimi_jax.types import Variables

NOT_FINITE = -2  # in place of a token, where a logit is NaN or infinite: no token can be picked


def next_token(
    graphdef: nnx.GraphDef,
    params: Variables,
    buffers: Variables,
    last_BD: Float[Array, "B D"],
    keys_B: Key[Array, "B"],
    step: Int[Array, ""],
    rule: Rule,
    *,
    num_tokens: int,
) -> Int[Array, "B"]:
    """Picks the token that follows each row.

    Args:
      graphdef, params, buffers: the model.
      last_BD: final hidden state of each row's last token.
      keys_B: typed PRNG key of each row, the same at every step.
      step: int32, tokens that were picked so far; with the row's key it decides the draw.
      rule: how to pick.
      num_tokens: only ids below it are picked; the vocabulary may have rows that no token of the tokenizer uses.

    Returns:
      int32 token ids, or `NOT_FINITE`.
    """
    logits_BA = merge(graphdef, params, buffers).logits(last_BD[:, None])[:, 0, :num_tokens]
    tokens_B = pick(logits_BA, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, step), rule)
    return jnp.where(jnp.isfinite(logits_BA.max(axis=-1)), tokens_B, NOT_FINITE)


def decode_step(
    graphdef: nnx.GraphDef, params: Variables, buffers: Variables, caches: Caches, tokens_B: Int[Array, "B"]
) -> tuple[Caches, Float[Array, "B D"]]:
    """Feeds one token per row.

    Args:
      graphdef, params, buffers: the model.
      caches: after all tokens before these.
      tokens_B: int32.

    Returns:
      (caches, final hidden states).
    """
    hidden_B1D, caches, _ = merge(graphdef, params, buffers)(tokens_B[:, None], caches=caches)
    return caches, hidden_B1D[:, 0]
