"""The gradients of the RMS norm, and of what passes beside it, in one pass over memory."""

from pallas_kernels.rms_norm.api import rms_norm_gradients

__all__ = ["rms_norm_gradients"]
