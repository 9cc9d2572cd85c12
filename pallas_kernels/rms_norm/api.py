"""Public entry of the RMS norm's gradients: signature and the table of implementations."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arguments import check_arrays, check_one_dtype
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.partition import Axes
from pallas_kernels.rms_norm import mosaic_gpu, reference

__all__ = ["IMPLEMENTATIONS", "rms_norm_gradients"]

# Fastest first. The gradient of the gain is the sum of what they return over its first two axes.
IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(mosaic_gpu.rms_norm_gradients, mosaic_gpu.refuse),
    "reference": Implementation(reference.rms_norm_gradients),
}
AXES = Axes(("BT", "", "BT", "BT"), ("BT", "BT"))


def rms_norm_gradients(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D"],
    dy: Float[Array, "B T D"],
    d_beside: Float[Array, "B T D"] | None,
    *,
    eps: float,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T D"], Float[Array, "D"]]:
    """Pulls dy back through y = x / sqrt(mean(x^2) + eps) * weight and adds the gradient of x that did not pass it.

    Args:
      x: what was normalised, bfloat16, float16 or float32.
      weight: gain, any float dtype.
      dy: gradient of y, in the dtype of x.
      d_beside: gradient of x by another way, such as a residual connection, in the dtype of x; None: there is none.
      eps: added to the mean of squares.
      implementation: "auto" or a key of `IMPLEMENTATIONS`.

    Returns:
      (gradient of x in its dtype, computed in float32; that of the gain in float32).

    Raises:
      ValueError: an argument has the wrong shape or dtype.
      NotImplementedError: the implementation refuses these arguments; the message says why.
    """
    check_arrays(
        "rms_norm_gradients",
        {"x": (x, "B T D"), "weight": (weight, "D"), "dy": (dy, "B T D"), "d_beside": (d_beside, "B T D")},
    )
    check_one_dtype("rms_norm_gradients", x=x, dy=dy, d_beside=d_beside)
    arguments = (x, weight, dy, d_beside)
    dx, parts = call("rms_norm_gradients", IMPLEMENTATIONS, implementation, *arguments, eps=eps, axes=AXES)
    return dx, jnp.sum(parts, axis=(0, 1))
