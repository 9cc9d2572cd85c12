"""The largest values of short rows and their places."""

from pallas_kernels.top_k.api import top_k

__all__ = ["top_k"]
