"""Every token but a document's first is predicted exactly once, and no example mixes documents."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.data.packing import Packer, Record
from kimi_jax.data.pipeline import make_batch

PAD = -1


def pack(documents: list[list[list[int]]], seq_len: int) -> list[Record]:
    """Packs documents that come in pieces."""
    packer, records = Packer(seq_len, PAD), []
    for pieces in documents:
        added = 0
        for piece in pieces:
            records += packer.add(np.array(piece, np.int32), starts_document=added == 0)
            added += len(piece)
    return records + list(packer.finish())


@st.composite
def documents_and_lengths(draw):
    """Documents whose tokens are all different, so that a token tells its place, cut into pieces at random."""
    lengths = draw(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=12))
    token, documents = 0, []
    for pieces in lengths:
        cut = []
        for length in pieces:
            cut.append(list(range(token, token + length)))
            token += length
        documents.append(cut)
    return documents, draw(st.integers(2, 12))


@settings(max_examples=300, deadline=None)
@given(documents_and_lengths())
def test_every_token_is_predicted_once_from_its_own_document(case):
    documents, seq_len = case
    batch = make_batch(records) if (records := pack(documents, seq_len)) else None
    whole = [[token for piece in pieces for token in piece] for pieces in documents]
    previous = {b: a for document in whole for a, b in itertools.pairwise(document)}
    if batch is None:
        assert sum(map(len, whole)) <= 1
        return
    mask = batch["loss_mask"]
    assert sorted(batch["targets"][mask].tolist()) == sorted(previous)
    pairs = zip(batch["inputs"][mask].tolist(), batch["targets"][mask].tolist(), strict=True)
    assert all(previous[target] == given for given, target in pairs)


@settings(max_examples=300, deadline=None)
@given(documents_and_lengths())
def test_segments_are_documents_and_zero_is_padding(case):
    documents, seq_len = case
    document_of = {token: i for i, pieces in enumerate(documents) for piece in pieces for token in piece}
    for record in pack(documents, seq_len):
        segments, tokens = record.segment_ids, record.tokens
        np.testing.assert_array_equal(segments > 0, tokens != PAD)
        np.testing.assert_array_equal(segments > 0, np.arange(seq_len + 1) < record.num_valid)
        owners = [document_of[token] for token in tokens[: record.num_valid].tolist()]
        changes = np.concatenate([[1], np.not_equal(owners[1:], owners[:-1])]).astype(int)
        np.testing.assert_array_equal(segments[: record.num_valid], np.cumsum(changes))


def test_neighbouring_records_share_one_token():
    first, second, last = pack([[list(range(10))]], 4)
    assert first.tokens.tolist() == [0, 1, 2, 3, 4]
    assert second.tokens.tolist() == [4, 5, 6, 7, 8]
    assert last.tokens.tolist() == [8, 9, PAD, PAD, PAD]
    assert last.segment_ids.tolist() == [1, 1, 0, 0, 0]


def test_a_stream_that_fills_its_records_needs_no_padding_record():
    assert [record.num_valid for record in pack([[list(range(9))]], 4)] == [5, 5]


@pytest.mark.parametrize("documents", [[], [[]], [[[]]], [[[7]]]])
def test_nothing_to_predict_gives_no_record(documents):
    assert pack(documents, 4) == []


def test_a_document_that_starts_on_a_boundary_keeps_its_own_segment():
    records = pack([[[0, 1, 2, 3, 4]], [[5, 6, 7]]], 4)
    assert [record.segment_ids.tolist() for record in records] == [[1, 1, 1, 1, 1], [1, 2, 2, 2, 0]]
