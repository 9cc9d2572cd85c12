"""Measures chunk lengths of the chunked form against the recurrence: the source of its default on this device."""

import functools
import time

import jax
import jax.numpy as jnp

from pallas_kernels.kda.cases import Case, make_inputs, run, run_with_gradients
from pallas_kernels.kda.chunked import TILES

REPEATS = 7
_case = functools.partial(Case, gate="softplus", normalize_qk=True, keys="normal", scale=None, dtype="float32")
CASES = [_case(f"B2-T1024-H4-D{dim}", 2, 1024, 4, 4, dim, dim) for dim in (32, 64, 128)]


def measure(function, inputs) -> tuple[float, float]:
    """Returns (ms, MB): the fastest of several calls, and the temporary memory of one.

    On a CPU the time is processor time summed over cores, which other programs disturb least; elsewhere elapsed time.
    """
    compiled = jax.jit(function).lower(inputs).compile()
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    jax.block_until_ready(compiled(inputs))
    durations = []
    for _ in range(REPEATS):
        start = clock()
        jax.block_until_ready(compiled(inputs))
        durations.append(clock() - start)
    return 1e3 * min(durations), compiled.memory_analysis().temp_size_in_bytes / 1e6


def main() -> None:
    """Command line: python -m pallas_kernels.kda.tiles."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print("| case | implementation | tile | forward ms | MB | forward and backward ms | MB |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        inputs = jax.tree.map(jnp.asarray, make_inputs(case))
        for implementation, tile in [*(("chunked", tile) for tile in TILES), ("reference", None)]:
            call = case.call._replace(tile=tile)
            results = (
                measure(functools.partial(f, call, implementation=implementation), inputs)
                for f in (run, run_with_gradients)
            )
            numbers = " | ".join(f"{ms:.0f} | {megabytes:.0f}" for ms, megabytes in results)
            print(f"| {case.name} | {implementation} | {tile or ''} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
