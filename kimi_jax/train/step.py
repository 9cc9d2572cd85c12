"""One optimizer step and one validation step, as pure functions of state and batch."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kimi_jax.config.mesh import Mesh
from kimi_jax.config.model import ModelConfig, MoeFfn
from kimi_jax.config.train import SkipNonFinite
from kimi_jax.layers.router import RouterStats
from kimi_jax.models import decoder
from kimi_jax.models.layout import layer_kinds, plan_layout
from kimi_jax.train.loss import mean_cross_entropy, token_cross_entropy
from kimi_jax.train.optimizer import apply_update, clip_by_global_norm, sum_squares
from kimi_jax.train.schedule import learning_rate
from kimi_jax.train.state import Recipe, State
from kimi_jax.types import PyTree, Variables

type Batch = Mapping[str, Array]
"""inputs, targets int32 [B, T]; loss_mask bool [B, T]; segment_ids int32 [B, T] (segment 0: padding), absent if every
row is one document without padding."""
type Metrics = dict[str, Array]


class Sums(NamedTuple):
    """What a microbatch adds to the step: each a share of the whole batch's mean, or a count."""

    loss: Float[Array, ""]
    """Cross-entropy in nats, over the tokens of the whole batch."""
    z_loss: Float[Array, ""]
    """Squared log-sum-exp, over the same."""
    balance_loss: Float[Array, ""]
    """Sum over MoE layers of the mean over the batch's rows; 0 without MoE."""
    load: Float[Array, "L E"] | None
    """Router load of each MoE layer."""
    dropped: Float[Array, ""] | None
    """Choices of experts that did not fit between devices, over all MoE layers."""


def build_train_step(recipe: Recipe) -> Callable[..., tuple[State, Metrics]]:
    """Makes the step function; the caller compiles it, donating the state.

    The gradient is that of the mean over all scored tokens of the batch, however many microbatches it is cut into.

    Returns:
      (state, batch, peak_lr=that of the config) -> (state, metrics). Metrics are scalars: loss_nats, z_loss,
      balance_loss, grad_norm (before clipping), update_rms (of the parameters' change), lr, tokens (scored ones),
      skipped (0 or 1), and with MoE router_load_max and router_load_min, the fullest and emptiest expert of any layer
      relative to its layer's mean; with experts on several devices dropped_fraction of all choices.
    """
    cfg = recipe.cfg
    gradients, rate = build_gradients(recipe), learning_rate(cfg.optim, cfg.train.steps)

    def train_step(
        state: State, batch: Batch, peak_lr: float | Float[Array, ""] = cfg.optim.peak_lr
    ) -> tuple[State, Metrics]:
        grads, sums = gradients(state["params"], state["buffers"], batch)
        lr = rate(state["step"], peak_lr)
        with jax.named_scope("optimizer"):
            clipped, grad_norm = clip_by_global_norm(grads, cfg.optim.clip_norm)
            direction, opt_state = recipe.optimizer.update(clipped, state["opt_state"], state["params"])
            params = apply_update(state["params"], direction, lr, state["step"])
            update_rms = lr * _rms(direction)
        new = {
            "params": params,
            "buffers": update_router_bias(cfg.model, state["buffers"], sums.load),
            "opt_state": opt_state,
        }
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
        skipped = ~finite & isinstance(cfg.train.non_finite, SkipNonFinite)
        if isinstance(cfg.train.non_finite, SkipNonFinite):
            new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, {k: state[k] for k in new})
        metrics = {
            "loss_nats": sums.loss,
            "z_loss": sums.z_loss,
            "balance_loss": sums.balance_loss,
            "grad_norm": grad_norm,
            "update_rms": update_rms,
            "lr": lr,
            "tokens": jnp.sum(batch["loss_mask"], dtype=jnp.int32),
            "skipped": skipped.astype(jnp.int32),
            **_router_balance(sums.load),
            **_dropped_choices(recipe.cfg.mesh, sums),
        }
        return {**new, "step": state["step"] + 1}, metrics

    return train_step


def build_gradients(recipe: Recipe) -> Callable[[Variables, Variables, Batch], tuple[PyTree, Sums]]:
    """Makes the function from parameters, buffers and a whole batch to the float32 gradient and what was measured."""
    value_and_grad = jax.value_and_grad(_build_loss(recipe), has_aux=True)
    k = recipe.cfg.train.grad_accum

    def gradients(params, buffers, batch):
        whole = _Whole(_count(batch["loss_mask"]), _count(_has_tokens(batch)))
        one = lambda microbatch: value_and_grad(params, buffers, microbatch, whole)
        if k == 1:
            (_, sums), grads = one(batch)
            return grads, sums

        def accumulate(total, microbatch):
            (_, sums), grads = one(microbatch)
            return jax.tree.map(jnp.add, total, (grads, sums)), None

        microbatches = jax.tree.map(lambda x: _split_rows(x, k), dict(batch))
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], microbatches))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[1], shapes[0][1]))
        return lax.scan(accumulate, zeros, microbatches)[0]

    return gradients


def _split_rows(x_B: Array, k: int) -> Array:
    """[B, ...] -> [k, B / k, ...], taking every k-th row, so that a sharded batch axis stays evenly sharded."""
    return jnp.moveaxis(x_B.reshape(x_B.shape[0] // k, k, *x_B.shape[1:]), 1, 0)


def _has_tokens(batch: Batch) -> Bool[Array, "B"]:
    """Which rows are not padding alone."""
    if "segment_ids" not in batch:
        return jnp.ones(batch["inputs"].shape[0], bool)
    return jnp.any(batch["segment_ids"] > 0, axis=1)


class _Whole(NamedTuple):
    """Counts over the whole batch, float32, at least 1."""

    tokens: Float[Array, ""]
    rows: Float[Array, ""]


def _count(mask: Bool[Array, "..."]) -> Float[Array, ""]:
    return jnp.maximum(jnp.sum(mask, dtype=jnp.int32), 1).astype(jnp.float32)  # counted exactly beyond 2^24


def _build_loss(recipe: Recipe) -> Callable[[Variables, Variables, Batch, _Whole], tuple[Float[Array, ""], Sums]]:
    cfg = recipe.cfg
    balance_weight = getattr(cfg.model.ffn, "balance_loss", 0.0)

    def loss(params, buffers, batch, whole):
        hidden, head, stats = _run_model(recipe, params, buffers, batch)
        scored = (hidden, head, batch["targets"], batch["loss_mask"].astype(bool), whole.tokens)
        with jax.named_scope("loss"):
            total, means = mean_cross_entropy(*scored, cfg.train.z_loss, cfg.train.loss_chunk)
        rows = jnp.sum(_has_tokens(batch))
        balance_loss = jnp.sum(stats.balance_loss) * rows / whole.rows if stats else jnp.zeros(())
        routers = (stats.load, jnp.sum(stats.dropped)) if stats else (None, None)
        sums = Sums(means.cross_entropy, means.z_loss, balance_loss, *routers)
        return total + balance_weight * balance_loss if balance_weight else total, sums  # XLA keeps gradients times 0

    return loss


def _run_model(
    recipe: Recipe, params: Variables, buffers: Variables, batch: Batch
) -> tuple[Float[Array, "B T D"], Float[Array, "D A"], RouterStats | None]:
    """Hidden states after the final norm, the head's weight, and what the routers report."""
    model = decoder.merge(recipe.graphdef, params, buffers)
    remat = recipe.cfg.train.remat
    hidden, _, stats = model(batch["inputs"], segment_ids_BT=batch.get("segment_ids"), remat=remat)
    return hidden, model.head.weight[...], stats


def build_eval_step(recipe: Recipe) -> Callable[[Variables, Variables, Batch, Int[Array, "A"]], Metrics]:
    """Makes (params, buffers, batch, token_bytes) -> sums over the scored tokens: loss_nats, tokens, correct, bytes."""

    def eval_step(params, buffers, batch, token_bytes):
        hidden, head, _ = _run_model(recipe, params, buffers, batch)
        targets, mask = batch["targets"], batch["loss_mask"].astype(bool)
        losses = token_cross_entropy(hidden, head, targets, mask, recipe.cfg.train.loss_chunk)
        counts = {"tokens": mask, "correct": losses.correct, "bytes": jnp.where(mask, token_bytes[targets], 0)}
        sums = {name: jnp.sum(x, dtype=jnp.int32) for name, x in counts.items()}
        return {"loss_nats": jnp.sum(losses.cross_entropy), **sums}

    return eval_step


# ------------------------------------------------------------------ router
def update_router_bias(cfg: ModelConfig, buffers: Variables, load_LE: Float[Array, "L E"] | None) -> Variables:
    """Moves each balancing bias towards an even load: b += rate * (sign(e) - mean sign(e)), e = mean load - load.

    Source: Moonlight, arXiv:2502.16982; the auxiliary-loss-free form of DeepSeek-V3 with its mean kept at zero.
    """
    if load_LE is None:
        return buffers
    lack = jnp.sign(jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE)
    change_LE = cfg.ffn.bias_update_rate * (lack - jnp.mean(lack, axis=-1, keepdims=True))
    rows = _moe_rows(cfg, buffers)
    return unflatten_dict({path: bias + change_LE[rows[path]] for path, bias in flatten_dict(buffers).items()})


def _moe_rows(cfg: ModelConfig, buffers: Variables) -> dict[tuple, Array]:
    """Which rows of the statistics (MoE layers, in layer order) belong to each bias: one, or one per repeated group."""
    layout = plan_layout(cfg)
    moe_layers = [layer for layer, (_, ffn) in enumerate(layer_kinds(cfg)) if isinstance(ffn, MoeFfn)]

    def rows(part: str, index: str) -> Int[Array, "..."]:
        first = layout.first_layer(part, int(index))
        if part != "groups":
            return jnp.asarray(moe_layers.index(first))
        return jnp.asarray([moe_layers.index(first + repeat * layout.group) for repeat in range(layout.repeats)])

    return {path: rows(*path[:2]) for path in flatten_dict(buffers)}


def _router_balance(load_LE: Float[Array, "L E"] | None) -> Metrics:
    if load_LE is None:
        return {}
    relative = load_LE / jnp.maximum(jnp.mean(load_LE, axis=-1, keepdims=True), 1.0)
    return {"router_load_max": jnp.max(relative), "router_load_min": jnp.min(relative)}


def _dropped_choices(mesh: Mesh, sums: Sums) -> Metrics:
    """Where experts lie on several devices, the share of choices that did not fit into the buffers between them."""
    return {"dropped_fraction": sums.dropped / jnp.maximum(jnp.sum(sums.load), 1.0)} if mesh.expert > 1 else {}


def _rms(tree: PyTree) -> Float[Array, ""]:
    leaves = jax.tree.leaves(tree)
    number = float(sum(x.size for x in leaves))  # as an integer it would not fit into 32 bits
    return jnp.sqrt(sum_squares(tree) / number)
