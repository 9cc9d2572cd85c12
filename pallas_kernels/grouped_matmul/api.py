"""Public entries of the grouped products: signatures, argument checks and the tables of implementations."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import check_arrays
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.grouped_matmul import mosaic_gpu, reference, xla
from pallas_kernels.grouped_matmul.rows import place_rows, spread_numbers, spread_rows, sum_rows
from pallas_kernels.grouped_matmul.tiles import SPARE

__all__ = [
    "IMPLEMENTATIONS",
    "SPARE",
    "SWIGLU_IMPLEMENTATIONS",
    "grouped_matmul",
    "grouped_swiglu",
    "place_rows",
    "spread_numbers",
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
    check_arrays("grouped_matmul", {"x": (x, "M D"), "w": (w, "E D F")}, {"group_sizes": (group_sizes, "E")})
    _check_dtypes("grouped_matmul", x, w=w)
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
    floating = {"x": (x, "M D"), "gate": (gate, "E D F"), "up": (up, "E D F"), "down": (down, "E F D")}
    check_arrays("grouped_swiglu", floating | {"scale": (scale, "M")}, {"group_sizes": (group_sizes, "E")})
    _check_dtypes("grouped_swiglu", x, gate=gate, up=up, down=down)
    arrays = x, gate, up, down, scale, group_sizes.astype(jnp.int32)
    return call("grouped_swiglu", SWIGLU_IMPLEMENTATIONS, implementation, *arrays, clear)


def _check_dtypes(op: str, x, **matrices) -> None:
    for name, w in matrices.items():
        if w.dtype not in (x.dtype, jnp.float32):
            raise ValueError(f"{op}: {name} must be {x.dtype}, the dtype of x, or float32; got {w.dtype}")
