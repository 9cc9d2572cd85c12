"""Training as Slurm jobs through submitit: what is asked for, and how a job that must go saves and comes back."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from kimi_jax.errors import UserError
from kimi_jax.experiments.launch import Outcome, Report, State, Unit
from kimi_jax.experiments.resources import Resources
from kimi_jax.experiments.sweep import LOGS
from kimi_jax.train.run_dir import write_whole
from kimi_jax.train.signals import StopRequest

FOREVER = 10**6  # a job comes back after its time limit so many times

type Cluster = Literal["slurm", "local"]


class Training:
    """A training command as submitit runs it.

    Every task of a job holds one. Before the time is up, and at a preemption, submitit calls the first one's
    `checkpoint`, which stops its process. The processes of the other tasks follow it, and each writes its part of the
    checkpoint. The job is then put back into the queue and goes on from there.
    """

    def __init__(self, command: Sequence[str]):
        self.command = tuple(command)
        self._waiter = threading.Thread(target=self._train)  # a wait that a signal handler may join, too
        self._starting = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._leaves = False

    def __reduce__(self) -> tuple[type[Self], tuple[Sequence[str]]]:
        return type(self), (self.command,)  # a lock and a thread are of one process

    def __call__(self) -> int:
        self._waiter.start()
        self._waiter.join()
        if code := self._process.returncode:
            sys.exit(code if code > 0 else 128 - code)
        return 0

    def _train(self) -> None:
        # Slurm sends the signal that is meant for submitit to all processes of the job. What is blocked in this thread
        # is blocked in the process that it starts.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        with self._starting:
            if self._leaves:
                return
            self._process = subprocess.Popen(self.command)
        self._process.wait()

    def checkpoint(self) -> Any:
        """Called by submitit's signal handler: lets the process write a checkpoint, then asks for the same again.

        The signal may come at any moment, before the process is started, too.
        """
        import submitit

        with self._starting:
            self._leaves = True
        if self._process:
            self._process.terminate()
            self._waiter.join()
        return submitit.helpers.DelayedSubmission(type(self)(self.command))


def submit(
    commands: Sequence[Sequence[str]],
    folder: Path,
    resources: Resources,
    *,
    name: str,
    at_once: int = 256,
    cluster: Cluster = "slurm",
) -> list[Any]:
    """Puts commands into the queue, several as one array.

    Args:
      commands: each trains and goes on from its last checkpoint when it is run again.
      folder: for submitit's files and the output of the jobs, on a disk that the nodes share.
      resources: of each command.
      name: of the jobs.
      at_once: tasks of the array that may run at the same time.
      cluster: "local" runs them here as processes.

    Returns:
      submitit's jobs, in order.

    Raises:
      UserError: submitit or Slurm is missing, or Slurm refuses the job.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("slurm: the package submitit is not installed; pip install 'kimi_jax[slurm]'") from error
    parameters = _parameters(resources, cluster, name)
    if cluster == "slurm":
        parameters["slurm_array_parallelism"] = at_once
    try:
        executor = submitit.AutoExecutor(folder.absolute(), cluster=cluster, **{f"{cluster}_max_num_timeout": FOREVER})
        executor.update_parameters(**parameters)
        with executor.batch():
            jobs = [executor.submit(Training(command)) for command in commands]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"slurm: sbatch refuses the job: {_last_line(str(error))}") from error
    except RuntimeError as error:  # no srun
        raise UserError(f"slurm: {error}") from error
    return jobs


def _parameters(resources: Resources, cluster: Cluster, name: str) -> dict[str, Any]:
    """What is asked for in submitit's words."""
    parameters = {"timeout_min": resources.minutes, "gpus_per_node": resources.gpus_per_node}
    parameters["tasks_per_node"] = resources.tasks
    if cluster == "local":
        return parameters
    options = {option.replace("-", "_"): value for option, value in resources.options.items()}
    return parameters | {
        "name": name,
        "nodes": resources.nodes,
        "slurm_signal_delay_s": resources.save_s,
        "slurm_additional_parameters": {"requeue": True, **options},
    }


def _last_line(text: str) -> str:
    return next(filter(None, reversed([line.strip() for line in text.splitlines()])), "no reason given")


def queued_jobs() -> set[str]:
    """Ids of this user's jobs that wait or run, those of array tasks as ARRAY_TASK.

    Raises:
      UserError: there is no Slurm.
    """
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except FileNotFoundError as error:
        raise UserError("slurm: there is no squeue here; submit from a login node of the cluster") from error
    except subprocess.SubprocessError as error:
        raise UserError(f"slurm: squeue failed: {_last_line(getattr(error, 'stderr', '') or str(error))}") from error
    return set(listed.stdout.split())


@dataclass(frozen=True)
class Slurm:
    """A sweep as one array of jobs; each call submits what is neither finished nor in the queue."""

    runs_dir: Path
    train: Sequence[str]
    """Command that trains, before the arguments of scripts/train.py."""
    resources: Resources
    at_once: int = 256
    queued: Callable[[], set[str]] = queued_jobs
    """Ids of the jobs that wait or run."""

    def launch(self, runs: Sequence[Unit], stop: StopRequest, report: Report) -> list[Outcome]:
        """Submits the runs that are due; reports each run once.

        Args:
          runs: the members of the sweep, alone or in groups.
          stop: not used: what is submitted goes on without this process.
          report: called with each outcome.
        """
        present = self.queued()
        state_of = {run.name: self._state(run, present) for run in runs}
        due = [run for run in runs if state_of[run.name].startswith("submitted")]
        folder = self.runs_dir / LOGS
        folder.mkdir(parents=True, exist_ok=True)
        causes = {run.name: self._cause(run) for run in due}
        if due:
            commands = [run.prepare(self.runs_dir, self.train) for run in due]
            jobs = submit(commands, folder / "slurm", self.resources, name=self.runs_dir.name, at_once=self.at_once)
            for run, job in zip(due, jobs, strict=True):
                write_whole(self._ticket(run), job.job_id)
        outcomes = [Outcome(run, state_of[run.name], cause=causes.get(run.name, "")) for run in runs]
        for outcome in outcomes:
            report(outcome)
        return outcomes

    def _state(self, run: Unit, present: set[str]) -> State:
        if run.is_finished(self.runs_dir):
            return "finished before"
        ticket = self._ticket(run)
        if not ticket.exists():
            return "submitted"
        return "in the queue" if ticket.read_text() in present else "submitted again"

    def _cause(self, run: Unit) -> str:
        """The last error line of the run's last job; empty if it has none."""
        ticket = self._ticket(run)
        log = self.runs_dir / LOGS / "slurm" / f"{ticket.read_text()}_0_log.err" if ticket.exists() else None
        lines = log.read_text(errors="replace").splitlines() if log and log.exists() else []
        return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")

    def _ticket(self, run: Unit) -> Path:
        """Holds the id of the job that trains a run."""
        return self.runs_dir / LOGS / f"{run.name}.job"
