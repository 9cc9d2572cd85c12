"""The GPU that the Mosaic GPU kernels are written for, and the one that a program is made for."""

import contextlib
from collections.abc import Iterator

import jax

CAPABILITY = "9.0"
MULTIPROCESSORS = 132  # of an H100 or H200 SXM; another number is correct, with work shared out less evenly
_described: list[str] = []  # compute capabilities that `compiling_for` names, the last one counts


@contextlib.contextmanager
def compiling_for(capability: str) -> Iterator[None]:
    """Implementations are chosen for such a GPU, whatever is there: for compiling ahead of time."""
    _described.append(capability)
    try:
        yield
    finally:
        _described.pop()


def is_absent() -> bool:
    """Whether the GPU that programs are made for is only described."""
    return bool(_described)


def find_capability() -> str:
    """Compute capability of the GPU that programs are made for."""
    return _described[-1] if _described else jax.devices()[0].compute_capability


def refuse_other_backends() -> str | None:
    """Why nothing written for NVIDIA GPUs can run; None: it can."""
    if _described or jax.default_backend() == "gpu":
        return None
    return f"needs an NVIDIA GPU, the default backend is {jax.default_backend()}"


def refuse_device() -> str | None:
    """Why a Hopper kernel cannot run; None: it can."""
    refusal = refuse_other_backends()
    if refusal:
        return refusal
    capability = find_capability()
    if capability != CAPABILITY:
        return f"needs compute capability {CAPABILITY} (Hopper), this GPU has {capability}"
    return None
