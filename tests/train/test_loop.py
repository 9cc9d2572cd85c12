"""Whole runs: what they leave behind, and that an interrupted one equals an uninterrupted one bit for bit."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from flax.traverse_util import flatten_dict

from kimi_jax.config.load import dump
from kimi_jax.errors import UserError
from kimi_jax.train import loop, run_dir
from kimi_jax.train.checkpoint import CheckpointStore
from kimi_jax.train.loop import train
from kimi_jax.train.metrics import read_metrics
from kimi_jax.train.run_dir import RunDir, check_usable
from kimi_jax.train.state import Recipe

TIMED = {"tokens_per_s"}  # the only numbers that two runs of one config do not share


def _numbers(run_dir: RunDir) -> list[dict]:
    return [{name: x for name, x in record.items() if name not in TIMED} for record in read_metrics(run_dir.metrics)]


def _state(cfg, run_dir: RunDir, step: int) -> dict:
    with CheckpointStore(run_dir.checkpoints) as store:
        restored = store.restore(step, Recipe(cfg).abstract_state())
    return {"position": restored.position} | flatten_dict(restored.state, sep="/")


def _assert_same_run(cfg, got: RunDir, want: RunDir):
    assert _numbers(got) == _numbers(want)
    ours, theirs = _state(cfg, got, cfg.train.steps), _state(cfg, want, cfg.train.steps)
    assert ours.pop("position") == theirs.pop("position")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def _copy(whole, folder) -> RunDir:
    """The run as it was after step 8: later checkpoints gone, its metrics file already longer."""
    shutil.copytree(whole.run_dir.path, folder)
    shutil.rmtree(folder / "checkpoints" / "12")
    return RunDir(folder)


def test_a_run_learns_and_leaves_everything_behind(hybrid, whole):
    assert whole.finished and whole.exit_code == 0 and whole.step == 12
    records = read_metrics(whole.run_dir.metrics)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["loss_nats"] < records[0]["loss_nats"] - 1.0
    assert records[0]["loss_nats"] == pytest.approx(np.log(264), abs=0.2), "an untrained model knows nothing"
    assert records[0]["lr"] == pytest.approx(1e-2) and records[1]["lr"] == pytest.approx(2e-2)
    assert records[0]["router_load_max"] >= 1.0 >= records[0]["router_load_min"]
    validated = [record["step"] for record in records if "validation_loss_nats" in record]
    assert validated == [6, 12]
    last = records[-1]
    # byte tokens: every scored token is one byte, but the document separators, which stand for none
    ratio = last["validation_bits_per_byte"] / (last["validation_loss_nats"] / np.log(2))
    assert 1.0 <= ratio < 1.05
    assert last["total_tokens"] == sum(record["tokens"] for record in records)
    assert whole.last == last and last["tokens_per_s"] > 0
    assert whole.run_dir.load_config() == hybrid
    environment = json.loads(whole.run_dir.environment.read_text())
    assert environment["packages"]["jax"] == jax.__version__ and environment["devices"]
    assert sorted(int(p.name) for p in whole.run_dir.checkpoints.iterdir()) == [4, 8, 12]
    log = whole.run_dir.log.read_text()
    for expected in ("Optimizer of every parameter", "prefix/0/mixer/qkv/query", "compiled", "finished 12 steps"):
        assert expected in log


def test_the_loss_curve_is_a_picture(whole):
    from matplotlib.image import imread

    pixels = imread(whole.run_dir.loss_plot)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 800 and pixels[..., :3].std() > 0.05


def test_tensorboard_files_hold_the_metrics(whole):
    (events,) = (whole.run_dir.path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"loss_nats" in content and b"validation_bits_per_byte" in content


def test_a_finished_run_says_so(hybrid, whole, capsys):
    before = whole.run_dir.metrics.read_bytes()
    again = train(hybrid, whole.run_dir.path)
    assert again == dataclasses.replace(whole, compile_s=None)
    assert "finished, 12 steps taken, train.steps=12; nothing to do" in capsys.readouterr().out
    assert whole.run_dir.metrics.read_bytes() == before


def test_stopped_and_resumed_equals_whole(hybrid, whole, tmp_path, monkeypatch):
    report = loop._Loop._report

    def stop_at_five(self, record, measured):
        report(self, record, measured)
        if record["step"] == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_report", stop_at_five)
        stopped = train(hybrid, tmp_path / "run")
    assert not stopped.finished and stopped.exit_code == 128 + signal.SIGTERM
    assert 5 <= stopped.step < 8, "the signal is noticed within the steps that were under way"
    assert (stopped.run_dir.checkpoints / str(stopped.step)).is_dir()
    resumed = train(hybrid, tmp_path / "run", "must")
    assert resumed.finished
    _assert_same_run(hybrid, resumed.run_dir, whole.run_dir)


DIE_WHILE_SAVING = """
import os, signal, sys
from kimi_jax.train.checkpoint import CheckpointStore
save = CheckpointStore.save
def save_and_die(self, step, *rest):
    save(self, step, *rest)
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
CheckpointStore.save = save_and_die
sys.argv = ["train.py", *sys.argv[1:]]
exec(compile(open("scripts/train.py").read(), "scripts/train.py", "exec"))
"""


def test_killed_while_saving_and_resumed_equals_whole(hybrid, whole, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(dump(hybrid))
    settings = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    command = [sys.executable, "-c", DIE_WHILE_SAVING, str(config), "--run-dir", str(tmp_path / "run")]
    killed = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_dir = RunDir(tmp_path / "run")
    assert (run_dir.checkpoints / "4").is_dir()
    assert read_metrics(run_dir.metrics)[-1]["step"] == 8
    with run_dir.metrics.open("a") as file:
        file.write('{"step": 9, "loss_na')  # as if it had died in the middle of a line
    _assert_same_run(hybrid, train(hybrid, run_dir.path).run_dir, whole.run_dir)


def test_loss_that_is_not_finite_stops_the_run(hybrid, whole, tmp_path):
    copy = _copy(whole, tmp_path / "run")
    with CheckpointStore(copy.checkpoints, keep=9) as store:
        restored = store.restore(8, Recipe(hybrid).abstract_state())
        head = restored.state["params"]["head"]
        head["weight"] = head["weight"].at[0, 0].set(np.nan)
        store.save(9, restored.state, restored.position, restored.metadata)
    with pytest.raises(UserError, match=r"step 10: loss_nats is nan and grad_norm is nan; last good .*checkpoints/9; "):
        train(hybrid, copy.path)
    assert not (copy.checkpoints / "12").exists(), "a state that is not finite is never saved"


def test_a_damaged_checkpoint_is_found_before_anything_is_written(hybrid, whole, tmp_path):
    copy = _copy(whole, tmp_path / "run")
    before = copy.metrics.read_bytes()
    (copy.checkpoints / "8" / "model" / "_METADATA").unlink()
    with pytest.raises(UserError, match=r"checkpoints/8: damaged: .*; remove that folder to go on from step 4"):
        train(hybrid, copy.path)
    assert copy.metrics.read_bytes() == before


def test_run_directories_that_cannot_be_used(hybrid, changed, whole, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    strange = tmp_path / "home"
    strange.mkdir()
    (strange / "letter.txt").write_text("dear")
    other = changed(hybrid, optim={"peak_lr": 1e-3})
    cases = [
        (hybrid, file, "auto", "is a file"),
        (hybrid, strange, "auto", "no config.yaml, so it is no run"),
        (hybrid, whole.run_dir.path, "never", "--resume never does not overwrite"),
        (hybrid, tmp_path / "new", "must", "there is no checkpoint"),
        (other, whole.run_dir.path, "auto", r"optim\.peak_lr: 0\.02 there, 0\.001 now"),
    ]
    for cfg, path, resume, message in cases:
        with pytest.raises(UserError, match=message):
            train(cfg, path, resume)
        with pytest.raises(UserError, match=message):
            check_usable(path, cfg, resume)
    assert not (tmp_path / "new").exists()
    with loop.claim(tmp_path / "busy", hybrid, "auto"), pytest.raises(UserError, match="another process is training"):
        train(hybrid, tmp_path / "busy")


def test_a_launcher_that_looks_whether_a_directory_is_free_is_no_run(hybrid, tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "LOOK_S", 600)
    with (tmp_path / run_dir.LOCK).open("w") as look:
        fcntl.flock(look, fcntl.LOCK_EX)
        monkeypatch.setattr(run_dir.time, "sleep", lambda seconds: look.close())
        with loop.claim(tmp_path, hybrid, "auto"):
            assert look.closed


def test_what_may_change_on_resume(hybrid, changed, whole, tmp_path):
    longer = changed(hybrid, train={"steps": 13, "log_every": 5})
    copy = _copy(whole, tmp_path / "run")
    with loop.claim(copy.path, longer, "auto") as (_, changes):
        assert changes == ["train.log_every: 1 -> 5", "train.steps: 12 -> 13"]


def test_vocabulary_smaller_than_the_tokenizers(hybrid, changed, tmp_path):
    message = "model.vocab_size=256 is too small: the records data has 258 different tokens"
    with pytest.raises(UserError, match=message):
        train(changed(hybrid, model={"vocab_size": 256}), tmp_path / "run")
    assert not RunDir(tmp_path / "run").has_progress
    with loop.claim(tmp_path / "run", hybrid, "auto"):  # the corrected command may use the same directory
        pass


def test_an_implementation_that_cannot_run_here(hybrid, changed, tmp_path):
    mixers = hybrid.model_dump()["model"]["mixers"]
    mixers["kda"]["implementation"] = "mosaic_gpu"
    with pytest.raises(UserError, match=r"mosaic_gpu: needs an NVIDIA GPU"):
        train(changed(hybrid, model={"mixers": mixers}), tmp_path / "run")


def test_script_prints_the_config(hybrid, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(dump(hybrid))
    run = lambda *arguments: subprocess.run(
        [sys.executable, "scripts/train.py", *arguments], capture_output=True, text=True
    )
    printed = run(str(config), "train.steps=7", "--print-config")
    assert yaml.safe_load(printed.stdout)["train"]["steps"] == 7, printed.stderr
    wrong = run(str(config), "train.stepz=7")
    assert wrong.returncode == 2 and "stepz" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_start_without_data_is_one_line(hybrid, changed, tmp_path):
    config = tmp_path / "config.yaml"
    nowhere = {"train": str(tmp_path / "nowhere"), "validation": None}
    config.write_text(dump(changed(hybrid, data=nowhere, logging={"tensorboard": False})))
    command = [sys.executable, "scripts/train.py", str(config), "--run-dir", str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ") and "nowhere: no manifest.json there" in line


def test_data_may_move_but_not_change(hybrid, corpus, changed, whole, tmp_path):
    copy = _copy(whole, tmp_path / "run")
    moved = {split: str(shutil.copytree(f"{corpus}/{split}", tmp_path / split)) for split in ("train", "validation")}
    with loop.claim(copy.path, changed(hybrid, data=moved), "auto") as (_, changes):
        assert [change.partition(":")[0] for change in changes] == ["data.train", "data.validation"]
    with pytest.raises(UserError, match=r"data: the validation records have hash .*, but those of this run have"):
        train(changed(hybrid, data=moved | {"validation": moved["train"]}), copy.path)
    with pytest.raises(UserError, match="data position: saved with content_sha256="):
        train(changed(hybrid, data=moved | {"train": moved["validation"]}), copy.path)
