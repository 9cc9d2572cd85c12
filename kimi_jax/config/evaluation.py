"""What a run measures beside its validation loss."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from kimi_jax.config.base import Config
from kimi_jax.config.data import DataConfig
from kimi_jax.config.mixer import PositiveInt


class LossEvaluation(Config):
    """Loss and accuracy on further data: a synthetic task, other text, longer sequences."""

    kind: Literal["loss"] = "loss"
    data: DataConfig | None = None
    """Its validation examples are taken; unset: those of the run."""
    seq_len: PositiveInt | None = None
    """Tokens per example; unset: those of the data."""
    every: PositiveInt = 1
    """Validations of the run from one to the next; the last step always has one."""
    batches: PositiveInt = 4
    batch_size: PositiveInt | None = None
    """Sequences per batch; unset: train.batch_size."""
    by_position: bool = False
    """Also the loss by position within the document: tokens 0 to 63, 64 to 127, 128 to 255, and so on by doubling."""


class LmEval(Config):
    """Tasks of lm-evaluation-harness (extra `eval`), on text data alone."""

    kind: Literal["lm_eval"] = "lm_eval"
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names that the harness knows, or that `include` defines; `mmlu` is a group, `*` stands for any letters."""
    limit: PositiveInt | None = None
    """Documents per task; unset: all."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; unset: as the task says."""
    include: str | None = None
    """A directory with task files of one's own."""
    every: PositiveInt = 1
    """Validations of the run from one to the next; the last step always has one."""
    batch_size: PositiveInt = 8
    """Rows that run together at most."""


def _loss_by_default(value: Any) -> Any:
    return {"kind": "loss", **value} if isinstance(value, Mapping) else value


Evaluation = Annotated[LossEvaluation | LmEval, Field(discriminator="kind"), BeforeValidator(_loss_by_default)]
