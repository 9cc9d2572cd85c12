"""The router: which experts a token meets, with which weights, and what training learns about the balance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kimi_jax.config.model import MoeFfn
from kimi_jax.layers.param import buffer, normal, param

WEIGHT_EPS = 1e-20  # added to the sum of the chosen scores before dividing by it


class RouterStats(NamedTuple):
    """What a router reports per step; a decoder stacks them over its MoE layers, in layer order."""

    load: Float[Array, "E"]
    """float32, number of (valid token, choice) pairs per expert."""
    balance_loss: Float[Array, ""]
    """float32, sequence-wise balance loss before its weight: 1 for perfectly even routing."""


class Routing(NamedTuple):
    """The k experts of each token."""

    expert: Int[Array, "B T k"]
    """int32; E, which is no expert, for padding."""
    weight: Float[Array, "B T k"]
    """float32; 0 for padding."""


class Router(nnx.Module):
    """Sigmoid scores in float32; the k best by score plus balancing bias; weights from the scores alone.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
    """

    def __init__(self, cfg: MoeFfn, *, model_dim: int, std: float, rngs: nnx.Rngs):
        self.top_k, self.scaling, self.renormalize = cfg.top_k, cfg.routed_scaling, cfg.renormalize
        self.weight = param(normal(rngs, (model_dim, cfg.num_experts), std), axes=("embed", "experts"))
        self.bias = buffer(jnp.zeros(cfg.num_experts, jnp.float32), axes=("experts",))

    @jax.named_scope("router")
    def __call__(self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"]) -> tuple[Routing, RouterStats]:
        x_BTD = jnp.where(valid_BT[..., None], x_BTD.astype(jnp.float32), 0)
        # TF32 or bfloat16 products would send tokens near a tie to other experts than the public implementations do.
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD, self.weight[...], precision=jax.lax.Precision.HIGHEST)
        score_BTE = jax.nn.sigmoid(logits_BTE)
        choice_BTE = jax.lax.stop_gradient(score_BTE + self.bias[...][None, None, :])
        _, expert_BTk = jax.lax.top_k(choice_BTE, self.top_k)
        weight_BTk = jnp.take_along_axis(score_BTE, expert_BTk, axis=-1)
        if self.renormalize:
            weight_BTk = weight_BTk / (jnp.sum(weight_BTk, -1, keepdims=True) + WEIGHT_EPS)
        routing = Routing(
            expert=jnp.where(valid_BT[..., None], expert_BTk, score_BTE.shape[-1]).astype(jnp.int32),
            weight=jnp.where(valid_BT[..., None], self.scaling * weight_BTk, 0),
        )
        return routing, measure_balance(score_BTE, routing.expert, valid_BT)


def measure_balance(
    score_BTE: Float[Array, "B T E"], expert_BTk: Int[Array, "B T k"], valid_BT: Bool[Array, "B T"]
) -> RouterStats:
    """Counts the load and computes the balance loss sum_e f_e P_e per row, averaged over the rows that have tokens.

    f_e = E / (k T) times the tokens of the row that chose e; P_e = mean over the row of the normalised score of e.

    Source: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20.
    """
    E, k = score_BTE.shape[-1], expert_BTk.shape[-1]
    chosen_BE = jnp.sum(jax.nn.one_hot(expert_BTk, E, dtype=jnp.float32), axis=(1, 2))
    tokens_B = jnp.sum(valid_BT, axis=1, dtype=jnp.float32)
    share_BTE = score_BTE / (jnp.sum(score_BTE, -1, keepdims=True) + WEIGHT_EPS)
    share_BE = jnp.sum(jnp.where(valid_BT[..., None], share_BTE, 0), axis=1)
    per_row_B = jnp.sum(chosen_BE * share_BE, -1) * E / (k * jnp.maximum(tokens_B, 1) ** 2)
    rows = jnp.maximum(jnp.sum(tokens_B > 0), 1)
    return RouterStats(load=jnp.sum(chosen_BE, 0), balance_loss=jnp.sum(per_row_B) / rows)
