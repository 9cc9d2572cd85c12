"""Which token follows: the greedy rule, and sampling from the head of the distribution."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kimi_jax.errors import UserError


class Greedy(NamedTuple):
    """The most likely token; of equals, the one of the lowest id."""


class Nucleus(NamedTuple):
    """A draw from the `top_k` most likely tokens, cut to the fewest of them whose probabilities reach `top_p`."""

    temperature: Float[Array, ""]
    """float32, > 0; divides the logits before anything else."""
    top_p: Float[Array, ""]
    """float32, in (0, 1], of the probability that `top_k` leaves."""
    top_k: Int[Array, ""]
    """int32, >= 1."""


type Rule = Greedy | Nucleus

SMALLEST, LARGEST = (float(getattr(np.finfo(np.float32), name)) for name in ("tiny", "max"))


def make_rule(temperature: float, top_p: float = 1.0, top_k: int | None = None) -> Rule:
    """Makes a rule from what a user asks for.

    Args:
      temperature: >= 0; 0 is greedy, and so is what float32 holds as 0.
      top_p: in (0, 1].
      top_k: >= 1; None: all tokens.

    Raises:
      UserError: every argument that is out of range, one line each.
    """
    problems = []
    if not 0 <= temperature <= LARGEST:
        problems.append(f"temperature={temperature}: must be in [0, {LARGEST:.2g}]")
    if not 0 < top_p <= 1:
        problems.append(f"top_p={top_p}: must be in (0, 1]")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k={top_k}: must be at least 1")
    if problems:
        raise UserError(problems)
    if temperature < SMALLEST:
        return Greedy()
    everything = jnp.iinfo(jnp.int32).max
    return Nucleus(jnp.float32(temperature), jnp.float32(top_p), jnp.int32(min(top_k or everything, everything)))


def pick(logits_BA: Float[Array, "B A"], keys_B: Key[Array, "B"], rule: Rule) -> Int[Array, "B"]:
    """Picks one token per row; a row's token depends on its logits, its key and the rule alone.

    Args:
      logits_BA: float32.
      keys_B: typed PRNG keys; unused by `Greedy`.
      rule: how.

    Returns:
      int32 token ids.
    """
    if isinstance(rule, Greedy):
        return jnp.argmax(logits_BA, axis=-1).astype(jnp.int32)
    return jax.vmap(_draw, in_axes=(0, 0, None))(logits_BA, keys_B, rule)


def _draw(logits_A: Float[Array, "A"], key: Key[Array, ""], rule: Nucleus) -> Int[Array, ""]:
    order_A = jnp.argsort(logits_A, descending=True, stable=True)
    sorted_A = logits_A[order_A]
    scaled_A = (sorted_A - sorted_A[0]) / rule.temperature  # <= 0: no temperature overflows
    lowest = jnp.finfo(scaled_A.dtype).min
    scaled_A = jnp.where(jnp.arange(len(order_A)) < rule.top_k, scaled_A, lowest)
    probability_A = jax.nn.softmax(scaled_A)
    before_A = jnp.cumsum(probability_A) - probability_A
    scaled_A = jnp.where(before_A < rule.top_p, scaled_A, lowest)
    return order_A[jax.random.categorical(key, scaled_A)].astype(jnp.int32)
