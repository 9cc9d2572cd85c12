"""Scores as .npy files: how tokens are read, and how arrays that may exceed memory are written whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from kimi_jax.errors import UserError
from kimi_jax.generate.forward import Forward
from kimi_jax.generate.score import BATCH_SIZE, check_tokens, cut_documents, fill_scores
from kimi_jax.interop.saved_model import load_model


def read_array(path: Path) -> np.ndarray:
    """Opens a .npy file without reading it whole.

    Raises:
      UserError: no such file, or one of another kind.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: is no .npy array: {' '.join(str(error).split())}") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: is no .npy array: it is an archive of several")
    return array


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """Refuses files that could not be written at the end, or would take the place of another one of the call.

    Raises:
      UserError: a directory, a file in a directory that does not exist, or a file that is named twice.
    """
    taken = {path.resolve() for path in inputs if path}
    for path in filter(None, outputs):
        if path.is_dir():
            raise UserError(f"{path}: is a directory, must name a file")
        if not path.parent.is_dir():
            raise UserError(f"{path}: its directory does not exist")
        if path.resolve() in taken:
            raise UserError(f"{path}: is named twice; tokens, segment ids and each output must be files of their own")
        taken.add(path.resolve())


@contextlib.contextmanager
def new_array(path: Path | None, shape: tuple[int, ...]) -> Iterator[np.ndarray | None]:
    """Gives a float32 array of zeros on disk that becomes `path` when the block ends well, and vanishes when not.

    None gives None. The disk space is taken at once: a disk that is full says so here, not as a crash in between.

    Raises:
      UserError: the file cannot be written.
    """
    if path is None:
        yield None
        return
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        array = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
        if hasattr(os, "posix_fallocate"):
            with temporary.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        yield array
        array.flush()
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def score_files(
    checkpoint: Path,
    tokens: Path,
    *,
    segment_ids: Path | None = None,
    logits: Path | None = None,
    log_likelihood: Path | None = None,
    step: int | None = None,
    dtype: str | None = None,
    batch_size: int = BATCH_SIZE,
) -> tuple[int, int]:
    """Scores a file of tokens; what the arrays hold is said in `kimi_jax.generate.score.Scores`.

    Args:
      checkpoint: a run directory or a public checkpoint.
      tokens: integers [B, T] as .npy; -1 marks padding, anywhere in a row.
      segment_ids: integers [B, T], the documents of packed rows, 0 for padding; None: one document per row.
      logits: the file for float32 [B, T, vocabulary]; None: not written. It may exceed host memory.
      log_likelihood: the file for float32 [B, T]; None: not written.
      step: of a run's checkpoint; None: the newest.
      dtype: compute dtype instead of the model's.
      batch_size: rows that run together at most.

    Returns:
      (number of documents, number of tokens).

    Raises:
      UserError: a file or checkpoint that is missing, damaged or does not fit, an output that cannot be written, or a
        logit that is not finite.
    """
    if logits is None and log_likelihood is None:
        raise UserError("score: neither logits nor log-likelihoods are asked for")
    check_outputs((logits, log_likelihood), (tokens, segment_ids))
    tokens_BT = read_array(tokens)
    segment_ids_BT = None if segment_ids is None else read_array(segment_ids)
    model = load_model(checkpoint, step=step, dtype="stored")
    check_tokens(tokens_BT, model.cfg.vocab_size, segment_ids_BT, source=str(tokens))
    documents = cut_documents(tokens_BT, segment_ids_BT)
    shape = tokens_BT.shape
    with new_array(logits, (*shape, model.cfg.vocab_size)) as logits_BTA, new_array(log_likelihood, shape) as likely_BT:
        arrays = {"logits_BTA": logits_BTA, "log_likelihood_BT": likely_BT}
        fill_scores(Forward(model, dtype=dtype), documents, **arrays, batch_size=batch_size)
    return len(documents), sum(len(document.tokens_N) for document in documents)
