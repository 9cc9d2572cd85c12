"""Multi-head latent attention: softmax attention whose keys have a part per head and a part that all heads share."""

from pallas_kernels.mla.api import mla_absorbed_attention, mla_attention

__all__ = ["mla_absorbed_attention", "mla_attention"]
