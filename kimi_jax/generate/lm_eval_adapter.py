"""A model as lm-evaluation-harness sees it, through the harness's public model interface; needs the extra `eval`."""

import abc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from kimi_jax.config.model import ModelConfig
from kimi_jax.data.tokenizers import Tokenizer
from kimi_jax.errors import UserError
from kimi_jax.generate.api import Generator, Settings
from kimi_jax.generate.continuations import Request, score_continuations
from kimi_jax.generate.forward import Forward
from kimi_jax.generate.score import BATCH_SIZE, plan_batches, score_sequences
from kimi_jax.interop.saved_model import SavedModel

MAX_NEW_TOKENS = 256  # of a generated answer whose task names no limit
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # its names, the first one counts
SAMPLING = ("temperature", "top_p", "top_k")
KNOWN = {"until", "do_sample", *LIMITS, *SAMPLING}


class Tasks(TaskManager):
    """The harness's index of tasks, and those of a directory of one's own; documents are read once."""

    def __init__(self, include: Path | None):
        super().__init__(include_path=include and str(include))
        self._loaded: dict[tuple[str, ...], dict[str, Any]] = {}

    def load(self, task_list: list[str]) -> dict[str, Any]:
        names = tuple(task_list)
        if names not in self._loaded:
            self._loaded[names] = super().load(task_list)
        return self._loaded[names]


class Requests(LM):
    """The harness's three kinds of requests in tokens; nothing is ever truncated.

    Args:
      cfg: of the model.
      tokenizer: of the tasks' texts.

    Attributes:
      num_requested: tokens of all log-likelihood requests, as if each were run alone.
    """

    def __init__(self, cfg: ModelConfig, tokenizer: Tokenizer):
        super().__init__()
        self._vocab_size, self._tokenizer = cfg.vocab_size, tokenizer
        self.num_requested = 0

    @abc.abstractmethod
    def score_pairs(self, pairs: Sequence[Request]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation behind its context, and whether greedy generation would give it."""

    @abc.abstractmethod
    def score_texts(self, texts: Sequence[Int[np.ndarray, "N"]]) -> list[float]:
        """Log-likelihood of all tokens of each text but the first."""

    @abc.abstractmethod
    def generate(
        self, contexts: Sequence[Int[np.ndarray, "N"]], settings: Settings, stop: Sequence[str]
    ) -> Sequence[str]:
        """Continues each context."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        pairs = [self._encode_pair(*request.args) for request in requests]
        self.num_requested += sum(len(pair.context) + max(len(pair.continuation) - 1, 0) for pair in pairs)
        return self.score_pairs(pairs)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Whole texts stand behind the end token."""
        eos = self._tokenizer.eos_id
        texts = [np.append(eos, self._encode(request.args[0])).astype(np.int32) for request in requests]
        self.num_requested += sum(map(len, texts))
        return self.score_texts(texts)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Contexts with equal settings go together."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        answers: dict[int, str] = {}
        for members in groups.values():
            settings, stop = read_generation_settings(requests[members[0]].args[1])
            contexts = [self._encode(requests[index].args[0]) for index in members]
            if not all(map(len, contexts)):
                raise UserError("a task asks for a continuation of an empty text; must have at least one token")
            answers |= zip(members, self.generate(contexts, settings, stop), strict=True)
        return [answers[index] for index in range(len(requests))]

    def _encode(self, text: str) -> np.ndarray:
        ids = self._tokenizer.encode(text, specials=True)
        if (largest := ids.max(initial=0)) >= self._vocab_size:
            raise UserError(f"token {largest} of a task is outside the model's vocabulary")
        return ids

    def _encode_pair(self, context: str, continuation: str) -> Request:
        """Spaces at the end of a context belong to the continuation, as tokenizers want it; the text is cut after."""
        if not context:
            return Request((self._tokenizer.eos_id,), tuple(self._encode(continuation).tolist()))
        trimmed = context.rstrip()
        if not trimmed:
            whole = [self._tokenizer.eos_id, *self._encode(context + continuation).tolist()]
            return Request(tuple(whole[:1]), tuple(whole[1:]))
        before = self._encode(trimmed).tolist()
        whole = self._encode(context + continuation).tolist()
        return Request(tuple(before), tuple(whole[len(before) :]))


class HarnessModel(Requests):
    """Answers requests; what several of them begin with is run once.

    Args:
      model: with a tokenizer.
      batch_size: rows that run together at most.
      arrived: called now and then: a long evaluation is no silence.
    """

    def __init__(self, model: SavedModel, *, batch_size: int = BATCH_SIZE, arrived: Callable[[], None] = lambda: None):
        self._generator = Generator(model)
        self._forward = Forward(model, arrived=arrived)
        super().__init__(model.cfg, model.tokenizer)
        self._batch_size, self._arrived = batch_size, arrived

    @property
    def num_run(self) -> int:
        """Tokens of `loglikelihood` and `loglikelihood_rolling` requests that went through the model."""
        return self._forward.num_tokens

    def score_pairs(self, pairs):
        return [tuple(answer) for answer in score_continuations(self._forward, pairs, batch_size=self._batch_size)]

    def score_texts(self, texts):
        totals = np.zeros(len(texts))
        for piece in score_sequences(self._forward, texts, batch_size=self._batch_size, with_logits=False):
            count = len(texts[piece.sequence]) - 1 - piece.start  # behind the last token nothing is asked
            totals[piece.sequence] += piece.log_likelihood_T[:count].sum(dtype=np.float64)
        return totals.tolist()

    def generate(self, contexts, settings, stop):
        found: dict[int, str] = {}
        for batch in plan_batches([len(context) + settings.max_new_tokens for context in contexts], self._batch_size):
            prompts = [contexts[batch[0] if index is None else index] for index in batch]
            completions = self._generator.generate(prompts, settings, stop=stop).completions
            found |= {i: c.text for i, c in zip(batch, completions, strict=True) if i is not None}
            self._arrived()
        return [found[index] for index in range(len(contexts))]


class Rehearsal(Requests):
    """Encodes all requests and runs none: what a task may not ask is found before there is a model."""

    def score_pairs(self, pairs):
        return [(0.0, False)] * len(pairs)

    def score_texts(self, texts):
        return [0.0] * len(texts)

    def generate(self, contexts, settings, stop):
        return [""] * len(contexts)


def read_generation_settings(asked: dict) -> tuple[Settings, tuple[str, ...]]:
    """Translates a task's generation settings.

    Returns:
      (settings, stop texts).

    Raises:
      UserError: a setting that is not known, or out of range.
    """
    unknown = sorted(set(asked) - KNOWN)
    if unknown:
        raise UserError(f"generation setting {unknown[0]!r} of a task: is not one of {', '.join(sorted(KNOWN))}")
    until = asked.get("until") or []
    stop = (until,) if isinstance(until, str) else tuple(filter(None, until))
    limit = next((int(asked[name]) for name in LIMITS if asked.get(name) is not None), MAX_NEW_TOKENS)
    sampling = {name: asked[name] for name in SAMPLING if asked.get(name) is not None}
    greedy = not asked.get("do_sample", sampling.get("temperature", 0) > 0)
    return Settings(limit, **({"temperature": 0.0} if greedy else {"temperature": 1.0} | sampling)), stop
