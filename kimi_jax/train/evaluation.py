"""What is measured on data that training does not see: the loss and accuracy of a run's validation data."""

import math
from collections.abc import Mapping, Sequence

import jax

type Sums = Mapping[str, jax.typing.ArrayLike]
"""What `build_eval_step` returns for a batch."""


def validation_metrics(sums: Sequence[Sums]) -> dict[str, float]:
    """Means over the scored tokens of all batches; empty if there are none.

    Args:
      sums: one mapping per batch, fetched from the device.
    """
    tokens, correct, size = (sum(int(s[name]) for s in sums) for name in ("tokens", "correct", "bytes"))
    if not tokens:
        return {}
    nats = sum(float(s["loss_nats"]) for s in sums)
    loss = {"validation_loss_nats": nats / tokens, "validation_accuracy": correct / tokens}
    return loss | ({"validation_bits_per_byte": nats / math.log(2) / size} if size else {})
