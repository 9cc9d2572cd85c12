"""SwiGLU of dense blocks, in one pass with the products around it."""

from pallas_kernels.swiglu.api import swiglu_product, swiglu_product_gradient

__all__ = ["swiglu_product", "swiglu_product_gradient"]
