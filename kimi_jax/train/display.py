"""What a run says: on the terminal with live progress, as plain lines elsewhere, and always in log.txt."""

import contextlib
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kimi_jax.train.metrics import Record
from kimi_jax.train.run_dir import naming

LOG_WIDTH = 140
PLAIN_LINE_SECONDS = 10.0  # without a terminal, step lines come no more often than this


class Display:
    """The terminal and log.txt as one place to print to; a context manager.

    Args:
      log: appended to.
      steps: of the whole run.
    """

    def __init__(self, log: Path, *, steps: int):
        self._terminal = Console(soft_wrap=True)
        if not self._terminal.is_terminal:
            self._terminal.width = LOG_WIDTH
        log.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = log, log.open("a")
        self._log = Console(file=self._file, width=LOG_WIDTH, no_color=True)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=self._terminal,
            refresh_per_second=4,
            transient=True,
            disable=not self._terminal.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, numbers="", start=False)
        self._steps = steps
        self._last_line_s = float("-inf")
        self._validation = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._progress.stop()
        reported = contextlib.suppress(OSError) if error else naming(self._path)  # the first error is the one to report
        with reported, contextlib.closing(self._file):
            if error is not None:
                self._log.print(f"ended by {kind.__name__}: {error}", markup=False, highlight=False)

    def print(self, *objects: RenderableType) -> None:
        """Prints lines or tables to the terminal and the log."""
        for object_ in objects:
            self._terminal.print(object_, markup=False, highlight=False)
            self._to_log(object_)

    def start_steps(self, step: int) -> None:
        """Shows the progress bar, `step` steps being done."""
        self._progress.start()
        self._progress.update(self._task, completed=step)
        self._progress.start_task(self._task)

    def show_step(self, record: Record, *, logged: bool) -> None:
        """Moves the bar; says the numbers of a step that is logged."""
        if "validation_loss_nats" in record:
            self._validation = _validation_text(record)
        if not logged:
            self._progress.update(self._task, completed=record["step"])
            return
        numbers = "  ".join(filter(None, [_step_text(record), self._validation]))
        self._progress.update(self._task, completed=record["step"], numbers=numbers)
        line = f"step {record['step']}/{self._steps}  {numbers}"
        self._to_log(line)
        due = time.monotonic() - self._last_line_s >= PLAIN_LINE_SECONDS or "validation_loss_nats" in record
        if self._progress.disable and due:
            self._terminal.print(line, markup=False, highlight=False)
            self._last_line_s = time.monotonic()

    def _to_log(self, object_: RenderableType) -> None:
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {object_}" if isinstance(object_, str) else object_
        with naming(self._path):
            self._log.print(text, markup=False, highlight=False, soft_wrap=isinstance(object_, str))
            self._file.flush()


def _step_text(record: Record) -> str:
    parts = [f"loss {record['loss_nats']:.4f}", f"grad norm {record['grad_norm']:.3g}", f"lr {record['lr']:.2e}"]
    if record.get("tokens_per_s"):
        parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
    return "  ".join(parts)


def _validation_text(record: Record) -> str:
    text = f"validation {record['validation_loss_nats']:.4f}"
    bits = record.get("validation_bits_per_byte")
    return text if bits is None else f"{text} ({bits:.3f} bits per byte)"


class Silence:
    """What the processes of a run say that are not the first: nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        pass

    def print(self, *objects: RenderableType) -> None:
        pass

    def start_steps(self, step: int) -> None:
        pass

    def show_step(self, record: Record, *, logged: bool) -> None:
        pass
