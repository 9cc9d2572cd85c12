"""Public entry of the grouped matrix product: signature, argument checks and the table of implementations."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.grouped_matmul import reference, xla

__all__ = ["IMPLEMENTATIONS", "grouped_matmul"]

IMPLEMENTATIONS = {  # fastest first
    "xla": Implementation(xla.grouped_matmul),
    "reference": Implementation(reference.grouped_matmul),
}


def grouped_matmul(
    x: Float[Array, "M D"], w: Float[Array, "E D F"], group_sizes: Int[Array, "E"], *, implementation: str = "auto"
) -> Float[Array, "M F"]:
    """Multiplies the first group_sizes[0] rows of x by w[0], the next group_sizes[1] rows by w[1], and so on.

    Args:
      x: rows sorted by group, bfloat16, float16 or float32.
      w: one matrix per group, same dtype.
      group_sizes: int32, >= 0 (empty groups are allowed), with a sum of at most M.
      implementation: "auto", "xla" or "reference".

    Returns:
      Products in the dtype of x, accumulated in float32; rows beyond the last group are zero. Differentiable in x, w.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
      NotImplementedError: the implementation refuses these arguments.
    """
    if x.ndim != 2 or w.ndim != 3 or w.shape[1] != x.shape[1] or group_sizes.shape != w.shape[:1]:
        shapes = f"x {x.shape}, w {w.shape}, group_sizes {group_sizes.shape}"
        raise ValueError(f"grouped_matmul: must be x [M, D], w [E, D, F], group_sizes [E]; got {shapes}")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul: group_sizes must be integers, got {group_sizes.dtype}")
    return call("grouped_matmul", IMPLEMENTATIONS, implementation, x, w, group_sizes)
