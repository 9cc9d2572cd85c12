"""RMS normalisation and the dtype it happens in."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kimi_jax.layers.param import param
from pallas_kernels.rms_norm.api import rms_norm_gradients


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
        return rms_norm(x, self.weight[...], self.eps)

    @jax.named_scope("rms_norm")
    def beside(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """Returns (x, norm of x), for a residual connection."""
        return norm_beside(x, self.weight[...], self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "B T D"], weight_D: Float[Array, "D"], eps: float) -> Float[Array, "B T D"]:
    """The norm of `RMSNorm`; the backward keeps x alone, and sums the gain's gradient in float32."""
    return rms_normalize(x, eps).astype(x.dtype) * weight_D.astype(x.dtype)[None, None, :]


def _rms_norm_fwd(x, weight_D, eps):
    return rms_norm(x, weight_D, eps), (x, weight_D)  # one kernel, where keeping the scale of each token makes two


def _rms_norm_bwd(eps, saved, dy):
    x, weight_D = saved
    dx, d_weight = rms_norm_gradients(x, weight_D, dy, None, eps=eps, implementation="reference")  # XLA fuses it
    return dx, d_weight.astype(weight_D.dtype)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def norm_beside(
    x: Float[Array, "B T D"], weight_D: Float[Array, "D"], eps: float
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """(x, its norm): the backward adds the gradients of both where the norm's is formed."""
    return x, rms_norm(x, weight_D, eps)


def _norm_beside_fwd(x, weight_D, eps):
    return norm_beside(x, weight_D, eps), (x, weight_D)


def _norm_beside_bwd(eps, saved, gradients):
    x, weight_D = saved
    d_beside, dy = gradients
    dx, d_weight = rms_norm_gradients(x, weight_D, dy, d_beside, eps=eps)
    return dx, d_weight.astype(weight_D.dtype)


norm_beside.defvjp(_norm_beside_fwd, _norm_beside_bwd)


def l2_normalize(x: Float[Array, "*B K"], eps: float = 1e-6) -> Float[Array, "*B K"]:
    """x / sqrt(sum(x^2) + eps) over the last axis, computed in float32, returned in the dtype of x."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + eps)).astype(x.dtype)
