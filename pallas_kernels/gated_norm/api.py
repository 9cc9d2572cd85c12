"""Public entry of the gated RMS norm: signature, argument checks and the table of implementations."""

import math

from jaxtyping import Array, Float

from pallas_kernels.arguments import check_arrays
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.gated_norm import mosaic_gpu, reference
from pallas_kernels.partition import Axes

__all__ = ["FEW_IMPLEMENTATIONS", "FEW_ROWS", "IMPLEMENTATIONS", "gated_rms_norm"]

# Fastest first.
IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(mosaic_gpu.gated_rms_norm, mosaic_gpu.refuse),
    "reference": Implementation(reference.gated_rms_norm),
}
# Few rows, as in decoding: XLA makes a single kernel of them.
FEW_ROWS = 1024
FEW_IMPLEMENTATIONS = {"reference": IMPLEMENTATIONS["reference"]}
AXES = Axes(("BTH", "BTH", ""), "BTH")  # of [B, T, H, V]


def gated_rms_norm(
    x: Float[Array, "*B V"],
    logits: Float[Array, "*B V"],
    weight: Float[Array, "V"],
    *,
    eps: float,
    activation: str = "sigmoid",
    implementation: str = "auto",
) -> Float[Array, "*B V"]:
    """x / sqrt(mean(x^2) + eps) * weight * activation(logits), over the last axis, computed in float32.

    Args:
      x: outputs of the heads, bfloat16, float16 or float32.
      logits: of the output gate, same shape.
      weight: gain of the norm, float32.
      eps: added to the mean of squares, positive.
      activation: "sigmoid" or "silu".
      implementation: "auto" or a key of `IMPLEMENTATIONS`; up to `FEW_ROWS` rows, of `FEW_IMPLEMENTATIONS`.

    Returns:
      The product in the dtype of the logits. Differentiable in x, logits and weight.

    Raises:
      ValueError: an argument has the wrong shape or kind, or the activation is unknown.
      NotImplementedError: the implementation refuses these arguments; the message says why.
    """
    axes = " ".join([*(f"B{i}" for i in range(x.ndim - 1)), "V"])
    check_arrays("gated_rms_norm", {"x": (x, axes), "logits": (logits, axes), "weight": (weight, "V")})
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"gated_rms_norm: {activation=} must be one of {', '.join(reference.ACTIVATIONS)}")
    settings = {"eps": eps, "activation": activation, "axes": AXES if x.ndim == 4 else None}
    implementations = IMPLEMENTATIONS if math.prod(x.shape[:-1]) > FEW_ROWS else FEW_IMPLEMENTATIONS
    return call("gated_rms_norm", implementations, implementation, x, logits, weight, **settings)
