"""Which optimizer, matrix axes and weight decay every parameter gets, and the update that follows from it."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, BFloat16, Float, Int, UInt32
from rich import box
from rich.table import Table

from kimi_jax.config.optim import Minimax, Muon, Optimizer
from kimi_jax.parallel.rules import on_one_device
from kimi_jax.train import newton_schulz
from kimi_jax.train.muon import Matrix, scale_by_muon
from kimi_jax.types import PyTree

type Path = tuple[str | int, ...]
type Axes = Sequence[str | None]

BATCH_AXES = ("layers", "experts")  # leading ones: a stack of matrices, each updated on its own
MERGED_AXES = ("heads", "head_dim")  # adjacent: one side of the matrix, as in Moonlight
TABLE_AXES = ("vocab",)  # embedding and head: matrices that AdamW keeps
FILTER_AXES = ("conv",)  # depthwise filters: no matrices at all
FLOAT32_AXES = ("experts",)  # as a side of a matrix: the router, whose product is float32
SMALL = 1 << 17  # numbers: squares of such leaves are added up as they are, so that XLA updates leaves in one kernel


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What one parameter gets; `matrix` is None for AdamW."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    matrix: Matrix | None
    decay: bool
    narrow: bool
    """Whether `train.parameters: bfloat16` holds it in 16 bits: what enters products of the compute dtype."""

    @property
    def optimizer(self) -> Literal["muon", "adamw"]:
        return "muon" if self.matrix else "adamw"


def matrix_of(axes: Axes) -> Matrix | None:
    """Reads a parameter's matrix axes off its logical axis names.

    Leading "layers" and "experts" axes are batch, adjacent "heads" and "head_dim" are one side; what has then two sides
    and is no convolution is a matrix: every projection, the router's among them, the embedding and the head.

    Raises:
      ValueError: three sides or more, so the names do not say which belong together.
    """
    batch = next((i for i, name in enumerate(axes) if name not in BATCH_AXES), len(axes))
    sides: list[int] = []
    for i, name in enumerate(axes[batch:], start=batch):
        if sides and (axes[i - 1], name) == MERGED_AXES:
            sides[-1] += 1
        else:
            sides.append(1)
    if len(sides) > 2:
        raise ValueError(f"parameter axes {tuple(axes)} form {len(sides)} sides; a matrix has 2, a vector 1")
    if len(sides) < 2 or any(name in FILTER_AXES for name in axes):
        return None
    return Matrix(batch, *sides)


def assign(cfg: Optimizer, params: PyTree, logical_axes: PyTree) -> dict[Path, Assignment]:
    """Decides for every parameter.

    Weight decay reaches matrices alone: no norm, gate parameter (a_log, dt_bias), bias or convolution.

    Args:
      cfg: optimizer kind.
      params: nested dict of arrays or shapes.
      logical_axes: the same dict with tuples of axis names.
    """
    axes = flatten_dict(logical_axes)
    return {path: _assign_one(cfg, leaf.shape, axes[path]) for path, leaf in flatten_dict(params).items()}


def _assign_one(cfg: Optimizer, shape: tuple[int, ...], axes: Axes) -> Assignment:
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} axis names {tuple(axes)} for an array of shape {shape}")
    matrix = matrix_of(axes)
    for_muon = isinstance(cfg, Muon) and not any(name in TABLE_AXES for name in axes)
    narrow = matrix is not None and not any(name in FLOAT32_AXES for name in axes[matrix.batch :])
    return Assignment(shape, tuple(axes), matrix if for_muon else None, decay=matrix is not None, narrow=narrow)


def _polynomials(cfg: Muon) -> list[newton_schulz.Polynomial]:
    match cfg.newton_schulz:
        case Minimax(smallest=smallest):
            return newton_schulz.minimax(cfg.newton_schulz_steps, smallest)
    return newton_schulz.quintic(cfg.newton_schulz_steps)


def build_optimizer(cfg: Optimizer, assignments: Mapping[Path, Assignment]) -> optax.GradientTransformation:
    """Builds the update direction; the caller subtracts learning rate times it.

    Returns:
      A transform over nested dicts; its state is {"adamw": ..., "muon": ...}, each over the parameters it owns and in
      their dtypes. All arithmetic is float32, and so are the updates.
    """
    transforms = {"adamw": optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)}
    if isinstance(cfg, Muon):
        matrices = unflatten_dict({path: a.matrix for path, a in assignments.items() if a.matrix})
        transforms["muon"] = scale_by_muon(
            matrices,
            momentum=cfg.momentum,
            polynomials=_polynomials(cfg),
            update_rms=cfg.update_rms,
            logical_axes=unflatten_dict({path: a.axes for path, a in assignments.items() if a.matrix}),
        )
    decay = {path: cfg.weight_decay * a.decay for path, a in assignments.items()}

    def owned(tree: PyTree, name: str) -> PyTree:
        return unflatten_dict(
            {path: x for path, x in flatten_dict(tree).items() if assignments[path].optimizer == name}
        )

    def init(params):
        return {name: transform.init(owned(params, name)) for name, transform in transforms.items()}

    def update(grads, state, params):
        updates, new_state = {}, {}
        for name, transform in transforms.items():
            wide_state = _widened(state[name])
            own, wide_state = transform.update(_widened(owned(grads, name)), wide_state, owned(params, name))
            new_state[name] = jax.tree.map(lambda after, before: after.astype(before.dtype), wide_state, state[name])
            updates |= flatten_dict(own)
        weights = flatten_dict(_widened(params))
        # Not plus 0 times the weight: the old one would live on beside the new.
        decayed = {path: u + decay[path] * weights[path] if decay[path] else u for path, u in updates.items()}
        return unflatten_dict(decayed), new_state

    return optax.GradientTransformation(init, update)


def store_parameters(params: PyTree, assignments: Mapping[Path, Assignment], dtype: str) -> PyTree:
    """Returns float32 parameters as training holds them: `dtype` is float32, or bfloat16 for the narrow ones."""
    kept = {path: x.astype(dtype) if assignments[path].narrow else x for path, x in flatten_dict(params).items()}
    return unflatten_dict(kept)


def _widened(tree: PyTree) -> PyTree:
    """Floating-point leaves in float32; the conversions fuse into what reads them."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def clip_by_global_norm(grads: PyTree, limit: float | None) -> tuple[PyTree, Float[Array, ""]]:
    """Scales gradients down to a global norm of `limit`; returns them in float32, and the norm before."""
    grads = _widened(grads)
    norm = jnp.sqrt(sum_squares(grads))
    if limit is None:
        return grads, norm
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    return jax.tree.map(lambda g: g * scale, grads), norm


def sum_squares(tree: PyTree) -> Float[Array, ""]:
    """Sums over all leaves; on one device those of a shape together, as the end of every sum is a kernel of its own."""
    leaves = jax.tree.leaves(tree)
    if not on_one_device():  # those of a shape may be cut in different ways
        return sum(jnp.sum(jnp.square(x)) for x in leaves)
    parts = collections.defaultdict(list)
    for x in leaves:
        part = jnp.sum(jnp.square(x), axis=-1) if x.size > SMALL else jnp.square(x)
        parts[part.shape].append(part)
    return sum(jnp.sum(sum(alike)) for alike in parts.values())


def apply_update(params: PyTree, update: PyTree, lr: Float[Array, ""], step: Int[Array, ""]) -> PyTree:
    """Returns params - lr * update in the dtypes of the parameters.

    What is held in bfloat16 is rounded stochastically: an update far below half a unit in the last place would
    otherwise change nothing, however often it came.

    Args:
      params: float32 or bfloat16 leaves.
      update: float32 tree like it.
      lr: float32.
      step: int32; with the parameter's place in the tree it decides how each element is rounded.
    """
    leaves, structure = jax.tree.flatten(params)
    new = [p.astype(jnp.float32) - lr * u for p, u in zip(leaves, jax.tree.leaves(update), strict=True)]
    stored = [
        x if p.dtype == jnp.float32 else round_stochastically(x, jnp.uint32(leaf), step.astype(jnp.uint32))
        for leaf, (p, x) in enumerate(zip(leaves, new, strict=True))
    ]
    return jax.tree.unflatten(structure, stored)


def round_stochastically(
    x: Float[Array, "..."], stream: UInt32[Array, ""], draw: UInt32[Array, ""]
) -> BFloat16[Array, "..."]:
    """Rounds finite float32 to one of its two bfloat16 neighbours, to each with the probability of its nearness.

    Each element is rounded by a hash of its position and of the two seeds.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_hash_positions(x.shape, stream, draw) >> 16)
    upper = bits & jnp.uint32(0xFFFF0000)  # float32 that bfloat16 holds exactly
    return jax.lax.bitcast_convert_type(upper, jnp.float32).astype(jnp.bfloat16)


def _hash_positions(shape: tuple[int, ...], stream: UInt32[Array, ""], draw: UInt32[Array, ""]) -> UInt32[Array, "..."]:
    """The mixer of a 32-bit hash (Ellis, lowbias32) over a counter, one flat one.

    The parameter's seed comes to every element, at the start: as a number of its own it would be a kernel for each
    parameter, and more that parameters of one shape have in common would make XLA update all in one kernel, which
    spills.
    """
    x = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape) + draw * jnp.uint32(0x85EBCA6B)
    x = x ^ (stream * jnp.uint32(0xC2B2AE35))
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def assignment_table(assignments: Mapping[Path, Assignment], weight_decay: float) -> Table:
    """The printed table; blocks that are treated alike share a row."""
    table = Table(title="Optimizer of every parameter", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("parameter", "shape", "optimizer", "matrix (rows x columns)", "weight decay"):
        table.add_column(name, overflow="fold")
    alike: dict[tuple, list[str]] = {}
    for path, a in sorted(assignments.items(), key=lambda item: [str(part) for part in item[0]]):
        part, *rest = map(str, path)
        block = rest.pop(0) if rest and rest[0].isdigit() else ""
        alike.setdefault((part, tuple(rest), a), []).append(block)
    for (part, rest, a), blocks in alike.items():
        decay = f"{weight_decay:g}" if a.decay and weight_decay else "-"
        shape = " x ".join(map(str, a.shape))
        name = "/".join(filter(None, [part, ",".join(blocks), *rest]))
        table.add_row(name, shape, a.optimizer, _describe(a), decay)
    return table


def _describe(a: Assignment) -> str:
    if a.matrix is None:
        return "-"
    *batch, rows, columns = a.matrix.shape(a.shape)
    split = a.matrix.batch + a.matrix.rows
    names: Callable[[Axes], str] = lambda axes: "*".join(str(name) for name in axes)
    sides = f"{names(a.axes[a.matrix.batch : split])} x {names(a.axes[split:])}"
    stack = f"{math.prod(batch)} of " if batch else ""
    return f"{stack}{rows} x {columns} ({sides})"
