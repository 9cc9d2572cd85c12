"""Which processes form a run: how each finds the others, what process 0 does for all, and how all of them end."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the key-value store of a run has no public name

from kimi_jax.errors import UserError

POLL_S = 1.0  # between two looks at the other processes
GRACE_S = 3.0  # for a process to find by itself the error that another one has reported
JOIN_S = 300  # for all processes to appear
WAIT_MS = 7 * 24 * 3600 * 1000  # for what process 0 does for all; if it dies the watch ends the others

FAILED, SHARED = "kimi_jax/failed", "kimi_jax/shared"  # keys of the store that all processes see


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of a run."""

    launcher: str
    """Who started them, in words."""
    num_processes: int
    process_id: int
    coordinator: str | None = None
    """HOST:PORT of process 0; None: jax asks the launcher."""
    local_id: int = 0
    local_count: int = 1
    """Processes on this machine, and which of them this is: they share its GPUs."""


def find_place(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Place | None:
    """Finds out whether this process is one of several.

    Explicit arguments win, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (in an indexed
    Kubernetes job the last is JOB_COMPLETION_INDEX), then Slurm and Open MPI.

    Returns:
      None if it runs alone.

    Raises:
      UserError: something says that there are several processes, and something that this one is alone.
    """
    explicit = _explicit_place(coordinator, num_processes, process_id, environment)
    return explicit or _slurm_place(environment) or _mpi_place(environment)


def _explicit_place(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> Place | None:
    index = _number(environment, "JOB_COMPLETION_INDEX")
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    num_processes = num_processes or _number(environment, "JAX_NUM_PROCESSES")
    if process_id is None:
        process_id = _number(environment, "JAX_PROCESS_ID")
    if process_id is None and (coordinator or num_processes):
        process_id = index
    given = {
        "the coordinator (--coordinator, JAX_COORDINATOR_ADDRESS)": coordinator,
        "the number of processes (--num-processes, JAX_NUM_PROCESSES)": num_processes,
        "this process's number (--process-id, JAX_PROCESS_ID)": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if index:
            raise UserError(
                f"JOB_COMPLETION_INDEX={index}: one of several pods, but JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES "
                "are not set; see scripts/kubernetes/pretrain.yaml"
            )
        return None
    if missing:
        raise UserError(f"processes: {' and '.join(missing)} must be given, too")
    if not 0 <= process_id < num_processes:
        raise UserError(f"processes: process id {process_id} must be from 0 to {num_processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:  # jax would wait for ever
        raise UserError(f"processes: coordinator {coordinator!r} must be HOST:PORT, the port from 1 to 65535")
    return Place("explicit", num_processes, process_id, coordinator) if num_processes > 1 else None


def _slurm_place(environment: Mapping[str, str]) -> Place | None:
    tasks = _number(environment, "SLURM_NTASKS") or 1
    if "SLURM_STEP_NODELIST" not in environment:  # not started by srun
        if tasks > 1:
            raise UserError(
                f"SLURM_NTASKS={tasks}, but this process was not started by srun and would train alone: "
                "start `srun python scripts/train.py ...`, or ask for --ntasks=1"
            )
        return None
    if tasks == 1:
        return None
    node, local = _number(environment, "SLURM_NODEID") or 0, _number(environment, "SLURM_LOCALID") or 0
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or str(tasks)
    counts = _expand_counts(text)
    if node >= len(counts):
        raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text!r}: names no node of SLURM_NODEID={node}")
    return Place("Slurm", tasks, _number(environment, "SLURM_PROCID") or 0, None, local, counts[node])


def _mpi_place(environment: Mapping[str, str]) -> Place | None:
    size = _number(environment, "OMPI_COMM_WORLD_SIZE") or 1
    if size == 1:
        return None
    rank, local, count = (
        _number(environment, f"OMPI_COMM_WORLD_{name}") or 0 for name in ("RANK", "LOCAL_RANK", "LOCAL_SIZE")
    )
    return Place("Open MPI", size, rank, None, local, count or 1)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise UserError(f"{name}={text!r}: must be a whole number")
    return int(text)


def _expand_counts(text: str) -> list[int]:
    """Slurm's "2(x3),1" -> [2, 2, 2, 1]."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def share_of_devices(num_visible: int, place: Place) -> list[int] | None:
    """The GPUs of this process among those that it sees: its even share; None on a machine without any.

    Raises:
      UserError: they do not divide over the processes of this machine.
    """
    if num_visible <= 1 or place.local_count == 1:  # one: the launcher has handed them out
        return list(range(num_visible)) or None
    if num_visible % place.local_count:
        raise UserError(f"{place.local_count} processes on this machine cannot share {num_visible} GPUs evenly")
    share = num_visible // place.local_count
    return list(range(place.local_id * share, (place.local_id + 1) * share))


def visible_gpus() -> list[str]:
    """GPU numbers of this machine, or those that CUDA_VISIBLE_DEVICES leaves; empty without a driver."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [number for number in chosen.split(",") if number]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i, _ in enumerate(filter(None, listed.stdout.splitlines()))] if not listed.returncode else []


# ---------------------------------------------------------------- a run of several processes
@contextlib.contextmanager
def joined(place: Place | None, *, heartbeat_s: int) -> Iterator[None]:
    """Connects this process with the others before, and parts from them after, the body.

    An error in the body of one process ends all of them: the first one prints it, those that meet the same error are
    silent, the others print one line that names it. A process that is killed ends the others, too.

    Args:
      place: from `find_place`; None: nothing happens.
      heartbeat_s: after so many seconds without a sign of life a process is taken for dead.

    Raises:
      UserError: the processes did not find each other.
    """
    if place is None:
        yield
        return
    _connect(place, heartbeat_s)
    watch = _Watch(place, heartbeat_s)
    watch.start()
    try:
        yield
    except BaseException as error:
        watch.fail(error)
    watch.part()
    jax.distributed.shutdown()


def _connect(place: Place, heartbeat_s: int) -> None:
    # Its C++ handler of SIGTERM would swallow the signal; the loop has its own agreement to stop.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_enable_recoverability", True)  # else jaxlib aborts the survivors of a crash by itself
    devices = share_of_devices(len(visible_gpus()), place)
    numbers = {} if place.coordinator is None else {"process_id": place.process_id}
    if place.coordinator is not None:
        numbers |= {"coordinator_address": place.coordinator, "num_processes": place.num_processes}
    try:
        jax.distributed.initialize(
            **numbers, local_device_ids=devices, heartbeat_timeout_seconds=heartbeat_s, initialization_timeout=JOIN_S
        )
    except (RuntimeError, ValueError, OSError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"process {place.process_id} of {place.num_processes} ({place.launcher}): {first}") from error
    if jax.process_count() != place.num_processes:
        raise UserError(f"{place.launcher}: {place.num_processes} processes, but jax sees {jax.process_count()}")


def is_main() -> bool:
    """Whether this process writes the files of a run."""
    return jax.process_index() == 0


def on_main[T](work: Callable[[], T]) -> T:
    """Does something on process 0 while the others wait for it; all processes must call it in the same order.

    Args:
      work: gives what JSON can hold.

    Returns:
      What `work` gave, on every process.

    Raises:
      UserError: `work` raised it on process 0.
    """
    if jax.process_count() == 1:
        return work()
    key = f"{SHARED}/{next(_calls)}"
    if is_main():
        try:
            value = work()
        except UserError as error:
            _client().key_value_set(key, json.dumps({"problems": error.problems}))
            raise
        _client().key_value_set(key, json.dumps({"value": value}))
        return value
    answer = json.loads(_client().blocking_key_value_get(key, WAIT_MS))
    if "problems" in answer:
        raise UserError(answer["problems"])
    return answer["value"]


_calls = itertools.count()


def _client() -> Any:
    return distributed.global_state.client


class _Watch(threading.Thread):
    """Ends this process when another one has failed or is gone, and tells the others when this one fails."""

    def __init__(self, place: Place, heartbeat_s: int):
        super().__init__(name="watch over the other processes", daemon=True)
        self._place, self._heartbeat_s = place, heartbeat_s
        self._parting = threading.Event()
        self._ending = threading.Lock()  # taken by the thread that ends the process, for good

    def run(self) -> None:
        everyone = range(self._place.num_processes)
        while not self._parting.wait(POLL_S):
            try:
                alive = sorted(_client().get_live_nodes(everyone))  # returns when every living process asks
                failed = _reported_failure()
            except (jax.errors.JaxRuntimeError, AttributeError):
                self._leave("process 0, which coordinates the others, is gone", [])
                return
            gone = sorted(set(everyone).difference(alive))
            if failed:
                time.sleep(GRACE_S)
                self._leave(f"ended by the failure of {failed}", alive)
            elif gone:
                self._leave(f"process {gone[0]} is gone: no sign of life for {self._heartbeat_s} s", alive)

    def _leave(self, reason: str, alive: Sequence[int]) -> None:
        if self._parting.is_set() or not self._ending.acquire(blocking=False):
            return
        print(f"error: process {self._me}: {reason}", file=sys.stderr, flush=True)
        _exit(1, alive)

    @property
    def _me(self) -> str:
        return f"{self._place.process_id} of {self._place.num_processes}"

    def fail(self, error: BaseException) -> NoReturn:
        """Prints an error unless another process has printed the same, tells the others, and ends the process."""
        if _may_come_from_a_lost_process(error):
            time.sleep(self._heartbeat_s + GRACE_S)  # the watch finds out and ends this process with one line
        self._ending.acquire()
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        who, what = f"process {self._me}", text.partition("\n")[0]
        reporter, _, reported = _report_failure(f"{who}: {what}").partition(": ")
        if reporter == who or reported != what:
            _print_error(error)
        _exit(_exit_code(error), range(self._place.num_processes))

    def part(self) -> None:
        """Waits until all processes are here; process 0, which serves the others, also until they have gone.

        The watch goes on until then: another process may still fail. None leaves before all watches have ended.
        """
        _client().wait_at_barrier("kimi_jax/part", WAIT_MS)
        self._parting.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().wait_at_barrier("kimi_jax/parted", int(1000 * self._heartbeat_s))
        everyone = range(self._place.num_processes)
        while self._place.process_id == 0 and len(_client().get_live_nodes(everyone)) > 1:
            time.sleep(0.05)


def _exit(code: int, alive: Sequence[int]) -> NoReturn:
    sys.stdout.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 must not go before the others have read
        _client().wait_at_barrier(f"kimi_jax/left/{len(alive)}", int(2 * (POLL_S + GRACE_S) * 1000), alive)
    os._exit(code)  # leaving in order would wait for processes that do not come


def _report_failure(text: str) -> str:
    """Tells the other processes of a failure; returns what they have been told, by the quickest."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was quicker, or process 0 is gone
        _client().key_value_set(FAILED, text)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return _reported_failure() or text
    return text


def _reported_failure() -> str | None:
    try:
        return _client().key_value_try_get(FAILED)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def _may_come_from_a_lost_process(error: BaseException) -> bool:
    return not isinstance(error, UserError) and any(name in str(error) for name in ("Gloo", "gloo", "NCCL"))


def _print_error(error: BaseException) -> None:
    if isinstance(error, UserError):
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr, flush=True)
    elif not isinstance(error, KeyboardInterrupt | SystemExit):
        traceback.print_exception(error)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
