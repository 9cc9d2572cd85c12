"""Public entry of the short convolution: signature, argument checks and the table of implementations."""

from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import check_arrays
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.partition import Axes
from pallas_kernels.short_conv import mosaic_gpu, reference, xla
from pallas_kernels.short_conv.spans import over_spans

__all__ = ["IMPLEMENTATIONS", "STEP_IMPLEMENTATIONS", "short_conv"]

# Fastest first.
IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(over_spans(mosaic_gpu.short_conv), mosaic_gpu.refuse),
    "xla": Implementation(over_spans(xla.short_conv)),
    "reference": Implementation(over_spans(reference.short_conv)),
}
# One token, as in decoding: XLA makes a single kernel of it.
STEP_IMPLEMENTATIONS = {name: IMPLEMENTATIONS[name] for name in ("xla", "reference")}
AXES = Axes(("BTH", "H"), ("BTH", "B-H"), {"segment_ids": "BT"}, exchanges=True)
CONTINUED_AXES = Axes(("B-H", "H"), ("B-H", "B-H"), {"cache": "B-H", "segment_ids": "B"})


def short_conv(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    *,
    cache: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Convolves each channel over the last W tokens, then applies SiLU: y_t = silu(sum_d weight[W-1-d] x_{t-d}).

    Padding is as if it were not there: taps step over it and look at the last W tokens of the document that are not
    padding, just as padding leaves a recurrent state alone. So a padded row equals the row without its padding.

    Args:
      x: inputs, bfloat16, float16 or float32.
      weight: filters, any float dtype; tap W-1 multiplies the current token; W >= 1.
      cache: the last W-1 inputs before the first document of x, oldest first, zero where there were none; None: zeros.
      segment_ids: int32; 0 is padding, which gives zero output and zero gradient and may hold anything. Taps do not
        reach across a token whose id differs from that of the last non-padding token before it.
      implementation: "auto" or a key of `IMPLEMENTATIONS`, for T = 1 of `STEP_IMPLEMENTATIONS`.

    Returns:
      (y in the dtype of x, accumulated in float32; the cache to continue the last document with, in the dtype of x).
      Differentiable in x, weight and cache.

    Raises:
      ValueError: an argument has the wrong shape.
    """
    arrays = {"x": (x, "B T D"), "weight": (weight, "D W"), "cache": (cache, "B W-1 D")}
    check_arrays("short_conv", arrays, {"segment_ids": (segment_ids, "B T")})
    implementations = IMPLEMENTATIONS if x.shape[1] > 1 else STEP_IMPLEMENTATIONS
    optional = {"cache": cache, "segment_ids": segment_ids}
    axes = AXES if cache is None else CONTINUED_AXES
    return call("short_conv", implementations, implementation, x, weight, axes=axes, **optional)
