"""Becomes a command that does not outlive its launcher: python tethered.py LAUNCHER_PID COMMAND [ARGUMENT ...]"""

# A program of its own: what runs between fork and exec in a launcher with threads (JAX starts some) may hang.
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def tethered(command: list[str]) -> list[str]:
    """The command that runs `command` and, on Linux, gets SIGTERM when this process is gone, even by kill -9."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main() -> None:
    launcher, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # outlasts exec
        if os.getppid() != launcher:  # it was gone before
            os.kill(os.getpid(), signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
