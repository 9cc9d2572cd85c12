"""Times KDA against its peers: every implementation in one process, each checked before its time is printed."""

import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.kda import api, bench_peers
from pallas_kernels.kda.cases import BOUND, TOLERANCE, Case, Inputs, exact, make_inputs, run, run_with_gradients
from pallas_kernels.testing import error_ratio

CALLS, REPEATS = 10, 5  # queued back to back; the median of the repeats is printed
CHUNK = 64  # tokens; only for counting operations
HBM_BYTES_PER_S = {"NVIDIA H100 80GB HBM3": 2.94e12, "NVIDIA H200": 4.3e12}  # measured: copy, bytes read and written
SHAPES = {  # batch, tokens, heads
    "B1-T8192-H96": (1, 8192, 96),
    "B1-T8192-H64": (1, 8192, 64),
    "B8-T4096-H32": (8, 4096, 32),
    "B1-T65536-H32": (1, 65536, 32),
    "B1-T8192-H32": (1, 8192, 32),
}
COLUMNS = ("forward ms", "x ours", "GB/s", "TFLOP/s", "of byte floor", "fwd+bwd ms", "x ours", "memory GB")
GATES = ("softplus", "lower_bound")


class WrongResult(RuntimeError):
    """A result beyond its tolerance."""


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds, `None` where nothing was measured, with the reason in `note`."""

    case: str
    name: str
    forward_ms: float | None = None
    both_ms: float | None = None
    memory_gb: float | None = None
    note: str = ""


def bench_cases() -> dict[str, Case]:
    """The timed problems: 128 channels, bfloat16, raw gate, L2 norm inside."""
    return {
        f"{name}-{gate}": Case(
            *(f"{name}-{gate}", B, T, H, H, 128, 128),
            **dict(dtype="bfloat16", gate=gate, scale=None, normalize_qk=True, keys="normal"),
        )
        for name, (B, T, H) in SHAPES.items()
        for gate in GATES
    }


def measure(case: Case, peers: tuple[str, ...] = ()) -> Iterator[Row]:
    """Yields a row for every implementation that accepts the case, then for every peer."""
    inputs = _draw(case)
    for name in api.IMPLEMENTATIONS:
        if name != "reference":
            yield _guarded(case, name, functools.partial(_measure_ours, case, name, inputs))
    for name in peers:
        yield _guarded(case, name, functools.partial(_measure_peer, case, name, inputs))


def _guarded(case: Case, name: str, measured: Callable[[], Row]) -> Row:
    """A wrong result, a refusal, a missing package or too little memory is a row with a note."""
    try:
        return measured()
    except (
        WrongResult,
        NotImplementedError,
        ImportError,
        jax.errors.JaxRuntimeError,
        bench_peers.OutOfMemory,
    ) as error:
        return Row(case.name, name, note=_reason(error))
    finally:
        gc.collect()


def _reason(error: Exception) -> str:
    """The first line; of a refusal, the reason alone."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return (line.split("; ", 1)[-1] if isinstance(error, NotImplementedError) else line)[:80]


@functools.partial(jax.jit, static_argnums=0)
def _draw(case: Case) -> Inputs:
    """Random inputs with the gate of a fresh model, drawn on the device."""
    B, T, H, K = case.batch, case.time, case.heads, case.key_dim
    key = iter(jax.random.split(jax.random.key(0), 9))
    dtype = jnp.dtype(case.dtype)
    q, k, v, g, d_o = (jax.random.normal(next(key), (B, T, H, K)).astype(dtype) for _ in range(5))
    rate = jax.random.uniform(next(key), (H,), minval=1.0, maxval=16.0)
    step = jnp.exp(jax.random.uniform(next(key), (H, K), minval=jnp.log(1e-3), maxval=jnp.log(0.1)))
    beta = jax.nn.sigmoid(jax.random.normal(next(key), (B, T, H))).astype(dtype)
    state = jax.random.normal(next(key), (B, H, K, K))
    a_log = jnp.log(rate) if case.gate == "softplus" else jnp.zeros(H)
    bias = step + jnp.log(-jnp.expm1(-step))  # inverse softplus
    return Inputs(q, k, v, g, beta, a_log, bias, state, None, d_o, jnp.ones_like(state))


def _measure_ours(case: Case, name: str, inputs: Inputs) -> Row:
    _check_gradients(case, name)
    forward = jax.jit(functools.partial(run, case, implementation=name)).lower(inputs).compile()
    _check(case, forward(inputs), _reference(case, inputs))
    milliseconds = time_queued(lambda: forward(inputs))
    try:
        both = jax.jit(run_with_gradients, static_argnums=(0, 2)).lower(case, inputs, name).compile()
        both_ms = time_queued(lambda: both(inputs))
        usage = both.memory_analysis()
        memory = (usage.argument_size_in_bytes + usage.output_size_in_bytes + usage.temp_size_in_bytes) / 1e9
    except jax.errors.JaxRuntimeError as error:
        return Row(case.name, name, milliseconds, note=f"backward: {str(error).splitlines()[0][:60]}")
    return Row(case.name, name, milliseconds, both_ms, memory)


def _measure_peer(case: Case, name: str, inputs: Inputs) -> Row:
    peer = bench_peers.PEERS[name](case, inputs, BOUND)
    _check(case, peer.values(), _reference(case, inputs))
    return Row(case.name, name, *peer.times(CALLS, REPEATS))


@functools.partial(jax.jit, static_argnums=0)
def _reference(case: Case, inputs: Inputs):
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    return run(case, wide, "reference")


def _check(case: Case, got, want) -> None:
    for name, x, y in zip(("o", "final_state"), got, want, strict=True):
        ratio = error_ratio(x, y)
        if not ratio <= TOLERANCE["dense"][name]:
            raise WrongResult(f"WRONG, so no time: error ratio of {name} is {ratio:.1e}")


@functools.cache
def _check_gradients(case: Case, name: str) -> None:
    """Values and gradients of the same problem at 192 tokens and 2 heads, against float64."""
    small = dataclasses.replace(case, batch=1, time=192, heads=2, value_heads=2)
    inputs = make_inputs(small)
    got, want = run_with_gradients(small, inputs, name), exact(small, inputs)
    for key, tolerance in small.tolerance.items():
        ratio = error_ratio(got[key], want[key])
        if not ratio <= tolerance:
            raise WrongResult(f"WRONG, so no time: error ratio of {key} is {ratio:.1e}")


def time_queued(call: Callable[[], object]) -> float:
    """Median device time of one call in milliseconds, calls queued back to back."""
    jax.block_until_ready(call())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            result = call()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / CALLS * 1e3)
    return statistics.median(times)


def floor_bytes(case: Case, *, both: bool) -> int:
    """Bytes that must move: inputs and outputs once, in 16 bits; with the backward also those of the gradients."""
    channels = 2 * case.heads * case.key_dim + case.value_heads * (case.key_dim + 2 * case.value_dim)
    tokens = case.batch * case.time
    backward = 2 * channels - case.value_heads * case.value_dim  # q, k, v, g, do in; dq, dk, dv, dg out
    return 2 * tokens * (channels + (backward if both else 0))


def operations(case: Case, *, both: bool) -> int:
    """Floating-point operations of the chunkwise form, lower triangles only; the backward counts twice the forward."""
    K, V = case.key_dim, case.value_dim
    per_token_head = 6 * K * V + 2 * CHUNK * V + 2 * CHUNK * K
    return per_token_head * case.batch * case.time * case.value_heads * (3 if both else 1)


def table(rows: list[Row], cases: dict[str, Case], device: str) -> str:
    """The rows as a Markdown table; ratios are of the other row's time to our fastest."""
    lines = [f"| case | implementation | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for row in rows:
        ours = [r for r in rows if r.case == row.case and r.name in api.IMPLEMENTATIONS]
        forward = min((r.forward_ms for r in ours if r.forward_ms), default=None)
        both = min((r.both_ms for r in ours if r.both_ms), default=None)
        lines.append(f"| {row.case} | {row.name} | {_cells(row, cases[row.case], forward, both, device)} |")
    return "\n".join(lines)


def _cells(row: Row, case: Case, best_forward: float | None, best_both: float | None, device: str) -> str:
    if row.forward_ms is None:
        return row.note + " | " * (len(COLUMNS) - 1)
    seconds, moved = row.forward_ms / 1e3, floor_bytes(case, both=False)
    bandwidth = HBM_BYTES_PER_S.get(device)
    cells = [
        f"{row.forward_ms:.3f}",
        f"{row.forward_ms / best_forward:.2f}" if best_forward else "",
        f"{moved / seconds / 1e9:.0f}",
        f"{operations(case, both=False) / seconds / 1e12:.0f}",
        f"{moved / bandwidth / seconds:.0%}" if bandwidth else "",
        f"{row.both_ms:.2f}" if row.both_ms else row.note,
        f"{row.both_ms / best_both:.2f}" if row.both_ms and best_both else "",
        f"{row.memory_gb:.1f}" if row.memory_gb else "",
    ]
    return " | ".join(cells)
