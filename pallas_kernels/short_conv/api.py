"""Public entry of the short convolution: signatures, argument checks and the table of implementations."""

import functools
import itertools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import check_arrays
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.partition import Axes
from pallas_kernels.short_conv import mosaic_gpu, reference, xla
from pallas_kernels.short_conv.spans import over_spans

__all__ = ["IMPLEMENTATIONS", "STEP_IMPLEMENTATIONS", "short_conv", "short_conv_parts"]


def _then_cut(convolve: Callable) -> Callable:
    """Lets an implementation with one result return its channels as several arrays."""

    @functools.wraps(convolve)
    def run(x, weight, *, cuts: tuple[int, ...], **optional):
        y, cache = convolve(x, weight, **optional)
        return *jnp.split(y, cuts, axis=-1), cache

    return run


# Fastest first.
IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(over_spans(mosaic_gpu.short_conv), mosaic_gpu.refuse),
    "xla": Implementation(over_spans(_then_cut(xla.short_conv))),
    "reference": Implementation(over_spans(_then_cut(reference.short_conv))),
}
# One token, as in decoding: XLA makes a single kernel of it.
STEP_IMPLEMENTATIONS = {name: IMPLEMENTATIONS[name] for name in ("xla", "reference")}


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
    y, cache = _convolve("H", (), x, weight, cache, segment_ids, implementation)
    return y, cache


def short_conv_parts(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    widths: tuple[int, ...],
    *,
    cache: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
) -> tuple[tuple[Float[Array, "B T _"], ...], Float[Array, "B W-1 D"]]:
    """Does the same with several arrays joined along channels to one x, and returns the result of each by itself.

    Args:
      widths: channels of each, which add up to D. Devices do not cut D.

    Returns:
      (the parts of what `short_conv` returns, the cache of all).
    """
    if sum(widths) != x.shape[-1] or min(widths) < 1:
        raise ValueError(f"short_conv_parts: {widths=} must be positive and add up to {x.shape[-1]}, the channels of x")
    cuts = tuple(itertools.accumulate(widths[:-1]))
    *ys, cache = _convolve("-", cuts, x, weight, cache, segment_ids, implementation)
    return tuple(ys), cache


def _convolve(letter: str, cuts: tuple[int, ...], x, weight, cache, segment_ids, implementation: str):
    """Returns the results that begin at channel 0 and at `cuts`, then the cache; `letter` is that of D in `Axes`."""
    arrays = {"x": (x, "B T D"), "weight": (weight, "D W"), "cache": (cache, "B W-1 D")}
    check_arrays("short_conv", arrays, {"segment_ids": (segment_ids, "B T")})
    cached, results = f"B-{letter}", len(cuts) + 1
    if cache is None:
        axes = Axes((f"BT{letter}", letter), (f"BT{letter}",) * results + (cached,), {"segment_ids": "BT"}, True)
    else:
        axes = Axes((cached, letter), (cached,) * (results + 1), {"cache": cached, "segment_ids": "B"})
    optional = {"cuts": cuts, "cache": cache, "segment_ids": segment_ids}
    implementations = IMPLEMENTATIONS if x.shape[1] > 1 else STEP_IMPLEMENTATIONS
    return call("short_conv", implementations, implementation, x, weight, axes=axes, **optional)
