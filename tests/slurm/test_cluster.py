"""Jobs of a real Slurm: they find each other, save when they must go, come back and end as if nothing had happened."""

import collections
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_run import tiny_run

from kimi_jax.config.train import RunConfig
from kimi_jax.experiments.sweep import load_sweep
from kimi_jax.train.loop import train
from kimi_jax.train.metrics import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 1000
LIMIT_S = 240


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A config that trains for some seconds."""
    values = tiny_run(
        peak_lr=1e-4,
        steps=STEPS,
        checkpoints={"every": 10**6},
        validation={"every": 10**6, "batches": 1},
        watchdog={"heartbeat_s": 30},
    )
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> list[float]:
    """The losses of one process that nothing interrupts."""
    result = train(RunConfig.model_validate(yaml.safe_load(tiny.read_text())), tmp_path_factory.mktemp("whole"))
    return _losses(result.run_dir.path)


def _losses(run_dir: Path) -> list[float]:
    return [record["loss_nats"] for record in read_metrics(run_dir / "metrics.jsonl")]


def _wait_for_steps(run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while len(_losses(run_dir)) < count:
        assert time.monotonic() < deadline, f"{run_dir}: {len(_losses(run_dir))} steps after {LIMIT_S} s"
        time.sleep(0.1)


def test_a_batch_script_comes_back_after_a_signal(slurm, tiny, whole, tmp_path):
    """Two processes of one job; SIGTERM is what Slurm sends before the time limit."""
    run_dir, log = tmp_path / "run", tmp_path / "job.log"
    options = ["--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=10", f"--output={log}"]
    script = ["scripts/slurm/pretrain.sbatch", str(tiny), "--run-dir", str(run_dir)]
    environment = {**os.environ, "PYTHON": sys.executable}
    submitted = subprocess.run(
        ["sbatch", "--parsable", *options, *script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    job = submitted.stdout.strip()
    assert job, submitted.stderr
    _wait_for_steps(run_dir, 5)
    slurm.run("scancel", "--signal=TERM", job)
    slurm.start_again_now(job)
    slurm.wait_for_end(job)
    text = log.read_text()
    (stopped,) = re.findall(r"SIGTERM: stopped after step (\d+)", text)
    assert f"goes on from step {stopped}" in text and f"finished {STEPS} steps" in text
    assert 5 <= int(stopped) < STEPS
    assert _losses(run_dir) == pytest.approx(whole, rel=1e-4)


def test_what_scancel_ends_does_not_come_back(slurm, tiny, tmp_path):
    run_dir = tmp_path / "run"
    options = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10"]
    options.append(f"--output={tmp_path}/job.log")
    command = ["sbatch", "--parsable", *options, "scripts/slurm/pretrain.sbatch", str(tiny)]
    command += ["train.steps=1000000", "--run-dir", str(run_dir)]
    environment = {**os.environ, "PYTHON": sys.executable}
    submitted = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    job = submitted.stdout.strip()
    _wait_for_steps(run_dir, 5)
    slurm.run("scancel", job)
    slurm.wait_for_end(job)
    time.sleep(2)  # what would come back is PENDING by then
    assert slurm.state(job) in ("", "CANCELLED")


def test_one_process_of_many_is_refused(slurm, tiny, tmp_path):
    script = tmp_path / "alone.sbatch"
    script.write_text(f"#!/bin/bash\n{sys.executable} scripts/train.py {tiny} --run-dir {tmp_path}/run\n")
    log = tmp_path / "job.log"
    job = slurm.run("sbatch", "--parsable", "--ntasks=2", f"--output={log}", f"--chdir={ROOT}", str(script)).strip()
    slurm.wait_for_end(job)
    (line,) = [line for line in log.read_text().splitlines() if "error" in line]
    assert line.startswith("error: SLURM_NTASKS=2, but this process was not started by srun")


def test_launch_saves_and_comes_back(slurm, tiny, whole, tmp_path):
    """scripts/train.py --launch slurm: submitit hears the signal, the training saves, the job is put back."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "scripts/train.py", str(tiny), "--run-dir", str(run_dir), "--launch", "slurm"]
    command += ["--gpus-per-node", "0", "--tasks-per-node", "2", "--time", "00:10:00", "--slurm", "partition=main"]
    launched = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert launched.returncode == 0, launched.stderr
    job = re.match(r"job (\d+): ", launched.stdout)[1]
    _wait_for_steps(run_dir, 5)
    slurm.run("scancel", "--signal=USR2", job)
    slurm.start_again_now(job)
    slurm.wait_for_end(job)
    text = (run_dir / "log.txt").read_text()
    (stopped,) = re.findall(r"SIGTERM: stopped after step (\d+)", text)
    assert f"goes on from step {stopped}" in text and f"finished {STEPS} steps" in text
    assert _losses(run_dir) == pytest.approx(whole, rel=1e-4)


def test_a_sweep_is_an_array_and_nothing_is_submitted_twice(slurm, tiny, tmp_path):
    sweep, runs_dir = tmp_path / "sweep.yaml", tmp_path / "runs"
    sweep.write_text(yaml.safe_dump({"base": str(tiny), "grid": {"train.steps": [20]}, "seeds": [0, 1, 2]}))
    command = [sys.executable, "scripts/sweep.py", str(sweep), "--runs-dir", str(runs_dir), "--launcher", "slurm"]
    command += ["--gpus-per-node", "0", "--time", "10", "--at-once", "2"]
    counts = []
    for _ in range(2):
        launched = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert launched.returncode == 0, launched.stderr
        counts.append(launched.stdout.strip().splitlines()[-1])
    assert counts[0] == "3 runs: 3 submitted" and "3 in the queue" in counts[1]
    tickets = [path.read_text() for path in (runs_dir / "sweep").glob("*.job")]
    (array,) = {ticket.partition("_")[0] for ticket in tickets}
    slurm.wait_for_end(array)
    runs = load_sweep(sweep)
    assert all(run.is_finished(runs_dir) for run in runs)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "3 runs: 3 finished before" in again.stdout
    starts = collections.Counter(
        line for run in runs for line in re.findall("starts", (run.directory(runs_dir).log).read_text())
    )
    assert starts == {"starts": 3}


def test_what_slurm_refuses_is_one_line(slurm, tiny, tmp_path):
    command = [sys.executable, "scripts/train.py", str(tiny), "--run-dir", f"{tmp_path}/run", "--launch", "slurm"]
    command += ["--gpus-per-node", "0", "--slurm", "partition=nowhere"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]  # sbatch says it, too
    assert line.startswith("error: slurm: sbatch refuses the job: ") and "partition" in line
    assert "Traceback" not in refused.stderr
