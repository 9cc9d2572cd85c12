"""Rows to their places on Hopper: every row is read once and written to each of its places by the copy engine."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.batching import by_rows
from pallas_kernels.hopper import MULTIPROCESSORS

TOKENS, STAGES = 8, 4  # rows per step; steps whose rows are in shared memory
BLOCKS = 2 * MULTIPROCESSORS
LINE = 64  # columns; a row in shared memory is whole lines of 128 bytes, from which copies start
WIDEST = 1536  # columns of which two blocks fit into the shared memory of a multiprocessor


def unserved(x) -> str | None:
    """Why `spread_rows` cannot take x, whatever the device."""
    T, D = x.shape
    if x.dtype.itemsize != 2:
        return f"x must be bfloat16 or float16, got {x.dtype}"
    if T % TOKENS or D % LINE or D > 2 * WIDEST:
        return f"x {x.shape} must have a multiple of {TOKENS} rows and of {LINE} columns, at most {2 * WIDEST}"
    return None


def _box(columns: int) -> int:
    """Columns per box: a copy has at most 256 entries per dimension, in whole 16 bytes."""
    return max(box for box in range(8, 257, 8) if columns % box == 0)


def spread_rows(x: Float[Array, "T D"], row: Int[Array, "T k"], num_rows: int) -> Float[Array, "R D"]:
    """See `pallas_kernels.grouped_matmul.rows.spread_rows`."""
    return by_rows(functools.partial(_spread_models, num_rows=num_rows))(x[None], row[None])[0]


def _spread_models(x: Float[Array, "M T D"], row: Int[Array, "M T k"], num_rows: int) -> Float[Array, "M R D"]:
    """Several models at once, whose rows stand behind each other."""
    (M, T, D), k, R = x.shape, row.shape[2], num_rows
    first = jnp.arange(0, M * R, R, dtype=row.dtype)[:, None, None]
    row = row + first if num_rows == T * k else jnp.where(row < R, row + first, M * R)
    return _spread(x.reshape(M * T, D), row.reshape(M * T, k), M * R).reshape(M, R, D)


def _spread(x, row, num_rows: int):
    (T, D), k = x.shape, row.shape[1]
    steps, box = T // TOKENS, _box(D)
    blocks = min(BLOCKS if D <= WIDEST else BLOCKS // 2, steps)

    def grouped_spread_rows(x, row, y, buffer, arrived):
        block = lax.axis_index("block")
        mine = lax.div(steps - block + blocks - 1, blocks)

        def tokens(i):
            return pl.ds((i * blocks + block) * TOKENS, TOKENS)

        def fetch(i):
            slot = lax.rem(i, STAGES)
            plgpu.copy_gmem_to_smem(x.at[tokens(i)], buffer.at[slot], arrived.at[slot])

        def spread(i, _):
            slot, first = lax.rem(i, STAGES), (i * blocks + block) * TOKENS
            places = [[row[j, first + t] for j in range(k)] for t in range(TOKENS)]
            plgpu.barrier_wait(arrived.at[slot])
            for t in range(TOKENS):
                for place in places[t]:  # the copy engine leaves out those behind the last row
                    plgpu.copy_smem_to_gmem(buffer.at[slot, pl.ds(t, 1)], y.at[pl.ds(place, 1)], commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the slot of the step before is free again

            @pl.when((i > 0) & (i - 1 + STAGES < mine))
            def _():
                fetch(i - 1 + STAGES)

        for i in range(STAGES):

            @pl.when(i < mine)
            def _(i=i):
                fetch(lax.convert_element_type(i, "int32"))

        lax.fori_loop(0, mine, spread, None)
        plgpu.wait_smem_to_gmem(0)

    launch = plgpu.kernel(
        grouped_spread_rows,
        out_type=jax.ShapeDtypeStruct((num_rows, D // box, box), x.dtype),
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        scratch_types=[
            plgpu.SMEM((STAGES, TOKENS, D // box, box), x.dtype),
            plgpu.Barrier(num_barriers=STAGES),
        ],
    )
    return launch(x.reshape(T, D // box, box), row.T).reshape(num_rows, D)  # transposed, as kernels make it
