"""What a run directory holds, which run may write into it, and what is recorded about its making."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import jax

from kimi_jax.config.load import dump, load
from kimi_jax.config.train import RunConfig
from kimi_jax.errors import UserError
from kimi_jax.parallel.processes import on_main

type Resume = Literal["auto", "never", "must"]

PACKAGES = ("kimi_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pydantic")
ABSENT = "(absent)"
LOCK = ".lock"
LOOK_S = 0.5
IN_USE = "another process is training in it"

# What may change when a run goes on: how long it is, how often it reports, and how (not what) it computes.
FREE_KEYS = (
    "train.steps",
    "train.log_every",
    "train.validation",
    "train.evaluations",
    "train.checkpoints",
    "train.non_finite",
    "train.remat",
    "train.loss_chunk",
    "train.grad_accum",
    "mesh",
    "train.watchdog",
    "train.flags",
    "logging",
)
FREE_ENDINGS = (".implementation", ".chunk_size")

# Where the data lies. Checkpoints know what it holds, and a run goes on over no other.
PLACES = ("data.train", "data.validation")

# What a start leaves that ended before config.yaml was written, over wrong data for instance: the next one may go on.
BEFORE_CONFIG = (LOCK, "checkpoints", "log.txt", "slurm", "stacks")


@dataclass(frozen=True)
class RunDir:
    """The paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def loss_plot(self) -> Path:
        return self.path / "plots" / "loss.png"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def ended(self) -> Path:
        """Says at which step the run was ended before its last one, for good."""
        return self.path / "ended.json"

    def mark_ended(self, step: int) -> None:
        write_whole(self.ended, json.dumps({"step": step}) + "\n")

    @property
    def saved_steps(self) -> list[int]:
        """The steps of whole checkpoints, in no order."""
        return [int(path.name) for path in self.checkpoints.glob("[0-9]*") if path.name.isdecimal()]

    @property
    def has_progress(self) -> bool:
        """Whether steps were taken here: something that must not be lost."""
        return any(self.checkpoints.glob("[0-9]*")) or (self.metrics.exists() and self.metrics.stat().st_size > 0)

    def load_config(self) -> RunConfig:
        """Reads the resolved config of the run."""
        return load(self.config, [], RunConfig)


@contextlib.contextmanager
def claim(path: Path, cfg: RunConfig, resume: Resume) -> Iterator[tuple[RunDir, list[str]]]:
    """Holds a run directory for one run, created if need be, after checking that the run may use it.

    Process 0 holds it for all processes of the run.

    Yields:
      The directory, and one line per config key that differs from the last time and may do so.

    Raises:
      UserError: it is no run directory, is in use, belongs to another config, `resume` forbids it, or a process does
        not see it.
    """
    with contextlib.ExitStack() as stack:
        changes = on_main(lambda: stack.enter_context(_hold(path, cfg, resume)))
        if not (path / LOCK).exists():
            where = f"process {jax.process_index()} on {platform.node()}"
            raise UserError(f"run directory {path}: {where} does not see it; it must lie on a disk that all share")
        yield RunDir(path), changes


def check_usable(path: Path, cfg: RunConfig, resume: Resume) -> list[str]:
    """What `claim` checks of a directory, without holding it, and what it yields of changes.

    Raises:
      UserError: it is no run directory, belongs to another config, or `resume` forbids it.
    """
    run_dir = RunDir(path)
    _check_is_run_dir(run_dir, resume)
    return _check_config(run_dir, cfg) if run_dir.has_progress else []


@contextlib.contextmanager
def _hold(path: Path, cfg: RunConfig, resume: Resume) -> Iterator[list[str]]:
    _check_is_run_dir(RunDir(path), resume)  # before it is made
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / LOCK, "w")  # noqa: SIM115 - held until the process ends or lets go
    except OSError as error:
        raise UserError(f"run directory {path}: cannot be written: {error.strerror}") from error
    with lock:
        try:
            _lock(lock)
        except BlockingIOError as error:
            raise UserError(f"run directory {path}: {IN_USE}") from error
        except OSError as error:  # some shared disks know no locks
            raise UserError(f"run directory {path}: {LOCK} cannot be locked: {error.strerror}") from error
        yield check_usable(path, cfg, resume)


def _lock(file: TextIO) -> None:
    """Takes the lock; a launcher that looks whether it is free has it for a moment, a run for longer."""
    end = time.monotonic() + LOOK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(LOOK_S / 10)


def _check_is_run_dir(run_dir: RunDir, resume: Resume) -> None:
    path = run_dir.path
    if path.exists() and not path.is_dir():
        raise UserError(f"run directory {path}: is a file")
    strangers = path.is_dir() and any(entry.name not in BEFORE_CONFIG for entry in path.iterdir())
    if (strangers or run_dir.has_progress) and not run_dir.config.exists():
        raise UserError(f"run directory {path}: holds files but no config.yaml, so it is no run; name another")
    if resume == "must" and not run_dir.saved_steps:
        raise UserError(f"run directory {path}: --resume must, but there is no checkpoint in it")
    if resume == "never" and run_dir.has_progress:
        raise UserError(f"run directory {path}: already holds a run, and --resume never does not overwrite one")


def _check_config(run_dir: RunDir, cfg: RunConfig) -> list[str]:
    differing = list(config_differences(run_dir.load_config(), cfg))
    fixed = [change for change in differing if not _is_free(change[0]) and not _has_moved(*change)]
    forbidden = [f"{key}: {was} there, {now} now" for key, was, now in fixed]
    if forbidden:
        first = f"run directory {run_dir.path}: belongs to another config; name another directory, or make equal:"
        raise UserError([first, *(f"  {line}" for line in forbidden)])
    return [f"{key}: {was} -> {now}" for key, was, now in differing]


def _is_free(key: str) -> bool:
    return key.endswith(FREE_ENDINGS) or any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _has_moved(key: str, was: Any, now: Any) -> bool:
    return key in PLACES and isinstance(was, str) and isinstance(now, str)


def fixed_values(cfg: RunConfig) -> dict[str, Any]:
    """Dotted key to value of everything that may not change while a run lasts: what it computes, not for how long."""
    return {key: value for key, value in config_values(cfg).items() if not _is_free(key)}


def config_values(cfg: RunConfig) -> dict[str, Any]:
    """Dotted key to value of everything."""
    return dict(_leaves(cfg.model_dump(mode="json")))


def config_differences(was: RunConfig, now: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted key, value, value) for each leaf in which two configs differ."""
    old, new = config_values(was), config_values(now)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key, ABSENT) != new.get(key, ABSENT):
            yield key, old.get(key, ABSENT), new.get(key, ABSENT)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else key)
    else:
        yield path, value


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name that becomes `path` when the block ends well: a reader sees the old file or the new.

    After an error nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield temporary
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # renamed, or a disk that refuses this, too
            temporary.unlink()


def write_whole(path: Path, text: str) -> None:
    """Writes a `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an error of the system the name of the file that it is about; writing to an open one has none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def describe_environment() -> dict[str, Any]:
    """Source revision, package versions and devices, for environment.json."""
    return {
        "git": _git_revision(Path(__file__).parent),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()],
        "process_count": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def record_start(run_dir: RunDir, cfg: RunConfig) -> dict[str, Any]:
    """Writes config.yaml and environment.json; returns the latter's content."""
    environment = describe_environment()
    write_whole(run_dir.config, dump(cfg))
    write_whole(run_dir.environment, json.dumps(environment, indent=2) + "\n")
    return environment


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision(folder: Path) -> dict[str, Any] | None:
    """Revision and whether tracked files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), "--no-optional-locks", *arguments]  # someone may be committing there
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None
