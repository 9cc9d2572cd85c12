"""Runs that are trained together: what each of them writes, and the batches they see."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kimi_jax.config.train import RunConfig, SkipNonFinite
from kimi_jax.data.pipeline import BATCH_DTYPES, Batch, Dataset, build_dataset, save_tokenizer
from kimi_jax.train.checkpoint import CheckpointStore
from kimi_jax.train.metrics import Sink, read_metrics
from kimi_jax.train.plot import plot_loss
from kimi_jax.train.run_dir import RunDir


@dataclass
class Member:
    """One run of a group: its directory and all that is written there."""

    cfg: RunConfig
    paths: RunDir
    store: CheckpointStore
    sinks: Sequence[Sink] = ()
    total_tokens: int = 0
    skipped_in_a_row: int = 0
    accuracies: list[float] = field(default_factory=list)
    """Of this process's validations, oldest first."""
    failure: str | None = None
    """Why nothing is written any more, if so."""

    def note_step(self, step: int, numbers: Mapping[str, float]) -> dict[str, Any]:
        """Counts a finished step; returns its record, and notes if the run has failed."""
        record = {"step": step, "loss_nats": numbers["loss_nats"], **numbers}
        bad = [f"{name} is {record[name]}" for name in ("loss_nats", "grad_norm") if not math.isfinite(record[name])]
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0
        rule = self.cfg.train.non_finite
        if bad and not (isinstance(rule, SkipNonFinite) and self.skipped_in_a_row <= rule.max_consecutive):
            self.failure = f"{self.paths.path}: step {step}: {' and '.join(bad)}"
        self.total_tokens += record["tokens"]
        return record | {"total_tokens": self.total_tokens}

    def write(self, record: Mapping[str, Any]) -> None:
        """Sends a record to every sink."""
        for sink in self.sinks:
            sink.write(record)

    def plot(self) -> None:
        plot_loss(read_metrics(self.paths.metrics), self.paths.loss_plot, title=self.paths.path.absolute().name)


class Feed:
    """The batches of all members of a group; drawn once if they all see the same."""

    def __init__(self, members: Sequence[Member]):
        configs = [member.cfg for member in members]
        self.shared = all(cfg.data == configs[0].data for cfg in configs)
        rows = configs[0].train.batch_size
        self._shape = (rows, configs[0].data.seq_len) if self.shared else (len(configs), rows, configs[0].data.seq_len)
        sources = configs[:1] if self.shared else configs
        self.datasets: list[Dataset] = [build_dataset(cfg.data, batch_size=rows) for cfg in sources]
        self.datasets[0].check_vocabulary(configs[0].model.vocab_size, f"the {configs[0].data.kind} data")
        self._iterators = [data.train_iterator() for data in self.datasets]
        self._repeats = len(configs) if self.shared else 1

    def save_tokenizers(self, members: Sequence[Member]) -> None:
        for member, data in zip(members, self.datasets * self._repeats, strict=True):
            save_tokenizer(data, member.paths.tokenizer)

    def empty(self, size: int) -> Batch:
        """Room for `size` batches: arrays [size, B, T] if all members see the same, else [size, members, B, T]."""
        return {name: np.zeros((size, *self._shape), dtype) for name, dtype in BATCH_DTYPES.items()}

    def draw(self, steps: int, size: int) -> Batch:
        """The next batches of all members, in the first `steps` rows of `empty(size)`."""
        batches = self.empty(size)
        for step in range(steps):
            for member, iterator in enumerate(self._iterators):
                for name, rows in next(iterator).items():
                    batches[name][step if self.shared else (step, member)] = rows
        return batches

    @property
    def positions(self) -> list[dict[str, Any]]:
        """Where each member's data goes on."""
        return [iterator.get_state() for iterator in self._iterators] * self._repeats

    @property
    def identities(self) -> list[dict[str, str | None]]:
        """What each member's data is."""
        return [data.identity for data in self.datasets] * self._repeats

    def go_on(self, positions: Sequence[Mapping[str, Any]], identities: Sequence[Mapping[str, str | None]]) -> None:
        """Moves to what `positions` were, after checking that the data is what it was."""
        for data, identity in zip(self.datasets * self._repeats, identities, strict=True):
            data.check_same(identity)
        for iterator, position in zip(self._iterators, positions, strict=False):
            iterator.set_state(dict(position))

    def close(self) -> None:
        for iterator in self._iterators:
            iterator.close()
