"""How benches take times on a GPU, when they refuse to, and the table they print."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

QUEUED_MS, REPEATS = 100, 5  # of calls queued back to back, and how often: the median is printed
FEWEST = 4  # calls
HBM_BYTES_PER_S = {"NVIDIA H100 80GB HBM3": 2.94e12, "NVIDIA H200": 4.3e12}  # measured: copy, bytes read and written
COLUMNS = ("ms", "x ours", "GB/s", "TFLOP/s", "of byte floor", "GB compiled", "GB device peak")


class WrongResult(RuntimeError):
    """A result beyond its tolerance: its time would mean nothing."""


class OutOfMemory(RuntimeError):
    """A peer did not fit beside our arrays."""


class Work(NamedTuple):
    """The least that a call must do."""

    moved_bytes: int
    """Every input read once, every result written once."""
    operations: int
    """Floating-point, one multiplication and one addition counted as two."""


@dataclass(frozen=True)
class Row:
    """One line of the table: one call of one implementation, on one case.

    Args:
      call: what was timed, as "forward".
      name: implementation, or peer if not `ours`.
      ms: milliseconds of one call; None: not measured, `note` says why.
      compiled_gb: arguments, results and temporary memory of our compiled call; a peer's own count of its peak.
      device_gb: peak of the whole process on the device, where this call set it.
    """

    case: str
    call: str
    name: str
    ours: bool
    work: Work
    ms: float | None = None
    compiled_gb: float | None = None
    device_gb: float | None = None
    note: str = ""


class Timed(NamedTuple):
    """What `time_compiled` measured."""

    ms: float
    compiled_gb: float
    device_gb: float | None
    values: Any


def median_ms(average: Callable[[int], float]) -> float:
    """Median of repeats of `average`, which returns the milliseconds of one of so many calls queued back to back.

    The first start and the last wait take 0.4 ms on an H100, which is nothing of QUEUED_MS.
    """
    average(1)
    calls = max(FEWEST, math.ceil(QUEUED_MS / average(FEWEST)))
    return statistics.median(average(calls) for _ in range(REPEATS))


def time_queued(call: Callable[[], object]) -> float:
    """Median device time of one call in milliseconds; it must take the device longer than the host, about 0.1 ms."""

    def average(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls * 1e3

    return median_ms(average)


def time_compiled(function: Callable, *arguments) -> Timed:
    """Compiles `function` for these arguments, calls it and times it."""
    compiled = jax.jit(function).lower(*arguments).compile()
    usage = compiled.memory_analysis()
    used = usage.argument_size_in_bytes + usage.output_size_in_bytes + usage.temp_size_in_bytes
    before = _device_peak()
    values = jax.block_until_ready(compiled(*arguments))
    after = _device_peak()
    ms = time_queued(lambda: compiled(*arguments))
    return Timed(ms, (used - usage.alias_size_in_bytes) / 1e9, after / 1e9 if after > before else None, values)


def _device_peak() -> int:
    """Bytes; the allocator's count cannot be reset."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


@jax.jit
def _error_ratio(got, want):
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.sqrt(jnp.mean(jnp.square(got - want))) / (jnp.sqrt(jnp.mean(jnp.square(want))) + 1e-8)


def check(
    got: Mapping[str, Float[Array, "..."]], want: Mapping[str, Float[Array, "..."]], tolerance: Mapping[str, float]
) -> None:
    """Compares by name, on the device, those arrays that have a tolerance.

    Raises:
      WrongResult: an error ratio (RMS of the difference to RMS of `want`) exceeds its tolerance, or is nan.
    """
    for name, limit in tolerance.items():
        if name in want and not (ratio := float(_error_ratio(got[name], want[name]))) <= limit:
            raise WrongResult(f"WRONG, so no time: error ratio of {name} is {ratio:.1e}, may be {limit:.0e}")


REASONS = (WrongResult, OutOfMemory, NotImplementedError, ImportError, jax.errors.JaxRuntimeError)


def reason(error: Exception) -> str:
    """One short line for the table; of a refusal, the reason alone."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return (line.split("; ", 1)[-1] if isinstance(error, NotImplementedError) else line)[:100]


def measured(row: Row, measure: Callable[[], Mapping[str, float | None]]) -> Row:
    """The row with the fields that `measure` returns, or with the reason why there is no time."""
    try:
        return dataclasses.replace(row, **measure())
    except REASONS as error:
        return dataclasses.replace(row, note=reason(error))


def table(rows: Sequence[Row], device: str) -> str:
    """The rows as Markdown; ratios are of a row's time to our fastest of the same case and call."""
    lines = [f"| case | call | implementation | {' | '.join(COLUMNS)} |", "|---" * (3 + len(COLUMNS)) + "|"]
    for row in rows:
        ours = [r.ms for r in rows if r.ours and r.ms and (r.case, r.call) == (row.case, row.call)]
        cells = _cells(row, min(ours, default=None), HBM_BYTES_PER_S.get(device))
        lines.append(f"| {row.case} | {row.call} | {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(row: Row, best: float | None, bandwidth: float | None) -> list[str]:
    if row.ms is None:
        return [row.note, *[""] * (len(COLUMNS) - 1)]
    seconds, optional = row.ms / 1e3, functools.partial("{:.2f}".format)
    return [
        f"{row.ms:.3f}",
        f"{row.ms / best:.2f}" if best else "",
        f"{row.work.moved_bytes / seconds / 1e9:.0f}",
        f"{row.work.operations / seconds / 1e12:.1f}",
        f"{row.work.moved_bytes / bandwidth / seconds:.0%}" if bandwidth else "",
        optional(row.compiled_gb) if row.compiled_gb else "",
        optional(row.device_gb) if row.device_gb else "",
    ]
