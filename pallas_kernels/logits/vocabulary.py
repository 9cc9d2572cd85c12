"""A vocabulary cut over devices: which numbers are here, and what a row's sums over all parts are."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def numbers_here(numbers: Int[Array, "*M"], size: int, axes: tuple[str, ...]) -> Int[Array, "*M"]:
    """Places in this device's part, which has `size` of them; `size` for what is elsewhere. No axes: all is here."""
    if not axes:
        return numbers
    place = numbers - lax.axis_index(axes) * size
    return jnp.where((place >= 0) & (place < size), place, size)


def log_sum_exp_of_parts(part: Float[Array, "*M"], axes: tuple[str, ...]) -> Float[Array, "*M"]:
    """From the log-sum-exp of each part that of all."""
    if not axes:
        return part
    peak = lax.pmax(part, axes)
    return peak + jnp.log(lax.psum(jnp.exp(part - peak), axes))
