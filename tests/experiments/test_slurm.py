"""Jobs through submitit, on its local executor: what is asked for, and that a job told to go saves and comes back."""

import argparse
import collections
import contextlib
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
import pathlib, signal, sys
log = pathlib.Path(sys.argv[1])
def note(text):
    with log.open("a") as file: file.write(text)
resumed = log.exists()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
note("goes on\\n" if resumed else "starts\\n")
if not resumed:
    signal.sigwait([signal.SIGTERM])
    note("saved\\n")
    sys.exit(143)
"""
# Is told to go while its command is being started.
TOLD_EARLY = """
import os, signal, subprocess, sys
from kimi_jax.experiments.slurm import Training
def told(*_):
    again = training.checkpoint()
    sys.exit(9 if again.function.command == training.command else 1)
class Popen(subprocess.Popen):
    def __init__(self, command):
        os.kill(os.getpid(), signal.SIGUSR2)
        super().__init__(command)
subprocess.Popen = Popen
signal.signal(signal.SIGUSR2, told)
training = Training(["sleep", "600"])
training()
"""
LIMIT_S = 300


@pytest.fixture
def submit_here(tmp_path):
    """Runs a command as a job of submitit's local executor; no process of it outlives the test, however that ends."""
    jobs = []

    def submit_one(command: list[str]):
        jobs.extend(submit([command], tmp_path / "jobs", Resources(5), name="run", cluster="local"))
        return jobs[-1]

    yield submit_one
    for job in jobs:
        if job._process.poll() is None:
            for process in family(job._process.pid):
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process, signal.SIGKILL)
            job._process.wait()


def family(process: int) -> list[int]:
    """A process, its children and theirs, as long as they are there."""
    children = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        for thread in Path(f"/proc/{process}/task").iterdir():
            children += map(int, (thread / "children").read_text().split())
    return [process, *(relative for child in children for relative in family(child))]


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


def test_a_job_that_must_go_saves_and_comes_back(tmp_path, submit_here):
    script, log = tmp_path / "train.py", tmp_path / "log"
    script.write_text(STAND_IN)
    job = submit_here([sys.executable, str(script), str(log)])
    deadline = time.monotonic() + LIMIT_S
    while not log.exists() or "starts\n" not in log.read_text():
        assert job._process.poll() is None and time.monotonic() < deadline, job.stderr()
        time.sleep(0.05)
    controller, task, *training = family(job._process.pid)
    assert len(training) == 1, f"{training} under the task {task} of {controller}: {job.stderr()}"
    for process in (*training, task):  # Slurm signals all processes of a job; the task's would end the training
        os.kill(process, signal.SIGUSR2)
    assert job.result() == 0
    assert log.read_text().splitlines() == ["starts", "saved", "goes on"]


def test_a_job_that_must_go_while_it_starts_stops_what_it_has_started():
    assert subprocess.run([sys.executable, "-c", TOLD_EARLY], check=False, timeout=LIMIT_S).returncode == 9


@pytest.mark.slow
def test_a_failing_command_fails_the_job(submit_here):
    from submitit.core.utils import UncompletedJobError

    command = [sys.executable, "-c", "import sys; sys.exit('error: no data')"]
    job = submit_here(command)
    job._results_timeout_s = 1
    with pytest.raises(UncompletedJobError, match="error: no data"):
        job.result()


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
