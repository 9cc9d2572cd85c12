"""The dense feed-forward block."""

import jax
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
        hidden_BTF = jax.nn.silu(gate_BTF) * project("BTD,DF->BTF", x_BTD, self.up[...])
        return project("BTF,FD->BTD", hidden_BTF, self.down[...])


class Mlp(SwiGlu):
    """SwiGLU as a whole feed-forward block; it has no router to report on."""

    def __init__(self, cfg: DenseFfn, *, model_dim: int, std: float, rngs: nnx.Rngs):
        super().__init__(model_dim, cfg.hidden_dim, std=std, rngs=rngs)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], None]:
        return super().__call__(x_BTD), None
