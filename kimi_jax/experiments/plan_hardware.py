"""The clusters that can be planned for: what their GPUs do, hold and move."""

import difflib
import re
from dataclasses import dataclass

from kimi_jax.errors import UserError
from kimi_jax.train.xla_flags import MEMORY_FRACTION

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in hosts of eight, as it is usually rented.

    Args:
      kind: as the driver names it.
      memory_bytes: what the driver shows.
      copy_bytes_per_s: device memory, bytes read and written.
      link_bytes_per_s: to the other GPUs of its host, each way, as collectives reach it.
      network_bytes_per_s: of its own network adapter, each way, as collectives reach it.
      capability: of its kernels.
    """

    kind: str
    memory_bytes: int
    copy_bytes_per_s: float
    link_bytes_per_s: float = 250e9
    network_bytes_per_s: float = 42e9
    per_host: int = 8
    capability: str = "9.0"


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", memory_bytes=84942979072, copy_bytes_per_s=2.94e12),
    "h200": Gpu("NVIDIA H200", memory_bytes=150755147776, copy_bytes_per_s=4.3e12),
}
"""Copies and links are measured, the latter between two GPUs (docs/performance.md, docs/scaling.md). The rate of the
network is what NCCL usually reaches of 400 Gbit/s per GPU; it is assumed, not measured."""


@dataclass(frozen=True)
class Hardware:
    """So many GPUs of one kind; its text is what `read_hardware` reads."""

    count: int
    name: str
    """A key of GPUS."""

    def __str__(self) -> str:
        return f"{self.count}x{self.name}"

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.name]

    @property
    def hosts(self) -> int:
        return -(-self.count // self.gpu.per_host)

    @property
    def usable_bytes(self) -> float:
        """Per GPU: what training takes of its memory."""
        return MEMORY_FRACTION * self.gpu.memory_bytes

    def neighbours(self, size: int, stride: int) -> int:
        """How many of `size` GPUs, every `stride`-th, share a host."""
        return min(size, max(1, self.gpu.per_host // stride))

    def ring_bytes_per_s(self, size: int, stride: int) -> float:
        """What each of these GPUs sends at most in a ring; those of one host use all their network adapters for it."""
        near = self.neighbours(size, stride)
        if near == size:
            return self.gpu.link_bytes_per_s
        return min(self.gpu.link_bytes_per_s, near * self.gpu.network_bytes_per_s)


def read_hardware(text: str) -> Hardware:
    """Reads a number and a kind, as 64xh100.

    Raises:
      UserError: it is not of that form, or the kind is unknown.
    """
    found = re.fullmatch(r"([1-9][0-9]*)x([a-z0-9]+)", text.lower())
    if not found:
        raise UserError(f"--hardware={text!r}: must be a number and a kind of GPU, as 64xh100")
    count, name = int(found[1]), found[2]
    if name not in GPUS:
        near = difflib.get_close_matches(name, GPUS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--hardware={text!r}: unknown GPU {name!r}; known are {', '.join(GPUS)}{hint}")
    per_host = GPUS[name].per_host
    if count > per_host and count % per_host:
        raise UserError(f"--hardware={text!r}: more than one host has whole hosts, multiples of {per_host} GPUs")
    return Hardware(count, name)


def compiler_target(gpu: Gpu) -> str:
    """The GPU as XLA's compiler wants it described, where there is none to ask: Hopper's sizes, in protobuf text."""
    hopper = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": 233472,
        "threads_per_core_limit": 2048,
        "core_count": 132,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": 3352320000000,
        "l2_cache_size": 52428800,
        "clock_rate_ghz": 1.98,
        "device_memory_size": gpu.memory_bytes,
        "shared_memory_per_block_optin": 232448,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    sizes = " ".join(f"{name}: {value}" for name, value in hopper.items())
    major, minor = gpu.capability.split(".")
    return (
        f"gpu_device_info {{ {sizes} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{gpu.kind}"'
    )


def topology_name(hardware: Hardware) -> str:
    """Partitions x hosts x GPUs of a host, as `jax.experimental.topologies` wants it."""
    return f"1x{hardware.hosts}x{hardware.count // hardware.hosts}"
