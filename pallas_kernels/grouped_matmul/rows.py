"""Rows in the order of their groups: where each (token, choice) pair goes, and how rows get there and back."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.grouped_matmul import rows_mosaic_gpu
from pallas_kernels.grouped_matmul.tiles import sum_before
from pallas_kernels.hopper import refuse_device


def place_rows(group: Int[Array, "T k"], num_groups: int) -> tuple[Int[Array, "T k"], Int[Array, "E"]]:
    """Sorts pairs by group, those of one group in the order of tokens.

    A running count over the tokens in place of a sort: on a GPU less than half of its time. Tokens are the last axis,
    along which a GPU reads and writes, and in which kernels make the groups and take the rows.

    Args:
      group: int32, 0 <= group <= num_groups; pairs of group num_groups, which is none, come last.

    Returns:
      The row of each pair, every row once; the number of rows of each group.
    """
    group_kT, number_E1 = group.T, jnp.arange(num_groups + 1, dtype=jnp.int32)[:, None]
    # Written to memory, and term by term: XLA makes a slow kernel of so short a reduction.
    chosen_ET = sum((group_kT[j : j + 1] == number_E1).astype(jnp.int32) for j in range(len(group_kT)))
    chosen_ET = jax.lax.optimization_barrier(chosen_ET)
    through_ET = jnp.cumsum(chosen_ET, 1)
    sizes = through_ET[:, -1]
    before_ET = (through_ET - chosen_ET) + sum_before(sizes)[:, None]
    same = group_kT[:, None] == group_kT[None]
    sooner = jnp.tri(len(group_kT), k=-1, dtype=bool)[..., None]
    earlier_kT = jnp.sum(same & sooner, 1, dtype=jnp.int32)  # a token may name a group, or none, more than once
    return (jnp.take_along_axis(before_ET, group_kT, 0) + earlier_kT).T, sizes[:-1]


@jax.custom_vjp
def spread_numbers(weight: Float[Array, "T k"], row: Int[Array, "T k"]) -> Float[Array, "R"]:
    """Writes weight[t, j] to place row[t, j] of T k."""
    return jnp.zeros(row.size, weight.dtype).at[row.T].set(weight.T, unique_indices=True)


# The barrier: two kernels that read the gradient would each gather it from all over the memory.
spread_numbers.defvjp(
    lambda weight, row: (spread_numbers(weight, row), row),
    lambda row, d: (jax.lax.optimization_barrier(d[row]), None),
)


def refuse(x, row, num_rows) -> str | None:
    return refuse_device() or rows_mosaic_gpu.unserved(x)


def _gather(x: Float[Array, "T D"], row: Int[Array, "T k"], num_rows: int) -> Float[Array, "R D"]:
    token = jnp.zeros(num_rows, jnp.int32)
    token = token.at[row].set(jnp.arange(row.shape[0])[:, None], unique_indices=True, mode="drop")
    return x[token]


IMPLEMENTATIONS = {  # fastest first
    "mosaic_gpu": Implementation(rows_mosaic_gpu.spread_rows, refuse),
    "xla": Implementation(_gather),
    "reference": Implementation(_gather),  # nothing simpler defines it; a caller names one for rows and products
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def spread_rows(
    x: Float[Array, "T D"], row: Int[Array, "T k"], implementation: str = "auto", num_rows: int | None = None
) -> Float[Array, "R D"]:
    """Copies x[t] to the rows row[t, 0], row[t, 1], ...; the gradient is `sum_rows`.

    Args:
      row: int32, no number twice; every number from 0 to T k for the gradient.
      implementation: "auto", "mosaic_gpu", "xla" or "reference".
      num_rows: of the result, at most T k: rows from there on do not exist; None: T k. Rows that nothing is copied to
        hold anything.
    """
    return call("spread_rows", IMPLEMENTATIONS, implementation, x, row, row.size if num_rows is None else num_rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_rows(y: Float[Array, "R D"], row: Int[Array, "T k"], implementation: str = "auto") -> Float[Array, "T D"]:
    """Sums the rows row[t, 0], row[t, 1], ... of y in float32, rounded once; the gradient is `spread_rows`."""
    places = row.T  # as kernels make them
    rows = y[places] if len(y) == row.size else y.at[places].get(mode="fill", fill_value=0)
    return jnp.sum(rows, axis=0, dtype=jnp.promote_types(y.dtype, jnp.float32)).astype(y.dtype)


# Automatic differentiation would turn gathers into sums by scattering, which are slow and of no fixed order.
spread_rows.defvjp(
    lambda x, row, implementation, num_rows: (spread_rows(x, row, implementation, num_rows), row),
    lambda implementation, num_rows, row, dy: (sum_rows(dy, row, implementation), None),
)
sum_rows.defvjp(
    lambda y, row, implementation: (sum_rows(y, row, implementation), (row, len(y))),
    lambda implementation, saved, dy: (spread_rows(dy, saved[0], implementation, saved[1]), None),
)
