"""Grouped matrix product: consecutive groups of rows, each with a matrix of its own."""

from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
