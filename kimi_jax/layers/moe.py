"""The mixture-of-experts feed-forward block: dropless, one grouped matrix product per projection."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kimi_jax.config.model import MoeFfn
from kimi_jax.layers.mlp import SwiGlu
from kimi_jax.layers.param import normal, param
from kimi_jax.layers.router import Router, RouterStats
from pallas_kernels.grouped_matmul.api import grouped_matmul


class Experts(nnx.Module):
    """E SwiGLU blocks on rows sorted by expert."""

    def __init__(self, cfg: MoeFfn, *, model_dim: int, std: float, rngs: nnx.Rngs):
        D, E, F = model_dim, cfg.num_experts, cfg.hidden_dim
        self.implementation = cfg.implementation
        self.gate = param(normal(rngs, (E, D, F), std), axes=("experts", "embed", "ffn"))
        self.up = param(normal(rngs, (E, D, F), std), axes=("experts", "embed", "ffn"))
        self.down = param(normal(rngs, (E, F, D), std), axes=("experts", "ffn", "embed"))

    @jax.named_scope("experts")
    def __call__(self, x_MD: Float[Array, "M D"], group_sizes_E: Int[Array, "E"]) -> Float[Array, "M D"]:
        matmul = functools.partial(grouped_matmul, group_sizes=group_sizes_E, implementation=self.implementation)
        gate, up, down = (w[...].astype(x_MD.dtype) for w in (self.gate, self.up, self.down))
        return matmul(jax.nn.silu(matmul(x_MD, gate)) * matmul(x_MD, up), down)


class Moe(nnx.Module):
    """sum_k weight_k E_k(x), combined in float32, plus the shared expert, which is neither routed nor scaled."""

    def __init__(self, cfg: MoeFfn, *, model_dim: int, std: float, rngs: nnx.Rngs):
        self.router = Router(cfg, model_dim=model_dim, std=std, rngs=rngs)
        self.experts = Experts(cfg, model_dim=model_dim, std=std, rngs=rngs)
        shared_dim = cfg.num_shared_experts * cfg.hidden_dim
        self.shared = SwiGlu(model_dim, shared_dim, std=std, rngs=rngs) if shared_dim else None

    @jax.named_scope("moe")
    def __call__(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        B, T, D = x_BTD.shape
        valid_BT = jnp.ones((B, T), bool) if valid_BT is None else valid_BT
        routing, stats = self.router(x_BTD, valid_BT)
        expert_Mk, weight_Mk = (x.reshape(B * T, -1) for x in routing)
        order, row_Mk = sort_by_expert(expert_Mk)
        rows = gather_rows(x_BTD.reshape(B * T, D), order // expert_Mk.shape[1], row_Mk)
        y_rows = self.experts(rows, jnp.bincount(expert_Mk.ravel(), length=stats.load.shape[0]))
        y_BTD = combine_rows(y_rows, weight_Mk, order, row_Mk).astype(x_BTD.dtype).reshape(B, T, D)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD), stats


def sort_by_expert(expert_Mk: Int[Array, "M k"]) -> tuple[Int[Array, "Mk"], Int[Array, "M k"]]:
    """Returns the (token, choice) pair that each row of the sorted batch holds, and the row of each pair."""
    order = jnp.argsort(expert_Mk.ravel(), stable=True)
    row = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    return order, row.reshape(expert_Mk.shape)


# Automatic differentiation would turn both gathers into scatter-adds; the inverse permutation makes them gathers again.
@jax.custom_vjp
def gather_rows(x_MD: Float[Array, "M D"], token: Int[Array, "Mk"], row_Mk: Int[Array, "M k"]) -> Float[Array, "Mk D"]:
    """Row r of the result is x[token[r]]; the gradient sums each token's k rows in float32."""
    return x_MD[token]


def _gather_rows_fwd(x_MD, token, row_Mk):
    return x_MD[token], row_Mk


def _gather_rows_bwd(row_Mk, d_rows):
    return jnp.sum(d_rows[row_Mk], axis=1, dtype=jnp.float32).astype(d_rows.dtype), None, None


gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)


@jax.custom_vjp
def combine_rows(
    y_rows: Float[Array, "Mk D"], weight_Mk: Float[Array, "M k"], order: Int[Array, "Mk"], row_Mk: Int[Array, "M k"]
) -> Float[Array, "M D"]:
    """Sums each token's k rows with its weights; float32."""
    return jnp.einsum("MkD,Mk->MD", y_rows[row_Mk].astype(jnp.float32), weight_Mk)


def _combine_rows_fwd(y_rows, weight_Mk, order, row_Mk):
    return combine_rows(y_rows, weight_Mk, order, row_Mk), (y_rows, weight_Mk, order, row_Mk)


def _combine_rows_bwd(saved, d_MD):
    y_rows, weight_Mk, order, row_Mk = saved
    d_rows = d_MD[order // weight_Mk.shape[1]] * weight_Mk.ravel()[order][:, None]
    d_weight = jnp.einsum("MkD,MD->Mk", y_rows[row_Mk].astype(jnp.float32), d_MD)
    return d_rows.astype(y_rows.dtype), d_weight, None, None


combine_rows.defvjp(_combine_rows_fwd, _combine_rows_bwd)
