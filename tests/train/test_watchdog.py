"""Silence: one line, the stacks of all threads, and the end of the process unless the config forbids it."""

import subprocess
import sys
import textwrap

import pytest

SILENCE_S = 1
LIMIT_S = 300
SCRIPT = """
import pathlib, sys, time
from kimi_jax.config.train import Watchdog as Config
from kimi_jax.train.watchdog import Watchdog

def hang_here():
    while exit or not stacks.stat().st_size:
        time.sleep(0.01)

folder, exit = pathlib.Path(sys.argv[1]), sys.argv[2] == "exit"
stacks = folder / "stacks" / "3.txt"
with Watchdog(Config(silence_s=1, exit=exit), folder, 3) as watchdog:
    for step in range(1, 13):
        time.sleep(0.1)
        watchdog.feed(step)
    print("fed", flush=True)
    hang_here()
    print("went on")
print(stacks.exists())
"""


def _run(folder, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


@pytest.mark.parametrize("exit", [True, False])
def test_silence_leaves_a_line_and_the_stacks(tmp_path, exit):
    ended = _run(tmp_path, "exit" if exit else "stay")
    path = tmp_path / "stacks" / "3.txt"
    end = "; this process ends" if exit else ""
    line = f"error: process 3: no step for {SILENCE_S:g} s after step 12; stacks of its threads: {path}{end}"
    assert ended.stderr.splitlines() == [line]
    assert "hang_here" in path.read_text() and "Thread" in path.read_text()
    assert ended.returncode == (1 if exit else 0)
    assert ended.stdout.split() == (["fed"] if exit else ["fed", "went", "on", "True"])


def test_no_silence_leaves_nothing(tmp_path):
    from kimi_jax.config.train import Watchdog as Config
    from kimi_jax.train.watchdog import Watchdog

    with Watchdog(Config(silence_s=60), tmp_path, 0) as watchdog:
        watchdog.feed(1)
    with Watchdog(Config(silence_s=None), tmp_path, 0) as watchdog:
        watchdog.feed(1)
    assert not list(tmp_path.iterdir())
