"""What a run that hangs leaves: one line, the stacks of all its threads, and, unless forbidden, no process."""

import contextlib
import faulthandler
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from kimi_jax.config import train as config

MARGIN_S = 1.0  # the line comes before the stacks


class Watchdog:
    """Waits for silence; a context manager.

    The stacks are written, and the process ended, by a thread that needs no lock of the interpreter, so that a library
    that hangs while it holds that lock is seen, too.

    Args:
      cfg: how long a silence is.
      run_dir: the stacks go to `stacks/<process>.txt` in it.
      process: the number of this process.
    """

    def __init__(self, cfg: config.Watchdog, run_dir: Path, process: int):
        self._cfg, self._process = cfg, process
        self._path = run_dir / "stacks" / f"{process}.txt"
        self._last_step: int | None = None
        self._fed = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if self._cfg.silence_s is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w")
            threading.Thread(target=self._announce, name="watchdog", daemon=True).start()
            self._arm()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._ended.set()
        if self._cfg.silence_s is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()
                with contextlib.suppress(OSError):  # another process's stacks are there
                    self._path.parent.rmdir()

    def feed(self, step: int) -> None:
        """Notes that a step has ended."""
        self._last_step = step
        if self._cfg.silence_s is not None and time.monotonic() - self._fed > min(MARGIN_S, self._cfg.silence_s / 10):
            self._arm()

    def _arm(self) -> None:
        self._fed = time.monotonic()
        seconds = self._cfg.silence_s + MARGIN_S
        faulthandler.dump_traceback_later(seconds, file=self._file, exit=self._cfg.exit)

    def _announce(self) -> None:
        """Says once per silence what is about to be written."""
        announced = None
        while not self._ended.wait(min(0.2 * MARGIN_S, self._cfg.silence_s / 10)):
            fed = self._fed
            if fed != announced and time.monotonic() - fed > self._cfg.silence_s:
                announced = fed
                where = f"after step {self._last_step}" if self._last_step else "before the first step"
                line = f"error: process {self._process}: no step for {self._cfg.silence_s:g} s {where}"
                end = "; this process ends" if self._cfg.exit else ""
                print(f"{line}; stacks of its threads: {self._path}{end}", file=sys.stderr, flush=True)
