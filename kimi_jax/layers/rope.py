"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(x: Float[Array, "B T *H P"], position_BT: Int[Array, "B T"], theta: float) -> Float[Array, "B T *H P"]:
    """Rotates the pairs (x_i, x_{i+P/2}) by position * theta^(-2i/P), in float32; returns the dtype of x.

    Source: RoFormer, arXiv:2104.09864, in the half-split order of the public checkpoints.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BT.astype(jnp.float32)[..., None] * frequency[None, None, :]
    angle = angle.reshape(*position_BT.shape, *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
