"""The mixture-of-experts feed-forward block: dropless, rows sorted by expert, grouped products."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from kimi_jax.config.model import MoeFfn
from kimi_jax.layers.linear import fan_out
from kimi_jax.layers.mlp import SwiGlu
from kimi_jax.layers.param import normal, param
from kimi_jax.layers.router import Router, RouterStats, Routing
from pallas_kernels.grouped_matmul.api import grouped_swiglu, place_rows, spread_numbers, spread_rows, sum_rows

type Addends = tuple[Float[Array, "B T D"], ...]
"""What a feed-forward block adds to the residual stream, one after the other: apart, so that none is summed first."""


class Matrices(NamedTuple):
    """Of E SwiGLU blocks; in the dtype of the activations, or in float32, to which their gradients then come."""

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]


class Experts(nnx.Module):
    """E SwiGLU blocks."""

    def __init__(self, cfg: MoeFfn, *, model_dim: int, std: float, rngs: nnx.Rngs):
        D, E, F = model_dim, cfg.num_experts, cfg.hidden_dim
        self.num_experts, self.implementation, self.capacity = E, cfg.implementation, cfg.capacity
        self.gate = param(normal(rngs, (E, D, F), std), axes=("experts", "embed", "ffn"))
        self.up = param(normal(rngs, (E, D, F), std), axes=("experts", "embed", "ffn"))
        self.down = param(normal(rngs, (E, F, D), std), axes=("experts", "ffn", "embed"))

    def matrices(self, dtype: DTypeLike) -> Matrices:
        """Parameters for activations of a dtype: the product rounds float32 ones to it, but not their gradients."""
        parameters = (w[...] for w in (self.gate, self.up, self.down))
        return Matrices(*(w.astype(jnp.promote_types(w.dtype, dtype)) for w in parameters))


@jax.named_scope("experts")
def run_sorted(
    matrices: Matrices,
    x_MD: Float[Array, "M D"],
    scale_M: Float[Array, "M"],
    group_sizes_E: Int[Array, "E"],
    implementation: str,
    clear: bool = True,
) -> Float[Array, "M D"]:
    """Runs the experts on rows sorted by expert, their hidden rows multiplied by `scale_M`; see `grouped_swiglu`."""
    return grouped_swiglu(x_MD, *matrices, scale_M, group_sizes_E, clear=clear, implementation=implementation)


def mix(
    matrices: Matrices,
    x_MD: Float[Array, "M D"],
    expert_Mk: Int[Array, "M k"],
    weight_Mk: Float[Array, "M k"],
    implementation: str,
) -> Float[Array, "M D"]:
    """Returns sum_k weight_k E_k(x), summed in float32; expert number E is none. All experts are on this device."""
    row_Mk, group_sizes_E = place_rows(expert_Mk, matrices.gate.shape[0])
    scale_R, x_RD = spread_numbers(weight_Mk, row_Mk), spread_rows(x_MD, row_Mk, implementation)
    y_RD = run_sorted(matrices, x_RD, scale_R, group_sizes_E, implementation)
    return sum_rows(y_RD, row_Mk, implementation)


def run_here(
    experts: Experts,
    x_BTD: Float[Array, "B T D"],
    routing: Routing,
    beside: Callable[[Float[Array, "B T D"]], Float[Array, "B T D"]],
) -> tuple[Addends, Float[Array, ""]]:
    """The dispatcher of one device: ((sum_k weight_k E_k(x), beside(x)), how many choices were dropped: none)."""
    B, T, D = x_BTD.shape
    expert_Mk, weight_Mk = (x.reshape(B * T, -1) for x in routing)
    matrices = experts.matrices(x_BTD.dtype)
    y_MD = mix(matrices, x_BTD.reshape(B * T, D), expert_Mk, weight_Mk, experts.implementation)
    return (y_MD.reshape(B, T, D), beside(x_BTD)), jnp.zeros(())


class Moe(nnx.Module):
    """sum_k weight_k E_k(x) plus the shared expert, which is neither routed nor scaled."""

    def __init__(
        self, cfg: MoeFfn, *, model_dim: int, std: float, rngs: nnx.Rngs, dispatch: Callable[..., tuple] = run_here
    ):
        """`dispatch` has the signature of `run_here`; another one may send tokens to experts on other devices."""
        self.dispatch = dispatch
        self.router = Router(cfg, model_dim=model_dim, std=std, rngs=rngs)
        self.experts = Experts(cfg, model_dim=model_dim, std=std, rngs=rngs)
        shared_dim = cfg.num_shared_experts * cfg.hidden_dim
        self.shared = SwiGlu(model_dim, shared_dim, std=std, rngs=rngs) if shared_dim else None

    @jax.named_scope("moe")
    def __call__(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"] | None = None
    ) -> tuple[Addends, RouterStats]:
        valid_BT = jnp.ones(x_BTD.shape[:2], bool) if valid_BT is None else valid_BT
        x_BTD, for_router = fan_out(x_BTD, 2)
        routing, stats = self.router(for_router, valid_BT)
        addends, dropped = self.dispatch(self.experts, x_BTD, routing, self.shared or jnp.zeros_like)
        return addends, stats._replace(dropped=dropped)
