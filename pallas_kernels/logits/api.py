"""Public entries of the logits: signatures, the table of implementations, and a vocabulary on several devices."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.logits import mosaic_gpu, xla
from pallas_kernels.partition import VOCABULARY_AXES, free_axes_of

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

    On a mesh whose `tensor` axis divides the vocabulary each device has its part of the values.

    Args:
      x: any float dtype; 16-bit for the kernel.
      weight: of the dtype of x.
      targets: int32 in [0, A).
      implementation: "auto", "mosaic_gpu" or "xla".

    Raises:
      NotImplementedError: the implementation refuses these arguments.
    """
    run = lambda *arrays: Logits(*call("logits", IMPLEMENTATIONS, implementation, *arrays))
    axes = free_axes_of(VOCABULARY_AXES, weight.shape[1])
    if not axes:
        return run(x, weight, targets)
    cut = jax.shard_map(
        functools.partial(_run_part, run, axes),
        in_specs=(P(), P(None, axes), P()),
        out_specs=Logits(P(None, axes), P(), P()),
        axis_names=set(axes),
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    return cut(x, weight, targets)


def _run_part(run, axes: tuple[str, ...], x, weight_Da, targets) -> Logits:
    """Of the vocabulary's part on this device; sums over all parts."""
    local = targets - lax.axis_index(axes) * weight_Da.shape[1]
    here = (local >= 0) & (local < weight_Da.shape[1])
    part = run(x, weight_Da, jnp.where(here, local, 0))
    peak = lax.pmax(part.log_sum_exp, axes)
    log_sum_exp = peak + jnp.log(lax.psum(jnp.exp(part.log_sum_exp - peak), axes))
    return Logits(part.values, log_sum_exp, lax.psum(jnp.where(here, part.target, 0), axes))


def is_target(targets: Int[Array, "..."], values: Float[Array, "... A"]) -> Bool[Array, "... A"]:
    """Which values are those of the targets."""
    return xla.is_target(targets, values)
