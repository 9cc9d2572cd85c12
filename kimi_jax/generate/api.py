"""Public entry of generation: a model that continues text."""

import codecs
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from kimi_jax.data.chat import END_OF_TURN
from kimi_jax.data.tokenizers import Tokenizer, check_text
from kimi_jax.errors import UserError
from kimi_jax.generate.decode import NOT_FINITE, decode_step, next_token
from kimi_jax.generate.prefill import cut_pieces, init_state, padded_length, prefill_piece, round_length
from kimi_jax.generate.sampling import make_rule
from kimi_jax.generate.weights import cast_matrices
from kimi_jax.interop.saved_model import SavedModel, load_model
from kimi_jax.models.decoder import abstract

type Prompt = str | Int[np.ndarray, "N"]
"""Text, or token ids, as those of `kimi_jax.data.chat.encode_chat`."""

FINISHED = -1  # stands where a row has no token any more


@dataclass(frozen=True)
class Settings:
    """How to continue a text.

    Attributes:
      max_new_tokens: >= 1; a text also ends at a stop token of the model.
      temperature, top_p, top_k: as in `kimi_jax.generate.sampling.make_rule`.
      seed: in [0, 2^31), of the first prompt of a batch; prompt i has seed + i, and draws what it would draw alone.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed={self.seed}: must be in [0, 2^31)")
        make_rule(self.temperature, self.top_p, self.top_k)


class Completion(NamedTuple):
    """What followed one prompt."""

    text: str
    """Without the stop text."""
    token_ids: tuple[int, ...]
    """Without the stop token, with the tokens of the stop text."""
    ended_by: Literal["stop", "length"]


class Completions(NamedTuple):
    """What followed the prompts of a batch, and how long it took; the times include compilation when it was needed."""

    completions: tuple[Completion, ...]
    prefill_s: float
    """Seconds until the first token of each row."""
    decode_s: float
    """Seconds for all others."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all rows after their first, per second."""
        return sum(max(len(c.token_ids) - 1, 0) for c in self.completions) / max(self.decode_s, 1e-9)


class Generator:
    """Continues prompts with one model.

    Compiles once per config, batch size and (power of two of) length; every further call reuses that.
    """

    def __init__(self, model: SavedModel):
        if model.tokenizer is None:
            raise UserError("generate: the checkpoint has no tokenizer (tokenizer.json or tiktoken.model)")
        self.cfg, self.tokenizer = model.cfg, model.tokenizer
        turn = model.tokenizer.specials.get(END_OF_TURN)  # ends a text too, whatever ends a document
        self.stop_ids = model.stop_ids if turn in (None, *model.stop_ids) else (*model.stop_ids, turn)
        self._weights = (cast_matrices(model.params, model.cfg.dtype), model.buffers)
        num_tokens = min(model.tokenizer.vocab_size, model.cfg.vocab_size)
        self._run = _programs(abstract(model.cfg)[0], num_tokens)

    def stream(self, prompt: Prompt, settings: Settings = Settings()) -> Iterator[str]:
        """Yields the text that follows a prompt as it comes, one (possibly empty) piece per token.

        Raises:
          UserError: the prompt is empty, or holds a token that the model does not know; or a logit is not finite.
        """
        text = _TextStream(self.tokenizer)
        for tokens_B in self.steps([self.encode(prompt)], settings):
            token = int(tokens_B[0])
            if token in self.stop_ids:
                break
            yield text.add(token)
        yield text.finish()

    def generate(
        self, prompts: Sequence[Prompt], settings: Settings = Settings(), *, stop: Sequence[str] = ()
    ) -> Completions:
        """Continues a batch of prompts; each row gets what it would get alone.

        Args:
          prompts: texts, or token ids.
          settings: how to continue.
          stop: texts, not empty, that end a row where the first of them occurs.

        Raises:
          UserError: as in `stream`.
        """
        start = time.perf_counter()
        rows = [_Row(self.tokenizer, self.stop_ids, [text.encode() for text in stop]) for _ in prompts]
        first = start
        for step, tokens_B in enumerate(self.steps([self.encode(prompt) for prompt in prompts], settings)):
            first = time.perf_counter() if step == 0 else first
            for row, token in zip(rows, tokens_B.tolist(), strict=True):
                row.add(token)
            if all(row.stopped for row in rows):
                break
        completions = tuple(row.complete() for row in rows)
        return Completions(completions, first - start, time.perf_counter() - first)

    def encode(self, prompt: Prompt) -> Int[np.ndarray, "N"]:
        """Encodes a prompt; names of special tokens in a text become those tokens, ids are only checked."""
        ids = self._encode_text(prompt) if isinstance(prompt, str) else np.asarray(prompt)
        if not ids.size:
            raise UserError("prompt: is empty; must have at least one token")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"prompt: is {ids.dtype} of shape {list(ids.shape)}, must be text or integers [N]")
        if ids.min() < 0 or ids.max() >= self.cfg.vocab_size:
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(f"prompt: token {bad} is outside the model's vocabulary of {self.cfg.vocab_size}")
        return ids.astype(np.int32)

    def _encode_text(self, prompt: str) -> Int[np.ndarray, "N"]:
        check_text(prompt, "prompt")
        return self.tokenizer.encode(prompt, specials=True)

    def steps(self, prompts: Sequence[Int[np.ndarray, "N"]], settings: Settings) -> Iterator[Int[np.ndarray, "B"]]:
        """Yields the next token of every row, `FINISHED` behind a stop token, until all rows are finished.

        Args:
          prompts: token ids, at least one each.
          settings: how to continue.

        Raises:
          UserError: there is no prompt, or a logit is not finite.
        """
        if not prompts:
            raise UserError("prompts: there is none")
        rule = make_rule(settings.temperature, settings.top_p, settings.top_k)
        keys_B = jax.vmap(jax.random.key)(jnp.arange(len(prompts), dtype=jnp.uint32) + np.uint32(settings.seed))
        slots = round_length(padded_length(max(map(len, prompts))) + settings.max_new_tokens)
        caches, last_BD = self._run.init(*self._weights, batch=len(prompts), slots=slots)
        for tokens_BT, segment_ids_BT in cut_pieces(prompts):
            caches, last_BD = self._run.prefill(*self._weights, caches, last_BD, tokens_BT, segment_ids_BT)
        finished_B = np.zeros(len(prompts), bool)
        for step in range(settings.max_new_tokens):
            tokens_B = self._run.pick(*self._weights, last_BD, keys_B, jnp.int32(step), rule)
            if step + 1 < settings.max_new_tokens:  # dispatched before this step's tokens are waited for
                caches, last_BD = self._run.decode(*self._weights, caches, tokens_B)
            known_B = np.where(finished_B, FINISHED, np.asarray(tokens_B))
            if (known_B == NOT_FINITE).any():
                row = int(np.argmax(known_B == NOT_FINITE))
                raise UserError(f"new token {step} of prompt {row}: a logit is not finite; are the weights whole?")
            yield known_B
            finished_B |= np.isin(known_B, self.stop_ids)
            if finished_B.all():
                return


class _Programs(NamedTuple):
    init: Callable
    prefill: Callable
    decode: Callable
    pick: Callable


@functools.lru_cache(maxsize=8)
def _programs(graphdef: nnx.GraphDef, num_tokens: int) -> _Programs:
    """Equal configs share compiled code, in whatever `Generator` they are used."""
    bind = functools.partial
    return _Programs(
        init=jax.jit(bind(init_state, graphdef), static_argnames=("batch", "slots")),
        prefill=jax.jit(bind(prefill_piece, graphdef), donate_argnames=("caches", "last_BD")),
        decode=jax.jit(bind(decode_step, graphdef), donate_argnames=("caches",)),
        pick=jax.jit(bind(next_token, graphdef, num_tokens=num_tokens)),
    )


class _Row:
    """Gathers the tokens of one row until a stop token or a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], stop: Sequence[bytes]):
        self._tokenizer, self._stop_ids, self._stop = tokenizer, stop_ids, stop
        self._tokens: list[int] = []
        self._text = b""
        self.stopped = False

    def add(self, token: int) -> None:
        if self.stopped:
            return
        self.stopped = token in self._stop_ids
        if not self.stopped:
            self._tokens.append(token)
            self._text += self._tokenizer.decode_bytes([token])
            self._cut()

    def _cut(self) -> None:
        found = [place for text in self._stop if (place := self._text.find(text)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def complete(self) -> Completion:
        text = self._text.decode("utf-8", errors="replace")
        return Completion(text, tuple(self._tokens), "stop" if self.stopped else "length")


class _TextStream:
    """Turns tokens into text as they come; holds back the bytes of a character that is not complete."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def load_generator(path: str | Path, *, step: int | None = None) -> Generator:
    """Opens a run directory or a public checkpoint for generation.

    Args:
      path: a directory with config.yaml and checkpoints, or with config.json and safetensors.
      step: of a run's checkpoint; None: the newest.

    Raises:
      UserError: neither of both, or one that is incomplete or damaged.
    """
    return Generator(load_model(path, step=step, dtype="stored"))
