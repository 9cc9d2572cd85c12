"""A config file is either understood or refused with one line per mistake, all at once."""

import errno
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.config.load import dump, json_schema, load, validate
from kimi_jax.config.mixer import KdaMixer
from kimi_jax.config.train import RunConfig
from kimi_jax.config.yaml_files import merge, parse_yaml, to_yaml
from kimi_jax.errors import UserError, exit_on_user_error

VALID = """
model:
  vocab_size: 320
  model_dim: 64
  num_layers: 7
  pattern: [kda, kda, kda, mla]
  tail: [kda, kda, mla]
  mixers:
    kda: {kind: kda, num_heads: 2, key_dim: 32, value_dim: 32}
    mla: {kind: mla, num_heads: 2}
  ffn: {kind: moe, num_experts: 4, top_k: 2, hidden_dim: 64}
  first_k_dense: 1
  dense_hidden_dim: 128
data: {kind: stdlib, seq_len: 128}
optim: {kind: adamw, peak_lr: 1e-3, schedule: {kind: wsd, warmup_steps: 10, decay_steps: 20}}
train: {steps: 100, batch_size: 8}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(VALID)
    return path


def _problems(file, *overrides):
    with pytest.raises(UserError) as caught:
        load(file, overrides, RunConfig)
    return [problem.removeprefix(f"{file}: ") for problem in caught.value.problems]


def test_valid_file_and_overrides(file):
    cfg = load(file, ["optim.peak_lr=2e-4", "model.mixers.kda.decay={kind: head}", "train.steps=40"], RunConfig)
    assert cfg.optim.peak_lr == 2e-4
    assert cfg.model.mixers["kda"].decay.kind == "head"
    assert cfg.model.mixer_names == ("kda", "kda", "kda", "mla", "kda", "kda", "mla")


def test_dump_reads_back_equal(file, tmp_path):
    cfg = load(file, [], RunConfig)
    (tmp_path / "again.yaml").write_text(dump(cfg))
    assert load(tmp_path / "again.yaml", [], RunConfig) == cfg


ONE_MISTAKE = {
    "unknown_key": ("train.stepz=3", "train.stepz: unknown key; did you mean 'steps'?"),
    "unknown_key_in_variant": ("model.mixers.mla.nope_dims=3", "model.mixers.mla.nope_dims: unknown key; did you mean"),
    "wrong_type": ("train.steps=many", "train.steps: got 'many', must be a valid integer"),
    "truth_as_number": ("train.log_every=true", "train.log_every: got True, must be a number"),
    "vanishes_in_float32": ("optim.eps=1e-300", "optim.eps: got 1e-300, must be greater than or equal to 1.17549e-38"),
    "never_moves": ("optim.b2=1", "optim.b2: got 1, must be less than 1"),
    "more_tokens_than_int32": ("data.seq_len=268435456", "train.batch_size: 8 sequences of 268435456 tokens"),
    "more_tokens_evaluated": (
        "train.evaluations={x: {batch_size: 2000000, seq_len: 2048}}",
        "train.evaluations.x.batch_size: 2000000 sequences of 2048 tokens, must be less than 2147483648",
    ),
    "not_positive": ("train.batch_size=0", "train.batch_size: got 0, must be greater than 0"),
    "too_large": ("model.model_dim=10000000000", "model.model_dim: got 10000000000, must be less than 2147483648"),
    "unknown_kind": ("optim.kind=muonn", "optim.kind: got 'muonn'; did you mean 'muon'?"),
    "no_kind": ("model.mixers.mla.position={theta: 3}", "model.mixers.mla.position.kind must be one of none, rope"),
    "no_kind_of_a_name": (
        "model.mixers.mla={num_heads: 2}",
        "model.mixers.mla.kind must be one of kda, gdn, mamba2, mla",
    ),
    "not_a_list": ("model.pattern=kda", "model.pattern: got 'kda', must be a list"),
    "an_empty_list": ("model.pattern=[]", "model.pattern: got [], must have at least 1"),
    "not_a_mapping": ("train.checkpoints=4", "train.checkpoints: got 4, must be a mapping"),
    "not_an_option": ("model.dtype=bfloat", "model.dtype: got 'bfloat'; did you mean 'bfloat16'?"),
    "no_nccl_name": ("train.flags.nccl={FOO: '1'}", "train.flags.nccl.FOO: got 'FOO', must match ^NCCL_"),
    "nan": ("optim.peak_lr=.nan", "optim.peak_lr: got nan, must be"),
    "heads_do_not_divide": (
        "model.mixers.kda.num_value_heads=3",
        "num_value_heads: 3 is not a multiple of num_heads=2",
    ),
    "pattern_names_no_mixer": ("model.pattern=[kda, kda, kda, mlaa]", "model.pattern: 'mlaa' names no mixer; did you"),
    "tail_of_wrong_length": (
        "model.num_layers=8",
        "model.tail: names 3 mixers: num_layers=8 leaves 5 layers before them, must be whole patterns of 4",
    ),
    "top_k_too_large": ("model.ffn.top_k=5", "model.ffn.top_k: 5 is larger than num_experts=4"),
    "no_dense_width": ("model.dense_hidden_dim=null", "model.dense_hidden_dim: is not set, but first_k_dense=1"),
    "odd_rope": (
        "model.mixers.mla={kind: mla, num_heads: 2, rope_dim: 7, position: {kind: rope}}",
        "model.mixers.mla.rope_dim: 7 is odd",
    ),
    "microbatches": ("train.grad_accum=3", "train.grad_accum: 3 does not divide batch_size=8"),
    "warmup_too_long": (
        "optim.schedule.warmup_steps=90",
        "optim.schedule.warmup_steps: warmup_steps=90 + decay_steps=20",
    ),
}


@pytest.mark.parametrize(("override", "message"), ONE_MISTAKE.values(), ids=ONE_MISTAKE)
def test_one_mistake_is_one_line(file, override, message):
    (problem,) = _problems(file, override)
    assert message in problem and "\n" not in problem


def test_all_mistakes_at_once(file):
    overrides = [override for override, _ in ONE_MISTAKE.values()]
    exclusive = {
        "model.pattern=kda",
        "model.pattern=[]",
        "optim.kind=muonn",
        "model.mixers.mla.nope_dims=3",
        "model.mixers.mla.position={theta: 3}",
        "model.mixers.mla={num_heads: 2}",
    }
    exclusive |= {"train.log_every=true"}  # looked for once nothing else is wrong
    exclusive |= {"optim.peak_lr=.nan", "optim.schedule.warmup_steps=90", "train.batch_size=0", "train.steps=many"}
    kept = [override for override in overrides if override not in exclusive]
    problems = "\n".join(_problems(file, *kept))
    for override, message in ONE_MISTAKE.values():
        assert override in exclusive or message in problems, (message, problems)


def test_rules_run_beside_wrong_types(file):
    problems = _problems(file, "model.ffn.hidden_dim=wide", "model.ffn.top_k=5", "model.pattern=[kda, kda, kda, mlaa]")
    assert [p.split(":")[0] for p in problems] == ["model.ffn.hidden_dim", "model.pattern", "model.ffn.top_k"]


def test_missing_section_is_named(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("train: {steps: 1, batch_size: 1}")
    assert {p.split(":")[0] for p in _problems(path)} == {"model", "data", "optim"}


BAD_FILES = {
    "empty": ("", "run.yaml: is empty, must be a mapping"),
    "syntax": ("model: [1, 2", "run.yaml:1:13"),
    "not_a_mapping": ("- a\n- b", "is list at top level"),
    "twice": ("train: 1\ntrain: 2", "key 'train' is given twice"),
    "list_as_key": ("? [train]\n: 1", "run.yaml:1:3: a key must be one word"),
    "missing_base": ("base: nowhere.yaml", "nowhere.yaml: no such config file"),
    "circle": ("base: run.yaml", "base files form a circle"),
    "bytes": ("\x00", "run.yaml"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(path, [], RunConfig)
    assert message in str(caught.value) and len(caught.value.problems) == 1


def test_bad_overrides_are_all_named(file):
    problems = _problems(file, "train.steps", "=3", "train.steps=[1", "train.steps=!!bool x", "train=!!timestamp x")
    assert len(problems) == 5


def test_a_mapping_may_take_over_another():
    assert parse_yaml("{a: &a {x: 1, y: 2}, b: {<<: *a, y: 3}}", "test")["b"] == {"x": 1, "y": 3}


def test_base_lies_under_the_file(file):
    child = file.parent / "child.yaml"
    child.write_text("base: run.yaml\nmodel: {mixers: {kda: {num_heads: 4}}}\noptim: {kind: muon, peak_lr: 1e-2}")
    cfg = load(child, [], RunConfig)
    assert cfg.model.mixers["kda"].num_heads == 4 and cfg.model.mixers["kda"].key_dim == 32
    assert cfg.optim.kind == "muon" and cfg.optim.schedule.warmup_steps == 0, "another kind replaces the whole mapping"


def test_merge_keeps_fields_of_the_same_kind():
    assert merge({"a": {"kind": "x", "b": 1}}, {"a": {"c": 2}}) == {"a": {"kind": "x", "b": 1, "c": 2}}
    assert merge({"a": {"kind": "x", "b": 1}}, {"a": {"kind": "y"}}) == {"a": {"kind": "y"}}


@pytest.mark.parametrize("text", ["1e-3", "1.5e-3", "+1E5", "1e3", ".5e1"])
def test_scientific_notation_is_a_number(text):
    assert parse_yaml(text, "test") == float(text)


def test_what_nests_without_end_is_one_line():
    with pytest.raises(UserError, match=r"^test: is nested too deeply$"):
        parse_yaml("[" * 3000 + "]" * 3000, "test")


def test_on_is_a_word(file):
    """YAML 1.1 makes a boolean of it, also where it is a key."""
    assert parse_yaml("{on: host, off: no, exit: true}", "test") == {"on": "host", "off": "no", "exit": True}
    assert load(file, ["train.remat={kind: named, on: host}"], RunConfig).train.remat.on == "host"


@pytest.mark.parametrize("text", ["1e", "v1e3", "1e3_run", "1:30", "2026-11-22"])
def test_text_that_only_resembles_a_number_stays_text(text):
    assert parse_yaml(text, "test") == text


@pytest.mark.parametrize("text", ["1e3", "0x1f", "010", "1:30", "2026-11-22", "on", "null", "", "<<", ".inf"])
def test_text_in_a_dump_is_text_for_every_reader(text):
    written = to_yaml({"name": text})
    assert parse_yaml(written, "test") == yaml.safe_load(written) == {"name": text}


def test_exit_code_and_lines(file, capsys):
    with pytest.raises(SystemExit) as exited, exit_on_user_error():
        load(file, ["train.stepz=3", "train.steps=many"], RunConfig)
    assert exited.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.ENOSPC, "log.txt: cannot be written: No space left on device"),
        (errno.EFBIG, "log.txt: cannot be written: File too large"),
        (errno.EISDIR, "log.txt: cannot be used: Is a directory"),
        (errno.EEXIST, "log.txt: cannot be used: File exists"),
    ],
)
def test_a_disk_that_says_no_is_one_line(number, line, capsys):
    with pytest.raises(SystemExit) as exited, exit_on_user_error():
        raise OSError(number, os.strerror(number), "log.txt")
    assert exited.value.code == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    "allocate", [lambda: np.zeros(2**55), lambda: jax.jit(lambda: jnp.zeros(2**55, jnp.int8))()], ids=["host", "device"]
)
def test_memory_that_does_not_suffice_is_one_line(allocate, capsys):
    with pytest.raises(SystemExit) as exited, exit_on_user_error():
        jax.block_until_ready(allocate())
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory does not suffice: ") and "alloc" in line


def test_memory_that_ends_inside_a_program_is_one_line(capsys):
    with pytest.raises(SystemExit), exit_on_user_error():  # as jax 0.11.2 says it on a CPU
        raise RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 256000000000 bytes.")
    assert capsys.readouterr().err.startswith("error: memory does not suffice: ")


def test_a_reader_that_goes_is_no_error():
    """As in `| head -1`: nothing is said, neither by us nor by Python when it ends."""
    code = "from kimi_jax.errors import *\nwith exit_on_user_error(): print('x' * 10**6)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "no such file", "x"), RuntimeError("else"), BrokenPipeError("of a worker")],
)
def test_other_system_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), exit_on_user_error():
        raise error


def test_rules_hold_for_configs_built_in_python():
    with pytest.raises(ValueError, match="not a multiple of num_heads"):
        KdaMixer(num_heads=2, num_value_heads=3)


def test_json_schema_describes_every_field():
    schema = json_schema(RunConfig)
    assert {"model", "data", "optim", "train", "base"} <= set(schema["properties"])
    assert "Mixer names, repeated" in json.dumps(schema)
    assert '"required":' not in json.dumps(schema), "a file may leave to its base what it does not set, at any depth"


_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.floats(), st.text("ab.:", max_size=3))
_TREES = st.recursive(
    _LEAVES, lambda t: st.lists(t, max_size=2) | st.dictionaries(st.text("abk", max_size=4), t, max_size=2)
)


def _paths(data, path=()):
    yield path
    for key, value in data.items() if isinstance(data, dict) else ():
        yield from _paths(value, (*path, key))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_user_error_or_a_config(data):
    plain = yaml.safe_load(VALID)
    for path in data.draw(st.lists(st.sampled_from(list(_paths(plain))[1:]), min_size=1, max_size=3)):
        target = plain
        for key in path[:-1]:
            target = target.get(key) if isinstance(target, dict) else None
        if isinstance(target, dict):
            target[path[-1]] = data.draw(_TREES)
    try:
        validate(plain, RunConfig, source="test")
    except UserError as error:
        assert error.problems and all("\n" not in problem for problem in error.problems)
