"""The dense feed-forward block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from kimi_jax.config.model import DenseFfn
from kimi_jax.layers.linear import each_apart, is_longer, project
from kimi_jax.layers.param import normal, param


class SwiGlu(nnx.Module):
    """down(silu(gate x) * up x), without biases."""

    def __init__(self, dim: int, hidden_dim: int, *, std: float, rngs: nnx.Rngs):
        self.gate = param(normal(rngs, (dim, hidden_dim), std), axes=("embed", "ffn"))
        self.up = param(normal(rngs, (dim, hidden_dim), std), axes=("embed", "ffn"))
        self.down = param(normal(rngs, (hidden_dim, dim), std), axes=("ffn", "embed"))

    @jax.named_scope("mlp")
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        weights = self.gate[...], self.up[...]
        if is_longer(x_BTD, weights):  # beside each other, not one after the other: so each device keeps its part of F
            both_BTFG = project("BTD,DFG->BTFG", x_BTD, jnp.stack(each_apart(*weights), axis=-1))
        else:
            both_BTFG = jnp.stack([project("BTD,DF->BTF", x_BTD, w) for w in weights], axis=-1)
        return project("BTF,FD->BTD", swiglu(both_BTFG), self.down[...])


@jax.custom_vjp
def swiglu(both: Float[Array, "*B F 2"]) -> Float[Array, "*B F"]:
    """silu(gate) up, computed in float32 and rounded once; the backward pass keeps the argument alone."""
    gate, up = (both[..., i].astype(jnp.float32) for i in range(2))
    return (gate * jax.nn.sigmoid(gate) * up).astype(both.dtype)


def _swiglu_forward(both):
    return swiglu(both), both


def _swiglu_backward(both, dy):
    """One expression for each number of the result: what two had in common XLA would write to memory first."""
    both = jax.lax.optimization_barrier(both)
    wide = lambda x: jnp.broadcast_to(x.astype(jnp.float32), both.shape)
    gate, up, dy = (wide(x) for x in (both[..., :1], both[..., 1:], dy[..., None]))
    sigmoid = jax.nn.sigmoid(gate)
    of_gate = jax.lax.broadcasted_iota(jnp.int32, both.shape, both.ndim - 1) == 0
    return ((dy * sigmoid * jnp.where(of_gate, up * (1 + gate * (1 - sigmoid)), gate)).astype(both.dtype),)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class Mlp(SwiGlu):
    """SwiGLU as a whole feed-forward block; it has no router to report on."""

    def __init__(self, cfg: DenseFfn, *, model_dim: int, std: float, rngs: nnx.Rngs):
        super().__init__(model_dim, cfg.hidden_dim, std=std, rngs=rngs)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"] | None = None
    ) -> tuple[tuple[Float[Array, "B T D"]], None]:
        return (super().__call__(x_BTD),), None
