"""Grouped matrix product in plain JAX: a loop over blocks of rows that each belong to one group.

`lax.ragged_dot` multiplies every row by every matrix on a CPU. Here each group is filled up to whole blocks, so that a
block needs one matrix: at most M / 64 + E small dense products, with gathers on both sides.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 64  # rows per product; on 2 CPU cores 32 to 128 are within a third of each other


class Blocks(NamedTuple):
    """How rows are spread over blocks."""

    group: Int[Array, "N"]
    """The group of each block."""
    row: Int[Array, "N C"]
    """The row at each place of each block; M where there is none."""
    place: Int[Array, "M"]
    """The place of each row, counted through all blocks; N C for rows beyond the last group."""


def plan_blocks(group_sizes: Int[Array, "E"], num_rows: int) -> Blocks:
    """Cuts every group into blocks of `BLOCK` rows."""
    num_groups = group_sizes.shape[0]
    num_blocks = num_rows // BLOCK + num_groups  # enough for any sizes: each group leaves at most one block part-filled
    ends, block_ends = jnp.cumsum(group_sizes), jnp.cumsum(-(-group_sizes // BLOCK))
    first_row = ends - group_sizes
    first_block = jnp.concatenate([jnp.zeros(1, block_ends.dtype), block_ends[:-1]])
    block = jnp.arange(num_blocks, dtype=group_sizes.dtype)
    group = jnp.minimum(jnp.searchsorted(block_ends, block, side="right"), num_groups - 1)
    offset = (block - first_block[group]) * BLOCK
    row = (first_row[group] + offset)[:, None] + jnp.arange(BLOCK, dtype=group_sizes.dtype)[None]
    used: Bool[Array, "N C"] = (row < ends[group][:, None]) & (block < block_ends[-1])[:, None]
    every_row = jnp.arange(num_rows, dtype=group_sizes.dtype)
    group_of_row = jnp.minimum(jnp.searchsorted(ends, every_row, side="right"), num_groups - 1)
    place = first_block[group_of_row] * BLOCK + every_row - first_row[group_of_row]
    return Blocks(
        group=group,
        row=jnp.where(used, row, num_rows),
        place=jnp.where(every_row < ends[-1], place, num_blocks * BLOCK),
    )


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "M D"], w: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M F"]:
    """See `pallas_kernels.grouped_matmul.api.grouped_matmul`; the backward pass keeps the arguments alone."""
    blocks = plan_blocks(group_sizes, x.shape[0])
    y = jax.lax.map(lambda b: _dot("CD,DF->CF", b[0], w[b[1]]).astype(x.dtype), (_fill(x, blocks), blocks.group))
    return _empty(y, blocks)


def _forward(x, w, group_sizes):
    return grouped_matmul(x, w, group_sizes), (x, w, group_sizes)


def _backward(saved, dy):
    x, w, group_sizes = saved
    blocks = plan_blocks(group_sizes, x.shape[0])

    def one_block(dw, inputs):
        x_CD, dy_CF, group = inputs
        dx_CD = _dot("CF,DF->CD", dy_CF, w[group]).astype(x.dtype)
        return dw.at[group].add(_dot("CD,CF->DF", x_CD, dy_CF)), dx_CD

    zero = jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32))
    dw, dx = jax.lax.scan(one_block, zero, (_fill(x, blocks), _fill(dy, blocks), blocks.group))
    return _empty(dx, blocks), dw.astype(w.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _fill(x: Float[Array, "M D"], blocks: Blocks) -> Float[Array, "N C D"]:
    return x.at[blocks.row].get(mode="fill", fill_value=0)


def _empty(y: Float[Array, "N C F"], blocks: Blocks) -> Float[Array, "M F"]:
    return y.reshape(-1, y.shape[-1]).at[blocks.place].get(mode="fill", fill_value=0)
