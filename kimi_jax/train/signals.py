"""What a signal does: it asks a run to stop and to save, or it ends a program that cleans up behind itself."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN_S = 0.05
ECHO_S = 1.0


def exit_code(number: signal.Signals | None) -> int:
    """128 plus the number of the signal that ended something, as shells report it; 0 without one."""
    return 128 + number if number else 0


class StopRequest:
    """Whether a signal came, and which; `exit_code` is 128 plus its number, as shells report it."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        return exit_code(self.signal)


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Notes the first SIGTERM or SIGINT; a second one acts as it always did.

    The same signal within a second is an echo, not a second one: Linux sends one for each thread of a launcher that is
    killed, and `timeout` and batch systems send one to a process and one to its group. Outside the main thread Python
    allows no handlers; nothing is caught there.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    first_s = 0.0

    def note(number: int, frame: object) -> None:
        nonlocal first_s
        if request.signal is None:
            request.signal, first_s = signal.Signals(number), time.monotonic()
        elif number != request.signal or time.monotonic() - first_s > ECHO_S:
            restore()
            signal.raise_signal(number)

    former = {number: signal.signal(number, note) for number in SIGNALS}

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    try:
        yield request
    finally:
        restore()


class _Terminated(SystemExit):
    """SIGTERM as an exception."""


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Lets SIGTERM unwind the body, so that half-written files are removed; the exit code is 143.

    Python drops an exception that is raised within a callback of the garbage collector, of which jax has one, or within
    a destructor. The signal is then sent again.
    """

    def leave(number: int, frame: object) -> None:
        raise _Terminated(exit_code(signal.Signals(number)))

    def send_again(dropped: Any) -> None:
        if isinstance(dropped.exc_value, _Terminated):
            threading.Timer(AGAIN_S, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            former_hook(dropped)

    former_handler, former_hook = signal.signal(signal.SIGTERM, leave), sys.unraisablehook
    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = former_hook
        signal.signal(signal.SIGTERM, former_handler)
