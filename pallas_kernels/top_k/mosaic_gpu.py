"""The largest values on Hopper: a few lanes keep a row in registers and take its largest k times."""

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


def refuse(values, bias, *, k: int) -> str | None:
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


def top_k(
    values: Float[Array, "B T E"], bias: Float[Array, "E"], *, k: int
) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"]]:
    """See `pallas_kernels.top_k.api.top_k`."""
    B, T, E = values.shape
    places, chosen = by_rows(functools.partial(_run, k))(values.reshape(1, B * T, E), bias[None])
    return tuple(jnp.moveaxis(x[0], 0, 1).reshape(B, T, k) for x in (places, chosen))


def _run(k: int, values: Float[Array, "M R E"], bias: Float[Array, "M E"]):
    """(places, values there) of M models, each [M, k, R]: a column per round of the search, as it is stored."""
    M, R, E = values.shape

    def top_k_of_rows(values, bias, places, chosen):
        model, rows = lax.axis_index("model"), pl.ds(lax.axis_index("block") * ROWS, ROWS)
        value = plgpu.load(values.at[model, rows], layout=TILE, optimized=False)
        added = plgpu.load(bias.at[model], layout=TILE.reduce(0), optimized=False)
        by_row = lambda x: plgpu.layout_cast(lax.broadcast_in_dim(x, (ROWS, E), (0,)), TILE)
        left = _ordered(value + plgpu.layout_cast(lax.broadcast_in_dim(added, (ROWS, E), (1,)), TILE))
        left = jnp.maximum(left, TAKEN + 1)
        place = plgpu.layout_cast(lax.broadcasted_iota(i32, (ROWS, E), 1), TILE)
        for i in range(k):
            largest = by_row(jnp.max(left, 1))
            first = jnp.min(jnp.where(left == largest, place, E), 1)
            taken = place == by_row(first)
            places.at[model, i, rows][...] = first
            chosen.at[model, i, rows][...] = jnp.sum(jnp.where(taken, value, 0.0), 1)
            left = jnp.where(taken, TAKEN, left)

    launch = plgpu.kernel(
        top_k_of_rows,
        out_type=[jax.ShapeDtypeStruct((M, k, R), dtype) for dtype in (i32, f32)],
        grid=(M, R // ROWS),
        grid_names=("model", "block"),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
    )
    return launch(values, bias)


def _ordered(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Integers in the order in which a sort has these float32: -NaN, -inf to -0, 0 to inf, NaN."""
    bits = lax.bitcast_convert_type(x, i32)
    return bits ^ ((bits >> 31) & jnp.iinfo(i32).max)
