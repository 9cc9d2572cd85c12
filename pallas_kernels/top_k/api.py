"""Public entry of the largest values: signature, gradient and the table of implementations."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import check_arrays
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.partition import Axes
from pallas_kernels.top_k import mosaic_gpu, reference

__all__ = ["FEW_IMPLEMENTATIONS", "FEW_ROWS", "IMPLEMENTATIONS", "top_k"]

IMPLEMENTATIONS = {  # fastest first
    "mosaic_gpu": Implementation(mosaic_gpu.top_k, mosaic_gpu.refuse),
    "reference": Implementation(reference.top_k),
}
# Few rows, as in decoding: XLA's sort is as fast.
FEW_ROWS = 1024
FEW_IMPLEMENTATIONS = {"reference": IMPLEMENTATIONS["reference"]}
AXES = Axes(("BT", ""), ("BT", "BT"))


def top_k(
    values: Float[Array, "B T E"], bias: Float[Array, "E"], k: int, *, implementation: str = "auto"
) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"]]:
    """Finds the k largest of values + bias in each row, the largest first; of equals, the first come first.

    Args:
      values, bias: float32; sums are in the order of a sort: what is -inf comes last, NaN first, and 0 before -0.
      k: at most E.
      implementation: "auto" or a key of `IMPLEMENTATIONS`; up to `FEW_ROWS` rows, of `FEW_IMPLEMENTATIONS`.

    Returns:
      (places, values at these, without the bias): differentiable in values alone.

    Raises:
      ValueError: an argument has the wrong shape or dtype, or k is not from 1 to E.
      NotImplementedError: the implementation refuses these arguments; the message says why.
    """
    E = check_arrays("top_k", {"values": (values, "B T E"), "bias": (bias, "E")})["E"]
    if not 1 <= k <= E:
        raise ValueError(f"top_k: {k=} must be from 1 to {E=}")
    return _top_k(k, implementation, values, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _top_k(k: int, implementation: str, values, bias):
    implementations = IMPLEMENTATIONS if math.prod(values.shape[:-1]) > FEW_ROWS else FEW_IMPLEMENTATIONS
    return call("top_k", implementations, implementation, values, bias, k=k, axes=AXES)


def _forward(k, implementation, values, bias):
    places, chosen = _top_k(k, implementation, values, bias)
    return (places, chosen), (places, bias)


def _backward(k, implementation, saved, gradients):
    """A masked sum over the choices: a gather's gradient would be a scatter."""
    places, bias = saved
    taken = jax.nn.one_hot(places, bias.shape[0], dtype=bool)
    return jnp.sum(jnp.where(taken, gradients[1][..., None], 0), -2), jnp.zeros_like(bias)


_top_k.defvjp(_forward, _backward)
