"""The RMS norm's gradients on Hopper: a warp has a row in registers, which XLA reads twice, and the next on its way."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.batching import by_rows
from pallas_kernels.hopper import MULTIPROCESSORS, refuse_device

f32 = jnp.float32
DTYPES = (jnp.bfloat16, jnp.float16)
LANES, WARPS = 32, 4  # a row per warp
VECTORS = (8, 4, 2)  # channels that a lane reads at once: the most that divide the width
WIDEST = 1536  # channels: what fits in registers
BLOCKS = 2  # per multiprocessor, what fits in registers; they take rows in turns and leave one row of sums each
STAGES = 2  # rows per warp on their way
IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS


def refuse(x, weight, dy, d_beside, **_) -> str | None:
    """Refuses all but Hopper GPUs, and shapes that whole rows and blocks do not cover."""
    return refuse_device() or unserved(x, d_beside)


def unserved(x, d_beside) -> str | None:
    """The part of `refuse` that does not ask for the device."""
    B, T, D = x.shape
    if x.dtype not in DTYPES:
        return f"x must be bfloat16 or float16, got {x.dtype}"
    if D % (LANES * VECTORS[-1]) or D > WIDEST or B * T % WARPS or not B * T:
        return f"{D=}, {B * T=}: D must be a multiple of {LANES * VECTORS[-1]} up to {WIDEST}, B * T of {WARPS}"
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
) -> tuple[Float[Array, "B T D"], Float[Array, "1 N D"]]:
    """See `pallas_kernels.rms_norm.api.rms_norm_gradients`; every block has its part of the gain's gradient."""
    model = (a.reshape(1, -1, x.shape[-1]) for a in (x, dy, d_beside))  # of one model, whose gain all rows share
    dx, sums = by_rows(functools.partial(_run, float(eps)))(weight.astype(f32)[None], *model)
    return dx.reshape(x.shape), sums


def _run(eps: float, weight: Float[Array, "M D"], x: Float[Array, "M R D"], dy, d_beside):
    M, R, D = x.shape
    blocks, groups = BLOCKS * MULTIPROCESSORS, R // WARPS
    vector = next(n for n in VECTORS if D % (LANES * n) == 0)
    line = LANES * vector
    tile = plgpu.Layout.TILED(
        fragmented_array.Tiling(((WARPS, line), (vector,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    )
    channels = tile.reduce(0)
    spread = lambda values, axis: plgpu.layout_cast(lax.broadcast_in_dim(values, (WARPS, D), (axis,)), tile)

    def rms_norm_backward(*refs):
        *arrays, x_ring, dy_ring, beside_ring, partial_sums, full = refs
        weight, x, dy, d_beside, dx, sums = (ref.at[lax.axis_index("model")] for ref in arrays)
        block = lax.axis_index("block")
        mine = lax.div(groups - block + blocks - 1, blocks)
        rows = lambda n: pl.ds((block + n * blocks) * WARPS, WARPS)
        gain = spread(plgpu.load(weight, layout=channels, optimized=False), 1)
        rings = ((x, x_ring), (dy, dy_ring), (d_beside, beside_ring))

        def copy(n):
            slot = lax.rem(n, STAGES)
            for array, ring in rings:
                plgpu.copy_gmem_to_smem(array.at[rows(n)], ring.at[slot], full.at[slot], oob_mode=IN_BOUNDS)

        def four_rows(n, total):
            slot = lax.rem(n, STAGES)
            plgpu.barrier_wait(full.at[slot])
            wide, d, beside = (plgpu.load(ring.at[slot], layout=tile, optimized=False) for _, ring in rings)
            pl.when(n + STAGES < mine)(lambda: copy(n + STAGES))  # has a barrier: by then all warps have read the slot
            wide, d = wide.astype(f32), d.astype(f32)
            root = lax.rsqrt(jnp.sum(wide * wide, 1) * (1 / D) + eps)
            inner = jnp.sum(wide * d * gain, 1) * (root * root * (1 / D))
            value = beside.astype(f32) + spread(root, 0) * (d * gain - wide * spread(inner, 0))
            dx.at[rows(n)][...] = value.astype(dx.dtype)
            return total + d * wide * spread(root, 0)

        for n in range(STAGES):
            pl.when(n < mine)(functools.partial(copy, n))
        partial_sums[...] = lax.fori_loop(0, mine, four_rows, plgpu.layout_cast(jnp.zeros((WARPS, D), f32), tile))
        plgpu.commit_smem()
        parts = [plgpu.load(partial_sums.at[warp], layout=channels, optimized=False) for warp in range(WARPS)]
        sums.at[block][...] = sum(parts[1:], parts[0])

    launch = plgpu.kernel(
        rms_norm_backward,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((M, blocks, D), f32)],
        grid=(M, blocks),
        grid_names=("model", "block"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        scratch_types=[
            *[plgpu.SMEM((STAGES, WARPS, D), x.dtype)] * 3,
            plgpu.SMEM((WARPS, D), f32),
            plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        ],
    )
    return launch(weight, x, dy, d_beside)
