"""Muon in Moonlight's form: momentum as a sum, Nesterov, Newton-Schulz steps, updates of one RMS."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from kimi_jax.parallel.matrices import HERE, Layout, collect, give_back, layout_of, whole_shape
from kimi_jax.parallel.rules import spec
from kimi_jax.train.newton_schulz import QUINTIC, Polynomial
from kimi_jax.types import PyTree
from pallas_kernels.symmetric_matmul import apply, gram, multiply, quadratic

GROWTH = 150.0, 16.0  # of rounding errors, in the first run of steps and in later ones; all in one: a quarter of X
SMALL_SIDE = 128  # below, products cost next to nothing, and the kernels' tiles would be mostly empty
MULTIPLE = 64  # of larger sides, to which zeros are added: what the kernels take
NORM_FLOOR = 1e-7
SMALL_STACK = 2**24  # elements; larger stacks fill a device by themselves, and putting them together costs a copy

type Change = Callable[[Float[Array, "N R C"], Layout], Float[Array, "N R C"]]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """How many of a parameter's axes are batch, which merged axes are the rows after them, and which the columns."""

    batch: int
    rows: int
    columns: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns (batch..., rows, columns) in elements."""
        split = self.batch + self.rows
        return (*shape[: self.batch], math.prod(shape[self.batch : split]), math.prod(shape[split:]))


def orthogonalize(
    x_NRC: Float[Array, "N R C"],
    *,
    polynomials: Sequence[Polynomial] = (QUINTIC,) * 5,
    dtype: jnp.dtype = jnp.float16,
    layout: Layout = HERE,
) -> Float[Array, "N R C"]:
    """Moves the singular values of each matrix close to 1 by Newton-Schulz steps.

    Each step multiplies X by a I + b R + c R^2, R = X X^T, or X^T X of tall matrices. All of these commute, so R of the
    next step and the product of the factors come from products of small symmetric matrices, and X is multiplied once
    for several steps. Rounding errors of R below its smallest eigenvalues grow by up to a^2 per step: by `GROWTH` at
    most, then R is computed from X again.

    Args:
      x_NRC: matrices, float32, or this device's parts of them.
      polynomials: one per step, at least one; see `kimi_jax.train.newton_schulz`.
      dtype: of the matrix products, and of what travels for them. No number leaves the range of float16, which errs an
        eighth as much as bfloat16; float32 only to check the arithmetic.
      layout: where the other parts are; every device then does the products of some whole matrices.

    Returns:
      The approximate orthogonal factor U V^T of each matrix, float32.

    Source: Moonlight, arXiv:2502.16982, section 2.
    """
    squares = jnp.sum(jnp.square(x_NRC), axis=(-2, -1), keepdims=True)
    norm = jnp.sqrt(lax.psum(squares, layout.cuts) if layout.cuts else squares)
    x = collect((x_NRC / (norm + NORM_FLOOR)).astype(dtype), layout)
    _, R, C = x.shape
    implementation, multiple = ("auto", MULTIPLE) if min(R, C) >= SMALL_SIDE else ("xla", 1)
    x = jnp.pad(x, ((0, 0), (0, -R % multiple), (0, -C % multiple)))  # rows and columns of zeros stay zeros
    for run in _cut(polynomials):
        x = _refine(x, run, implementation)
    return give_back(x[:, :R, :C], layout, x_NRC.shape[0]).astype(jnp.float32)


def _cut(polynomials: Sequence[Polynomial]) -> list[list[Polynomial]]:
    """Runs of steps that R is carried through, each as long as errors stay within `GROWTH`."""
    runs, growth = [], math.inf
    for polynomial in polynomials:
        if growth > GROWTH[len(runs) > 1]:
            runs.append([])
            growth = 1.0
        runs[-1].append(polynomial)
        growth *= polynomial.a**2
    return runs


def _refine(x: Float[Array, "N R C"], run: Sequence[Polynomial], implementation: str) -> Float[Array, "N R C"]:
    """Several steps with one multiplication of x."""
    times = functools.partial(multiply, implementation=implementation)
    r, product = gram(x, implementation=implementation), None
    for number, (a, b, c) in enumerate(run, 1):
        factor = quadratic(r, a=a, b=b, c=c, implementation=implementation)
        product = factor if product is None else times(product, factor)
        if number < len(run):
            r = times(r, times(factor, factor))  # the square reads one matrix from memory, not two
    return apply(product, x, implementation=implementation)


def scale_by_muon(
    matrices: PyTree,
    *,
    momentum: float,
    polynomials: Sequence[Polynomial] = (QUINTIC,) * 5,
    update_rms: float,
    logical_axes: PyTree | None = None,
    dtype: jnp.dtype = jnp.float16,
) -> optax.GradientTransformation:
    """Turns gradients into Moonlight's update directions, without learning rate and weight decay.

    Args:
      matrices: tree of `Matrix`, one for every parameter the transform sees.
      momentum: mu of M <- mu M + G; a sum, not an average.
      polynomials: of the Newton-Schulz steps.
      update_rms: RMS an update has when its factor is orthogonal: the scale is update_rms * sqrt(max(rows, columns)).
      logical_axes: tree like it of tuples of axis names: parameters lie on the mesh in use as
        `kimi_jax.parallel.rules` says. None: on one device.
      dtype: of the Newton-Schulz products.

    Returns:
      A transform whose state is {"momentum": float32 tree like the parameters}.
    """

    def direction(stack_NRC: Array, layout: Layout) -> Array:
        scale = update_rms * math.sqrt(max(whole_shape(stack_NRC, layout)))
        return scale * orthogonalize(stack_NRC, polynomials=polynomials, dtype=dtype, layout=layout)

    def init(params):
        return {"momentum": jax.tree.map(jnp.zeros_like, params)}

    def update(grads, state, params=None):
        velocity = jax.tree.map(lambda m, g: momentum * m + g, state["momentum"], grads)
        ahead = jax.tree.map(lambda g, v: _settle(g + momentum * v), grads, velocity)
        return _map_on_mesh(direction, ahead, matrices, logical_axes), {"momentum": velocity}

    return optax.GradientTransformation(init, update)


def _settle(x: Array) -> Array:
    """Has x computed while the momentum it comes from is there: for what is put together later, XLA would copy that."""
    return lax.optimization_barrier(x) if x.size <= SMALL_STACK else x


def _map_on_mesh(change: Change, tree: PyTree, matrices: PyTree, logical_axes: PyTree | None) -> PyTree:
    """`map_stacks`, each device with its parts of the parameters."""
    mesh = jax.sharding.get_abstract_mesh()
    if logical_axes is None or mesh.empty or mesh.size == 1:
        return map_stacks(change, tree, matrices, jax.tree.map(lambda _: HERE, tree))
    several = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    specs = jax.tree.map(lambda x, axes: spec(axes, x.shape, mesh), tree, logical_axes)
    layouts = jax.tree.map(lambda s, kind: layout_of(s, kind.batch, kind.rows, several), specs, matrices)
    run = functools.partial(map_stacks, change, matrices=matrices, layouts=layouts)
    return jax.shard_map(run, in_specs=(specs,), out_specs=specs, check_vma=False)(tree)


def map_stacks(change: Change, tree: PyTree, matrices: PyTree, layouts: PyTree) -> PyTree:
    """Applies a function of stacked matrices to all leaves, those of one shape together while they are small.

    A chain of products of one such matrix leaves most of a device idle, whatever waits behind it.

    Args:
      change: from matrices and their layout to as many of the same shape, each by itself.
      tree: arrays.
      matrices: tree like it of `Matrix`.
      layouts: tree like it of `Layout`; what lies differently does not go together.
    """
    leaves, structure = jax.tree.flatten(tree)
    kinds, places = jax.tree.leaves(matrices), jax.tree.leaves(layouts, is_leaf=lambda x: isinstance(x, Layout))
    stacks = [x.reshape(-1, *kind.shape(x.shape)[-2:]) for x, kind in zip(leaves, kinds, strict=True)]
    groups: dict[tuple, list[int]] = {}
    for index, stack in enumerate(stacks):
        alone = stack.size > SMALL_STACK
        alike = (stack.shape, index) if alone else (stack.shape[1:], places[index])
        groups.setdefault(alike, []).append(index)
    changed = {}
    for members in groups.values():
        counts = [stacks[index].shape[0] for index in members]
        together = change(jnp.concatenate([stacks[index] for index in members]), places[members[0]])
        changed |= zip(members, jnp.split(together, list(itertools.accumulate(counts))[:-1]), strict=True)
    return jax.tree.unflatten(structure, [changed[index].reshape(x.shape) for index, x in enumerate(leaves)])
