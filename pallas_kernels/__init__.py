"""Operators of Kimi Linear: their definitions in plain JAX, and GPU kernels; depends on jax and jaxtyping alone."""
