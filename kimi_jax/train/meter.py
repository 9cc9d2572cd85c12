"""Tokens per second of training: which seconds count."""

import contextlib
import time
from collections.abc import Iterator


class Meter:
    """Tokens per second of training.

    Pauses for validation, checkpoints and plots do not count, nor does what a process adds first, whose time starts the
    threads that read data.
    """

    def __init__(self) -> None:
        self.tokens = self.lap_tokens = 0
        self.seconds = self.lap_seconds = 0.0
        self._since: float | None = None

    def add(self, tokens: int) -> None:
        """Notes the tokens of steps that have just ended."""
        if self._since is None:
            self._since = time.perf_counter()
            return
        self.tokens += tokens
        self.lap_tokens += tokens

    @property
    def is_running(self) -> bool:
        """Whether something was added, so that time counts."""
        return self._since is not None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the time of the body off; only after the first `add`."""
        self._count()
        yield
        self._since = time.perf_counter()

    def lap(self) -> dict[str, float]:
        """The rate since the last lap; empty if no step ended since."""
        self._count()
        if not self.lap_tokens:
            return {}
        rate = self.lap_tokens / self.lap_seconds
        self.lap_tokens, self.lap_seconds = 0, 0.0
        return {"tokens_per_s": rate}

    @property
    def tokens_per_s(self) -> float:
        """Of this process so far; 0 if nothing was added after the first time."""
        return self.tokens / self.seconds if self.tokens else 0.0

    def _count(self) -> None:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.seconds += seconds
        self.lap_seconds += seconds
