"""Settings of XLA and NCCL that a run starts with; one that the installed libraries do not know is one line."""

import contextlib
import difflib
import hashlib
import importlib.metadata
import importlib.util
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from kimi_jax.config.train import Flags
from kimi_jax.data.prepare import cache_folder
from kimi_jax.errors import UserError

DEFAULTS = {"xla_gpu_enable_triton_gemm": "false"}  # cuBLAS alone: no search through Triton's tiles while compiling

MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # jax refuses both at once
MEMORY_FRACTION = 0.92  # of a GPU's memory, where jax would take 0.75; the rest is for CUDA itself and for NCCL

PRESETS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    # Gradients travel while others are computed; few large messages instead of many small ones.
    "overlap": {
        "xla_gpu_enable_latency_hiding_scheduler": "true",
        "xla_gpu_enable_pipelined_all_gather": "true",
        "xla_gpu_enable_pipelined_reduce_scatter": "true",
        "xla_gpu_enable_while_loop_double_buffering": "true",
        "xla_gpu_all_gather_combine_threshold_bytes": str(2**27),
        "xla_gpu_reduce_scatter_combine_threshold_bytes": str(2**27),
        "xla_gpu_all_reduce_combine_threshold_bytes": str(2**27),
    },
    # The same kernels and orders of summation in every process: resumed runs are equal bit for bit on GPUs, too.
    "deterministic": {"xla_gpu_deterministic_ops": "true"},
}

CHECK = "import jax; jax.local_devices(backend='cpu')"
CHECK_S = 300


def apply(flags: Flags, environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds what a config asks for, and the defaults, to XLA_FLAGS and NCCL's variables, and says how much of a GPU's
    memory XLA takes; what is set there stays.

    They count until jax starts its backend.

    Raises:
      UserError: the installed jaxlib or NCCL does not know a setting. XLA would abort the process.
    """
    _add(DEFAULTS | PRESETS[flags.preset] | flags.xla, environment)
    for name, value in flags.nccl.items():
        environment.setdefault(name, value)
    take_memory(environment)
    check_xla(environment["XLA_FLAGS"])
    check_nccl(list(flags.nccl), find_nccl())  # not the environment's: images set NCCL_VERSION, which NCCL never reads


def take_memory(environment: MutableMapping[str, str] = os.environ) -> None:
    """Says how much of a GPU's memory XLA takes, unless that is said there; it counts until jax starts its backend."""
    if not any(name in environment for name in MEMORY):
        environment[MEMORY[0]] = str(MEMORY_FRACTION)


def _add(settings: Mapping[str, str], environment: MutableMapping[str, str]) -> None:
    flags = environment.get("XLA_FLAGS", "")
    named = {flag.lstrip("-").partition("=")[0] for flag in flags.split()}
    missing = [f"--{name}={value}" for name, value in settings.items() if name not in named]
    environment["XLA_FLAGS"] = " ".join(filter(None, [flags, *missing]))


def check_xla(flags: str) -> None:
    """Lets a process of its own parse XLA's flags; what once passed with this jaxlib is not tried again.

    Raises:
      UserError: it does not take them.
    """
    text = f"{importlib.metadata.version('jaxlib')} {flags}"
    passed = cache_folder() / "xla_flags" / hashlib.sha256(text.encode()).hexdigest()[:16]
    if passed.exists():
        return
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CHECK]
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHECK_S)
    except subprocess.TimeoutExpired:  # a busy machine says nothing about the flags
        return
    if fatal := ended.returncode and re.search(r"^[EF]\d+ .*?\] (.*)$", ended.stderr, re.MULTILINE):
        raise UserError(f"XLA_FLAGS: jaxlib {text.partition(' ')[0]} refuses them: {fatal[1]}")
    if ended.returncode:  # something else is wrong, which the run itself will meet
        return
    with contextlib.suppress(OSError):  # a cache that may not be written costs two seconds, no run
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.write_text(text + "\n")


def find_nccl() -> Path | None:
    """The NCCL library that came with jax's CUDA packages."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else ()
    return next((path for folder in folders for path in sorted(Path(folder).glob("*/lib/libnccl.so*"))), None)


def check_nccl(names: list[str], library: Path | None) -> None:
    """Looks for the names of NCCL's variables in the library, which would ignore those that it does not know.

    Raises:
      UserError: one is not there.
    """
    if not names or library is None:
        return
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        known = {match.decode() for match in re.findall(rb"NCCL_[A-Z0-9_]+", content)}
    problems = []
    for name in sorted(set(names) - known):
        near = difflib.get_close_matches(name, known, n=1)
        problems.append(
            f"{name}: {library.name} knows no such variable" + (f"; did you mean {near[0]}?" if near else "")
        )
    if problems:
        raise UserError(problems)
