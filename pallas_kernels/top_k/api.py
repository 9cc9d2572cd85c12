"""Public entry of the largest values' places: signature and the table of implementations."""

import math

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
AXES = Axes(("BT",), "BT")


def top_k(values: Float[Array, "B T E"], k: int, *, implementation: str = "auto") -> Int[Array, "B T k"]:
    """Returns the places of the k largest of each row, the largest first; of equals, the first come first.

    Args:
      values: float32, in the order of a sort: what is -inf comes last, but for -NaN; NaN first, and 0 before -0.
      k: at most E.
      implementation: "auto" or a key of `IMPLEMENTATIONS`; up to `FEW_ROWS` rows, of `FEW_IMPLEMENTATIONS`.

    Raises:
      ValueError: an argument has the wrong shape or dtype, or k is not from 1 to E.
      NotImplementedError: the implementation refuses these arguments; the message says why.
    """
    E = check_arrays("top_k", {"values": (values, "B T E")})["E"]
    if not 1 <= k <= E:
        raise ValueError(f"top_k: {k=} must be from 1 to {E=}")
    implementations = IMPLEMENTATIONS if math.prod(values.shape[:-1]) > FEW_ROWS else FEW_IMPLEMENTATIONS
    return call("top_k", implementations, implementation, values, k=k, axes=AXES)
