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

    A running count over the tokens in place of a sort: on a GPU less than half of its time.

    Args:
      group: int32, 0 <= group <= num_groups; pairs of group num_groups, which is none, come last.

    Returns:
      The row of each pair, every row once; the number of rows of each group.
    """
    chosen = jnp.sum(jax.nn.one_hot(group, num_groups + 1, dtype=jnp.int32), 1)
    through = jnp.cumsum(chosen, 0)
    sizes = through[-1]
    before = (through - chosen) + sum_before(sizes)[None]
    same = group[:, :, None] == group[:, None, :]
    earlier = jnp.sum(jnp.tril(same, -1), 2, dtype=jnp.int32)  # a token may name a group, or none, more than once
    return jnp.take_along_axis(before, group, 1) + earlier, sizes[:-1]


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
    rows = y[row] if len(y) == row.size else y.at[row].get(mode="fill", fill_value=0)
    return jnp.sum(rows, axis=1, dtype=jnp.promote_types(y.dtype, jnp.float32)).astype(y.dtype)


# Automatic differentiation would turn gathers into sums by scattering, which are slow and of no fixed order.
spread_rows.defvjp(
    lambda x, row, implementation, num_rows: (spread_rows(x, row, implementation, num_rows), row),
    lambda implementation, num_rows, row, dy: (sum_rows(dy, row, implementation), None),
)
sum_rows.defvjp(
    lambda y, row, implementation: (sum_rows(y, row, implementation), (row, len(y))),
    lambda implementation, saved, dy: (spread_rows(dy, saved[0], implementation, saved[1]), None),
)
