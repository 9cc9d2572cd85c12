"""Jobs through submitit, on its local executor: what is asked for, and that a job told to go saves and comes back."""

import argparse
import collections
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kimi_jax.errors import UserError
from kimi_jax.experiments import resources, slurm
from kimi_jax.experiments.resources import Resources
from kimi_jax.experiments.slurm import Slurm, submit
from kimi_jax.experiments.sweep import load_sweep
from kimi_jax.train.signals import StopRequest

# Behaves as scripts/train.py: SIGTERM lets it save and end with 143; the next start goes on.
STAND_IN = """
import pathlib, signal, sys, time
log = pathlib.Path(sys.argv[1])
resumed = log.exists()
def save(*_):
    with log.open("a") as file: file.write("saved\\n")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
with log.open("a") as file: file.write("goes on\\n" if resumed else "starts\\n")
if not resumed: time.sleep(60)
"""


def parse(*arguments: str) -> Resources:
    parser = argparse.ArgumentParser()
    resources.add_arguments(parser)
    return resources.from_arguments(parser.parse_args(arguments))


def test_a_signal_ends_a_job_as_a_shell_would_say_it():
    for end, code in (("exit 2", 2), ("kill -TERM $$", 143)):
        program = f"from kimi_jax.experiments.slurm import Training; Training(['bash', '-c', {end!r}])()"
        # In a process of its own, as a job is: forking this one, which has threads of jax, would be a warning.
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == code


def test_arguments_say_what_a_job_asks_for(capsys):
    assert parse() == Resources(1440, 1, 8, None, 180, {})
    asked = parse("--nodes", "4", "--time", "2-01:30:01", "--slurm", "partition=a", "--slurm", "qos=high")
    assert (asked.nodes, asked.minutes, asked.tasks) == (4, 2 * 1440 + 91, 8)
    assert asked.options == {"partition": "a", "qos": "high"}
    assert parse("--gpus-per-node", "0", "--time", "30").tasks == 1
    for wrong in (["--time", "1:30"], ["--slurm", "partition"], ["--nodes", "0"], ["--gpus-per-node", "-1"]):
        with pytest.raises(SystemExit) as ended:
            parse(*wrong)
        assert ended.value.code == 2 and "must be" in capsys.readouterr().err


def test_a_job_that_must_go_saves_and_comes_back(tmp_path):
    script, log = tmp_path / "train.py", tmp_path / "log"
    script.write_text(STAND_IN)
    (job,) = submit(
        [[sys.executable, str(script), str(log)]], tmp_path / "jobs", Resources(5), name="run", cluster="local"
    )
    deadline = time.monotonic() + 60
    while not log.exists():
        assert time.monotonic() < deadline, job.stderr()
        time.sleep(0.05)
    (task,) = children(int(job.job_id))
    for process in (task, *children(task)):  # Slurm signals all processes of a job
        os.kill(process, signal.SIGUSR2)
    assert job.result() == 0
    job._process.wait()
    assert log.read_text().splitlines() == ["starts", "saved", "goes on"]


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
def test_a_failing_command_fails_the_job(tmp_path):
    from submitit.core.utils import UncompletedJobError

    command = [sys.executable, "-c", "import sys; sys.exit('error: no data')"]
    (job,) = submit([command], tmp_path / "jobs", Resources(5), name="run", cluster="local")
    job._results_timeout_s = 1
    with pytest.raises(UncompletedJobError, match="error: no data"):
        job.result()
    job._process.wait()


def test_what_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match='Could not detect "srun"'):
        submit([["true"]], tmp_path, Resources(5), name="run")
    with pytest.raises(UserError, match="there is no squeue here"):
        slurm.queued_jobs()
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"submitit is not installed; pip install 'kimi_jax\[slurm\]'"):
        submit([["true"]], tmp_path, Resources(5), name="run")


def test_a_sweep_submits_what_is_neither_finished_nor_queued(tmp_path, monkeypatch):
    debug = Path(__file__).parents[2] / "experiments" / "sizes" / "debug.yaml"
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"base": str(debug), "seeds": [0, 1, 2]}))
    runs, runs_dir = load_sweep(tmp_path / "sweep.yaml"), tmp_path / "runs"
    submitted = []

    def fake(commands, folder, resources, *, name, at_once):
        submitted.append((len(commands), at_once))
        Job = collections.namedtuple("Job", "job_id")
        return [Job(f"{len(submitted)}_{i}") for i in range(len(commands))]

    monkeypatch.setattr(slurm, "submit", fake)
    queue: set[str] = set()
    launcher = Slurm(runs_dir, ("python", "train.py"), Resources(5), at_once=2, queued=lambda: queue)
    first = launcher.launch(runs, StopRequest(), lambda outcome: None)
    assert [outcome.state for outcome in first] == ["submitted"] * 3
    queue = {"1_0", "1_2"}
    (runs[2].directory(runs_dir).checkpoints / str(runs[2].config.train.steps)).mkdir(parents=True)
    (runs_dir / "sweep" / "slurm").mkdir()
    (runs_dir / "sweep" / "slurm" / "1_1_0_log.err").write_text("srun: ...\nerror: the data is away\nsrun: ...\n")
    outcomes = launcher.launch(runs, StopRequest(), lambda outcome: None)
    states_and_causes = [(outcome.state, outcome.cause) for outcome in outcomes]
    assert states_and_causes == [("in the queue", ""), ("submitted again", "the data is away"), ("finished before", "")]
    assert submitted == [(3, 2), (1, 2)]


def test_the_example_job_of_kubernetes_is_an_indexed_one():
    service, job = yaml.safe_load_all(Path("scripts/kubernetes/pretrain.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    name, port = environment["JAX_COORDINATOR_ADDRESS"].split(":")
    assert job["spec"]["completionMode"] == "Indexed"
    assert int(environment["JAX_NUM_PROCESSES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert name == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert container["ports"] == [{"containerPort": int(port)}]


def test_the_batch_script_is_bash():
    subprocess.run(["bash", "-n", "scripts/slurm/pretrain.sbatch"], check=True)
