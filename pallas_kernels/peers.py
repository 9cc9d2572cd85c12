"""PyTorch packages beside ours in a bench: tensors of the same values, device times, settings of their kernels."""

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.timing import OutOfMemory, median_ms

type Setting = tuple[Mapping[str, int], int, int]  # block sizes, warps, stages


def tensor(x: jax.Array):
    """A copy of an array of ours as a tensor on the same device."""
    import torch

    return torch.from_dlpack(jax.block_until_ready(x)).clone()


def arrays(tensors: Sequence) -> tuple[jax.Array, ...]:
    """Tensors as arrays of ours, once they are computed."""
    import torch

    torch.cuda.synchronize()
    return tuple(jnp.from_dlpack(x.detach().contiguous()) for x in tensors)


def device_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of one of several calls queued back to back, by the device's clock.

    Raises:
      OutOfMemory: the calls do not fit beside our arrays.
    """
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def average(calls: int) -> float:
        events[0].record()
        for _ in range(calls):
            call()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / calls

    try:
        return median_ms(average)
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemory("out of memory") from error


def peak_gb(call: Callable[[], object]) -> float:
    """Peak of PyTorch's allocator during a call."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 1e9


def recorded(call: Callable[[], object]) -> Callable[[], object]:
    """Records a call in a CUDA graph, so that replaying it costs the host nothing."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@functools.cache
def write_fla_settings() -> Path | None:
    """Makes the folder that fla is to read settings of its kernels from; None if FLA_CACHE_MODE says otherwise."""
    if "FLA_CACHE_MODE" in os.environ:
        return None
    folder = Path(tempfile.mkdtemp(prefix="fla-settings-"))
    os.environ |= {"FLA_CACHE_MODE": "default", "FLA_CONFIG_DIR": str(folder)}
    print("fla: fixed kernel settings; FLA_CACHE_MODE=disabled lets it tune, minutes per case", file=sys.stderr)
    return folder


def pin_fla(settings: Mapping[str, Setting]) -> None:
    """Gives kernels of fla these settings, through files that it reads itself; others tune themselves."""
    if folder := write_fla_settings():
        for kernel, (blocks, warps, stages) in settings.items():
            setting = {"kwargs": blocks, "num_warps": warps, "num_stages": stages, "num_ctas": 1}
            (folder / f"{kernel}.json").write_text(json.dumps({"kernel_name": kernel, "default_config": setting}))
