"""What a model says about given tokens: their logits and log-likelihoods, in batches and pieces of bounded memory."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from kimi_jax.errors import UserError
from kimi_jax.generate.forward import Context, Forward, Reading
from kimi_jax.generate.prefill import cut_pieces, padded_length, round_length
from kimi_jax.interop.saved_model import SavedModel

PADDING = -1  # the token id that marks a place without a token
BATCH_SIZE = 8
MAX_BATCH_TOKENS = 32_768  # of a batch, padding included: long sequences come in batches of fewer rows


class ScoredPiece(NamedTuple):
    """Consecutive tokens of one sequence; every entry is about the token that follows its own."""

    sequence: int
    start: int
    """Index of the first token."""
    logits_TA: Float[np.ndarray, "T A"] | None
    """float32; None if they were not asked for."""
    log_likelihood_T: Float[np.ndarray, "T"]
    """float32; meaningless behind the last token."""


class Scores(NamedTuple):
    """Scores of a rectangle of tokens; 0 where there is nothing to score."""

    logits_BTA: Float[np.ndarray, "B T A"]
    """float32, of the token after each; 0 at padding."""
    log_likelihood_BT: Float[np.ndarray, "B T"]
    """float32, of each token given those before it; 0 at padding and at the first token of a document."""


class Document(NamedTuple):
    """A run of tokens that see each other, and where they stand in the rectangle."""

    row: int
    columns_N: Int[np.ndarray, "N"]
    tokens_N: Int[np.ndarray, "N"]


def score_sequences(
    forward: Forward,
    sequences: Sequence[Int[np.ndarray, "N"]],
    *,
    batch_size: int = BATCH_SIZE,
    with_logits: bool = True,
) -> Iterator[ScoredPiece]:
    """Scores sequences of any lengths, those of similar length together; each gets what it would get alone.

    Args:
      forward: the model.
      sequences: int32 token ids, at least one each.
      batch_size: rows that run together at most.
      with_logits: whether the logits are fetched from the device.

    Yields:
      Pieces that cover every token once; those of a sequence come in order, the sequences in any.

    Raises:
      UserError: a logit is not finite.
    """
    for batch in plan_batches([len(sequence) for sequence in sequences], batch_size):
        rows = [np.zeros(0, np.int32) if index is None else sequences[index] for index in batch]
        following = [np.append(row[1:], row[:1]) for row in rows]  # behind the last token stands any
        context = forward.start(len(rows), round_length(padded_length(max(map(len, rows)))))
        for start, reading in ahead(read_rows(forward, context, rows, following)):
            logits_BCA = np.asarray(reading.logits_BCA) if with_logits else None
            log_likelihood_BC, finite_BC = np.asarray(reading.log_likelihood_BC), np.asarray(reading.finite_BC)
            for row, index in enumerate(batch):
                inside = row, slice(max(len(rows[row]) - start, 0))
                if finite_BC[inside].size:
                    _check_finite(finite_BC[inside], index, start)
                    logits_TA = None if logits_BCA is None else logits_BCA[inside]
                    yield ScoredPiece(index, start, logits_TA, log_likelihood_BC[inside])


def _check_finite(finite_T: Bool[np.ndarray, "T"], sequence: int, start: int) -> None:
    if not finite_T.all():
        at = start + int(np.argmin(finite_T))
        raise UserError(f"logits behind token {at} of sequence {sequence}: not finite; are the weights whole?")


def plan_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int | None]]:
    """Yields batches of indices, longest first; None fills the last batch of a shape, so that few are ever compiled."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        slots = round_length(lengths[order[0]])
        rows = max(1, min(batch_size, MAX_BATCH_TOKENS // slots, len(lengths)))
        batch, order = order[:rows], order[rows:]
        yield [*batch, *[None] * (rows - len(batch))]


def read_rows(
    forward: Forward, context: Context, rows: Sequence[Int[np.ndarray, "N"]], following: Sequence[Int[np.ndarray, "N"]]
) -> Iterator[tuple[int, Reading]]:
    """Feeds tokens and reads the head behind each.

    Args:
      forward: the model.
      context: what stands before the tokens; given away.
      rows: tokens of each row, of any lengths.
      following: the token that follows each of them, likewise.

    Yields:
      (index of the first token, reading); beyond the end of its tokens a row holds nothing of meaning.
    """
    start = 0
    for (tokens_BT, segment_ids_BT), (next_BT, _) in zip(cut_pieces(rows), cut_pieces(following), strict=True):
        context, hidden_BTD = forward.advance(context, tokens_BT, segment_ids_BT)
        for offset, reading in forward.read(hidden_BTD, next_BT):
            yield start + offset, reading
        start += next_BT.shape[1]


def ahead[T](items: Iterable[T]) -> Iterator[T]:
    """Yields the items, each after the next was made: the device works on it while this one is fetched."""
    held: list[T] = []
    for item in items:
        held.append(item)
        if len(held) > 1:
            yield held.pop(0)
    yield from held


def cut_documents(
    tokens_BT: Int[np.ndarray, "B T"], segment_ids_BT: Int[np.ndarray, "B T"] | None = None
) -> list[Document]:
    """Takes the documents out of padded or packed rows.

    Args:
      tokens_BT: integers; `PADDING` marks places without a token, anywhere in a row.
      segment_ids_BT: integers, 0 for padding; within a row, another id than that of the last token begins another
        document. None: one document per row.
    """
    documents = []
    for row, valid_T in enumerate(_find_tokens(tokens_BT, segment_ids_BT)):
        columns = np.flatnonzero(valid_T)
        if not len(columns):
            continue
        ids = columns * 0 if segment_ids_BT is None else segment_ids_BT[row, columns]
        for part in np.split(columns, np.flatnonzero(np.diff(ids)) + 1):
            documents.append(Document(row, part, tokens_BT[row, part].astype(np.int32)))
    return documents


def _find_tokens(tokens_BT: np.ndarray, segment_ids_BT: np.ndarray | None) -> Bool[np.ndarray, "B T"]:
    valid_BT = tokens_BT != PADDING
    return valid_BT if segment_ids_BT is None else valid_BT & (segment_ids_BT != 0)


def fill_scores(
    forward: Forward,
    documents: Sequence[Document],
    *,
    logits_BTA: Float[np.ndarray, "B T A"] | None = None,
    log_likelihood_BT: Float[np.ndarray, "B T"] | None = None,
    batch_size: int = BATCH_SIZE,
) -> None:
    """Writes scores into given arrays, as `Scores` describes them; what is no token stays as it is.

    Raises:
      UserError: a logit is not finite.
    """
    tokens = [document.tokens_N for document in documents]
    settings = {"batch_size": batch_size, "with_logits": logits_BTA is not None}
    for piece in score_sequences(forward, tokens, **settings):
        row, columns_N, _ = documents[piece.sequence]
        own_T = columns_N[piece.start : piece.start + len(piece.log_likelihood_T)]
        if logits_BTA is not None:
            logits_BTA[row, own_T] = piece.logits_TA
        if log_likelihood_BT is not None:
            next_T = columns_N[piece.start + 1 : piece.start + 1 + len(own_T)]
            log_likelihood_BT[row, next_T] = piece.log_likelihood_T[: len(next_T)]


def check_tokens(
    tokens_BT: np.ndarray, vocab_size: int, segment_ids_BT: np.ndarray | None = None, *, source: str = "tokens"
) -> None:
    """Refuses what is no rectangle of tokens.

    Raises:
      UserError: wrong rank, dtype or shape, no token at all, or an id that is neither `PADDING` nor in the vocabulary.
    """
    for name, array in ((source, tokens_BT), (f"segment ids of {source}", segment_ids_BT)):
        if array is None:
            continue
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"{name}: is {array.dtype} of shape {list(array.shape)}, must be integers [B, T]")
        if array.shape != tokens_BT.shape:
            raise UserError(f"{name}: have shape {list(array.shape)}, must have {list(tokens_BT.shape)}")
    wrong = np.argwhere((tokens_BT != PADDING) & ((tokens_BT < 0) | (tokens_BT >= vocab_size)))
    if len(wrong):
        row, column = map(int, wrong[0])
        rule = f"must be {PADDING} (padding) or in [0, {vocab_size})"
        raise UserError(f"{source}: token {tokens_BT[row, column]} at row {row}, column {column}: {rule}")
    if not _find_tokens(tokens_BT, segment_ids_BT).any():
        raise UserError(f"{source}: shape {list(tokens_BT.shape)} without any token")


def score_tokens(
    model: SavedModel,
    tokens_BT: Int[np.ndarray, "B T"],
    *,
    segment_ids_BT: Int[np.ndarray, "B T"] | None = None,
    dtype: str | None = None,
    batch_size: int = BATCH_SIZE,
) -> Scores:
    """Scores a rectangle of tokens in host memory.

    Args:
      model: parameters and config.
      tokens_BT: integers; -1 marks padding, anywhere in a row.
      segment_ids_BT: documents of packed rows, 0 for padding; None: one document per row.
      dtype: compute dtype instead of the config's.
      batch_size: rows that run together at most.

    Raises:
      UserError: tokens that the model cannot have, or a logit that is not finite.
    """
    check_tokens(tokens_BT, model.cfg.vocab_size, segment_ids_BT)
    scores = Scores(
        np.zeros((*tokens_BT.shape, model.cfg.vocab_size), np.float32), np.zeros(tokens_BT.shape, np.float32)
    )
    fill_scores(
        Forward(model, dtype=dtype),
        cut_documents(tokens_BT, segment_ids_BT),
        logits_BTA=scores.logits_BTA,
        log_likelihood_BT=scores.log_likelihood_BT,
        batch_size=batch_size,
    )
    return scores
