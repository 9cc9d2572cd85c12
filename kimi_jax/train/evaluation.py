"""What is measured on data that training does not see: loss, accuracy, the loss by position, benchmarks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kimi_jax.config.data import DataConfig
from kimi_jax.config.evaluation import Evaluation, LmEval, LossEvaluation
from kimi_jax.config.load import validate
from kimi_jax.config.model import ModelConfig
from kimi_jax.config.train import RunConfig
from kimi_jax.data.pipeline import Batch, Dataset, build_dataset, tokenizer_of
from kimi_jax.data.tokenizers import Tokenizer
from kimi_jax.errors import UserError
from kimi_jax.layers.cache import place_tokens
from kimi_jax.models import decoder
from kimi_jax.train.loss import token_cross_entropy
from kimi_jax.train.state import Recipe
from kimi_jax.train.step import build_eval_step
from kimi_jax.types import Variables

type Sums = Mapping[str, Any]
"""Of a batch, over its scored tokens: loss_nats, tokens, correct, bytes; by position loss_nats_at and tokens_at."""

type RunBenchmark = Callable[[Variables, Variables, Callable[[], None]], Mapping[str, float]]
"""(params, buffers, a sign of life) -> its figures by name; the model may be cut over devices in any way."""

type OpenBenchmark = Callable[[LmEval, ModelConfig, Tokenizer], RunBenchmark]
"""Finds the tasks and reads their documents; raises `UserError` for what cannot be run."""

VALIDATION = "validation"
FIRST_POSITIONS = 64  # tokens of the first bin of positions; each later one begins where its size is


def fetch(measured: Mapping[str, Sequence[Sums]], arrived: Callable[[], None]) -> dict[str, list[Sums]]:
    """Brings what `Evaluator.start` returned to the host, batch by batch.

    Args:
      measured: sums by evaluation.
      arrived: called after each batch: a validation that goes on is no silence.
    """

    def fetch_one(sums: Sums) -> Sums:
        numbers = jax.device_get(sums)
        arrived()
        return numbers

    return {name: [fetch_one(sums) for sums in batches] for name, batches in measured.items()}


def mean_metrics(measured: Mapping[str, Sequence[Sums]]) -> dict[str, float]:
    """Means over the scored tokens of all batches of each evaluation, with its name in front; none without a token.

    Args:
      measured: what `fetch` returned.
    """
    return {key: value for name, sums in measured.items() for key, value in _means(name, sums).items()}


def _means(name: str, sums: Sequence[Sums]) -> dict[str, float]:
    tokens, correct, size = (sum(int(s[key]) for s in sums) for key in ("tokens", "correct", "bytes"))
    if not tokens:
        return {}
    nats = sum(float(s["loss_nats"]) for s in sums)
    metrics = {"loss_nats": nats / tokens, "accuracy": correct / tokens}
    metrics |= {"bits_per_byte": nats / math.log(2) / size} if size else {}
    return {f"{name}_{key}": value for key, value in metrics.items()} | _by_position(name, sums)


def _by_position(name: str, sums: Sequence[Sums]) -> dict[str, float]:
    if "loss_nats_at" not in sums[0]:
        return {}
    nats, tokens = (np.sum([s[key] for s in sums], axis=0, dtype=np.float64) for key in ("loss_nats_at", "tokens_at"))
    return {f"{name}_loss_nats_from_{first_position(i)}": nats[i] / n for i, n in enumerate(tokens) if n}


def first_position(position_bin: int) -> int:
    """Where a bin of positions begins: 0, 64, 128, 256, ..."""
    return FIRST_POSITIONS << (position_bin - 1) if position_bin else 0


def build_position_step(recipe: Recipe) -> Callable[[Any, Any, Mapping[str, Array]], dict[str, Array]]:
    """Makes (params, buffers, batch) -> {"loss_nats_at", "tokens_at"}: sums over the scored tokens of each bin."""

    def position_step(params, buffers, batch):
        model = decoder.merge(recipe.graphdef, params, buffers)
        hidden, _, _ = model(batch["inputs"], segment_ids_BT=batch["segment_ids"])
        mask = batch["loss_mask"].astype(bool)
        chunk = recipe.cfg.train.loss_chunk
        losses = token_cross_entropy(hidden, model.head.weight[...], batch["targets"], mask, chunk)
        return sums_by_position(losses.cross_entropy, mask, batch["segment_ids"])

    return position_step


def sums_by_position(
    loss_BT: Float[Array, "B T"], mask_BT: Array, segment_ids_BT: Int[Array, "B T"]
) -> dict[str, Array]:
    """Sums a loss over the tokens that `mask_BT` selects, by their position within the document."""
    B, T = loss_BT.shape
    position_BT = place_tokens(segment_ids_BT, jnp.ones(B, jnp.int32), jnp.zeros(B, jnp.int32)).position
    starts = [first_position(i) for i in range(1, 32) if first_position(i) < T]
    bin_BT = sum((position_BT >= start).astype(jnp.int32) for start in starts) + jnp.zeros_like(position_BT)
    chosen_BTN = (bin_BT[..., None] == jnp.arange(len(starts) + 1)[None, None]) & mask_BT[..., None]
    nats = jnp.sum(jnp.where(chosen_BTN, loss_BT[..., None], 0.0), axis=(0, 1))
    return {"loss_nats_at": nats, "tokens_at": jnp.sum(chosen_BTN, axis=(0, 1), dtype=jnp.int32)}


def is_due(cfg: Evaluation, validation: int, *, last: bool) -> bool:
    """Whether an evaluation belongs to the validation of that number, counted from 1."""
    return last or validation % cfg.every == 0


@dataclass(frozen=True)
class Measurement:
    """One thing that is measured, its data opened."""

    name: str
    cfg: LossEvaluation
    data: Dataset

    @cached_property
    def batches(self) -> list[Batch]:
        return list(self.data.validation_batches(self.cfg.batches))


def open_measurements(cfg: RunConfig, data: Dataset) -> list[Measurement]:
    """Opens what a run measures: its validation, then `train.evaluations`.

    Args:
      cfg: the run.
      data: that of the run.

    Raises:
      UserError: the data is missing, has no validation examples, or tokens that the model does not know.
    """
    found = [Measurement(VALIDATION, LossEvaluation(batches=cfg.train.validation.batches), data)]
    share = {"process_index": data.process_index, "process_count": data.process_count}
    for name, evaluation in cfg.train.evaluations_of(LossEvaluation).items():
        rows = evaluation.batch_size or cfg.train.batch_size
        source = _source(cfg, name, evaluation)
        own = source == cfg.data and rows == cfg.train.batch_size
        opened = data if own else build_dataset(source, batch_size=rows, **share)
        if opened.validation is None:
            raise UserError(
                f"train.evaluations.{name}: {opened.train} has no validation examples beside it to measure on"
            )
        opened.check_vocabulary(cfg.model.vocab_size, f"the data of train.evaluations.{name}")
        found.append(Measurement(name, evaluation, opened))
    return found


def _source(cfg: RunConfig, name: str, evaluation: LossEvaluation) -> DataConfig:
    source = evaluation.data or cfg.data
    if evaluation.seq_len is None:
        return source
    return validate(
        source.model_dump() | {"seq_len": evaluation.seq_len}, type(source), source=f"train.evaluations.{name}"
    )


def open_benchmarks(cfg: RunConfig, data: Dataset, open_benchmark: OpenBenchmark | None) -> dict[str, RunBenchmark]:
    """Opens the benchmarks among `train.evaluations`.

    Args:
      cfg: the run.
      data: that of the run.
      open_benchmark: `kimi_jax.generate.benchmark.Benchmark`, which this part of the project may not import; None where
        benchmarks are not run.

    Raises:
      UserError: they cannot be run: here, on these data, or at all.
    """
    asked = cfg.train.evaluations_of(LmEval)
    tokenizer = tokenizer_of(data) if asked else None
    for name in asked:
        where = f"train.evaluations.{name}: kind lm_eval"
        if open_benchmark is None:
            raise UserError(f"{where} is for runs of scripts/train.py; unset it, or pass `open_benchmark`")
        if tokenizer is None:
            raise UserError(f"{where} needs text, and data.kind={cfg.data.kind} has no tokenizer")
    found = {}
    for name, evaluation in asked.items():
        try:
            found[name] = open_benchmark(evaluation, cfg.model, tokenizer)
        except UserError as error:
            raise UserError([f"train.evaluations.{name}: {problem}" for problem in error.problems]) from error
    return found


class Evaluator:
    """Runs measurements on the model as it is.

    Args:
      recipe: of the run.
      measurements: what may be due.
      place: sends a batch to the devices.
      over: transforms (params, buffers, batch, token_bytes) -> sums before it is compiled, `jax.vmap` over runs for
        instance.
    """

    def __init__(
        self,
        recipe: Recipe,
        measurements: Sequence[Measurement],
        place: Callable[[Batch], Mapping[str, Array]] = jax.device_put,
        over: Callable[[Callable], Callable] = lambda step: step,
    ):
        self.measurements, self._place = measurements, place
        self._steps = {plain: jax.jit(over(build_step(recipe, by_position=not plain))) for plain in (True, False)}

    def start(self, params: Any, buffers: Any, validation: int, *, last: bool) -> dict[str, list[Sums]]:
        """Sums of every batch of what is due, by name; they are still on the device, and maybe not there yet."""
        return {
            m.name: [
                self._steps[not m.cfg.by_position](params, buffers, self._place(batch), m.data.token_bytes)
                for batch in m.batches
            ]
            for m in self.measurements
            if is_due(m.cfg, validation, last=last)
        }


def build_step(recipe: Recipe, *, by_position: bool) -> Callable[..., dict[str, Array]]:
    """Makes (params, buffers, batch, token_bytes) -> the sums of a batch."""
    step, positions = build_eval_step(recipe), build_position_step(recipe)
    if not by_position:
        return step
    return lambda params, buffers, batch, size: {
        **step(params, buffers, batch, size),
        **positions(params, buffers, batch),
    }
