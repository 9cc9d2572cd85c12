"""The RMS norm's gradients on Hopper: a warp has a row in registers, where XLA reads it twice."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.batching import by_rows
from pallas_kernels.hopper import refuse_device

f32 = jnp.float32
DTYPES = (jnp.bfloat16, jnp.float16)
LANES, WARPS = 32, 4  # a row per warp
VECTORS = (8, 4, 2)  # channels that a lane reads at once: the most that divide the width
WIDEST = 1536  # channels: what fits in registers
BLOCK = 64  # tokens per thread block, which leaves one row of sums per warp for the gain


def refuse(x, weight, dy, d_beside, **_) -> str | None:
    """Refuses all but Hopper GPUs, and shapes that whole rows and blocks do not cover."""
    return refuse_device() or unserved(x, d_beside)


def unserved(x, d_beside) -> str | None:
    """The part of `refuse` that does not ask for the device."""
    _, T, D = x.shape
    if x.dtype not in DTYPES:
        return f"x must be bfloat16 or float16, got {x.dtype}"
    if D % (LANES * VECTORS[-1]) or D > WIDEST or T % BLOCK:
        return f"{D=}, {T=}: D must be a multiple of {LANES * VECTORS[-1]} up to {WIDEST}, T of {BLOCK}"
    if d_beside is None:
        return "d_beside is None: there is nothing to add"
    return None


def rms_norm_gradients(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D"],
    dy: Float[Array, "B T D"],
    d_beside: Float[Array, "B T D"] | None,
    *,
    eps: float,
) -> tuple[Float[Array, "B T D"], Float[Array, "B N D"]]:
    """See `pallas_kernels.rms_norm.api.rms_norm_gradients`; every block has its part of the gain's gradient."""
    B, T, D = x.shape
    model = (a.reshape(1, -1, D) for a in (x, dy, d_beside))  # of one model, whose gain all rows share
    dx, sums = by_rows(functools.partial(_run, float(eps)))(weight.astype(f32)[None], *model)
    return dx.reshape(x.shape), jnp.sum(sums.reshape(B, T // BLOCK, WARPS, D), axis=2)


def _run(eps: float, weight: Float[Array, "M D"], x: Float[Array, "M R D"], dy, d_beside):
    M, R, D = x.shape
    vector = next(n for n in VECTORS if D % (LANES * n) == 0)
    line = LANES * vector
    tile = plgpu.Layout.TILED(
        fragmented_array.Tiling(((WARPS, line), (vector,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    )
    spread = lambda values, axis: plgpu.layout_cast(lax.broadcast_in_dim(values, (WARPS, D), (axis,)), tile)

    def rms_norm_backward(*refs):
        weight, x, dy, d_beside, dx, sums = (ref.at[lax.axis_index("model")] for ref in refs)
        block = lax.axis_index("block")
        gain = spread(plgpu.load(weight, layout=tile.reduce(0), optimized=False), 1)

        def four_rows(n, total):
            rows = pl.ds(block * BLOCK + n * WARPS, WARPS)
            wide, d, beside = (plgpu.load(ref.at[rows], layout=tile, optimized=False) for ref in (x, dy, d_beside))
            wide, d = wide.astype(f32), d.astype(f32)
            root = lax.rsqrt(jnp.sum(wide * wide, 1) * (1 / D) + eps)
            inner = jnp.sum(wide * d * gain, 1) * (root * root * (1 / D))
            dx.at[rows][...] = (beside.astype(f32) + spread(root, 0) * (d * gain - wide * spread(inner, 0))).astype(
                dx.dtype
            )
            return total + d * wide * spread(root, 0)

        zero = plgpu.layout_cast(jnp.zeros((WARPS, D), f32), tile)
        sums.at[block][...] = lax.fori_loop(0, BLOCK // WARPS, four_rows, zero)

    launch = plgpu.kernel(
        rms_norm_backward,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((M, R // BLOCK, WARPS, D), f32)],
        grid=(M, R // BLOCK),
        grid_names=("model", "block"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
    return launch(weight, x, dy, d_beside)
