"""Files of a run on a disk that says no: the file is named, nothing half-written stays, the first error is told."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import tiny_run

from kimi_jax.errors import UserError
from kimi_jax.train.display import Display
from kimi_jax.train.metrics import JsonLines
from kimi_jax.train.run_dir import _git_revision, whole_file, write_whole

FULL = Path("/dev/full")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"
    write_whole(path, "old")
    with pytest.raises(OSError) as caught, whole_file(path) as temporary:
        temporary.write_text("half of")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(not FULL.exists(), reason="needs a disk that is full")
def test_what_is_appended_to_is_named(tmp_path):
    sink = JsonLines(tmp_path / "metrics.jsonl", last_step=0)
    sink.close()
    sink._file = FULL.open("a")
    for write in (lambda: sink.write({"step": 1}), sink.close):
        with pytest.raises(OSError) as caught:
            write()
        assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    log = tmp_path / "log.txt"
    log.symlink_to(FULL)
    with pytest.raises(OSError) as caught, Display(log, steps=1) as display:
        display.print("a line")
    assert caught.value.filename == str(log)
    with pytest.raises(UserError, match="the first"), Display(log, steps=1):
        raise UserError("the first")


def test_the_repository_is_only_read(tmp_path):
    """`git status` would write down what it finds, and make a commit fail that comes at the same time."""
    git = lambda *words: subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "m")
    os.utime(tmp_path / "file", (1, 1))
    before = (tmp_path / ".git" / "index").read_bytes()
    assert _git_revision(tmp_path)["dirty"] is False
    assert (tmp_path / ".git" / "index").read_bytes() == before


@pytest.mark.slow
def test_a_run_on_a_full_disk_is_one_line(tmp_path):
    """As large as a file may be, so that the first checkpoint and the first plot fail; then the disk has room."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_run(steps=4, checkpoints={"every": 2})))
    command = [sys.executable, "scripts/train.py", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *command]  # in KiB
    full = subprocess.run(limited, capture_output=True, text=True, env=environment)
    assert full.returncode == 2
    # What tensorstore prints of asyncio is not ours to catch.
    assert full.stderr.splitlines()[-1] == f"error: {tmp_path}/run/plots/loss.png: cannot be written: File too large"
    assert "orbax" not in full.stderr and not list((tmp_path / "run").rglob("*.tmp"))
    subprocess.run(command, check=True, capture_output=True)
