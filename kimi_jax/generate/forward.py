"""The forward pass behind every score: through caches that can be copied, and the head some tokens at a time."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kimi_jax.generate.prefill import cut_pieces, init_state, keep_last
from kimi_jax.generate.weights import cast_matrices
from kimi_jax.interop.saved_model import SavedModel
from kimi_jax.models.decoder import Caches, abstract, merge
from kimi_jax.types import Variables

MAX_LOGITS = 1 << 26  # numbers that exist on the device at one time


class Reading(NamedTuple):
    """What the head says behind some tokens about the one that follows each."""

    logits_BCA: Float[Array, "B C A"]
    """float32."""
    log_likelihood_BC: Float[Array, "B C"]
    """Natural logarithm of the probability of the token that does follow, float32."""
    greedy_BC: Bool[Array, "B C"]
    """Whether no other token is more likely; of equals, the one of the lowest id counts."""
    finite_BC: Bool[Array, "B C"]
    """False where a logit is NaN or infinite."""


class Context(NamedTuple):
    """What a batch of rows carries from the tokens that were fed."""

    caches: Caches
    last_BD: Float[Array, "B D"]
    """Final hidden state of each row's last token, in the compute dtype."""


class Forward:
    """A model's forward pass through caches, compiled once per config, batch size, piece length and room in caches.

    Args:
      model: parameters and config.
      dtype: compute dtype instead of the config's; float32 multiplies in full precision on every device.
      arrived: called with each piece of tokens: a long scoring is no silence.

    Attributes:
      num_tokens: how many tokens, padding not counted, went through the model so far.
    """

    def __init__(self, model: SavedModel, *, dtype: str | None = None, arrived: Callable[[], None] = lambda: None):
        self.cfg = model.cfg.model_copy(update={"dtype": dtype or model.cfg.dtype})
        self.num_tokens = 0
        self._arrived = arrived
        self._model = (abstract(self.cfg)[0], cast_matrices(model.params, self.cfg.dtype), model.buffers)

    def start(self, batch: int, slots: int) -> Context:
        """Makes empty contexts with room for `slots` tokens per row, padding included."""
        return Context(*_start(*self._model, batch=batch, slots=slots))

    def select(self, context: Context, rows_B: Int[np.ndarray, "B"]) -> Context:
        """Copies rows, any number of times each, into a context of their own."""
        return select_rows(context, rows_B)

    def advance(
        self, context: Context, tokens_BT: Int[np.ndarray, "B T"], segment_ids_BT: Int[np.ndarray, "B T"]
    ) -> tuple[Context, Float[Array, "B T D"]]:
        """Feeds a piece of right-padded rows.

        Args:
          context: given away; only the one that comes back may be used.
          tokens_BT: int32.
          segment_ids_BT: int32, 1 for tokens, 0 for padding.

        Returns:
          (context behind the piece, final hidden states).
        """
        self.num_tokens += int(segment_ids_BT.sum())
        self._arrived()
        with self._precision():
            return _advance(*self._model, context, tokens_BT, segment_ids_BT)

    def feed(self, context: Context, rows: Sequence[Int[np.ndarray, "N"]]) -> Context:
        """Feeds tokens, any number per row, whose own scores are of no interest; the context is given away."""
        for tokens_BT, segment_ids_BT in cut_pieces(rows):
            context, _ = self.advance(context, tokens_BT, segment_ids_BT)
        return context

    def read(self, hidden_BTD: Float[Array, "B T D"], next_BT: Int[np.ndarray, "B T"]) -> Iterator[tuple[int, Reading]]:
        """Yields (first token, reading) until all hidden states are read; `next_BT` holds the tokens that follow."""
        B, T, _ = hidden_BTD.shape
        size = min(T, max(1, 1 << (MAX_LOGITS // (B * self.cfg.vocab_size) or 1).bit_length() - 1))
        for start in range(0, T, size):
            with self._precision():
                reading = _read(*self._model, hidden_BTD, next_BT, np.int32(start), size=size)
            yield start, reading

    def _precision(self) -> contextlib.AbstractContextManager:
        in_full = self.cfg.dtype == "float32"
        return jax.default_matmul_precision("highest") if in_full else contextlib.nullcontext()


@jax.jit
def select_rows(context: Context, rows_B: Int[Array, "B"]) -> Context:
    """Gathers rows of a context; what all rows share stays as it is."""

    def take(part: str, leaf: Array) -> Array:
        axis = 1 if part == "groups" else 0  # behind the "layers" axis of stacked caches
        return leaf if leaf.ndim == axis else jnp.take(leaf, rows_B, axis=axis)

    caches = {part: jax.tree.map(functools.partial(take, part), blocks) for part, blocks in context.caches.items()}
    return Context(caches, context.last_BD[rows_B])


# Equal configs share compiled code, in whatever `Forward` they are used.
_start = jax.jit(init_state, static_argnums=(0,), static_argnames=("batch", "slots"))


@functools.partial(jax.jit, static_argnums=(0,), donate_argnames=("context",))
def _advance(graphdef: nnx.GraphDef, params: Variables, buffers: Variables, context: Context, tokens, segment_ids):
    decoder = merge(graphdef, params, buffers)
    hidden, caches, _ = decoder(tokens, segment_ids_BT=segment_ids, caches=context.caches)
    return Context(caches, keep_last(hidden, segment_ids, context.last_BD)), hidden


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("size",))
def _read(graphdef: nnx.GraphDef, params, buffers, hidden_BTD, next_BT, start, *, size: int) -> Reading:
    hidden_BCD, next_BC = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (hidden_BTD, next_BT))
    logits_BCA = merge(graphdef, params, buffers).logits(hidden_BCD)
    total_BC = jax.nn.logsumexp(logits_BCA, axis=-1)
    chosen_BC = jnp.take_along_axis(logits_BCA, next_BC[..., None], axis=-1)[..., 0]
    greedy_BC = jnp.argmax(logits_BCA, axis=-1) == next_BC
    return Reading(logits_BCA, chosen_BC - total_BC, greedy_BC, jnp.isfinite(total_BC))
