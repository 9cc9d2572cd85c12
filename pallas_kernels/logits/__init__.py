"""Logits over a vocabulary together with the logarithm of the sum of their exponentials."""

from pallas_kernels.logits.api import Logits, is_target, logits

__all__ = ["Logits", "is_target", "logits"]
