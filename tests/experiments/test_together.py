"""Runs trained together: each is what it would have been alone, and survives what a run alone survives."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kimi_jax.config.load import dump
from kimi_jax.config.mesh import Mesh
from kimi_jax.config.sweep import Until
from kimi_jax.config.train import RunConfig
from kimi_jax.errors import UserError
from kimi_jax.experiments.sweep import group_runs, load_sweep
from kimi_jax.train import together
from kimi_jax.train.checkpoint import CheckpointStore
from kimi_jax.train.evaluation import Evaluator
from kimi_jax.train.loop import train
from kimi_jax.train.metrics import read_metrics
from kimi_jax.train.run_dir import RunDir
from kimi_jax.train.together import train_together

RATES = (1e-3, 1e-2)
# Of the loss over 10 steps between a member and the same run alone; measured 5e-7 at most on a CPU.
TOLERANCE = 5e-6


def make(peak_lr: float, seed: int = 0, **train_keys) -> RunConfig:
    mla = {"kind": "mla", "num_heads": 1, "nope_dim": 8, "rope_dim": 8, "value_dim": 8, "latent_dim": 8}
    long = {"seq_len": 32, "batches": 1, "by_position": True}
    model = {"vocab_size": 16, "model_dim": 16, "num_layers": 1, "pattern": ["mla"], "mixers": {"mla": mla}}
    return RunConfig.model_validate(
        {
            "model": model | {"ffn": {"kind": "dense", "hidden_dim": 16}, "dtype": "float32"},
            "data": {"kind": "palindrome", "seq_len": 16, "num_symbols": 8, "shuffle_seed": seed},
            "optim": {"kind": "adamw", "peak_lr": peak_lr, "schedule": {"kind": "constant", "warmup_steps": 2}},
            "train": {
                "steps": 10,
                "batch_size": 4,
                "seed": seed,
                "log_every": 1,
                "validation": {"every": 4, "batches": 1},
                "evaluations": {"long": long},
                "checkpoints": {"every": 4},
                **train_keys,
            },
        }
    )


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss_nats"]) for record in read_metrics(RunDir(folder).metrics)]


def assert_alike(one: list, other: list) -> None:
    assert [step for step, _ in one] == [step for step, _ in other]
    np.testing.assert_allclose([x for _, x in one], [x for _, x in other], rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, quick_compilation) -> list[Path]:
    """Two learning rates, trained together without interruption; not to be changed."""
    root = tmp_path_factory.mktemp("together")
    paths = [root / f"{rate}" for rate in RATES]
    ending = train_together([make(rate) for rate in RATES], paths)
    assert (ending.step, ending.finished, ending.exit_code) == (10, True, 0)
    return paths


def test_a_member_is_what_it_would_be_alone(folders, tmp_path):
    alone = train(make(RATES[1]), tmp_path / "alone")
    assert_alike(losses(folders[1]), losses(tmp_path / "alone"))
    last, found = alone.last, read_metrics(RunDir(folders[1]).metrics)[-1]
    assert last.keys() - {"mfu"} == found.keys() and found["total_tokens"] == last["total_tokens"]
    for name in ("validation_loss_nats", "long_loss_nats", "long_loss_nats_from_0"):
        assert abs(found[name] - last[name]) < TOLERANCE
    assert losses(folders[0]) != losses(folders[1])
    made = {path.name for path in (tmp_path / "alone").iterdir()}
    assert made == {path.name for path in folders[1].iterdir()} and (folders[1] / "plots" / "loss.png").exists()


def test_a_group_goes_on_from_the_newest_step_that_all_have(folders, tmp_path):
    """As after a kill between two members' checkpoints; later lines of the metrics are written again."""
    paths = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]
    shutil.rmtree(paths[1] / "checkpoints" / "10")
    train_together([make(rate) for rate in RATES], paths)
    log = (paths[0] / "log.txt").read_text()
    assert "go on from step 8" in log
    for folder, path in zip(folders, paths, strict=True):
        assert_alike(losses(folder), losses(path))


@pytest.mark.slow
def test_a_member_that_failed_long_ago_does_not_hold_up_the_others(folders, tmp_path):
    """The others go on from where they stopped; it is named at the end, and goes on alone."""
    paths = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]
    checkpoints = paths[1] / "checkpoints"
    shutil.rmtree(checkpoints / "10")
    (checkpoints / "8").rename(checkpoints / "4")
    message = "0.01: left out: its checkpoints end at step 4, those of others begin at 8"
    with pytest.raises(UserError, match=message):
        train_together([make(rate, steps=12) for rate in RATES], paths)
    assert "1 runs together go on from step 10" in (paths[0] / "log.txt").read_text()
    assert losses(paths[0])[:10] == losses(folders[0]) and losses(paths[0])[-1][0] == 12
    assert [path.name for path in checkpoints.iterdir()] == ["4"]


def test_a_group_checks_its_data_and_its_mesh(folders, tmp_path):
    paths = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]
    with CheckpointStore(RunDir(paths[0]).checkpoints) as store:
        found = json.loads((store.path(10) / "metadata" / "metadata").read_text())["data"]
    assert found.keys() == {"train", "validation"} and found["train"]
    wide = [cfg.model_copy(update={"mesh": Mesh(fsdp=2)}) for cfg in map(make, RATES)]
    with pytest.raises(UserError, match="mesh: fsdp=2 need 2 devices, but there are 1"):
        train_together(wide, paths)


def test_a_member_goes_on_alone(folders, tmp_path):
    path = Path(shutil.copytree(folders[1], tmp_path / "member"))
    shutil.rmtree(path / "checkpoints" / "10")
    train(make(RATES[1]), path)
    assert_alike(losses(folders[1]), losses(path))


def test_a_group_ends_when_a_member_has_learnt_the_task(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    configs = [make(rate) for rate in RATES]
    ending = train_together(configs, paths, Until(accuracy=0.001, validations=2))
    assert (ending.step, ending.finished) == (8, True)
    for path in paths:
        assert json.loads(RunDir(path).ended.read_text()) == {"step": 8}
        with CheckpointStore(RunDir(path).checkpoints) as store:
            assert store.latest_step == 8


@pytest.mark.slow
def test_seeds_see_data_of_their_own(tmp_path):
    configs = [make(RATES[1], seed) for seed in (0, 1)]
    train_together(configs, [tmp_path / "a", tmp_path / "b"])
    train(configs[1], tmp_path / "alone")
    assert_alike(losses(tmp_path / "b"), losses(tmp_path / "alone"))


def test_a_member_that_diverges_ends_alone(tmp_path):
    """The other is finished, and the error names the first."""
    configs = [make(1e-2), make(1e30)]
    with pytest.raises(UserError, match=r"bad: step \d+: grad_norm is nan"):
        train_together(configs, [tmp_path / "good", tmp_path / "bad"])
    assert losses(tmp_path / "good")[-1][0] == 10 and (tmp_path / "good" / "checkpoints" / "10").is_dir()
    assert not (tmp_path / "bad" / "checkpoints" / "10").exists()


def test_a_group_ends_when_all_have_diverged(tmp_path):
    with pytest.raises(UserError) as caught:
        train_together([make(1e30), make(2e30)], [tmp_path / "a", tmp_path / "b"])
    assert len(caught.value.problems) == 2
    assert "stopped after step" in (tmp_path / "a" / "log.txt").read_text()


@pytest.mark.slow
def test_a_validation_is_not_taken_for_training(tmp_path, monkeypatch):
    """Nor is its compilation, which comes with the first one: the speed is that of the steps."""
    start = Evaluator.start
    VALIDATION_S = 8

    def slow_start(self, *args, **keys):
        time.sleep(VALIDATION_S)
        return start(self, *args, **keys)

    monkeypatch.setattr(Evaluator, "start", slow_start)
    monkeypatch.setattr(together, "BLOCK_STEPS", 2)
    run = make(1e-2, validation={"every": 8, "batches": 1}, checkpoints={"every": 8}, steps=8)
    train_together([run], [tmp_path / "run"])
    last = read_metrics(RunDir(tmp_path / "run").metrics)[-1]
    assert last["tokens_per_s"] > 6 * last["tokens"] / (0.75 * VALIDATION_S), (
        "six of eight steps count, and take less than the validation"
    )


def test_other_differences_are_refused(tmp_path):
    message = "train.batch_size is 4 in one and 8 in another; only optim.peak_lr"
    with pytest.raises(UserError, match=message):
        train_together([make(1e-2), make(1e-3, batch_size=8)], [tmp_path / "a", tmp_path / "b"])
    benchmark = {"bench": {"kind": "lm_eval", "tasks": ["any"]}}
    with pytest.raises(UserError, match=r"train.evaluations.bench.kind=lm_eval is not supported"):
        train_together([make(rate, evaluations=benchmark) for rate in RATES], [tmp_path / "a", tmp_path / "b"])
    assert not (tmp_path / "a").exists()


# The command, killed between the checkpoints that its members leave at step 8.
DIE_WHILE_SAVING = """
import os, runpy, signal, sys
from kimi_jax.train.checkpoint import CheckpointStore
save, saved = CheckpointStore.save, []
def save_or_die(self, step, *rest):
    saved.append(step)
    if saved.count(8) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, step, *rest)
CheckpointStore.save = save_or_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_killed_group_goes_on(folders, tmp_path):
    """The command, killed, then called again."""
    base, sweep = tmp_path / "base.yaml", tmp_path / "sweep.yaml"
    base.write_text(dump(make(RATES[0])))
    sweep.write_text(f"base: base.yaml\ngrid: {{optim.peak_lr: {list(RATES)}}}\ntogether: {{over: [optim.peak_lr]}}\n")
    runs = load_sweep(sweep)
    (group,) = group_runs(sweep, runs)
    command = group.prepare(
        tmp_path / "runs", (sys.executable, str(Path(__file__).parents[2] / "scripts" / "train.py"))
    )
    python, *script = command
    killed = subprocess.run([python, "-c", DIE_WHILE_SAVING, *script], stdout=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert all((run.directory(tmp_path / "runs").checkpoints / "4").is_dir() for run in runs)
    assert not all(run.is_finished(tmp_path / "runs") for run in runs)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for run, folder in zip(runs, folders, strict=True):
        assert run.is_finished(tmp_path / "runs")
        assert_alike(losses(run.directory(tmp_path / "runs").path), losses(folder))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nothing to do" in again.stdout
