"""The places of the largest values of short rows."""

from pallas_kernels.top_k.api import top_k

__all__ = ["top_k"]
