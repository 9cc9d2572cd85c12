"""Synthetic tasks: a program that knows the rule solves every example, one that forgets solves none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.config.data import MqarData, NeedleData, PalindromeData, StackData
from kimi_jax.data.pipeline import build_dataset
from kimi_jax.data.synthetic import mqar, needle, palindrome, stack
from kimi_jax.data.synthetic.tasks import TRAIN, VALIDATION, SyntheticSource

TASKS = {
    "palindrome": PalindromeData(seq_len=64),
    "palindrome-even": PalindromeData(seq_len=65, num_symbols=3),
    "mqar": MqarData(seq_len=64),
    "mqar-few": MqarData(seq_len=64, num_pairs=5, num_keys=5, num_values=2),
    "stack": StackData(seq_len=192),
    "stack-one": StackData(seq_len=64, num_stacks=1, num_symbols=2),
    "needle": NeedleData(seq_len=64),
    "needles": NeedleData(seq_len=64, num_needles=9, num_keys=9),
}


def solve_palindrome(cfg, inputs):
    """Behind the separator at position n the answer to input n + i is the symbol before its mirror image."""
    n = int(np.flatnonzero(inputs == palindrome.SEPARATOR)[0])
    return {n + i: inputs[n - 1 - i] for i in range(1, n)}


def solve_mqar(cfg, inputs):
    end = int(np.flatnonzero(inputs == mqar.SEPARATOR)[0])
    memory = dict(zip(inputs[:end:2], inputs[1:end:2], strict=True))
    return {i: memory[inputs[i]] for i in range(end + 1, len(inputs)) if inputs[i] in memory}


def solve_stack(cfg, inputs):
    stacks, answers = [[] for _ in range(cfg.num_stacks)], {}
    for at in range(0, len(inputs) - 2, stack.OPERATION):
        which = stacks[inputs[at + 1] - stack.FIRST_STACK]
        if inputs[at] == stack.PUSH:
            which.append(inputs[at + 2])
        else:
            answers[at + 1] = which.pop()
    return answers


def solve_needle(cfg, inputs):
    needles, questions = (np.flatnonzero(inputs == mark) for mark in (needle.NEEDLE, needle.QUESTION))
    memory = {inputs[at + 1]: inputs[at + 2] for at in needles}
    return {at + 1: memory[inputs[at + 1]] for at in questions}


SOLVERS = {PalindromeData: solve_palindrome, MqarData: solve_mqar, StackData: solve_stack, NeedleData: solve_needle}


def scored(example) -> dict:
    return {int(i): example.targets[i] for i in np.flatnonzero(example.loss_mask)}


@pytest.mark.parametrize("name", TASKS)
@given(index=st.integers(0, 2**31 - 2), stream=st.sampled_from([TRAIN, VALIDATION]))
def test_a_program_solves_each_task(name, index, stream):
    cfg = TASKS[name]
    source = SyntheticSource(cfg, stream=stream)
    example = source[index]
    length = int(example.segment_ids.sum())
    answers = SOLVERS[type(cfg)](cfg, example.inputs[:length])
    assert scored(example) == answers and (answers or name == "stack-one")
    assert all(len(x) == cfg.seq_len for x in vars(example).values())
    assert example.inputs.min() >= 0 and example.inputs.max() < source.vocab_size
    assert cfg.seq_len - length < 3 or isinstance(cfg, MqarData)  # nothing is left but what has no room for one more


def test_scored_shares():
    """How much of a sequence is asked for, so that a change of the rule is seen."""
    shares = {}
    for name, cfg in TASKS.items():
        source = SyntheticSource(cfg, stream=TRAIN)
        shares[name] = round(float(np.mean([source[i].loss_mask.mean() for i in range(200)])), 2)
    assert shares["palindrome"] == round(30 / 64, 2) and shares["mqar"] == round(16 / 64, 2)
    assert 0.13 < shares["stack"] < 1 / 6 and shares["needles"] == round(9 / 64, 2)


@pytest.mark.parametrize("name", TASKS)
def test_examples_are_functions_of_their_number(name):
    cfg = TASKS[name]
    one, two = (SyntheticSource(cfg, stream=TRAIN)[7].inputs for _ in range(2))
    np.testing.assert_array_equal(one, two)
    others = [SyntheticSource(cfg, stream=TRAIN)[8].inputs, SyntheticSource(cfg, stream=VALIDATION)[7].inputs]
    assert all((one != other).any() for other in others)


def test_batches_differ_by_seed_and_resume_where_they_were():
    first, second = (build_dataset(PalindromeData(seq_len=16, shuffle_seed=seed), batch_size=4) for seed in (0, 1))
    iterator = first.train_iterator()
    batch = next(iterator)
    assert {name: (x.dtype, x.shape) for name, x in batch.items()} == {
        "inputs": (np.int32, (4, 16)),
        "targets": (np.int32, (4, 16)),
        "segment_ids": (np.int32, (4, 16)),
        "loss_mask": (bool, (4, 16)),
    }
    state = iterator.get_state()
    want = next(iterator)
    again = first.train_iterator()
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["inputs"], want["inputs"])
    assert (next(second.train_iterator())["inputs"] != batch["inputs"]).any()
    assert len(list(first.validation_batches(3))) == 3


def test_long_recall_has_as_many_keys_as_it_needs():
    cfg = MqarData(seq_len=8192)
    source = SyntheticSource(cfg, stream=TRAIN)
    example = source[0]
    assert cfg.key_tokens == cfg.pairs == 2048 and source.vocab_size == 1 + 2048 + 64
    assert scored(example) == solve_mqar(cfg, example.inputs)


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (MqarData, {"seq_len": 64, "num_keys": 15}, "15 is fewer than the 16 pairs"),
        (MqarData, {"seq_len": 3}, "has no room for 1 pairs"),
        (MqarData, {"seq_len": 16, "num_pairs": 8}, "has no room for 8 pairs"),
        (StackData, {"seq_len": 5}, "no room for a push and a pop"),
        (NeedleData, {"seq_len": 64, "num_needles": 10}, "no room for 10 needles"),
        (NeedleData, {"seq_len": 999, "num_needles": 65}, "64 is fewer than num_needles=65"),
        (PalindromeData, {"seq_len": 4}, "no room"),
    ],
)
def test_impossible_tasks_are_refused(task, fields, message):
    with pytest.raises(ValueError, match=message):
        task(**fields)
