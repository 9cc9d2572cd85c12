"""What a run measures beside its validation loss."""

from kimi_jax.config.base import Config
from kimi_jax.config.data import DataConfig
from kimi_jax.config.mixer import PositiveInt


class Evaluation(Config):
    """Loss and accuracy on further data: a synthetic task, other text, longer sequences."""

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
