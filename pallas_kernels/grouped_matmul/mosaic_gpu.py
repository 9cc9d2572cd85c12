"""Grouped products on Hopper: which arguments the kernels serve, and which of them make up each gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.batching import by_rows
from pallas_kernels.grouped_matmul.gradient_mosaic_gpu import multiply_transposed
from pallas_kernels.grouped_matmul.product_mosaic_gpu import multiply_rows
from pallas_kernels.grouped_matmul.swiglu_mosaic_gpu import swiglu_gradients, swiglu_rows
from pallas_kernels.grouped_matmul.tiles import ALIGNMENT, ROWS, TileConfig, plan_tiles
from pallas_kernels.hopper import refuse_device

DTYPES = (jnp.bfloat16, jnp.float16)
COLUMNS = 16  # D and F must be multiples of it: of 32 bytes, the narrowest layout of the matrix unit
CONFIG = TileConfig()


def refuse(x, w, *rest) -> str | None:
    """Refuses all but Hopper GPUs, 16-bit rows and widths that a layout divides; arguments as of the functions."""
    return refuse_device() or unserved(x, w)


def unserved(x, w) -> str | None:
    """The part of `refuse` that does not ask for the device."""
    if x.dtype not in DTYPES:
        return f"x must be bfloat16 or float16, got {x.dtype}"
    if w.shape[1] % COLUMNS or w.shape[2] % COLUMNS:
        return f"D={w.shape[1]} and F={w.shape[2]} must be multiples of {COLUMNS}"
    return None


def _of_models(run: Callable) -> Callable:
    """Lets `jax.vmap` map `run` by one launch over the groups of all models.

    Rows behind a model's last group join it as zeros, so that groups follow each other without gaps.

    Args:
      run: takes group sizes, rows whose results are zero where they are, and more rows or matrices.
    """

    def run_models(group_sizes, rows, *others):
        (M, E), R = group_sizes.shape, rows.shape[1]
        if M > 1:
            used = jnp.sum(group_sizes, 1, keepdims=True)
            rows = jnp.where((jnp.arange(R)[None] < used)[..., None], rows, 0)
            group_sizes = group_sizes + jnp.where(jnp.arange(E)[None] == E - 1, R - used, 0)
        results = run(group_sizes.reshape(-1), *(x.reshape(-1, *x.shape[2:]) for x in (rows, *others)))
        return jax.tree.map(lambda x: x.reshape(M, -1, *x.shape[1:]), results)

    def run_one(*arrays):
        return jax.tree.map(lambda x: x[0], by_rows(run_models)(*(x[None] for x in arrays)))

    return run_one


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "M D"], w: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M F"]:
    """See `pallas_kernels.grouped_matmul.api.grouped_matmul`; the backward pass keeps the arguments alone."""
    return _of_models(_multiply)(group_sizes, _pad(x), w)[: x.shape[0]]


def _multiply(group_sizes, x, w):
    plan = plan_tiles(group_sizes, x.shape[0])
    return multiply_rows(plan, [(x, w.astype(x.dtype))], transposed=False, config=CONFIG)


def _matmul_forward(x, w, group_sizes):
    return grouped_matmul(x, w, group_sizes), (x, w, group_sizes)


def _matmul_backward(saved, dy):
    x, w, group_sizes = saved
    dx, dw = _of_models(_matmul_gradients)(group_sizes, _pad(dy), _pad(x), w)
    return dx[: x.shape[0]], dw, None


def _matmul_gradients(group_sizes, dy, x, w):
    plan = plan_tiles(group_sizes, x.shape[0])
    dx = multiply_rows(plan, [(dy, w.astype(x.dtype))], transposed=True, config=CONFIG)
    return dx, multiply_transposed(x, dy, group_sizes, dtype=w.dtype, config=CONFIG)


grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def grouped_swiglu(
    x: Float[Array, "M D"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    scale: Float[Array, "M"],
    group_sizes: Int[Array, "E"],
) -> Float[Array, "M D"]:
    """See `pallas_kernels.grouped_matmul.api.grouped_swiglu`; the backward pass also keeps x gate and x up."""
    return _swiglu_forward(x, gate, up, down, scale, group_sizes)[0]


def _swiglu_forward(x, gate, up, down, scale, group_sizes):
    y, gated, raised = _of_models(_swiglu)(group_sizes, _pad(x), gate, up, down, _pad(scale))
    gated, raised = (checkpoint_name(z, "operators") for z in (gated, raised))  # kept or recomputed by that name
    return y[: x.shape[0]], (x, gate, up, down, scale, group_sizes, gated, raised)


def _swiglu(group_sizes, x, gate, up, down, scale):
    plan = plan_tiles(group_sizes, x.shape[0])
    hidden, gated, raised = swiglu_rows(plan, x, *(w.astype(x.dtype) for w in (gate, up)), scale, config=CONFIG)
    y = multiply_rows(plan, [(hidden, down.astype(x.dtype))], transposed=False, config=CONFIG)
    return y, gated, raised


def _swiglu_backward(saved, dy):
    x, gate, up, down, scale, group_sizes, gated, raised = saved
    others = _pad(x), gate, up, down, _pad(scale), gated, raised
    dx, *gradients, d_scale = _of_models(_swiglu_gradients)(group_sizes, _pad(dy), *others)
    return dx[: x.shape[0]], *gradients, d_scale[: x.shape[0]].astype(scale.dtype), None


def _swiglu_gradients(group_sizes, dy, x, gate, up, down, scale, gated, raised):
    plan = plan_tiles(group_sizes, x.shape[0])
    hidden, d_gated, d_raised, d_scale = swiglu_gradients(
        plan, dy, down.astype(x.dtype), gated, raised, scale, config=CONFIG
    )
    pairs = [(d_gated, gate.astype(x.dtype)), (d_raised, up.astype(x.dtype))]
    dx = multiply_rows(plan, pairs, transposed=True, config=CONFIG)
    factors = ((x, d_gated, gate), (x, d_raised, up), (hidden, dy, down))
    gradients = (multiply_transposed(a, b, group_sizes, dtype=w.dtype, config=CONFIG) for a, b, w in factors)
    return dx, *gradients, d_scale


grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _pad(x):
    """Rows in whole steps, at least a tile of them; what is added lies behind the last group."""
    rows = max(ROWS, -(-x.shape[0] // ALIGNMENT) * ALIGNMENT)
    return jnp.pad(x, ((0, rows - x.shape[0]), *((0, 0),) * (x.ndim - 1))) if rows != x.shape[0] else x
