"""Scores against the forward pass of each document alone: whatever the padding, packing, pieces and batches."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import make_model, make_reference

from kimi_jax.errors import UserError
from kimi_jax.generate import forward, prefill
from kimi_jax.generate.score import PADDING, cut_documents, plan_batches, score_tokens
from kimi_jax.generate.score_files import new_array, score_files
from kimi_jax.interop.hf_export import export_model
from kimi_jax.interop.saved_model import SavedModel

TOLERANCE = 2e-5  # largest difference of logits (standard deviation 1.7), float32; measured 2.6e-6
VOCAB = 50

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model():
    return make_model(VOCAB)


@pytest.fixture(scope="module")
def expect(model):
    return make_reference(model, length=32)


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(prefill, "MAX_PIECE", 16)
    monkeypatch.setattr(prefill, "MIN_PIECE", 16)
    monkeypatch.setattr(forward, "MAX_LOGITS", 3 * 4 * VOCAB)  # four tokens of three rows at a time


def padded_and_packed() -> tuple[np.ndarray, np.ndarray]:
    """Rows with padding to the left, to the right, in between and all over; and with three documents in one."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (6, 32), np.int32)
    segments = np.ones_like(tokens)
    tokens[0, :14] = PADDING
    tokens[1, 17:] = PADDING
    tokens[2, rng.permutation(32)[:9]] = PADDING
    tokens[3] = PADDING
    segments[4] = np.repeat([3, 1, 0, 3], [16, 7, 2, 7])  # a document ends where a piece ends; an id comes again
    return tokens, segments


def test_every_document_is_scored_as_if_alone(model, expect, short_pieces):
    tokens, segments = padded_and_packed()
    got = score_tokens(model, tokens, segment_ids_BT=segments, batch_size=3)
    documents = cut_documents(tokens, segments)
    assert sorted(len(d.tokens_N) for d in documents) == [7, 7, 16, 17, 18, 23, 32]
    worst, scored = 0.0, np.zeros_like(tokens, bool)
    for row, columns, ids in documents:
        logits, likelihood = expect(ids)
        assert logits.std() > 0.5
        worst = max(worst, np.abs(got.logits_BTA[row, columns] - logits).max())
        worst = max(worst, np.abs(got.log_likelihood_BT[row, columns] - likelihood).max())
        scored[row, columns] = True
    print(f"largest difference {worst:.1e}")
    assert worst <= TOLERANCE
    assert not got.logits_BTA[~scored].any()
    assert not got.log_likelihood_BT[~scored].any()


def test_batches_hold_every_sequence_once_and_bound_the_tokens():
    lengths = [5, 40_000, 33, 900, 1, 33]
    batches = list(plan_batches(lengths, batch_size=4))
    assert batches == [[1], [3, 2, 5, 0], [4, None, None, None]]
    assert [len(b) for b in plan_batches([9000] * 6, batch_size=8)] == [2, 2, 2]
    assert list(plan_batches([7], batch_size=8)) == [[0]]


def test_files_hold_what_the_function_returns(model, tmp_path, short_pieces):
    tokens, segments = padded_and_packed()
    np.save(tmp_path / "tokens.npy", tokens)
    np.save(tmp_path / "segments.npy", segments)
    want = score_tokens(model, tokens, segment_ids_BT=segments, batch_size=3)
    outputs = {"logits": tmp_path / "logits.npy", "log_likelihood": tmp_path / "likelihood.npy"}
    checkpoint = export_model(model, tmp_path / "public")
    before = sorted(tmp_path.iterdir())
    counts = score_files(
        checkpoint, tmp_path / "tokens.npy", segment_ids=tmp_path / "segments.npy", batch_size=3, **outputs
    )
    assert counts == (7, 120)
    np.testing.assert_array_equal(np.load(outputs["logits"]), want.logits_BTA)
    np.testing.assert_array_equal(np.load(outputs["log_likelihood"]), want.log_likelihood_BT)
    assert sorted(tmp_path.iterdir()) == sorted([*before, *outputs.values()])


def test_weights_that_are_not_finite_leave_no_file(model, tmp_path):
    broken = jax.tree.map(lambda leaf: leaf, model.params)
    broken["norm"]["weight"] = model.params["norm"]["weight"].at[0].set(jnp.nan)
    checkpoint = export_model(SavedModel(**vars(model) | {"params": broken}), tmp_path / "public")
    np.save(tmp_path / "tokens.npy", np.ones((1, 4), np.int32))
    with pytest.raises(UserError, match=r"logits behind token 0 of sequence 0: not finite; are the weights whole\?"):
        score_files(checkpoint, tmp_path / "tokens.npy", logits=tmp_path / "logits.npy")
    assert {path.name for path in tmp_path.iterdir()} == {"public", "tokens.npy"}


def test_a_full_disk_is_named_and_leaves_no_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    message = r"out\.npy: cannot be written: No space left on device$"
    with pytest.raises(UserError, match=message), new_array(tmp_path / "out.npy", (2, 3)):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 3), np.float32), r"tokens: is float32 of shape \[2, 3\], must be integers \[B, T\]"),
        (np.zeros(3, np.int32), r"tokens: is int32 of shape \[3\], must be integers \[B, T\]"),
        (np.array([[0, 50]]), r"tokens: token 50 at row 0, column 1: must be -1 \(padding\) or in \[0, 50\)"),
        (np.array([[0, -2]]), r"tokens: token -2 at row 0, column 1: must be -1 \(padding\) or in \[0, 50\)"),
        (np.array([[-1, -1]]), r"tokens: shape \[1, 2\] without any token"),
        (np.zeros((0, 3), np.int32), r"tokens: shape \[0, 3\] without any token"),
    ],
)
def test_refused_tokens(model, tokens, message):
    with pytest.raises(UserError, match=message):
        score_tokens(model, tokens)


def test_refused_files(model, tmp_path):
    with pytest.raises(UserError, match=r"segment ids of tokens: have shape \[1, 3\], must have \[1, 2\]"):
        score_tokens(model, np.zeros((1, 2), int), segment_ids_BT=np.zeros((1, 3), int))
    with pytest.raises(UserError, match=r"tokens: shape \[1, 2\] without any token"):
        score_tokens(model, np.zeros((1, 2), int), segment_ids_BT=np.zeros((1, 2), int))
    with pytest.raises(UserError, match="neither logits nor log-likelihoods are asked for"):
        score_files(tmp_path, tmp_path / "none.npy")
    out = tmp_path / "out.npy"
    with pytest.raises(UserError, match=r"none.npy: no such file"):
        score_files(tmp_path, tmp_path / "none.npy", logits=out)
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(UserError, match=r"text.npy: is no .npy array"):
        score_files(tmp_path, tmp_path / "text.npy", logits=out)
    np.save(tmp_path / "objects.npy", np.array([{}]))
    with pytest.raises(UserError, match=r"objects.npy: is no .npy array"):
        score_files(tmp_path, tmp_path / "objects.npy", logits=out)
    np.savez(tmp_path / "several.npz", tokens=np.zeros((1, 2), int))
    with pytest.raises(UserError, match=r"several.npz: is no .npy array: it is an archive"):
        score_files(tmp_path, tmp_path / "several.npz", logits=out)


def test_outputs_that_could_not_be_written_are_refused_first(tmp_path):
    tokens, file = tmp_path / "tokens.npy", tmp_path / "file"
    np.save(tokens, np.zeros((1, 2), int))
    file.touch()
    for lost in (tmp_path / "nowhere" / "out.npy", file / "out.npy"):
        with pytest.raises(UserError, match=r"out.npy: its directory does not exist"):
            score_files(tmp_path, tokens, logits=lost)
    with pytest.raises(UserError, match=r": is a directory, must name a file"):
        score_files(tmp_path, tokens, log_likelihood=tmp_path)
    for outputs in ({"logits": tokens}, {"logits": file, "log_likelihood": tmp_path / "." / "file"}):
        with pytest.raises(UserError, match=r": is named twice"):
            score_files(tmp_path, tokens, **outputs)
    assert {path.name for path in tmp_path.iterdir()} == {"tokens.npy", "file"}
