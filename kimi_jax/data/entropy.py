"""How predictable bytes are to simple statistics of themselves: what a model's bits per byte are compared with."""

from collections.abc import Iterable, Iterator

import numpy as np

from kimi_jax.data.pipeline import Batch
from kimi_jax.data.tokenizers import Tokenizer


def evaluated_runs(batches: Iterable[Batch], tokenizer: Tokenizer) -> Iterator[bytes]:
    """Recovers the text that a loss over batches covers, one run of bytes per document and row.

    The first byte of a run is context only: it is the last byte of the one token that has no prediction in that row.
    All bytes after it belong to targets that the loss mask selects: sum(token_bytes[targets] * loss_mask) bytes.

    Args:
      batches: as `Dataset.validation_batches` yields them.
      tokenizer: the tokenizer of the data.
    """
    for batch in batches:
        for row in range(len(batch["inputs"])):
            ids, mask = batch["segment_ids"][row], batch["loss_mask"][row]
            for segment in range(1, int(ids.max(initial=0)) + 1):
                inside = np.flatnonzero(ids == segment)
                context = tokenizer.decode_bytes(batch["inputs"][row, inside[:1]])[-1:]
                targets = batch["targets"][row, inside[mask[inside]]]
                yield context + tokenizer.decode_bytes(targets)


def order0_bits_per_byte(runs: Iterable[bytes]) -> float:
    """Computes the empirical entropy H(byte) of all bytes but the first of each run, in bits.

    Raises:
      ValueError: no run has two bytes.
    """
    return _entropy_bits(_pair_counts(runs).sum(axis=0))


def order1_bits_per_byte(runs: Iterable[bytes]) -> float:
    """Computes the empirical conditional entropy H(byte | byte before) within runs, in bits: the bigram entropy.

    It is what a table of bigrams fitted to these very bytes would reach, so no bigram model does better on them.

    Args:
      runs: pieces of text; no pair crosses from one to the next.

    Raises:
      ValueError: no run has two bytes.
    """
    counts = _pair_counts(runs)
    return _entropy_bits(counts.ravel()) - _entropy_bits(counts.sum(axis=1))


def _pair_counts(runs: Iterable[bytes]) -> np.ndarray:
    """Counts pairs of neighbouring bytes; int64 [256, 256], first byte by second."""
    counts = np.zeros(2**16, np.int64)
    for run in runs:
        values = np.frombuffer(run, np.uint8).astype(np.intp)
        counts += np.bincount(values[:-1] * 256 + values[1:], minlength=2**16)
    if not counts.any():
        raise ValueError("entropy: no run has two bytes, so there is no pair to count")
    return counts.reshape(256, 256)


def _entropy_bits(counts: np.ndarray) -> float:
    counts = counts[counts > 0]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())
