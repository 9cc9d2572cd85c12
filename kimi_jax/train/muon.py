"""Muon in Moonlight's form: momentum as a sum, Nesterov, five Newton-Schulz steps, updates of one RMS."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from kimi_jax.types import PyTree

QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c of X <- a X + b (X X^T) X + c (X X^T)^2 X
NORM_FLOOR = 1e-7


@dataclasses.dataclass(frozen=True)
class Matrix:
    """How many of a parameter's axes are batch, which merged axes are the rows after them, and which the columns."""

    batch: int
    rows: int
    columns: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns (batch..., rows, columns) in elements."""
        split = self.batch + self.rows
        return (*shape[: self.batch], math.prod(shape[self.batch : split]), math.prod(shape[split:]))


def orthogonalize(
    x_RC: Float[Array, "... R C"], *, steps: int = 5, dtype: jnp.dtype = jnp.bfloat16
) -> Float[Array, "... R C"]:
    """Moves the singular values of each matrix close to 1 (they end up in about 0.7 to 1.2) by Newton-Schulz steps.

    Args:
      x_RC: matrices, float32; leading axes are batch.
      steps: quintic steps, >= 1.
      dtype: of the matrix products; bfloat16 as in Moonlight on every device, float32 only to check the arithmetic.

    Returns:
      The approximate orthogonal factor U V^T of each matrix, float32.

    Source: Moonlight, arXiv:2502.16982, section 2.
    """
    a, b, c = QUINTIC
    norm = jnp.sqrt(jnp.sum(jnp.square(x_RC), axis=(-2, -1), keepdims=True))
    wide = x_RC.shape[-2] <= x_RC.shape[-1]
    x = (x_RC / (norm + NORM_FLOOR)).astype(dtype)
    x = x if wide else x.mT  # the Gram matrix is the small one

    def refine(_, x):
        gram = x @ x.mT
        return a * x + (b * gram + c * (gram @ gram)) @ x

    x = lax.fori_loop(0, steps, refine, x)  # rolled: every parameter has its own chain to compile
    return (x if wide else x.mT).astype(jnp.float32)


def scale_by_muon(
    matrices: PyTree, *, momentum: float, steps: int, update_rms: float, dtype: jnp.dtype = jnp.bfloat16
) -> optax.GradientTransformation:
    """Turns gradients into Moonlight's update directions, without learning rate and weight decay.

    Args:
      matrices: tree of `Matrix`, one for every parameter the transform sees.
      momentum: mu of M <- mu M + G; a sum, not an average.
      steps: Newton-Schulz steps.
      update_rms: RMS an update has when its factor is orthogonal: the scale is update_rms * sqrt(max(rows, columns)).
      dtype: of the Newton-Schulz products.

    Returns:
      A transform whose state is {"momentum": float32 tree like the parameters}.
    """

    def direction(grad: Array, velocity: Array, matrix: Matrix) -> Array:
        shape = matrix.shape(grad.shape)
        factor = orthogonalize((grad + momentum * velocity).reshape(shape), steps=steps, dtype=dtype)
        return update_rms * math.sqrt(max(shape[-2:])) * factor.reshape(grad.shape)

    def init(params):
        return {"momentum": jax.tree.map(jnp.zeros_like, params)}

    def update(grads, state, params=None):
        velocity = jax.tree.map(lambda m, g: momentum * m + g, state["momentum"], grads)
        return jax.tree.map(direction, grads, velocity, matrices), {"momentum": velocity}

    return optax.GradientTransformation(init, update)
