"""State-space duality (Mamba2): linear attention with one decay per head (arXiv 2405.21060)."""

from pallas_kernels.ssd.api import chunk_ssd

__all__ = ["chunk_ssd"]
