"""The places of the largest values on Hopper: a few lanes keep a row in registers and take its largest k times."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.batching import by_rows
from pallas_kernels.hopper import refuse_device

f32, i32 = jnp.float32, jnp.int32
LINE, ROWS = 32, 16  # values per line of 128 bytes; rows per thread block: eight lanes have a row, a warp has four
WIDEST, MOST = 256, 16  # values of a row, which stay in registers; rounds of the search, which are written out
TAKEN = jnp.iinfo(i32).min  # below the number of every value

TILE = plgpu.Layout.TILED(
    fragmented_array.Tiling(((ROWS, LINE), (4, LINE), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


def refuse(values, *, k: int) -> str | None:
    """Refuses all but Hopper GPUs, and rows that whole lines and tiles do not cover."""
    return refuse_device() or unserved(values, k=k)


def unserved(values, *, k: int) -> str | None:
    """The part of `refuse` that does not ask for the device."""
    *rows, E = values.shape
    R = math.prod(rows)
    if values.dtype != f32:
        return f"values must be float32, got {values.dtype}"
    if E % LINE or E > WIDEST or k > MOST or R % ROWS:
        return f"{E=}, {k=}, rows={R}: E must be a multiple of {LINE} up to {WIDEST}, k up to {MOST}, rows of {ROWS}"
    return None


def top_k(values: Float[Array, "B T E"], *, k: int) -> Int[Array, "B T k"]:
    """See `pallas_kernels.top_k.api.top_k`."""
    B, T, E = values.shape
    return by_rows(functools.partial(_run, k))(values.reshape(B * T, E)).reshape(B, T, k)


def _run(k: int, values: Float[Array, "R E"]) -> Int[Array, "R k"]:
    R, E = values.shape

    def top_k_of_rows(values, places):
        rows = pl.ds(lax.axis_index("block") * ROWS, ROWS)
        left = jnp.maximum(_ordered(plgpu.load(values.at[rows], layout=TILE, optimized=False)), TAKEN + 1)
        place = plgpu.layout_cast(lax.broadcasted_iota(i32, (ROWS, E), 1), TILE)
        by_row = lambda x: plgpu.layout_cast(lax.broadcast_in_dim(x, (ROWS, E), (0,)), TILE)
        for i in range(k):
            largest = by_row(jnp.max(left, 1))
            first = jnp.min(jnp.where(left == largest, place, E), 1)
            places.at[i, rows][...] = first
            left = jnp.where(place == by_row(first), TAKEN, left)

    launch = plgpu.kernel(
        top_k_of_rows,
        out_type=jax.ShapeDtypeStruct((k, R), i32),
        grid=(R // ROWS,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
    )
    return launch(values).T


def _ordered(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Integers in the order in which a sort has these float32: -NaN, -inf to -0, 0 to inf, NaN."""
    bits = lax.bitcast_convert_type(x, i32)
    return bits ^ ((bits >> 31) & jnp.iinfo(i32).max)
