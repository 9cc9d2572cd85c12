"""The hybrid decoder, and the pure functions that make it a pytree of arrays and back."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kimi_jax.config.model import ModelConfig
from kimi_jax.config.train import NamedRemat, NoRemat, Remat
from kimi_jax.layers.embed import Embedding, Head
from kimi_jax.layers.norm import RMSNorm
from kimi_jax.layers.param import Buffer
from kimi_jax.layers.router import RouterStats
from kimi_jax.models.block import Block
from kimi_jax.models.layout import Layout, layer_kinds, plan_layout
from kimi_jax.parallel.rules import constrain
from kimi_jax.parallel.weights import in_turn
from kimi_jax.types import PyTree, Variables

type Caches = dict[str, dict[str, Any]]
"""Like the decoder's parts: caches["groups"]["0"] holds the stacked caches of the first block of the group."""

NO_REMAT = NoRemat()
HIDDEN_AXES = ("batch", "tokens", None)  # of the residual stream [B, T, D]


class Decoder(nnx.Module):
    """Embedding, blocks, final norm and an untied head.

    `groups` holds one block per position of the repeating group, its parameters stacked on a leading "layers" axis.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, layout: Layout | None = None):
        self.layout = layout or plan_layout(cfg)
        self.embed = Embedding(cfg.vocab_size, cfg.model_dim, std=cfg.init_std, dtype=cfg.dtype, rngs=rngs)
        self.prefix = self._make_blocks(cfg, "prefix", self.layout.prefix, rngs)
        self.groups = self._make_blocks(cfg, "groups", self.layout.group, rngs)
        self.tail = self._make_blocks(cfg, "tail", self.layout.tail, rngs)
        self.norm = RMSNorm(cfg.model_dim, eps=cfg.norm_eps)
        self.head = Head(cfg.vocab_size, cfg.model_dim, std=cfg.init_std, rngs=rngs)

    def _make_blocks(self, cfg: ModelConfig, part: str, count: int, rngs: nnx.Rngs) -> nnx.Dict:
        kinds = layer_kinds(cfg)

        def make(index: int) -> Block:
            kind = kinds[self.layout.first_layer(part, index)]
            if part != "groups":
                return Block(cfg, *kind, rngs=rngs)
            stack = nnx.vmap(
                lambda key: Block(cfg, *kind, rngs=nnx.Rngs(params=key)),
                transform_metadata={nnx.PARTITION_NAME: "layers"},
            )
            return stack(jax.random.split(rngs.params(), self.layout.repeats))

        return nnx.Dict({str(index): make(index) for index in range(count)})

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        segment_ids_BT: Int[Array, "B T"] | None = None,
        caches: Caches | None = None,
        remat: Remat = NO_REMAT,
    ) -> tuple[Float[Array, "B T D"], Caches | None, RouterStats | None]:
        """Runs all blocks and the final norm.

        Args:
          tokens_BT: int32 token ids.
          segment_ids_BT: int32 document of each token, 0 for padding; None: one document per row. Documents of a row do
            not see each other.
          caches: what `init_caches` or an earlier call returned: generation. None: training, and None comes back.
          remat: what the backward pass recomputes.

        Returns:
          (hidden states after the final norm, caches, stats of the MoE layers stacked in layer order or None).
        """
        step = rematerialize(_run_block, remat)
        x, new_caches, stats = constrain(self.embed(tokens_BT), HIDDEN_AXES), {}, []
        for part in ("prefix", "groups", "tail"):
            run = self._scan_groups if part == "groups" else self._unroll
            blocks, part_caches = getattr(self, part), caches and caches[part]
            x, new_caches[part], part_stats = run(step, blocks, x, part_caches, segment_ids_BT)
            stats += part_stats
        stats = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stats) if stats else None
        return self.norm(x), new_caches if caches else None, stats

    def _unroll(self, step: Callable, blocks: nnx.Dict, x, caches, segment_ids):
        split = {index: nnx.split(block) for index, block in blocks.items()}
        x, new_caches, stats = _run_in_turn(step, split, x, caches, segment_ids)
        return x, new_caches, [jax.tree.map(lambda leaf: leaf[None], s) for s in stats if s is not None]

    def _scan_groups(self, step: Callable, blocks: nnx.Dict, x, caches, segment_ids):
        if not blocks:
            return x, {}, []
        split = {index: nnx.split(block) for index, block in blocks.items()}

        def run_group(x, inputs):
            states, group_caches = inputs
            group = {index: (graphdef, states[index]) for index, (graphdef, _) in split.items()}
            x, new_caches, stats = _run_in_turn(step, group, x, group_caches, segment_ids)
            return x, (new_caches, stats)

        states = {index: state for index, (_, state) in split.items()}
        x, (new_caches, stats) = jax.lax.scan(run_group, x, (states, caches))
        present = [s for s in stats if s is not None]
        if not present:
            return x, new_caches, []
        in_layer_order = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *present)  # [repeats, group, ...]
        return x, new_caches, [jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), in_layer_order)]

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T A"]:
        """Returns float32 logits over the vocabulary."""
        return self.head(hidden_BTD)

    def init_caches(self, batch: int, max_len: int) -> Caches:
        """Makes the caches of an empty context with room for `max_len` tokens per row, padding included."""
        caches = {
            part: {i: b.init_cache(batch, max_len, self.embed.dtype) for i, b in getattr(self, part).items()}
            for part in ("prefix", "groups", "tail")
        }
        repeats = self.layout.repeats
        caches["groups"] = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[None], (repeats, *leaf.shape)), caches["groups"]
        )
        return caches


def _run_in_turn(step: Callable, split: dict[str, tuple[nnx.GraphDef, nnx.State]], x, caches, segment_ids):
    """Runs blocks; the gradients of one travel while those of the block before it are computed."""
    new_caches, stats, names = {}, [], list(split)
    states = {index: state for index, (_, state) in split.items()}
    for index, behind in itertools.zip_longest(names, names[1:]):
        if behind is not None:
            x, states[behind] = in_turn(x, states[behind])
        cache = caches and caches[index]
        x, new_caches[index], block_stats = step(split[index][0], states[index], x, cache, segment_ids)
        stats.append(block_stats)
    return x, new_caches, stats


@functools.partial(jax.jit, static_argnums=0)  # blocks of one kind are traced and lowered once
def _run_block(graphdef: nnx.GraphDef, state: nnx.State, x, cache, segment_ids):
    x, cache, stats = nnx.merge(graphdef, state)(x, cache, segment_ids)
    return constrain(x, HIDDEN_AXES), cache, stats


def rematerialize(step: Callable, remat: Remat) -> Callable:
    """Wraps a block so that its backward pass keeps what `remat` says; the first argument is static."""
    if isinstance(remat, NoRemat):
        return step
    policy = _policy(remat) if isinstance(remat, NamedRemat) else None
    return jax.checkpoint(step, policy=policy, static_argnums=(0,))


def _policy(remat: NamedRemat) -> Callable[..., Any]:
    """The names are those that layers and operators give with `checkpoint_name`."""
    if remat.on == "device":
        return jax.checkpoint_policies.save_only_these_names(*remat.keep)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(remat.keep),
        offload_src="device",
        offload_dst="pinned_host",
    )


def init(cfg: ModelConfig, key: Array, layout: Layout | None = None) -> tuple[nnx.GraphDef, Variables, Variables]:
    """Draws the parameters of a decoder.

    Args:
      cfg: the model.
      key: typed PRNG key.
      layout: which layers share a scan; None: as `plan_layout` finds.

    Returns:
      (graphdef, params, buffers): a static description of the module, and nested dicts of float32 arrays.
    """
    model = Decoder(cfg, rngs=nnx.Rngs(params=key), layout=layout)
    graphdef, params, buffers = nnx.split(model, nnx.Param, Buffer)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)


def abstract(cfg: ModelConfig, layout: Layout | None = None) -> tuple[nnx.GraphDef, Variables, Variables]:
    """Returns what `init` returns with `jax.ShapeDtypeStruct` leaves, without any memory."""
    return jax.eval_shape(lambda key: init(cfg, key, layout), jax.random.key(0))


def merge(graphdef: nnx.GraphDef, params: Variables, buffers: Variables) -> Decoder:
    """Puts a decoder together from the parts that `init` returned, or from their like inside a transformed function."""
    return nnx.merge(graphdef, params, buffers)


def logical_axes(cfg: ModelConfig, layout: Layout | None = None) -> PyTree:
    """Returns a tree like the params of `init` whose leaves are tuples of axis names."""

    def make(key):
        return nnx.state(Decoder(cfg, rngs=nnx.Rngs(params=key), layout=layout), nnx.Param)

    variables = jax.eval_shape(make, jax.random.key(0))
    axes = jax.tree.map(lambda v: v.get_metadata()["out_sharding"], variables, is_leaf=_is_variable)
    return nnx.to_pure_dict(axes)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)
