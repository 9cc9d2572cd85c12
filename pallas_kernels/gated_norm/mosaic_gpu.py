"""Gated RMS norm on Hopper: one pass forward, one backward, which keeps the inputs only."""

import functools
import math

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
LOG2E = math.log2(math.e)
DTYPES = (jnp.bfloat16, jnp.float16)
LINE, ROWS = 64, 16  # channels per line of 128 bytes, rows that a warpgroup covers at a time
WIDEST = 256  # channels: what fits in registers
TILES = 2  # of ROWS rows, whose loads are in flight together in the forward
BLOCKS = 3  # of the backward per multiprocessor, which take tiles in turns and leave one row of sums for the gain each

# Eight lanes share a row and read a line of it together, a warp has four rows: a mean is over registers and shuffles.
TILE = plgpu.Layout.TILED(
    fragmented_array.Tiling(((ROWS, LINE), (4, LINE), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
CHANNELS = TILE.reduce(0)


def refuse(x, logits, weight, **_) -> str | None:
    """Refuses all but Hopper GPUs, and shapes that whole tiles do not cover."""
    return refuse_device() or unserved(x, logits)


def unserved(x, logits) -> str | None:
    """The part of `refuse` that does not ask for the device."""
    V, rows = x.shape[-1], math.prod(x.shape[:-1])
    if x.dtype not in DTYPES or logits.dtype not in DTYPES:
        return f"x and logits must be bfloat16 or float16, got {x.dtype}, {logits.dtype}"
    if V % LINE or V > WIDEST or rows % (ROWS * TILES) or not rows:
        return f"{V=}, {rows=}: V must be a multiple of {LINE} up to {WIDEST}, rows of {ROWS * TILES}"
    return None


def gated_rms_norm(
    x: Float[Array, "*B V"], logits: Float[Array, "*B V"], weight: Float[Array, "V"], *, eps: float, activation: str
) -> Float[Array, "*B V"]:
    """See `pallas_kernels.gated_norm.api.gated_rms_norm`."""
    V = x.shape[-1]
    model = (a.reshape(1, -1, V) for a in (x, logits))  # of one model, whose gain all rows share
    return _core(float(eps), activation, *model, weight.astype(f32)[None]).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _core(eps: float, activation: str, x: Float[Array, "M R V"], logits, weight: Float[Array, "M V"]):
    return by_rows(functools.partial(_run, eps, activation))(x, logits, weight)


def _run(eps: float, activation: str, x, logits, weight):
    M, R, V = x.shape

    def gated_norm_forward(x, logits, weight, y):
        x, logits, weight, y = _of_model(x, logits, weight, y)
        gain = plgpu.load(weight, layout=CHANNELS, optimized=False)
        at = [pl.ds((lax.axis_index("block") * TILES + i) * ROWS, ROWS) for i in range(TILES)]
        loaded = [[_load(ref.at[rows]) for ref in (x, logits)] for rows in at]
        for rows, (wide, z) in zip(at, loaded, strict=True):
            gate, _ = _activate(activation, z)
            y.at[rows][...] = (wide * _by_row(_root(wide, eps), V) * _by_channel(gain) * gate).astype(y.dtype)

    launch = _launch(gated_norm_forward, jax.ShapeDtypeStruct(x.shape, logits.dtype), (M, R // (ROWS * TILES)))
    return launch(x, logits, weight)


def _core_forward(eps, activation, x, logits, weight):
    return _core(eps, activation, x, logits, weight), (x, logits, weight)


def _core_backward(eps, activation, saved, dy):
    return by_rows(functools.partial(_run_backward, eps, activation))(*saved, dy)


def _run_backward(eps, activation, x, logits, weight, dy):
    M, R, V = x.shape
    tiles, blocks = R // ROWS, BLOCKS * MULTIPROCESSORS

    def gated_norm_backward(*refs):
        x, logits, weight, dy, dx, d_logits, d_weight = _of_model(*refs[:-1])
        gain = plgpu.load(weight, layout=CHANNELS, optimized=False)
        block = lax.axis_index("block")

        def tile(n, total):
            rows = pl.ds((block + n * blocks) * ROWS, ROWS)
            wide, z, d = (_load(ref.at[rows]) for ref in (x, logits, dy))
            root = _root(wide, eps)
            normed = wide * _by_row(root, V)
            gate, slope = _activate(activation, z)
            d_scaled = d * gate
            d_normed = d_scaled * _by_channel(gain)
            inside = _by_row(jnp.sum(d_normed * normed, 1) * (1 / V), V)
            dx.at[rows][...] = ((d_normed - normed * inside) * _by_row(root, V)).astype(dx.dtype)
            d_logits.at[rows][...] = (d * normed * _by_channel(gain) * slope).astype(d_logits.dtype)
            return total + d_scaled * normed

        zero = plgpu.layout_cast(jnp.zeros((ROWS, V), f32), TILE)
        partial_sums = refs[-1]
        partial_sums[...] = lax.fori_loop(0, lax.div(tiles - block + blocks - 1, blocks), tile, zero)
        plgpu.commit_smem()
        parts = [plgpu.load(partial_sums.at[row], layout=CHANNELS, optimized=False) for row in range(ROWS)]
        d_weight.at[block][...] = sum(parts[1:], parts[0])

    struct = jax.ShapeDtypeStruct
    outs = [struct(x.shape, x.dtype), struct(x.shape, logits.dtype), struct((M, blocks, V), f32)]
    launch = _launch(gated_norm_backward, outs, (M, blocks), [plgpu.SMEM((ROWS, V), f32)])
    dx, d_logits, d_weight = launch(x, logits, weight, dy)
    return dx, d_logits, jnp.sum(d_weight, axis=1)


_core.defvjp(_core_forward, _core_backward)


def _of_model(*refs):
    return [ref.at[lax.axis_index("model")] for ref in refs]


def _launch(kernel, out_type, grid: tuple[int, int], scratch_types=()):
    """No barriers but those that the kernel has: its warps go their own ways."""
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=grid,
        grid_names=("model", "block"),
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0, unsafe_no_auto_barriers=True),
    )


def _load(ref):
    return plgpu.load(ref, layout=TILE, optimized=False).astype(f32)


def _by_row(x, V: int):
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (ROWS, V), (0,)), TILE)


def _by_channel(x):
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (ROWS, x.shape[0]), (1,)), TILE)


def _root(x, eps: float):
    return lax.rsqrt(jnp.sum(x * x, 1) * (1 / x.shape[1]) + eps)


def _activate(activation: str, z):
    """(activation, its derivative)."""
    root = lax.rsqrt(1.0 + jnp.exp2(-LOG2E * z))  # 1 / (1 + e) as a square: no division
    s = root * root
    if activation == "silu":
        return z * s, s * (1.0 + z * (1.0 - s))
    return s, s * (1.0 - s)
