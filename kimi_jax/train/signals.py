"""How a run is asked to stop: SIGTERM or SIGINT once lets it write a checkpoint, a second one ends it at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
    """Notes the first stop signal and puts the former handlers back, so that a second one acts as it always did.

    Outside the main thread Python allows no handlers; nothing is caught there.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: object) -> None:
        request.signal = signal.Signals(number)
        restore()

    former = {number: signal.signal(number, note) for number in SIGNALS}

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    try:
        yield request
    finally:
        restore()
