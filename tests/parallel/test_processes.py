"""Several processes of one run: each finds its place, together they train what one trains, and they end together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from tiny_run import tiny_run

from kimi_jax.config.train import RunConfig
from kimi_jax.errors import UserError
from kimi_jax.parallel.feed import Share, place, share_of_batch
from kimi_jax.parallel.processes import Place, find_place, share_of_devices
from kimi_jax.train.loop import train
from kimi_jax.train.metrics import read_metrics

LIMIT_S = 300
HEARTBEAT_S = 10
SPARE_S = 60  # on a machine that does other work
LOSS_TOLERANCE = 1e-6  # relative; measured 2e-7

SLURM = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "1"}
SLURM |= {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
MPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
POD = {"JAX_COORDINATOR_ADDRESS": "run-0.run:8476", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}


# ------------------------------------------------------------------ finding the place
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SLURM, Place("Slurm", 8, 5, None, 1, 4)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "6,2"}, Place("Slurm", 8, 5, None, 1, 2)),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_ID": "1"}, None),
        (MPI, Place("Open MPI", 4, 3, None, 1, 2)),
        (POD, Place("explicit", 4, 2, "run-0.run:8476")),
        (POD | SLURM | {"JAX_PROCESS_ID": "0"}, Place("explicit", 4, 0, "run-0.run:8476")),
        ({"JOB_COMPLETION_INDEX": "0"}, None),
        (POD | {"JAX_NUM_PROCESSES": "1", "JOB_COMPLETION_INDEX": "0"}, None),
    ],
)
def test_the_place_is_found(environment, expected):
    assert find_place(environment=environment) == expected


def test_arguments_win_over_the_environment():
    assert find_place("host:1", 2, 0, POD) == Place("explicit", 2, 0, "host:1")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "SLURM_NTASKS=8, but this process was not started by srun"),
        (SLURM | {"SLURM_NODEID": "2"}, r"SLURM_STEP_TASKS_PER_NODE='4\(x2\)': names no node of SLURM_NODEID=2"),
        ({"JAX_NUM_PROCESSES": "4"}, r"the coordinator \(.*\) and this process's number \(.*\) must be given, too"),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "the number of processes .* must be given"),
        ({"JOB_COMPLETION_INDEX": "3"}, "JOB_COMPLETION_INDEX=3: one of several pods, but JAX_COORDINATOR_ADDRESS"),
        (POD | {"JOB_COMPLETION_INDEX": "4"}, "process id 4 must be from 0 to 3"),
        (POD | {"JAX_COORDINATOR_ADDRESS": "host"}, "coordinator 'host' must be HOST:PORT"),
        (POD | {"JAX_COORDINATOR_ADDRESS": "host:65536"}, "'host:65536' must be HOST:PORT, the port from 1 to 65535"),
        (POD | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES='four': must be a whole number"),
    ],
)
def test_mistakes_are_one_line(environment, message):
    with pytest.raises(UserError, match=message) as caught:
        find_place(environment=environment)
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]


def test_processes_of_a_machine_share_its_gpus():
    share = lambda visible, local, count: share_of_devices(visible, Place("Slurm", 8, 0, None, local, count))
    assert share(8, 3, 8) == [3] and share(8, 1, 2) == [4, 5, 6, 7]
    assert share(8, 0, 1) == list(range(8)), "one process on a machine has all of its GPUs"
    assert share(1, 3, 4) == [0], "the launcher has handed them out"
    assert share(0, 3, 4) is None
    with pytest.raises(UserError, match="3 processes on this machine cannot share 8 GPUs"):
        share(8, 0, 3)


# ------------------------------------------------------------------ rows of a batch
class _Process:
    """Stands for a sharding as one process sees it."""

    def __init__(self, *rows: slice):
        self._rows = rows

    def addressable_devices_indices_map(self, shape):
        return {device: (rows, slice(None)) for device, rows in enumerate(self._rows)}


def test_a_process_reads_no_more_than_its_devices_take():
    assert share_of_batch(_Process(slice(None)), (8, 4)) == Share(0, 1)
    assert share_of_batch(_Process(slice(4, 6), slice(6, 8)), (8, 4)) == Share(1, 2)
    assert share_of_batch(_Process(slice(2, 3), slice(2, 3)), (6, 4)) == Share(2, 6), "cut along tokens or heads"
    assert share_of_batch(_Process(slice(0, 1), slice(2, 3)), (8, 4)) == Share(0, 2)
    assert share_of_batch(_Process(slice(0, 1), slice(7, 8)), (8, 4)) == Share(0, 1)


def test_rows_are_placed_where_they_belong():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data", None))
    rows = np.arange(12, dtype=np.int32).reshape(4, 3)
    np.testing.assert_array_equal(place(rows, Share(0, 1), sharding), rows)


# ------------------------------------------------------------------ whole runs
TINY = tiny_run(
    steps=8,
    validation={"every": 4, "batches": 1},
    checkpoints={"every": 4},
    watchdog={"heartbeat_s": HEARTBEAT_S},
)
ENDLESS = {"steps": 10**9, "validation": {"every": 10**9, "batches": 1}, "checkpoints": {"every": 10**9}}
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_NUM_CPU_DEVICES": "1"}


class Processes:
    """A run in several processes of this machine, over loopback."""

    def __init__(self, folder: Path, count: int, *, environments: Sequence[Mapping[str, str]] = (), **changes):
        self.run_dir = folder / "run"
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(TINY | {"train": TINY["train"] | changes}))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "scripts/train.py", str(config), "--run-dir", str(self.run_dir)]
        command += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)]
        environments = environments or [{}] * count
        self.processes = [
            subprocess.Popen(
                [*command, "--process-id", str(number)],
                env={**os.environ, **QUICK, **environments[number]},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait(self) -> list[tuple[int, str, list[str]]]:
        """Exit code, output and error lines of each; jaxlib's own messages left out."""
        ended = []
        for process in self.processes:
            out, err = process.communicate(timeout=LIMIT_S)
            ours = [line for line in err.splitlines() if line and not re.match(r"[EWI]\d{4} ", line)]
            ended.append((process.returncode, out, ours))
        return ended

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not any(record["step"] >= step for record in self.metrics()):
            assert time.monotonic() < deadline and all(process.poll() is None for process in self.processes)
            time.sleep(0.05)

    def metrics(self) -> list[dict]:
        return read_metrics(self.run_dir / "metrics.jsonl")


@pytest.fixture(scope="module")
def alone(quick_compilation, tmp_path_factory) -> list[dict]:
    """What one process measures."""
    result = train(RunConfig.model_validate(TINY), tmp_path_factory.mktemp("alone"))
    return read_metrics(result.run_dir.metrics)


def assert_same_numbers(got: list[dict], want: list[dict]) -> None:
    assert [record["step"] for record in got] == [record["step"] for record in want]
    for name in ("loss_nats", "grad_norm", "validation_loss_nats"):
        values = [[record[name] for record in records if name in record] for records in (got, want)]
        np.testing.assert_allclose(*values, rtol=LOSS_TOLERANCE)
    assert [record["total_tokens"] for record in got] == [record["total_tokens"] for record in want]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_what_one_trains(alone, tmp_path, count):
    with Processes(tmp_path, count) as run:
        ended = run.wait()
    assert [code for code, _, _ in ended] == [0] * count, ended
    assert_same_numbers(run.metrics(), alone)
    assert "finished 8 steps" in ended[0][1]
    assert all("step" not in out and not errors for _, out, errors in ended[1:]), "one process speaks"
    assert (run.run_dir / "log.txt").read_text().count("finished 8 steps") == 1
    environment = json.loads((run.run_dir / "environment.json").read_text())
    assert environment["process_count"] == count and len(environment["devices"]) == count
    assert sorted(path.name for path in (run.run_dir / "checkpoints").iterdir()) == ["4", "8"]
    assert not (run.run_dir / "stacks").exists()


@pytest.mark.slow
def test_processes_of_open_mpi_find_each_other(alone, tmp_path):
    if not shutil.which("mpirun"):
        pytest.skip("Open MPI is not installed: apt-get install openmpi-bin")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TINY))
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "scripts/train.py"]
    command += [f"{tmp_path}/config.yaml", "--run-dir", f"{tmp_path}/run"]
    ended = subprocess.run(command, env=os.environ | QUICK, capture_output=True, text=True, timeout=LIMIT_S)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("finished 8 steps") == 1
    assert_same_numbers(read_metrics(tmp_path / "run" / "metrics.jsonl"), alone)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["process_count"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_to_one_stops_all_after_the_same_step(alone, tmp_path, victim):
    with Processes(tmp_path, 2, **ENDLESS) as run:
        run.wait_for_step(5)
        run.processes[victim].send_signal(signal.SIGTERM)
        ended = run.wait()
    assert [code for code, _, _ in ended] == [143, 143], ended
    last = run.metrics()[-1]["step"]
    assert [path.name for path in (run.run_dir / "checkpoints").iterdir()] == [str(last)]
    assert f"SIGTERM: stopped after step {last}" in ended[0][1]
    np.testing.assert_allclose([r["loss_nats"] for r in run.metrics()[:5]], [r["loss_nats"] for r in alone[:5]], 1e-6)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_one_line_each(tmp_path):
    with Processes(tmp_path, 3, batch_size=9, **ENDLESS) as run:
        run.wait_for_step(5)
        run.processes[1].kill()
        start = time.monotonic()
        ended = run.wait()
    assert time.monotonic() - start < 2 * HEARTBEAT_S + SPARE_S
    for number in (0, 2):
        line = f"error: process {number} of 3: process 1 is gone: no sign of life for {HEARTBEAT_S} s"
        assert ended[number][0] == 1 and ended[number][2] == [line]


WAITS = """
import os, signal, sys, time
from kimi_jax.parallel.processes import find_place, joined
number, port = sys.argv[1:]
with joined(find_place(f"127.0.0.1:{port}", 2, int(number)), heartbeat_s=5):
    if number == "1":
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_one_that_waits_for_the_end_sees_that_another_is_killed(start_process):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    commands = [[sys.executable, "-c", WAITS, number, port] for number in "01"]
    first, second = (start_process(command, stderr=subprocess.PIPE, text=True) for command in commands)
    said = first.communicate(timeout=LIMIT_S)[1]
    assert "error: process 0 of 2: process 1 is gone: no sign of life for 5 s" in said
    assert first.returncode == 1
    assert second.wait(LIMIT_S) == -signal.SIGKILL


@pytest.mark.slow
def test_the_others_end_when_process_0_is_killed(tmp_path):
    with Processes(tmp_path, 2, **ENDLESS) as run:
        run.wait_for_step(5)
        run.processes[0].kill()
        start = time.monotonic()
        ended = run.wait()
    assert time.monotonic() - start < 2 * HEARTBEAT_S + SPARE_S and ended[1][0] != 0, "jaxlib ends them"


@pytest.mark.slow
def test_an_error_of_one_ends_all_and_names_it(tmp_path, monkeypatch):
    """Process 1 cannot prepare its data."""
    monkeypatch.setitem(TINY, "data", {"kind": "stdlib", "seq_len": 16})
    with Processes(tmp_path, 2, environments=[{}, {"KIMI_JAX_CACHE": "/proc/nowhere"}], **ENDLESS) as run:
        ended = run.wait()
    assert [code for code, _, _ in ended] == [1, 2], ended
    (own,) = ended[1][2]
    assert own.startswith("error: ") and "set KIMI_JAX_CACHE" in own
    assert ended[0][2] == [f"error: process 0 of 2: ended by the failure of process 1 of 2: {own[7:]}"]


@pytest.mark.slow
def test_an_error_that_all_meet_is_said_once(tmp_path):
    with Processes(tmp_path, 2, batch_size=7) as run:
        ended = run.wait()
    assert [code for code, _, _ in ended] == [2, 2]
    said = [line for _, _, errors in ended for line in errors]
    assert len(said) == 1 and said[0].startswith("error: train.batch_size=7: ")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    """Two processes, then four with a device each, then one: the examples and losses of one process."""
    for count, steps in ((2, 3), (4, 6)):
        with Processes(tmp_path, count, steps=steps) as run:
            ended = run.wait()
        assert [code for code, _, _ in ended] == [0] * count, ended
    train(RunConfig.model_validate(TINY), run.run_dir)
    losses = [[record["loss_nats"] for record in records] for records in (run.metrics(), alone)]
    np.testing.assert_allclose(*losses, rtol=LOSS_TOLERANCE)
    assert run.metrics()[-1]["total_tokens"] == alone[-1]["total_tokens"]
