"""How a public checkpoint is spread over devices, and what that takes of their memory; only headers are read."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from kimi_jax.config.mesh import Mesh as MeshConfig
from kimi_jax.errors import UserError
from kimi_jax.interop.hf_import import READERS, Dtype, PublicCheckpoint, open_checkpoint
from kimi_jax.interop.keymap import Path_, flatten
from kimi_jax.models.counts import count_cache_bytes
from kimi_jax.models.decoder import logical_axes
from kimi_jax.parallel.mesh import abstract_mesh
from kimi_jax.parallel.rules import state_shardings
from kimi_jax.types import PyTree


class LoadPlan(NamedTuple):
    """Memory of one way to load a checkpoint.

    Attributes:
      device_bytes: parameters per device.
      whole_bytes: of these, what every device holds in full.
      host_bytes: most that the host holds beside the devices' memory: one leaf, and the tensors that are read into it.
      cache_tokens: length of one sequence whose caches fill what is left of a device; negative: parameters do not fit.
    """

    num_devices: int
    device_bytes: int
    whole_bytes: int
    host_bytes: int
    cache_tokens: int


def spread(checkpoint: PublicCheckpoint, mesh: Mesh | AbstractMesh) -> tuple[PyTree, PyTree]:
    """Cuts the parameters as training does, by `kimi_jax.parallel.rules`.

    Returns:
      Trees of shardings like (params, buffers), as `PublicCheckpoint.read` takes them.
    """
    axes = logical_axes(checkpoint.cfg)
    return state_shardings(checkpoint.params, axes, mesh), state_shardings(checkpoint.buffers, axes, mesh)


def plan_load(checkpoint: PublicCheckpoint, num_devices: int, memory_bytes: float, dtype: Dtype) -> LoadPlan:
    """Computes what loading onto a "tensor" axis of `num_devices` devices, `memory_bytes` each, takes; needs none."""
    mesh = abstract_mesh(MeshConfig(tensor=num_devices), num_devices)
    shapes, places = flatten(checkpoint.params, checkpoint.buffers), flatten(*spread(checkpoint, mesh))
    dtypes = checkpoint.leaf_dtypes(dtype)

    def num_bytes(path: Path_, shape: Sequence[int]) -> int:
        return math.prod(shape) * dtypes[path].itemsize

    whole = {path: num_bytes(path, leaf.shape) for path, leaf in shapes.items()}
    local = {path: num_bytes(path, places[path].shard_shape(leaf.shape)) for path, leaf in shapes.items()}
    in_flight = _bytes_in_flight(checkpoint)
    device_bytes, cache = sum(local.values()), count_cache_bytes(checkpoint.cfg)
    left = memory_bytes - device_bytes - cache.per_sequence
    return LoadPlan(
        num_devices,
        device_bytes,
        sum(size for path, size in local.items() if num_devices > 1 and size == whole[path]),
        max(size + in_flight[path] for path, size in whole.items()),
        int(left // cache.per_token) if cache.per_token else int(math.copysign(1, left)),
    )


def _bytes_in_flight(checkpoint: PublicCheckpoint) -> dict[Path_, int]:
    """What the readers hold at most of each leaf's tensors, as they lie in the files."""
    sizes: dict[Path_, list[int]] = {}
    for tensor in checkpoint.tensors:
        sizes.setdefault(tensor.path, []).append(checkpoint.stored[tensor.name].spec.num_bytes)
    return {path: sum(sorted(inside)[-READERS:]) for path, inside in sizes.items()}


def plan_table(folder: Path, devices: Sequence[int], memory_bytes: float, dtype: Dtype) -> str:
    """Reads the headers of a checkpoint and writes the plans for some numbers of devices as text.

    Raises:
      UserError: the checkpoint is incomplete or damaged, or there are no such devices.
    """
    wrong = [number for number in devices if number < 1]
    if wrong:
        raise UserError(f"devices={wrong[0]}: must be at least 1")
    if not 0 < memory_bytes < math.inf:
        raise UserError(f"memory of a device, {memory_bytes} bytes: must be finite and above 0")
    checkpoint = open_checkpoint(folder)
    size = sum(tensor.spec.num_bytes for tensor in checkpoint.stored.values())
    numbers = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors)
    lines = [
        f"{folder}: {len(checkpoint.tensors):,} tensors, {numbers:,} numbers, {size / 1e9:.2f} GB in files",
        f"as {dtype}, devices of {memory_bytes / 1e9:g} GB:",
        "devices   parameters each   of it copies   host, loading   room for one sequence",
    ]
    for num_devices in devices:
        plan = plan_load(checkpoint, num_devices, memory_bytes, dtype)
        lines.append(
            f"{num_devices:>7}   {plan.device_bytes / 1e9:>12.2f} GB   {plan.whole_bytes / 1e9:>9.2f} GB   "
            f"{plan.host_bytes / 1e9:>10.2f} GB   {_room(checkpoint, plan)}"
        )
    lines.append("activations and the compiled program's own buffers are not in it; each device holds a whole cache")
    return "\n".join(lines)


def _room(checkpoint: PublicCheckpoint, plan: LoadPlan) -> str:
    if plan.cache_tokens < 0:
        return "does not fit"
    if not count_cache_bytes(checkpoint.cfg).per_token:
        return "any length"
    return f"{plan.cache_tokens:,} tokens"
