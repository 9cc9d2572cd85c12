"""The only map from logical axis names to mesh axes, and what follows from it: how each array is cut."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from kimi_jax.types import PyTree
from pallas_kernels.partition import BATCH_AXES, HEAD_AXES, TOKEN_AXES, VOCABULARY_AXES

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "tokens": TOKEN_AXES,
    "experts": ("expert", "fsdp"),
    "embed": ("fsdp", "expert"),
    "vocab": VOCABULARY_AXES,
    "heads": HEAD_AXES,
    "ffn": ("tensor",),
}
"""Names that are absent (head_dim, rank, latent, conv, layers) are not cut. Of an array whose dimensions want the same
mesh axis the first one has it: of experts that divide over `expert` and `fsdp`, `embed` stays whole. Then whole experts
are gathered, in one piece: what is cut along an inner dimension is rearranged after gathering and before scattering."""


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """Cuts the named dimensions of an array, each over those of its mesh axes that divide it evenly.

    Args:
      axes: a logical name, or None, for each dimension.
      shape: the array's.
      mesh: with every mesh axis that `RULES` names; axes that are not `Auto` (inside `shard_map`) cut nothing.
    """
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}

    def cut(name: str | None, size: int) -> str | tuple[str, ...] | None:
        taken, parts = [], 1
        for axis in RULES.get(name, ()):
            length = mesh.shape[axis]
            if axis in free and length > 1 and size % (parts * length) == 0:
                taken.append(axis)
                free.remove(axis)
                parts *= length
        return tuple(taken) if len(taken) > 1 else taken[0] if taken else None

    return P(*(cut(name, size) for name, size in zip(axes, shape, strict=True)))


def axes_of(name: str, size: int) -> tuple[str, ...]:
    """The axes of the mesh in use over which a dimension of that name and size is cut; none without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.empty else tuple(jax.tree.leaves(tuple(spec((name,), (size,), mesh))))


def on_one_device() -> bool:
    """Whether the mesh in use has one device; so it is without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def constrain(x: Array, axes: Sequence[str | None]) -> Array:
    """States how an activation is cut over the mesh in use; on one device nothing happens."""
    if on_one_device():
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, jax.sharding.get_abstract_mesh()))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, T] of a batch."""
    return NamedSharding(mesh, P(RULES["batch"], RULES["tokens"]))


def state_shardings(state: PyTree, logical_axes: PyTree, mesh: Mesh) -> PyTree:
    """Cuts a training state.

    Args:
      state: nested dicts and tuples of arrays or their shapes; wherever in it a path ends like that of a parameter and
        there are as many dimensions (the parameter itself, its moments), it is cut by the parameter's names. All else
        is whole on every device.
      logical_axes: the tree of the parameters, with a tuple of names for each.
    """
    paths = jax.tree_util.tree_flatten_with_path(logical_axes, is_leaf=lambda x: isinstance(x, tuple))[0]
    axes_of = {_names(path): axes for path, axes in paths}

    def shard(path, leaf) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            axes = axes_of.get(names[start:])
            if axes is not None and len(axes) == len(leaf.shape):
                return NamedSharding(mesh, spec(axes, leaf.shape, mesh))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(shard, state)


def _names(path: Sequence) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _mesh_axes(part: str | tuple[str, ...] | None) -> str:
    return "-" if part is None else part if isinstance(part, str) else "+".join(part)


def sharding_table(params: PyTree, logical_axes: PyTree, mesh: Mesh) -> str:
    """One line per parameter: shape, logical axes, mesh axes, MiB on each device; the sum last."""
    shardings = state_shardings(params, logical_axes, mesh)
    rows, total = [], 0
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    all_axes = jax.tree.leaves(logical_axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, leaf), axes, sharding in zip(leaves, all_axes, jax.tree.leaves(shardings), strict=True):
        size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total += size
        cut = ", ".join(_mesh_axes(part) for part in sharding.spec)
        logical = ", ".join(name or "-" for name in axes)
        rows.append((".".join(_names(path)), str(leaf.shape), f"({logical})", f"({cut})", f"{size / 2**20:.2f}"))
    rows.append(("all parameters", "", "", "", f"{total / 2**20:.2f}"))
    lines = [("parameter", "shape", "logical axes", "mesh axes", "MiB per device"), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
