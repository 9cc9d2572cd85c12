"""Logits over a vocabulary, and the gradients of their cross-entropy without another pass over them."""

from pallas_kernels.logits.api import Gradients, Logits, cross_entropy_gradients, logits

__all__ = ["Gradients", "Logits", "cross_entropy_gradients", "logits"]
