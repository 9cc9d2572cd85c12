"""Runs the members of a sweep on this machine: a few processes at a time, one GPU each, none twice."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kimi_jax.experiments.sweep import LOGS, Group, Run
from kimi_jax.experiments.tethered import tethered
from kimi_jax.train.run_dir import IN_USE
from kimi_jax.train.signals import StopRequest
from kimi_jax.train.xla_flags import MEMORY

type State = Literal["finished before", "finished", "failed", "stopped", "submitted", "submitted again", "in the queue"]
type Report = Callable[["Outcome"], None]
type Unit = Run | Group
"""What one process trains."""

POLL_S = 0.2
SAYS_MEMORY = (*MEMORY, "XLA_PYTHON_CLIENT_PREALLOCATE")  # of the GPU, for one process
BUSY_S = 5.0  # before a run that another process holds is looked at again


@dataclass(frozen=True)
class Outcome:
    """How one process ended."""

    run: Unit
    state: State
    seconds: float = 0.0
    cause: str = ""
    """The one line that says why a failed run failed."""


@dataclass
class _Process:
    run: Unit
    handle: subprocess.Popen
    device: str | None
    started: float
    log: Path
    log_start: int
    """Bytes of the log that earlier starts wrote."""


@dataclass(frozen=True)
class Local:
    """Where and with what the runs of a sweep are started.

    Several of these may work on one `runs_dir` at the same time, on one machine or on a shared disk: a run belongs to
    the process that holds its directory, and the others wait for it.
    """

    runs_dir: Path
    train: Sequence[str]
    """Command that trains, before the arguments of scripts/train.py."""
    at_once: int = 1
    devices: Sequence[str] = ()
    """GPU numbers; each process sees one of them. Empty: none is chosen."""

    def launch(self, runs: Sequence[Unit], stop: StopRequest, report: Report) -> list[Outcome]:
        """Runs what is not finished, in order, and reports each run once.

        Args:
          runs: the members of the sweep, alone or in groups.
          stop: true once a signal asks for an end: running processes are then told to stop and to save.
          report: called with each outcome as it comes.

        Returns:
          The outcomes in the order in which they came.
        """
        outcomes: list[Outcome] = []

        def note(outcome: Outcome) -> None:
            outcomes.append(outcome)
            report(outcome)

        waiting: deque[tuple[float, Unit]] = deque((0.0, run) for run in runs)
        running: list[_Process] = []
        with _stopped_at_exit(running):
            while waiting or running:
                for process in [p for p in running if p.handle.poll() is not None]:
                    running.remove(process)
                    self._settle(process, stop, note, waiting)
                if stop:
                    _terminate(running)
                    waiting.clear()
                elif not self._start_next(waiting, running, note):
                    time.sleep(POLL_S)
        return outcomes

    def _start_next(self, waiting: deque[tuple[float, Unit]], running: list[_Process], note: Report) -> bool:
        """Starts, or passes over, the first waiting run that is due; false if there is nothing to do now."""
        if not waiting or len(running) >= self.at_once or waiting[0][0] > time.monotonic():
            return False
        _, run = waiting.popleft()
        held = _is_held(run, self.runs_dir)  # asked first: who lets go now has left its last checkpoint
        if run.is_finished(self.runs_dir):
            note(Outcome(run, "finished before"))
        elif held:
            waiting.append((time.monotonic() + BUSY_S, run))
        else:
            running.append(self._start(run, self._free_device(running)))
        return True

    def _free_device(self, running: Sequence[_Process]) -> str | None:
        uses = {device: sum(p.device == device for p in running) for device in self.devices}
        return min(uses, key=lambda device: uses[device]) if uses else None

    def _start(self, run: Unit, device: str | None) -> _Process:
        log = self.runs_dir / LOGS / f"{run.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **self._environment(device)}
        command = run.prepare(self.runs_dir, self.train)
        with log.open("ab") as output:  # another launcher's process may be writing, too
            log_start = output.tell()
            handle = subprocess.Popen(
                tethered(command), stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        return _Process(run, handle, device, time.monotonic(), log, log_start)

    def _environment(self, device: str | None) -> dict[str, str]:
        """Gives a process its GPU, and its share of the memory where several processes have the same.

        Whoever says how memory is taken is left alone: without preallocation a process takes what it needs.
        """
        if device is None:
            return {}
        share = -(-self.at_once // len(self.devices))
        shared = share > 1 and not any(name in os.environ for name in SAYS_MEMORY)
        memory = {MEMORY[0]: f"{0.9 / share:.3f}"} if shared else {}
        return {"CUDA_VISIBLE_DEVICES": device, **memory}

    def _settle(self, process: _Process, stop: StopRequest, note: Report, waiting: deque[tuple[float, Unit]]) -> None:
        run, seconds = process.run, time.monotonic() - process.started
        if run.is_finished(self.runs_dir):
            note(Outcome(run, "finished", seconds))
        elif stop:
            note(Outcome(run, "stopped", seconds))
        elif (cause := _cause(process)).endswith(IN_USE) or _is_held(run, self.runs_dir):
            waiting.append((time.monotonic() + BUSY_S, run))  # another launcher was quicker, or looked just then
        else:
            note(Outcome(run, "failed", seconds, cause))


def _is_held(run: Unit, runs_dir: Path) -> bool:
    """Whether a process trains in a directory of it."""
    return any(_is_locked(directory.path / ".lock") for directory in run.directories(runs_dir))


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _cause(process: _Process) -> str:
    """The first error line of what a process has printed, else its last line."""
    output, code = process.log.read_bytes()[process.log_start :], process.handle.returncode
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return named[0] if named else f"{ended}; last line of {process.log}: {lines[-1] if lines else '(empty)'}"


def _terminate(running: Sequence[_Process]) -> None:
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.handle.send_signal(signal.SIGTERM)
    for process in running:
        process.handle.wait()


@contextlib.contextmanager
def _stopped_at_exit(running: list[_Process]) -> Iterator[None]:
    """No process outlives an error of the launcher."""
    try:
        yield
    finally:
        _terminate(running)
