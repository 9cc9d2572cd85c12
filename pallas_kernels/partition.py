"""How an operator runs on several devices: on each its own rows, tokens and heads, in one `shard_map`.

XLA cannot cut a kernel: it would gather the operands and run the whole on every device. And what is written in plain
JAX shall be cut in the same way, so that it moves the same data.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp", "expert")
HEAD_AXES = ("tensor",)
TOKEN_AXES = ("context",)
VOCABULARY_AXES = ("tensor",)
MESH_AXES = {"B": BATCH_AXES, "T": TOKEN_AXES, "H": HEAD_AXES}
"""Names of the mesh axes over which rows, tokens and heads are cut, where the mesh in use (`jax.set_mesh`) has them."""


@dataclass(frozen=True)
class Axes:
    """A label for each argument and result: one letter per dimension, trailing ones left out.

    B is a row of the batch, T a token, H a head or a group of heads (query heads and value heads alike), - anything
    else. E is a head where an operator takes all tokens of some heads instead of some tokens of all heads: cut like H,
    and each of these parts like T. Behind "^" stands what a result is the largest over: one number for all rows.
    """

    arguments: tuple[str, ...]
    results: str | tuple[str, ...]
    keywords: Mapping[str, str] = field(default_factory=dict)
    """Those left out are whole on every device."""
    exchanges: bool = False
    """Tokens depend on each other: where T is cut, the operator has the name of that mesh axis as `axis`."""


def refuse_parts(*arrays: Any, axis: str | None = None, **_: Any) -> str | None:
    """For an implementation that knows no tokens on other devices."""
    return f"{axis=}: this form runs on one device" if axis else None


def partition(run: Callable[..., Any], axes: Axes, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Returns run(*args, **kwargs), cut over the axes of the mesh in use that are not cut already.

    An axis that does not divide the sizes of its letter leaves them whole, and its devices do the same work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = _free_axes(mesh)
    if math.prod(mesh.shape[name] for name in free) == 1:
        return run(*args, **kwargs)
    leaves, structure = jax.tree.flatten((args, dict(kwargs)))
    labels = _label_leaves(axes, args, kwargs)
    places: dict[tuple[int, str], list[int]] = {}  # one array given twice stays one: operators may ask
    for i, (leaf, label) in enumerate(zip(leaves, labels, strict=True)):
        if isinstance(leaf, (jax.Array, np.ndarray)):
            places.setdefault((id(leaf), label), []).append(i)
    arrays = [(leaves[at[0]], label) for (_, label), at in places.items()]
    parts = _choose_parts(mesh, free, [(x.shape, label) for x, label in arrays])

    def run_part(*local):
        filled = list(leaves)
        for at, x in zip(places.values(), local, strict=True):
            for i in at:
                filled[i] = x
        local_args, local_kwargs = jax.tree.unflatten(structure, filled)
        axis = {"axis": parts["T"][0]} if axes.exchanges and parts["T"] else {}
        results = run(*local_args, **local_kwargs, **axis)
        if isinstance(axes.results, str):
            return _combine(results, axes.results, parts)
        return tuple(_combine(x, label, parts) for x, label in zip(results, axes.results, strict=True))

    cut = jax.shard_map(
        run_part,
        in_specs=tuple(_spec(label, parts) for _, label in arrays),
        out_specs=jax.tree.map(lambda label: _spec(label.partition("^")[0], parts), axes.results),
        axis_names=set(free),
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    return cut(*(x for x, _ in arrays))


def _label_leaves(axes: Axes, args: tuple, kwargs: Mapping[str, Any]) -> list[str]:
    """In the order in which (args, kwargs) is flattened; the leaves of one argument share its label."""
    pairs = [*zip(args, axes.arguments, strict=True), *((kwargs[k], axes.keywords.get(k, "")) for k in sorted(kwargs))]
    return [label for value, label in pairs for _ in jax.tree.leaves(value)]


def _choose_parts(
    mesh: AbstractMesh, free: Sequence[str], arrays: Sequence[tuple[tuple[int, ...], str]]
) -> dict[str, tuple[str, ...]]:
    """Mesh axes of each letter: as many as divide all sizes that it labels."""
    parts = {}
    for letter, names in MESH_AXES.items():
        sizes = [shape[label.index(letter)] for shape, label in arrays if letter in label]
        parts[letter] = _dividing(mesh, [name for name in names if name in free], functools.reduce(math.gcd, sizes, 0))
    return parts | {"E": parts["H"] + parts["T"]}


def _dividing(mesh: AbstractMesh, names: Sequence[str], size: int) -> tuple[str, ...]:
    taken, number = [], 1
    for name in names:
        if mesh.shape[name] > 1 and size % (number * mesh.shape[name]) == 0:
            taken.append(name)
            number *= mesh.shape[name]
    return tuple(taken)


def free_axes_of(names: Sequence[str], size: int) -> tuple[str, ...]:
    """Those of the mesh in use over which a dimension of that size can be cut, and which nothing has taken yet."""
    mesh = jax.sharding.get_abstract_mesh()
    return _dividing(mesh, [name for name in _free_axes(mesh) if name in names], size)


def _spec(label: str, parts: Mapping[str, tuple[str, ...]]) -> P:
    return P(*(parts.get(letter) or None for letter in label))


def _combine(x: Any, label: str, parts: Mapping[str, tuple[str, ...]]) -> Any:
    over = [name for letter in label.partition("^")[2] for name in parts[letter]]
    return jax.lax.pmax(jax.lax.stop_gradient(x), over) if over else x


def refuse_cut_matrices(*_: Any, **__: Any) -> str | None:
    """For an implementation that takes whole matrices: XLA cuts them over mesh axes that no `shard_map` has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    names = [name for name in _free_axes(mesh) if mesh.shape[name] > 1]
    return f"this form takes whole matrices, and the mesh may cut them over {', '.join(names)}" if names else None


def _free_axes(mesh: AbstractMesh) -> list[str]:
    """Axes that XLA still distributes."""
    return [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
