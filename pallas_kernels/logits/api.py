"""Public entries of the logits: signatures and the table of implementations."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.logits import mosaic_gpu, xla

IMPLEMENTATIONS = {  # fastest first
    "mosaic_gpu": Implementation(mosaic_gpu.logits, mosaic_gpu.refuse),
    "xla": Implementation(xla.logits),
}


class Logits(NamedTuple):
    """Consistent with each other: exponentials of the differences of their rows add up to 1."""

    values: Float[Array, "M A"]
    """float32, or float16 where the kernel rounds them once; then below 65504, else their loss is not finite."""
    log_sum_exp: Float[Array, "M"]
    """Of the values as rounded; float32."""
    target: Float[Array, "M"]
    """The value of each row's target; float32."""


def logits(
    x: Float[Array, "M D"], weight: Float[Array, "D A"], targets: Int[Array, "M"], *, implementation: str = "auto"
) -> Logits:
    """Multiplies rows by the head. Not differentiable: losses that form their gradient themselves use it.

    Args:
      x: any float dtype; 16-bit for the kernel.
      weight: of the dtype of x.
      targets: int32 in [0, A).
      implementation: "auto", "mosaic_gpu" or "xla".

    Raises:
      NotImplementedError: the implementation refuses these arguments.
    """
    return Logits(*call("logits", IMPLEMENTATIONS, implementation, x, weight, targets))


def is_target(targets: Int[Array, "..."], values: Float[Array, "... A"]) -> Bool[Array, "... A"]:
    """Which values are those of the targets."""
    return xla.is_target(targets, values)
