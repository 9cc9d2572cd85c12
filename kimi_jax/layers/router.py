"""The router: which experts a token meets, with which weights, and what training learns about the balance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kimi_jax.config.model import MoeFfn
from kimi_jax.layers.linear import apart
from kimi_jax.layers.param import buffer, normal, param
from pallas_kernels.top_k.api import top_k

WEIGHT_EPS = 1e-20  # added to the sum of the chosen scores before dividing by it


class RouterStats(NamedTuple):
    """What a router reports per step; a decoder stacks them over its MoE layers, in layer order."""

    load: Float[Array, "E"]
    """float32, number of (valid token, choice) pairs per expert."""
    balance_loss: Float[Array, ""]
    """float32, sequence-wise balance loss before its weight: 1 for perfectly even routing."""
    dropped: Float[Array, ""]
    """float32, number of choices that did not fit into the buffers between devices."""


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
        logits_BTE = multiply_exactly(jnp.where(valid_BT[..., None], apart(x_BTD), 0), self.weight[...])
        score_BTE = jax.nn.sigmoid(logits_BTE)
        expert_BTk, weight_BTk = top_k(score_BTE, self.bias[...], self.top_k)
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
    chosen_BTE = jnp.sum(jax.nn.one_hot(expert_BTk, E, dtype=jnp.float32), axis=2)
    chosen_BE = jax.lax.optimization_barrier(jnp.sum(chosen_BTE, axis=1))  # else XLA counts anew for the load
    tokens_B = jnp.sum(valid_BT, axis=1, dtype=jnp.float32)
    share_BTE = score_BTE / (jnp.sum(score_BTE, -1, keepdims=True) + WEIGHT_EPS)
    share_BE = jnp.sum(jnp.where(valid_BT[..., None], share_BTE, 0), axis=1)
    per_row_B = jnp.sum(chosen_BE * share_BE, -1) * E / (k * jnp.maximum(tokens_B, 1) ** 2)
    rows = jnp.maximum(jnp.sum(tokens_B > 0), 1)
    return RouterStats(jnp.sum(chosen_BE, 0), balance_loss=jnp.sum(per_row_B) / rows, dropped=jnp.zeros(()))


def multiply_exactly(x: Float[Array, "B T D"], w: Float[Array, "D E"]) -> Float[Array, "B T E"]:
    """Returns x w with the precision of float32 products.

    TF32 or bfloat16 products would send tokens near a tie to other experts than the public implementations do. A
    bfloat16 x needs no float32 product for that: three bfloat16 terms hold the 24 bits of w.

    Args:
      w: float32.
    """
    if x.dtype == jnp.bfloat16:
        return _multiply_terms(x, w)
    return jnp.einsum("BTD,DE->BTE", x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _multiply_terms(x, w):
    parts = _dot("BTD,DE->BTE", x, jnp.concatenate(_terms(w), -1))
    return sum(jnp.split(parts, 3, -1))


def _multiply_terms_fwd(x, w):
    return _multiply_terms(x, w), (x, w)


def _multiply_terms_bwd(saved, d_logits):
    """The gradient of w as exact as the product; that of x, which is rounded to bfloat16, with 16 bits."""
    x, w = saved
    d, (w_high, w_middle, _) = _terms(d_logits), _terms(w)
    dw = sum(jnp.split(_dot("BTD,BTE->DE", x, jnp.concatenate(d, -1)), 3, -1))
    rows, columns = (jnp.concatenate(a, -1) for a in ((d[0], d[1], d[0]), (w_high, w_high, w_middle)))
    return jnp.einsum("BTE,DE->BTD", rows, columns), dw


_multiply_terms.defvjp(_multiply_terms_fwd, _multiply_terms_bwd)


def _dot(spec: str, a, b) -> Float[Array, "..."]:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _terms(x: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """Three bfloat16 arrays whose sum is x, to its last bit but for the smallest numbers."""
    terms = []
    for _ in range(3):
        high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # a cast there and back would be dropped
        terms.append(high.astype(jnp.bfloat16))
        x = x - high
    return terms
