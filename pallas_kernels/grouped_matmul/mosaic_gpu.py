"""Grouped products on Hopper: which arguments the kernels serve, and which of them make up each gradient."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels.batching import by_rows
from pallas_kernels.grouped_matmul.gradient_mosaic_gpu import multiply_transposed
from pallas_kernels.grouped_matmul.product_mosaic_gpu import multiply_rows
from pallas_kernels.grouped_matmul.swiglu_mosaic_gpu import swiglu_gradients, swiglu_rows
from pallas_kernels.grouped_matmul.tiles import ALIGNMENT, TileConfig, plan_tiles
from pallas_kernels.hopper import refuse_device
from pallas_kernels.tiles_mosaic_gpu import ROWS

DTYPES = (jnp.bfloat16, jnp.float16)
COLUMNS = 64  # to whole multiples of which other widths are filled with zeros: 128 bytes, a row of the fastest layout
CONFIG = TileConfig()


def refuse(x, w, *rest) -> str | None:
    """Refuses all but Hopper GPUs and 16-bit rows; arguments as of the functions below."""
    return refuse_device() or unserved(x, w)


def unserved(x, w) -> str | None:
    """The part of `refuse` that does not ask for the device."""
    if x.dtype not in DTYPES:
        return f"x must be bfloat16 or float16, got {x.dtype}"
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
    y = _of_models(_multiply)(group_sizes, _pad(x), _widen(w, x.dtype))
    return y[: x.shape[0], : w.shape[2]]


def _multiply(group_sizes, x, w):
    plan = plan_tiles(group_sizes, x.shape[0])
    return multiply_rows(plan, [(x, w)], transposed=False, config=CONFIG)


def _matmul_forward(x, w, group_sizes):
    return grouped_matmul(x, w, group_sizes), (x, w, group_sizes)


def _matmul_backward(saved, dy):
    x, w, group_sizes = saved
    run = _of_models(functools.partial(_matmul_gradients, w.dtype))
    dx, dw = run(group_sizes, _pad(dy), _pad(x), _widen(w, x.dtype))
    return dx[: x.shape[0], : x.shape[1]], _narrow(dw, w), None


def _matmul_gradients(dtype, group_sizes, dy, x, w):
    plan = plan_tiles(group_sizes, x.shape[0])
    dx = multiply_rows(plan, [(dy, w)], transposed=True, config=CONFIG)
    return dx, multiply_transposed(x, dy, group_sizes, dtype=dtype, config=CONFIG)


grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def grouped_swiglu(
    x: Float[Array, "M D"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    scale: Float[Array, "M"],
    group_sizes: Int[Array, "E"],
    clear: bool = True,
) -> Float[Array, "M D"]:
    """See `pallas_kernels.grouped_matmul.api.grouped_swiglu`; the backward pass keeps all that was made but y."""
    return _swiglu_forward(x, gate, up, down, scale, group_sizes, clear)[0]


def _swiglu_forward(x, gate, up, down, scale, group_sizes, clear):
    matrices = (_widen(w, x.dtype) for w in (gate, up, down))
    run = _of_models(functools.partial(_swiglu, clear))
    y, *made = run(group_sizes, _pad(x), *matrices, _pad(scale))
    made = (checkpoint_name(z, "operators") for z in made)  # kept or recomputed by that name
    return y[: x.shape[0], : x.shape[1]], (x, gate, up, down, scale, group_sizes, *made)


def _swiglu(clear, group_sizes, x, gate, up, down, scale):
    plan = plan_tiles(group_sizes, x.shape[0], clear)
    hidden, gated, raised = swiglu_rows(plan, x, gate, up, scale, config=CONFIG)
    return multiply_rows(plan, [(hidden, down)], transposed=False, config=CONFIG), gated, raised, hidden


def _swiglu_backward(clear, saved, dy):
    x, gate, up, down, scale, group_sizes, *rows = saved
    matrices = gate, up, down
    run = _of_models(functools.partial(_swiglu_gradients, clear, tuple(w.dtype for w in matrices)))
    widened = (_widen(w, x.dtype) for w in matrices)
    dx, *gradients, d_scale = run(group_sizes, _pad(dy), _pad(x), *widened, _pad(scale), *rows)
    gradients = (_narrow(dw, w) for dw, w in zip(gradients, matrices, strict=True))
    return dx[: x.shape[0], : x.shape[1]], *gradients, d_scale[: x.shape[0]].astype(scale.dtype), None


def _swiglu_gradients(clear, dtypes, group_sizes, dy, x, gate, up, down, scale, gated, raised, hidden):
    plan = plan_tiles(group_sizes, x.shape[0], clear)
    (d_gated, d_raised), d_scale = swiglu_gradients(plan, dy, down, (gated, raised), scale, config=CONFIG)
    dx = multiply_rows(plan, [(d_gated, gate), (d_raised, up)], transposed=True, config=CONFIG)
    # The matrices' last use before their gradients: else the optimizer, which writes onto them, would need copies.
    dx, d_gated, d_raised, hidden = jax.lax.optimization_barrier((dx, d_gated, d_raised, hidden))
    factors = zip((x, x, hidden), (d_gated, d_raised, dy), dtypes, strict=True)
    gradients = (multiply_transposed(a, b, group_sizes, dtype=dtype, config=CONFIG) for a, b, dtype in factors)
    return dx, *gradients, d_scale


grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _pad(x):
    """Fills up rows to whole steps, at least a tile of them, behind the last group; columns to whole layouts."""
    rows = max(ROWS, -(-x.shape[0] // ALIGNMENT) * ALIGNMENT)
    return _fill(x, rows, *map(_whole, x.shape[1:]))


def _widen(w: Float[Array, "E D F"], dtype: DTypeLike) -> Float[Array, "E D F"]:
    """The matrices as the kernels take them; rounding and filling are one copy."""
    return _fill(w.astype(dtype), w.shape[0], *map(_whole, w.shape[1:]))


def _narrow(dw: Float[Array, "E D F"], w: Float[Array, "E D F"]) -> Float[Array, "E D F"]:
    return dw[:, : w.shape[1], : w.shape[2]]


def _whole(columns: int) -> int:
    """At least a tile: along an array of one layout the copy engine would drop what is to be left out elsewhere."""
    return max(ROWS, -(-columns // COLUMNS) * COLUMNS)


def _fill(x, *shape: int):
    return x if x.shape == shape else jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])
