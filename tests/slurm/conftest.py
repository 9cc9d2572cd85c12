"""A Slurm of this machine alone: slurmctld and slurmd of Debian, on loopback, for the length of a session."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

START_S = 180
ENDED = ("", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Runs the daemons; SLURM_CONF names their configuration to every command."""
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch"))):
        pytest.skip("Slurm is not installed: apt-get install slurmctld slurmd slurm-client")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    host, (controller, daemon) = socket.gethostname().partition(".")[0], _free_ports(2)
    conf = folder / "slurm.conf"
    user = os.environ.get("USER") or "root"
    conf.write_text(CONF.format(host=host, controller=controller, daemon=daemon, folder=folder, user=user))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(conf))
        with contextlib.ExitStack() as daemons:
            for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
                with (folder / f"{command[0]}.out").open("w") as output:
                    daemon = daemons.enter_context(subprocess.Popen(command, stdout=output, stderr=output))
                    daemons.callback(_end, daemon)
            daemons.callback(subprocess.run, ["scancel", "--user", user], check=False, timeout=60)
            _wait_until_idle(folder)
            yield Slurm(folder)


class Slurm:
    """Commands of Slurm that the tests use."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, *command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, ...; empty once the job is forgotten."""
        listed = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=60)
        return listed.stdout.strip()

    def wait(self, job: str, *until: str, limit_s: float = 300) -> None:
        """Waits until a job has one of the states."""
        deadline = time.monotonic() + limit_s
        while (state := self.state(job)) not in until:
            assert time.monotonic() < deadline, f"job {job} is {state!r}, none of {until}"
            time.sleep(0.2)

    def wait_for_end(self, job: str, limit_s: float = 300) -> None:
        self.wait(job, *ENDED, limit_s=limit_s)

    def start_again_now(self, job: str) -> None:
        """A job that was put back into the queue would wait for two minutes."""
        self.wait(job, "PENDING")
        # Slurm kills what starts in the second in which it was put back.
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")


def _end(daemon: subprocess.Popen) -> None:
    """Asks it to go, and sees to it."""
    daemon.terminate()
    try:
        daemon.wait(60)
    except subprocess.TimeoutExpired:
        daemon.kill()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _wait_until_idle(folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        listed = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
        if listed.stdout.strip() == "idle":
            return
        time.sleep(0.2)
    logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
    raise AssertionError(f"no node came up in {START_S} s\n{logs}")
