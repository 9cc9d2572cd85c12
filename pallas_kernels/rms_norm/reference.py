"""The RMS norm's gradients in plain JAX: the definition that every implementation must match."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm_gradients(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D"],
    dy: Float[Array, "B T D"],
    d_beside: Float[Array, "B T D"] | None,
    *,
    eps: float,
) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 D"]]:
    """See `pallas_kernels.rms_norm.api.rms_norm_gradients`; sums over T are the parts of the gain's gradient."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    wide, dy = x.astype(dtype), dy.astype(dtype)
    d_normed = dy * weight.astype(dtype)[None, None, :]
    # Both sums in one pass.
    square, inner = (jnp.mean(wide * y, -1, keepdims=True) for y in (wide, d_normed))
    root = jax.lax.rsqrt(square + eps)
    dx = root * (d_normed - wide * (root * root * inner))
    if d_beside is not None:
        dx += d_beside.astype(dtype)
    return dx.astype(x.dtype), jnp.sum(dy * (wide * root), axis=1, keepdims=True)
