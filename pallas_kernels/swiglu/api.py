"""Public entries of the dense SwiGLU: signatures, argument checks and the tables of implementations."""

from jaxtyping import Array, Float

from pallas_kernels.arguments import check_arrays, check_one_dtype
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.partition import Axes
from pallas_kernels.swiglu import mosaic_gpu, xla
from pallas_kernels.swiglu.xla import swiglu

__all__ = ["GRADIENT_IMPLEMENTATIONS", "IMPLEMENTATIONS", "swiglu", "swiglu_product", "swiglu_product_gradient"]

IMPLEMENTATIONS = {  # fastest first
    "mosaic_gpu": Implementation(mosaic_gpu.swiglu_product, mosaic_gpu.refuse),
    "xla": Implementation(xla.swiglu_product),
}
GRADIENT_IMPLEMENTATIONS = {  # fastest first
    "mosaic_gpu": Implementation(mosaic_gpu.swiglu_product_gradient, mosaic_gpu.refuse),
    "xla": Implementation(xla.swiglu_product_gradient),
}
AXES = Axes(("BT", "-H", "-H"), ("BTH", "BT-H"))
GRADIENT_AXES = Axes(("BT", "H", "BT-H"), "BT-H")


def swiglu_product(
    x: Float[Array, "B T D"], gate: Float[Array, "D F"], up: Float[Array, "D F"], *, implementation: str = "auto"
) -> tuple[Float[Array, "B T F"], Float[Array, "B T 2 F"]]:
    """Computes silu(x gate) (x up).

    Args:
      x: bfloat16, float16 or float32.
      gate, up: in the dtype of x.
      implementation: "auto" or a key of `IMPLEMENTATIONS`.

    Returns:
      (SwiGLU, both products), in the dtype of x. Products are accumulated in float32, SwiGLU is computed in float32 and
      rounded once; the kernel takes it from the float32 products, the other from rounded ones. Not differentiable: the
      gradient is that of the block, see `swiglu_product_gradient`.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
      NotImplementedError: the implementation refuses these arguments.
    """
    check_arrays("swiglu_product", {"x": (x, "B T D"), "gate": (gate, "D F"), "up": (up, "D F")})
    check_one_dtype("swiglu_product", x=x, gate=gate, up=up)
    return call("swiglu_product", IMPLEMENTATIONS, implementation, x, gate, up, axes=AXES)


def swiglu_product_gradient(
    dy: Float[Array, "B T D"], down: Float[Array, "F D"], both: Float[Array, "B T 2 F"], *, implementation: str = "auto"
) -> Float[Array, "B T 2 F"]:
    """Pulls dy back through y = (silu(g) u) down.

    Args:
      dy: bfloat16, float16 or float32.
      down: in the dtype of dy.
      both: g and u, as `swiglu_product` gives them.
      implementation: "auto" or a key of `GRADIENT_IMPLEMENTATIONS`.

    Returns:
      Gradients of g and of u, in the dtype of dy.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
      NotImplementedError: the implementation refuses these arguments.
    """
    op, arrays = "swiglu_product_gradient", {"dy": (dy, "B T D"), "down": (down, "F D"), "both": (both, "B T G F")}
    if check_arrays(op, arrays)["G"] != 2:
        raise ValueError(f"{op}: both has shape {both.shape}, must hold 2 products, [B, T, 2, F]")
    check_one_dtype(op, dy=dy, down=down, both=both)
    return call(op, GRADIENT_IMPLEMENTATIONS, implementation, dy, down, both, axes=GRADIENT_AXES)
