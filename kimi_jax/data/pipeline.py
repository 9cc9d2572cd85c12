"""Which examples a run sees, in which order: a function of the seed and the step, for any number of processes."""

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from kimi_jax.config.data import DataConfig, RecordData, StdlibData, SyntheticData
from kimi_jax.data.example import Example
from kimi_jax.data.packing import Record
from kimi_jax.data.prepare import TRAIN, VALIDATION, prepare_stdlib
from kimi_jax.data.records import MANIFEST, RecordSource, read_manifest
from kimi_jax.data.synthetic import tasks
from kimi_jax.data.synthetic.tasks import SyntheticSource
from kimi_jax.data.tokenizers import BYTES, Tokenizer, load_tokenizer
from kimi_jax.errors import UserError

type Batch = Mapping[str, np.ndarray]
type Source = RecordSource | SyntheticSource

BATCH_DTYPES = {"inputs": np.int32, "targets": np.int32, "segment_ids": np.int32, "loss_mask": np.bool_}

VALIDATION_SEED = 0  # validation takes the same records in every run, whatever its seed
READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # batches


@dataclass(frozen=True)
class Dataset:
    """The training and validation data of one process.

    A batch is a dict of arrays [rows, seq_len], rows = batch_size / process_count: `inputs` and `targets` int32,
    `segment_ids` int32 (of the inputs; 1, 2, ... by document within the row, 0: padding) and `loss_mask` bool (the
    target is the next token of the same document). Process p holds rows p * rows to (p + 1) * rows of the global batch.
    """

    train: Source
    validation: Source | None
    vocab_size: int
    token_bytes: np.ndarray
    """Bytes of text each token stands for, int32 [vocab_size], 0 for special tokens and where tokens are no text."""
    shuffle_seed: int
    batch_size: int
    process_index: int
    process_count: int

    @property
    def identity(self) -> dict[str, str | None]:
        """Hashes of what the training and the validation examples are, wherever they lie."""
        validation = self.validation and self.validation.content_sha256
        return {"train": self.train.content_sha256, "validation": validation}

    def check_same(self, identity: Mapping[str, str | None]) -> None:
        """Compares the data with an `identity`, of the last time or of another process.

        Raises:
          UserError: it is other data.
        """
        for name, digest in identity.items():
            if digest != (have := self.identity[name]):
                raise UserError(f"data: the {name} records have hash {have}, but those of this run have {digest}")

    def check_vocabulary(self, size: int, what: str) -> None:
        """Checks that a model of `size` tokens knows all that occur.

        Raises:
          UserError: it does not.
        """
        if size < self.vocab_size:
            raise UserError(f"model.vocab_size={size} is too small: {what} has {self.vocab_size} different tokens")

    @property
    def _rows(self) -> int:
        return self.batch_size // self.process_count

    def train_iterator(self) -> "TrainIterator":
        """Iterates for ever over the training examples, in a new order each epoch."""
        order = grain.MapDataset.source(self.train).shuffle(self.shuffle_seed).repeat()
        # The processes take consecutive groups of `rows` examples in turn, so the global order is the same for any
        # number of processes.
        batches = order.batch(self._rows, drop_remainder=True, batch_fn=make_batch)
        batches = batches[self.process_index :: self.process_count]
        return TrainIterator(iter(batches.to_iter_dataset(READ_AHEAD)), self)

    def validation_batches(self, num_batches: int) -> Iterator[Batch]:
        """Yields the first `num_batches` validation batches, the same at each call; fewer if the set is small.

        The records are taken in a fixed random order, so that few batches stand for the whole. The last batch of the
        set is filled up with padding rows.
        """
        if self.validation is None:
            return
        order = grain.MapDataset.source(self.validation).shuffle(VALIDATION_SEED)
        pad = _padding_like(order[0])
        for batch in range(min(num_batches, math.ceil(len(order) / self.batch_size))):
            first = batch * self.batch_size + self.process_index * self._rows
            rows = range(first, first + self._rows)
            yield make_batch([order[row] if row < len(order) else pad for row in rows])


class TrainIterator(grain.DatasetIterator[Batch]):
    """Training batches, with a position that can be saved and restored exactly.

    The position counts examples of the global order, so it holds for another number of processes, and for another batch
    size that divides it.
    """

    def __init__(self, batches: grain.DatasetIterator[Batch], dataset: Dataset):
        super().__init__(batches)
        self._batches = batches
        self._batch_size = dataset.batch_size
        self._identity = {"content_sha256": dataset.train.content_sha256, "shuffle_seed": dataset.shuffle_seed}

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position as a dict that JSON can hold."""
        return {"next_example": self._batches.get_state()["next_index"] * self._batch_size, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position from `get_state`.

        Raises:
          UserError: the position belongs to other data or another shuffle seed, or lies within a batch.
        """
        for name, have in self._identity.items():
            if (saved := state.get(name)) != have:
                raise UserError(f"data position: saved with {name}={saved}, but this run has {name}={have}")
        index, within = divmod(state["next_example"], self._batch_size)
        if within:
            raise UserError(f"data position {state['next_example']} is not a multiple of batch_size={self._batch_size}")
        self._batches.set_state({"next_index": index})

    def close(self) -> None:
        """Stops reading ahead."""
        super().close()
        self._batches.close()


def make_batch(items: Sequence[Record | Example]) -> Batch:
    """Stacks what a source holds into a batch."""
    examples = [item.as_example() for item in items]
    names = (field.name for field in dataclasses.fields(Example))
    return {name: np.stack([getattr(example, name) for example in examples]) for name in names}


def _padding_like(item: Record | Example) -> Example:
    """A row in which nothing is asked."""
    example = item.as_example()
    return dataclasses.replace(
        example, segment_ids=np.zeros_like(example.segment_ids), loss_mask=np.zeros_like(example.loss_mask)
    )


def build_dataset(cfg: DataConfig, *, batch_size: int, process_index: int = 0, process_count: int = 1) -> Dataset:
    """Opens the data of a run; prepares the default corpus on first use.

    Args:
      cfg: the `data` section of a run's config.
      batch_size: examples per global batch.
      process_index: this process, in [0, process_count).
      process_count: processes that share a global batch; must divide batch_size.

    Raises:
      UserError: the data is missing, damaged, empty, too small for a batch, or does not fit the config.
    """
    if batch_size % process_count:
        raise UserError(f"batch_size={batch_size} is not a multiple of the {process_count} processes")
    train, validation, token_bytes = _OPEN[type(cfg)](cfg)
    if len(train) < batch_size:
        raise UserError(f"{train}: {len(train)} records, fewer than one batch of batch_size={batch_size}")
    return Dataset(
        train=train,
        validation=validation,
        vocab_size=len(token_bytes),
        token_bytes=token_bytes,
        shuffle_seed=cfg.shuffle_seed,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )


type _Opened = tuple[Source, Source | None, np.ndarray]
"""Training and validation examples, and the bytes of each token."""


def _open_task(cfg: SyntheticData) -> _Opened:
    train, validation = (SyntheticSource(cfg, stream=stream) for stream in (tasks.TRAIN, tasks.VALIDATION))
    return train, validation, np.zeros(train.vocab_size, np.int32)


def _open_text(folders: Callable[[DataConfig], tuple[Path, Path | None]], cfg: DataConfig) -> _Opened:
    train_folder, validation_folder = folders(cfg)
    train = _open_source(train_folder, cfg)
    validation = None if validation_folder is None else _open_source(validation_folder, cfg)
    tokenizer = open_tokenizer(train.folder)
    if validation is not None:
        _check_same_tokenizer(train, validation)
    return train, validation, tokenizer.token_bytes()


def _stdlib_folders(cfg: StdlibData) -> tuple[Path, Path]:
    folder = prepare_stdlib(cfg)
    return folder / TRAIN, folder / VALIDATION


def _record_folders(cfg: RecordData) -> tuple[Path, Path | None]:
    return Path(cfg.train), None if cfg.validation is None else Path(cfg.validation)


_OPEN: dict[type, Callable[[Any], _Opened]] = {
    StdlibData: functools.partial(_open_text, _stdlib_folders),
    RecordData: functools.partial(_open_text, _record_folders),
    **dict.fromkeys(tasks.TASKS, _open_task),
}


def _open_source(folder: Path, cfg: DataConfig) -> RecordSource:
    source = RecordSource(folder)
    if (seq_len := source.manifest.seq_len) != cfg.seq_len:
        raise UserError(
            f"{folder}: prepared with seq_len={seq_len}, but data.seq_len={cfg.seq_len}; "
            "change the config or prepare the data again"
        )
    if len(source) == 0:
        raise UserError(f"{folder}: holds no records")
    return source


def save_tokenizer(dataset: Dataset, target: Path) -> None:
    """Copies what `open_tokenizer` needs: the manifest of the records and the tokenizer's files; of a task nothing."""
    if not isinstance(dataset.train, RecordSource):
        return
    folder = dataset.train.folder
    target.mkdir(exist_ok=True)
    for name in (*read_manifest(folder).tokenizer.files, MANIFEST):
        shutil.copyfile(folder / name, target / name)


def tokenizer_of(dataset: Dataset) -> Tokenizer | None:
    """Opens the tokenizer of text; the examples of a task have none."""
    return open_tokenizer(dataset.train.folder) if isinstance(dataset.train, RecordSource) else None


def open_tokenizer(folder: Path) -> Tokenizer:
    """Opens the tokenizer that made the records of a folder, or that `save_tokenizer` put there.

    Raises:
      UserError: there is no manifest, or the tokenizer files beside them are not those that made them.
    """
    entry = read_manifest(folder).tokenizer
    tokenizer = load_tokenizer(str(folder / entry.files[0]) if entry.files else BYTES)
    if tokenizer.fingerprint() != entry.fingerprint or tokenizer.vocab_size != entry.vocab_size:
        raise UserError(
            f"{folder}: the {tokenizer.kind} tokenizer there has hash {tokenizer.fingerprint()[:12]}, but the "
            f"records were made with {entry.fingerprint[:12]} ({entry.kind}); restore it or prepare the data again"
        )
    return tokenizer


def _check_same_tokenizer(train: RecordSource, validation: RecordSource) -> None:
    entries = [source.manifest.tokenizer for source in (train, validation)]
    if entries[0].fingerprint != entries[1].fingerprint:
        a, b = (f"{entry.kind}, hash {entry.fingerprint[:12]}" for entry in entries)
        raise UserError(
            f"{validation.folder}: tokenizer ({b}) differs from that of the training data {train.folder} ({a}); "
            "prepare both with the same tokenizer"
        )
