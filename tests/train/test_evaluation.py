"""What is measured beside the validation loss: positions within documents, and which data fits a model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.config.data import MqarData
from kimi_jax.config.evaluation import LmEval, LossEvaluation
from kimi_jax.config.train import Train
from kimi_jax.data.pipeline import build_dataset
from kimi_jax.errors import UserError
from kimi_jax.train.evaluation import (
    fetch,
    first_position,
    is_due,
    mean_metrics,
    open_benchmarks,
    open_measurements,
    sums_by_position,
)


def test_positions_count_from_the_start_of_each_document():
    """Against a count token by token; a document of 70 and one of 130 tokens, then padding, in rows of 256."""
    ids = np.zeros((2, 256), np.int32)
    ids[0, :70], ids[0, 70:200] = 1, 2
    ids[1, :256] = 1
    mask = np.random.default_rng(0).random(ids.shape) < 0.7
    mask &= ids > 0
    loss = np.where(mask, np.random.default_rng(1).random(ids.shape), 0).astype(np.float32)
    want, tokens = np.zeros(3), np.zeros(3, int)
    for row, column in np.argwhere(mask):
        position = column - int(np.flatnonzero(ids[row] == ids[row, column])[0])
        at = next(i for i in (2, 1, 0) if position >= (0, 64, 128)[i])
        want[at], tokens[at] = want[at] + loss[row, column], tokens[at] + 1
    got = sums_by_position(jnp.asarray(loss), jnp.asarray(mask), jnp.asarray(ids))
    np.testing.assert_array_equal(got["tokens_at"], tokens)
    np.testing.assert_allclose(got["loss_nats_at"], want, rtol=1e-5)  # measured 3e-7
    assert [first_position(i) for i in range(4)] == [0, 64, 128, 256]


def test_means_are_over_the_tokens_of_all_batches():
    one = {"loss_nats": 6.0, "tokens": 3, "correct": 3, "bytes": 0}
    two = {"loss_nats": 2.0, "tokens": 1, "correct": 0, "bytes": 0}
    at = {"loss_nats_at": np.array([6.0, 0.0]), "tokens_at": np.array([3, 0])}
    assert mean_metrics({"a": [one, two]}) == {"a_loss_nats": 2.0, "a_accuracy": 0.75}
    assert mean_metrics({"b": [one | at, two | at]}) == {
        "b_loss_nats": 2.0,
        "b_accuracy": 0.75,
        "b_loss_nats_from_0": 2,
    }
    assert mean_metrics({"c": []}) == {}


def test_each_batch_of_a_validation_is_a_sign_of_life():
    arrived = []
    found = fetch({"a": [{"tokens": jnp.int32(i)} for i in range(3)], "b": []}, lambda: arrived.append(len(arrived)))
    assert found == {"a": [{"tokens": i} for i in range(3)], "b": []} and arrived == [0, 1, 2]


def test_an_evaluation_comes_with_every_so_many_validations_and_at_the_end():
    for cfg in (LossEvaluation(every=3), LmEval(tasks=["any"], every=3)):
        assert [n for n in range(1, 8) if is_due(cfg, n, last=False)] == [3, 6] and is_due(cfg, 7, last=True)


def test_data_that_a_model_cannot_read_is_refused(small, changed):
    task = {"kind": "mqar", "seq_len": 64}
    cfg = changed(small, train={"evaluations": {"recall": {"data": task}}})
    data = build_dataset(cfg.data, batch_size=cfg.train.batch_size)
    message = r"vocab_size=264 is too small: .*train.evaluations.recall has 1089 different tokens"
    with pytest.raises(UserError, match=message):
        open_measurements(cfg, data)
    short = {"data": {"kind": "mqar", "seq_len": 64, "num_keys": 21}, "seq_len": 128}
    with pytest.raises(UserError, match=r"train.evaluations.recall: num_keys: 21 is fewer than the 32 pairs"):
        open_measurements(changed(small, train={"evaluations": {"recall": short}}), data)
    measured = open_measurements(changed(small, train={"evaluations": {"more": {"batches": 1}}}), data)
    assert [m.name for m in measured] == ["validation", "more"] and measured[1].data is data
    alone = dataclasses.replace(data, validation=None)
    with pytest.raises(UserError, match=r"train.evaluations.more: .*/train has no validation examples"):
        open_measurements(changed(small, train={"evaluations": {"more": {"batches": 1}}}), alone)
    with pytest.raises(ValueError, match=r"evaluations.validation: is what the run's own"):
        Train(steps=1, batch_size=1, evaluations={"validation": {}})
    with pytest.raises(ValueError, match=r"'a/b' must be of letters, digits, - and _"):
        Train(steps=1, batch_size=1, evaluations={"a/b": {}})


def test_a_benchmark_needs_text_and_something_that_runs_it(small, changed):
    ask = {"train": {"evaluations": {"bench": {"kind": "lm_eval", "tasks": ["some"]}, "more": {"batches": 1}}}}
    cfg = changed(small, **ask)
    data = build_dataset(cfg.data, batch_size=cfg.train.batch_size)
    with pytest.raises(UserError, match=r"train.evaluations.bench: kind lm_eval is for runs of scripts/train.py"):
        open_benchmarks(cfg, data, None)
    opened = open_benchmarks(cfg, data, lambda asked, model, tokenizer: (asked.tasks, model, tokenizer.kind))
    assert opened == {"bench": (("some",), cfg.model, "bytes")}
    assert [m.name for m in open_measurements(cfg, data)] == ["validation", "more"]
    task = cfg.model_copy(update={"data": MqarData(seq_len=64)})
    with pytest.raises(UserError, match=r"bench: kind lm_eval needs text, and data.kind=mqar has no tokenizer"):
        open_benchmarks(task, build_dataset(task.data, batch_size=8), lambda *_: None)
    with pytest.raises(ValueError, match=r"tasks\n.*at least 1 item"):
        LmEval(tasks=[])
