"""What one row of a batch holds, wherever it comes from."""

from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Example:
    """What the model reads and what is asked of it, each of shape [seq_len].

    Args:
      inputs: int32.
      targets: int32; what stands where nothing is asked means nothing.
      segment_ids: int32, of the inputs; 1, 2, ... by document, 0: padding.
      loss_mask: bool, where the target is asked for.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    loss_mask: np.ndarray

    @classmethod
    def of_one_document(cls, seq_len: int, inputs: np.ndarray, targets: np.ndarray, loss_mask: np.ndarray) -> Self:
        """Fills three equally long sequences up to seq_len with padding."""

        def filled(values: np.ndarray | int, dtype: type) -> np.ndarray:
            row = np.zeros(seq_len, dtype)  # a tenth of the time of np.pad
            row[: len(inputs)] = values
            return row

        return cls(
            inputs=filled(inputs, np.int32),
            targets=filled(np.where(loss_mask, targets, 0), np.int32),
            segment_ids=filled(1, np.int32),
            loss_mask=filled(loss_mask, np.bool_),
        )

    def as_example(self) -> Self:
        return self
