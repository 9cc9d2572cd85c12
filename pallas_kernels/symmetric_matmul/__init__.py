"""Products of stacked matrices whose results are symmetric, and what brings them to the matrices: Newton-Schulz."""

from pallas_kernels.symmetric_matmul.api import apply, gram, multiply, quadratic

__all__ = ["apply", "gram", "multiply", "quadratic"]
