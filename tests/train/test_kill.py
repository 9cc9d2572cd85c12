"""Processes killed at any moment, each compiling for itself: the continued run still equals the uninterrupted one."""

import os
import signal
import subprocess
import sys
import time

import pytest

from kimi_jax.config.load import dump
from kimi_jax.train.metrics import read_metrics
from kimi_jax.train.run_dir import RunDir

KILL_AFTER = (3, 9, 15)  # step at which each of the first processes dies, somewhere between two lines
LIMIT_S = 600


@pytest.fixture
def start(hybrid, changed, tmp_path, start_process):
    """Starts a process that trains 24 steps with a checkpoint after every step and without a compilation cache."""
    cfg = changed(hybrid, train={"steps": 24, "checkpoints": {"every": 1, "keep": 2}}, logging={"tensorboard": False})
    (tmp_path / "config.yaml").write_text(dump(cfg))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}

    def run(run_dir: RunDir) -> subprocess.Popen:
        command = [sys.executable, "scripts/train.py", f"{tmp_path}/config.yaml", "--run-dir", str(run_dir.path)]
        return start_process(command, env=environment, stdout=subprocess.DEVNULL)

    return run


def _kill_after(process: subprocess.Popen, run_dir: RunDir, step: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not (records := read_metrics(run_dir.metrics)) or records[-1]["step"] < step:
        assert process.poll() is None and time.monotonic() < deadline, f"no step {step} in {LIMIT_S} s"
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"it came to its end before it was killed after step {step}"


@pytest.mark.slow
def test_killed_three_times_equals_whole(start, tmp_path):
    whole, killed = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    assert start(whole).wait(LIMIT_S) == 0
    for step in KILL_AFTER:
        _kill_after(start(killed), killed, step)
    assert start(killed).wait(LIMIT_S) == 0
    numbers = [
        [{name: x for name, x in record.items() if name != "tokens_per_s"} for record in read_metrics(run.metrics)]
        for run in (whole, killed)
    ]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 24
