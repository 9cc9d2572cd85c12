"""The dense feed-forward block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from kimi_jax.config.model import DenseFfn
from kimi_jax.layers.linear import project
from kimi_jax.layers.param import normal, param


class SwiGlu(nnx.Module):
    """down(silu(gate x) * up x), without biases."""

    def __init__(self, dim: int, hidden_dim: int, *, std: float, rngs: nnx.Rngs):
        self.gate = param(normal(rngs, (dim, hidden_dim), std), axes=("embed", "ffn"))
        self.up = param(normal(rngs, (dim, hidden_dim), std), axes=("embed", "ffn"))
        self.down = param(normal(rngs, (hidden_dim, dim), std), axes=("ffn", "embed"))

    @jax.named_scope("mlp")
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_BTF = project("BTD,DF->BTF", x_BTD, self.gate[...])
        up_BTF = project("BTD,DF->BTF", x_BTD, self.up[...])
        return project("BTF,FD->BTD", swiglu(gate_BTF, up_BTF), self.down[...])


@jax.custom_vjp
def swiglu(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """silu(gate) up, computed in float32 and rounded once; the backward pass keeps the arguments alone."""
    wide = gate.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(wide) * up.astype(jnp.float32)).astype(gate.dtype)


def _swiglu_forward(gate, up):
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(saved, dy):
    gate, up, dy = (x.astype(jnp.float32) for x in (*saved, dy))
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return d_gate.astype(saved[0].dtype), (dy * gate * sigmoid).astype(saved[1].dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class Mlp(SwiGlu):
    """SwiGLU as a whole feed-forward block; it has no router to report on."""

    def __init__(self, cfg: DenseFfn, *, model_dim: int, std: float, rngs: nnx.Rngs):
        super().__init__(model_dim, cfg.hidden_dim, std=std, rngs=rngs)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], None]:
        return super().__call__(x_BTD), None
