"""Parameters with logical axis names; no mesh is needed to make one."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Buffer(nnx.Variable):
    """State that no gradient reaches and training updates by a rule of its own: the router's balancing bias."""


def param(value: Array, axes: Sequence[str | None]) -> nnx.Param:
    """Wraps an initial value; `axes` names its dimensions for kimi_jax/parallel/rules.py and documents the layout."""
    return nnx.Param(value, out_sharding=tuple(axes), eager_sharding=False)


def normal(rngs: nnx.Rngs, shape: Sequence[int], std: float) -> Float[Array, "..."]:
    """Draws a float32 array from N(0, std^2)."""
    return std * jax.random.normal(rngs.params(), tuple(shape), jnp.float32)
