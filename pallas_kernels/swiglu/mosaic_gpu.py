"""Dense SwiGLU on Hopper: the kernels of the grouped one, with a group for each model that `jax.vmap` maps."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.batching import by_rows
from pallas_kernels.grouped_matmul.mosaic_gpu import COLUMNS, CONFIG, DTYPES
from pallas_kernels.grouped_matmul.swiglu_mosaic_gpu import swiglu_gradients, swiglu_rows
from pallas_kernels.grouped_matmul.tiles import ALIGNMENT
from pallas_kernels.hopper import refuse_device
from pallas_kernels.tiles_mosaic_gpu import ROWS


def refuse(x, w, *rest) -> str | None:
    """Refuses all but Hopper GPUs, and what would have to be filled up; arguments as of the functions below."""
    return refuse_device() or unserved(x, w)


def unserved(x, w) -> str | None:
    """The part of `refuse` that does not ask for the device."""
    rows = x.shape[0] * x.shape[1]
    if x.dtype not in DTYPES:
        return f"activations must be bfloat16 or float16, got {x.dtype}"
    if rows < ROWS or rows % ALIGNMENT:
        return f"B T = {rows} must be a multiple of {ALIGNMENT}, at least {ROWS}"
    if min(w.shape) < ROWS or any(size % COLUMNS for size in w.shape):
        return f"widths {w.shape} must be multiples of {COLUMNS}, at least {ROWS}"
    return None


def swiglu_product(
    x: Float[Array, "B T D"], gate: Float[Array, "D F"], up: Float[Array, "D F"]
) -> tuple[Float[Array, "B T F"], Float[Array, "B T 2 F"]]:
    """See `pallas_kernels.swiglu.api.swiglu_product`."""
    return _of_models(_product)(x, gate, up)


def _product(x, gate, up):
    return swiglu_rows(_plan(x), _rows(x), gate, up, None, config=CONFIG, joined=True)


def swiglu_product_gradient(
    dy: Float[Array, "B T D"], down: Float[Array, "F D"], both: Float[Array, "B T 2 F"]
) -> Float[Array, "B T 2 F"]:
    """See `pallas_kernels.swiglu.api.swiglu_product_gradient`."""
    return _of_models(_gradient)(dy, both, down)


def _gradient(dy, both, down):
    (d_both,), _ = swiglu_gradients(_plan(dy), _rows(dy), down, (_rows(both),), None, config=CONFIG)
    return d_both


def _of_models(run: Callable) -> Callable:
    """Lets `jax.vmap` map `run` by one launch; its arguments are those of all models, its results their rows."""

    def run_models(x, *others):
        return jax.tree.map(lambda y: y.reshape(*x.shape[:3], *y.shape[1:]), run(x, *others))

    return lambda *arrays: jax.tree.map(lambda y: y[0], by_rows(run_models)(*(x[None] for x in arrays)))


def _plan(x: Float[Array, "M B T D"]):
    """What `plan_tiles` gives for a group per model, known when the program is made."""
    models, rows = x.shape[0], x.shape[1] * x.shape[2]
    across = -(-rows // ROWS)
    group, tile = np.divmod(np.arange(models * across, dtype=np.int32), across)
    start = group * rows
    row = start + np.minimum(tile * ROWS, rows - ROWS)
    return np.stack([group, row, start, start + rows], 1), np.array([models * across], np.int32)


def _rows(x: Float[Array, "M B T ..."]) -> Float[Array, "R ..."]:
    return x.reshape(-1, *x.shape[3:])
