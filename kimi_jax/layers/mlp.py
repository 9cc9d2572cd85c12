"""The dense feed-forward block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from kimi_jax.config.model import DenseFfn
from kimi_jax.layers.linear import each_apart, is_longer, project, weight_gradient
from kimi_jax.layers.param import normal, param
from pallas_kernels.swiglu.api import swiglu, swiglu_product, swiglu_product_gradient


class SwiGlu(nnx.Module):
    """down(silu(gate x) * up x), without biases."""

    def __init__(self, dim: int, hidden_dim: int, *, std: float, rngs: nnx.Rngs):
        self.gate = param(normal(rngs, (dim, hidden_dim), std), axes=("embed", "ffn"))
        self.up = param(normal(rngs, (dim, hidden_dim), std), axes=("embed", "ffn"))
        self.down = param(normal(rngs, (hidden_dim, dim), std), axes=("ffn", "embed"))

    @jax.named_scope("mlp")
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up, down = (w[...] for w in (self.gate, self.up, self.down))
        if is_longer(x_BTD, (gate, up)):
            return checkpoint_name(run_block(x_BTD, *each_apart(gate, up), down), "products")
        both_BTGF = jnp.stack([project("BTD,DF->BTF", x_BTD, w) for w in (gate, up)], axis=-2)
        return project("BTF,FD->BTD", swiglu(both_BTGF), down)


@jax.custom_vjp
def run_block(
    x: Float[Array, "B T D"], gate: Float[Array, "D F"], up: Float[Array, "D F"], down: Float[Array, "F D"]
) -> Float[Array, "B T D"]:
    """down(silu(gate x) * up x) in the dtype of x; gradients of the matrices are summed in float32, as by `project`.

    Rematerialisation knows both products and SwiGLU of them as "products".
    """
    return _forward(x, gate, up, down)[0]


def _forward(x, gate, up, down):
    hidden, both = swiglu_product(x, gate.astype(x.dtype), up.astype(x.dtype))
    hidden, both = (checkpoint_name(z, "products") for z in (hidden, both))
    return jnp.einsum("BTF,FD->BTD", hidden, down.astype(x.dtype)), (x, gate, up, down, hidden, both)


def _backward(saved, dy):
    """Both gradients lie beside each other, not one behind the other: so each device keeps its part of F."""
    x, gate, up, down, hidden, both = saved
    d_both = swiglu_product_gradient(dy, down.astype(x.dtype), both)
    dx = jnp.einsum("BTGF,DGF->BTD", d_both, jnp.stack([gate, up], axis=1).astype(x.dtype))
    d_gate, d_up = jnp.unstack(weight_gradient("BTD", "BTGF", "DGF", x, d_both).astype(gate.dtype), axis=1)
    return dx, d_gate, d_up, weight_gradient("BTF", "BTD", "FD", hidden, dy).astype(down.dtype)


run_block.defvjp(_forward, _backward)


class Mlp(SwiGlu):
    """SwiGLU as a whole feed-forward block; it has no router to report on."""

    def __init__(self, cfg: DenseFfn, *, model_dim: int, std: float, rngs: nnx.Rngs):
        super().__init__(model_dim, cfg.hidden_dim, std=std, rngs=rngs)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"] | None = None
    ) -> tuple[tuple[Float[Array, "B T D"]], None]:
        return (super().__call__(x_BTD),), None
