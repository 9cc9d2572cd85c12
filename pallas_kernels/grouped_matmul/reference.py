"""Grouped products as sums over masked dense products: the definition every implementation must match."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul(
    x: Float[Array, "M D"], w: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M F"]:
    """See `pallas_kernels.grouped_matmul.api.grouped_matmul`; gradients by automatic differentiation."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])

    def add_group(y, group):
        w_DF, end, size = group
        inside = (row >= end - size) & (row < end)
        product = jnp.where(inside[:, None], x, 0).astype(dtype) @ _rounded(w_DF, x.dtype).astype(dtype)
        return y + product, None

    y, _ = jax.lax.scan(add_group, jnp.zeros((x.shape[0], w.shape[2]), dtype), (w, ends, group_sizes))
    return y.astype(x.dtype)


def grouped_swiglu(
    x: Float[Array, "M D"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    scale: Float[Array, "M"],
    group_sizes: Int[Array, "E"],
    clear: bool = True,
    *,
    matmul: Callable[..., Array] = grouped_matmul,
) -> Float[Array, "M D"]:
    """See `pallas_kernels.grouped_matmul.api.grouped_swiglu`; automatically differentiated; clears always."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    gated, raised = (matmul(x, w, group_sizes).astype(dtype) for w in (gate, up))
    hidden = scale[:, None] * jax.nn.silu(gated) * raised
    return matmul(hidden.astype(x.dtype), down, group_sizes)


def _rounded(w: Array, dtype) -> Array:
    """w with the precision of `dtype`; its gradient passes as it is."""
    info = jnp.finfo(dtype)
    return w + jax.lax.stop_gradient(jax.lax.reduce_precision(w, info.nexp, info.nmant) - w)
