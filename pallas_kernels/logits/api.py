"""Public entries of the logits: signatures, the table of implementations, and a vocabulary on several devices."""

from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import check_arrays, check_one_dtype
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.logits import mosaic_gpu, xla
from pallas_kernels.partition import VOCABULARY_AXES, free_axes_of

IMPLEMENTATIONS = {  # fastest first
    "mosaic_gpu": Implementation(mosaic_gpu.cross_entropy_gradients, mosaic_gpu.refuse),
    "xla": Implementation(xla.cross_entropy_gradients),
}


class Logits(NamedTuple):
    """All float32."""

    values: Float[Array, "M A"]
    log_sum_exp: Float[Array, "M"]
    target: Float[Array, "M"]
    """The value of each row's target."""


class Gradients(NamedTuple):
    """Of sum_m scale_m (lse_m - target_m + z_weight lse_m^2), and what it is made of."""

    log_sum_exp: Float[Array, "M"]
    """Of the logits, float32."""
    target: Float[Array, "M"]
    """The logit of each row's target, float32."""
    d_x: Float[Array, "M D"]
    """In the dtype of x."""
    d_weight: Float[Array, "D A"]
    """float32."""


def logits(x: Float[Array, "M D"], weight: Float[Array, "D A"], targets: Int[Array, "M"]) -> Logits:
    """Multiplies rows by the head: products in the dtype of x, which is that of the weight, summed in float32."""
    return Logits(*xla.logits(x, weight, targets))


def cross_entropy_gradients(
    x: Float[Array, "M D"],
    weight: Float[Array, "D A"],
    targets: Int[Array, "M"],
    scale: Float[Array, "M"],
    *,
    z_weight: float,
    implementation: str = "auto",
) -> Gradients:
    """Forms the gradients of a loss of logits while these are there.

    On a mesh whose `tensor` axis divides the vocabulary each device has its part of the logits.

    Args:
      x: rows, any float dtype; bfloat16 for the kernel. Products run in this dtype.
      weight: the head, of the dtype of x.
      targets: int32 in [0, A); any value where the scale is 0.
      scale: float32, of each row's share of the loss.
      z_weight: factor on the squared log-sum-exp.
      implementation: "auto", "mosaic_gpu" or "xla". To the kernel a logit further than 55 above the row's target is one
        that is 55 above: the loss of such a row is too small, its gradient that of equal logits.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
      NotImplementedError: the implementation refuses these arguments.
    """
    arrays = {"x": (x, "M D"), "weight": (weight, "D A"), "scale": (scale, "M")}
    check_arrays("cross_entropy_gradients", arrays, {"targets": (targets, "M")})
    check_one_dtype("cross_entropy_gradients", x=x, weight=weight)
    axes = free_axes_of(VOCABULARY_AXES, weight.shape[1])

    def run(*arrays):
        settings = {"z_weight": z_weight, "cut_over": axes}
        return Gradients(*call("cross_entropy_gradients", IMPLEMENTATIONS, implementation, *arrays, **settings))

    if not axes:
        return run(x, weight, targets, scale)
    cut = jax.shard_map(
        run,
        in_specs=(P(), P(None, axes), P(), P()),
        out_specs=Gradients(P(), P(), P(), P(None, axes)),
        axis_names=set(axes),
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    return cut(x, weight, targets, scale)
