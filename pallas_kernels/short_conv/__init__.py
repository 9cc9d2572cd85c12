"""Short causal convolution over tokens, one filter per channel, with SiLU: what feeds linear attention."""

from pallas_kernels.short_conv.api import short_conv, short_conv_parts

__all__ = ["short_conv", "short_conv_parts"]
