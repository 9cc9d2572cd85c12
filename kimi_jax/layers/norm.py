"""RMS normalisation and the dtype it happens in."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kimi_jax.layers.param import param


def rms_normalize(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, computed and returned in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a plain gain: normalised in float32, cast back, then multiplied by the weight."""

    def __init__(self, dim: int, *, eps: float, axis: str | None = "embed"):
        self.eps = eps
        self.weight = param(jnp.ones(dim, jnp.float32), axes=(axis,))

    @jax.named_scope("rms_norm")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_normalize(x, self.eps).astype(x.dtype) * self.weight[...].astype(x.dtype)[None, None, :]


def l2_normalize(x: Float[Array, "*B K"], eps: float = 1e-6) -> Float[Array, "*B K"]:
    """x / sqrt(sum(x^2) + eps) over the last axis, computed in float32, returned in the dtype of x."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + eps)).astype(x.dtype)
