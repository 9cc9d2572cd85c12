"""Public entries of the grouped products: signatures, argument checks and the tables of implementations."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.grouped_matmul import mosaic_gpu, reference, xla
from pallas_kernels.grouped_matmul.rows import place_rows, spread_rows, sum_rows
from pallas_kernels.grouped_matmul.tiles import SPARE

__all__ = [
    "IMPLEMENTATIONS",
    "SPARE",
    "SWIGLU_IMPLEMENTATIONS",
    "grouped_matmul",
    "grouped_swiglu",
    "place_rows",
    "spread_rows",
    "sum_rows",
]

IMPLEMENTATIONS = {  # fastest first
    "mosaic_gpu": Implementation(mosaic_gpu.grouped_matmul, mosaic_gpu.refuse),
    "xla": Implementation(xla.grouped_matmul),
    "reference": Implementation(reference.grouped_matmul),
}
SWIGLU_IMPLEMENTATIONS = {  # fastest first
    "mosaic_gpu": Implementation(mosaic_gpu.grouped_swiglu, mosaic_gpu.refuse),
    "xla": Implementation(xla.grouped_swiglu),
    "reference": Implementation(reference.grouped_swiglu),
}


def grouped_matmul(
    x: Float[Array, "M D"], w: Float[Array, "E D F"], group_sizes: Int[Array, "E"], *, implementation: str = "auto"
) -> Float[Array, "M F"]:
    """Multiplies the first group_sizes[0] rows of x by w[0], the next group_sizes[1] rows by w[1], and so on.

    Args:
      x: rows sorted by group, bfloat16, float16 or float32; finite, also behind the last group, as is the gradient of
        the result.
      w: one matrix per group, of the dtype of x, or float32: it is then rounded to the dtype of x for the products,
        and its gradient is not rounded.
      group_sizes: integers >= 0 (empty groups are allowed), with a sum of at most M.
      implementation: "auto", "mosaic_gpu", "xla" or "reference".

    Returns:
      Products in the dtype of x, accumulated in float32; rows beyond the last group are zero. Differentiable in x, w.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
      NotImplementedError: the implementation refuses these arguments.
    """
    if x.ndim != 2 or w.ndim != 3 or w.shape[1] != x.shape[1] or group_sizes.shape != w.shape[:1]:
        shapes = f"x {x.shape}, w {w.shape}, group_sizes {group_sizes.shape}"
        raise ValueError(f"grouped_matmul: must be x [M, D], w [E, D, F], group_sizes [E]; got {shapes}")
    _check_dtypes("grouped_matmul", group_sizes, x, w=w)
    return call("grouped_matmul", IMPLEMENTATIONS, implementation, x, w, group_sizes.astype(jnp.int32))


def grouped_swiglu(
    x: Float[Array, "M D"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    scale: Float[Array, "M"],
    group_sizes: Int[Array, "E"],
    *,
    clear: bool = True,
    implementation: str = "auto",
) -> Float[Array, "M D"]:
    """Computes (scale silu(x gate) (x up)) down with the matrices of each row's group.

    Args:
      x, gate, up, down, group_sizes: as x, w and group_sizes of `grouped_matmul`.
      scale: factor on each row, float32: applied before the last product, so that a sum over rows needs no weights and
        its gradient does not need the result.
      clear: whether results and gradients behind the last group are zero; else they may hold anything from its
        `SPARE`-th row on, and x, scale and the result's gradient may there, too (finite numbers under `jax.vmap`, which
        has them join the last group). Many rows that no group has cost time.
      implementation: "auto", "mosaic_gpu", "xla" or "reference".

    Returns:
      Rows in the dtype of x; if `clear`, zero beyond the last group. SwiGLU is computed in float32, rounded once; the
      kernel takes it from the float32 products, the others from rounded ones. Differentiable in all but group_sizes.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
      NotImplementedError: the implementation refuses these arguments.
    """
    E, D, F = gate.shape if gate.ndim == 3 else (0, 0, 0)
    shapes = {"x": x.shape, "gate": gate.shape, "up": up.shape, "down": down.shape, "scale": scale.shape}
    rows = x.shape[0] if x.ndim else 0
    if shapes != {"x": (rows, D), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D), "scale": (rows,)}:
        rule = "must be x [M, D], gate and up [E, D, F], down [E, F, D], scale [M]"
        raise ValueError(f"grouped_swiglu: {rule}; got {', '.join(f'{k} {v}' for k, v in shapes.items())}")
    if group_sizes.shape != (E,):
        raise ValueError(f"grouped_swiglu: group_sizes must be [E] = [{E}], got {group_sizes.shape}")
    _check_dtypes("grouped_swiglu", group_sizes, x, gate=gate, up=up, down=down)
    arrays = x, gate, up, down, scale, group_sizes.astype(jnp.int32)
    return call("grouped_swiglu", SWIGLU_IMPLEMENTATIONS, implementation, *arrays, clear)


def _check_dtypes(op: str, group_sizes, x, **matrices) -> None:
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"{op}: group_sizes must be integers, got {group_sizes.dtype}")
    for name, w in matrices.items():
        if w.dtype not in (x.dtype, jnp.float32):
            raise ValueError(f"{op}: {name} must be {x.dtype}, the dtype of x, or float32; got {w.dtype}")
