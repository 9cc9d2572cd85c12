"""What a user's mistake looks like: one clear line each, exit code 2, no traceback."""

import argparse
import contextlib
import errno
import os
import select
import signal
import sys
from collections.abc import Iterator, Sequence

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # the disk takes no more
REFUSED = {errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG, errno.EEXIST, errno.EISDIR, errno.ENOTDIR}

EXHAUSTED = ("RESOURCE_EXHAUSTED", "Out of memory")  # in messages of jax's JaxRuntimeError: a device's memory is full


class UserError(ValueError):
    """A mistake in the user's config, data, checkpoint, weights or environment.

    Args:
      problems: one line each; every line names the thing, the value and the rule.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Wraps a script's main: prints each problem of a `UserError` to standard error and exits with code 2.

    So does a disk that is full, something else where a file belongs, and memory, of the host or of a device, that does
    not suffice.
    """
    try:
        yield
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest of the output goes nowhere
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in FULL | REFUSED:
            raise
        name, what = error.filename or "a file of this run", "written" if error.errno in FULL else "used"
        print(f"error: {name}: cannot be {what}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in EXHAUSTED):
            raise
        what = next(iter(str(error).splitlines()), "of this process")
        print(f"error: memory does not suffice: {what}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, as behind `| head`; another pipe may have broken, to a worker."""
    output = select.poll()
    output.register(sys.stdout, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))


@contextlib.contextmanager
def plain_interrupts() -> Iterator[None]:
    """Wraps a script's slow imports: Ctrl-C ends the process at once, as it ends one that is not Python.

    Extensions that are being loaded make errors of their own of a KeyboardInterrupt.
    """
    former = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def positive(text: str) -> int:
    """The `type` of a command-line argument that is a whole number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a whole number from 1 on")
    return int(text)
