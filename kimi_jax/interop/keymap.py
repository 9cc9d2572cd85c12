"""Which public tensor is which parameter: one table, read in both directions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kimi_jax.config.mixer import ChannelDecay, LinearMixer, Mixer
from kimi_jax.config.model import DenseFfn, Ffn, ModelConfig
from kimi_jax.interop.transforms import (
    PER_HEAD,
    ROWS,
    TAPS,
    VECTOR,
    HeadLogits,
    HeadSelector,
    Matrix,
    Repeated,
    Shape,
    Transform,
    copy_blocks,
)
from kimi_jax.models.layout import layer_kinds, plan_layout
from kimi_jax.types import Variables

type Path_ = tuple[str, ...]


# ------------------------------------------------------------------ the table
class Entry(NamedTuple):
    """One line of the table. `{expert}` in the name: our array has a leading axis of experts, one tensor each there."""

    name: str
    path: Path_
    transform: Transform = Matrix()
    float32: bool = False
    """Whether the tensor stays float32 in a bfloat16 checkpoint."""


def _swiglu(name: str, *path: str) -> tuple[Entry, ...]:
    return tuple(Entry(f"{name}.{part}_proj.weight", (*path, part)) for part in ("gate", "up", "down"))


OUTER = (
    Entry("model.embed_tokens.weight", ("embed", "weight"), ROWS),
    Entry("model.norm.weight", ("norm", "weight"), VECTOR),
    Entry("lm_head.weight", ("head", "weight")),
)
NORMS = (
    Entry("input_layernorm.weight", ("mixer_norm", "weight"), VECTOR),
    Entry("post_attention_layernorm.weight", ("ffn_norm", "weight"), VECTOR),
)
LINEAR = (
    Entry("self_attn.q_proj.weight", ("mixer", "qkv", "query")),
    Entry("self_attn.k_proj.weight", ("mixer", "qkv", "key")),
    Entry("self_attn.v_proj.weight", ("mixer", "qkv", "value")),
    Entry("self_attn.q_conv1d.weight", ("mixer", "qkv", "query_conv", "weight"), TAPS),
    Entry("self_attn.k_conv1d.weight", ("mixer", "qkv", "key_conv", "weight"), TAPS),
    Entry("self_attn.v_conv1d.weight", ("mixer", "qkv", "value_conv", "weight"), TAPS),
    Entry("self_attn.A_log", ("mixer", "decay", "gate", "a_log"), PER_HEAD, float32=True),
    Entry("self_attn.b_proj.weight", ("mixer", "beta", "weight")),
    Entry("self_attn.g_a_proj.weight", ("mixer", "output", "gate", "down")),
    Entry("self_attn.g_b_proj.weight", ("mixer", "output", "gate", "up")),
    Entry("self_attn.o_norm.weight", ("mixer", "output", "norm"), VECTOR),
    Entry("self_attn.o_proj.weight", ("mixer", "output", "weight"), Matrix(inputs=2)),
)
CHANNEL_DECAY = (
    Entry("self_attn.dt_bias", ("mixer", "decay", "gate", "dt_bias"), VECTOR, float32=True),
    Entry("self_attn.f_a_proj.weight", ("mixer", "decay", "down")),
    Entry("self_attn.f_b_proj.weight", ("mixer", "decay", "up")),
)
MLA = (
    Entry("self_attn.q_proj.weight", ("mixer", "query")),
    Entry("self_attn.kv_a_proj_with_mqa.weight", ("mixer", "latent_down")),
    Entry("self_attn.kv_a_layernorm.weight", ("mixer", "latent_norm", "weight"), VECTOR),
    Entry("self_attn.kv_b_proj.weight", ("mixer", "latent_up")),
    Entry("self_attn.o_proj.weight", ("mixer", "output"), Matrix(inputs=2)),
)
DENSE = _swiglu("mlp", "ffn")
MOE = (
    Entry("block_sparse_moe.gate.weight", ("ffn", "router", "weight")),
    Entry("block_sparse_moe.gate.e_score_correction_bias", ("ffn", "router", "bias"), VECTOR, float32=True),
    Entry("block_sparse_moe.experts.{expert}.w1.weight", ("ffn", "experts", "gate")),
    Entry("block_sparse_moe.experts.{expert}.w3.weight", ("ffn", "experts", "up")),
    Entry("block_sparse_moe.experts.{expert}.w2.weight", ("ffn", "experts", "down")),
    *_swiglu("block_sparse_moe.shared_experts", "ffn", "shared"),
)


def _head_decay(key_dim: int) -> tuple[Entry, ...]:
    """One decay per head as one per channel: the bottleneck holds a logit per head, and copies it to the channels."""
    weight = ("mixer", "decay", "weight")
    return (
        Entry("self_attn.dt_bias", ("mixer", "decay", "gate", "dt_bias"), Repeated(key_dim), float32=True),
        Entry("self_attn.f_a_proj.weight", weight, HeadLogits(rank=key_dim)),
        Entry("self_attn.f_b_proj.weight", weight, HeadSelector(key_dim, rank=key_dim)),
    )


def layer_entries(mixer: Mixer, ffn: Ffn) -> tuple[Entry, ...]:
    """The lines of one layer."""
    if isinstance(mixer, LinearMixer):
        per_channel = isinstance(mixer.decay, ChannelDecay)
        mixing = LINEAR + (CHANNEL_DECAY if per_channel else _head_decay(mixer.key_dim))
    else:
        mixing = MLA
    return NORMS + mixing + (DENSE if isinstance(ffn, DenseFfn) else MOE)


# ------------------------------------------------------------------ one model
class PublicTensor(NamedTuple):
    """One tensor of a public checkpoint and the slice of a parameter that it holds."""

    name: str
    shape: Shape
    float32: bool
    path: Path_
    """Of the leaf in the merged tree of params and buffers."""
    repeat: int | None
    """Index into the leading axis of a leaf of stacked layers; None: not stacked."""
    expert: int | None
    """Index into the axis of experts; None: no such axis."""
    slice_shape: Shape
    """Of the slice of the leaf that this tensor holds."""
    transform: Transform

    def read(self, layer_leaf: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Takes the tensor out of its leaf, already indexed by `repeat`; C-contiguous."""
        ours = layer_leaf if self.expert is None else layer_leaf[self.expert]
        value = np.empty(self.shape, dtype)
        copy_blocks(value, self.transform.to_public(ours))
        return value

    def lies_in(self, box: Sequence[slice]) -> bool:
        """Whether a box of the leaf holds some of this tensor."""
        return all(cut.start <= index < cut.stop for index, cut in zip(self._index, box, strict=False))

    def write(self, piece: np.ndarray, box: Sequence[slice], value: np.ndarray) -> None:
        """Puts what lies in `box` of the leaf into `piece`, an array of the size of the box."""
        ours = self.transform.from_public(value, self.slice_shape)
        if ours is not None:
            place = tuple(index - cut.start for index, cut in zip(self._index, box, strict=False))
            copy_blocks(piece[place], ours[tuple(box[len(place) :])])

    @property
    def _index(self) -> tuple[int, ...]:
        return tuple(i for i in (self.repeat, self.expert) if i is not None)


def public_tensors(cfg: ModelConfig, leaves: Mapping[Path_, Any]) -> tuple[PublicTensor, ...]:
    """Lists every tensor of the public form of a model, in layer order.

    Args:
      cfg: a model that has a public form (`hf_config.to_public` accepts it).
      leaves: `flatten` of its params and buffers; only shapes are read, so `jax.ShapeDtypeStruct` will do.
    """
    return tuple(_walk(cfg, {path: leaf.shape for path, leaf in leaves.items()}))


def _walk(cfg: ModelConfig, shapes: Mapping[Path_, Shape]) -> Iterator[PublicTensor]:
    embed, *rest = OUTER
    yield from _expand(embed, "", (), None, shapes)
    layout = plan_layout(cfg)
    for layer, (mixer, ffn) in enumerate(layer_kinds(cfg)):
        place = layout.locate(layer)
        for entry in layer_entries(mixer, ffn):
            yield from _expand(entry, f"model.layers.{layer}.", (place.part, place.index), place.repeat, shapes)
    for entry in rest:
        yield from _expand(entry, "", (), None, shapes)


def _expand(entry: Entry, prefix: str, at: Path_, repeat: int | None, shapes: Mapping) -> Iterator[PublicTensor]:
    path = (*at, *entry.path)
    shape = shapes[path] if repeat is None else shapes[path][1:]
    per_expert = "{expert}" in entry.name
    slice_shape = shape[per_expert:]
    public_shape = entry.transform.public_shape(slice_shape)
    for expert in range(shape[0]) if per_expert else [None]:
        name = prefix + entry.name.format(expert=expert)
        yield PublicTensor(name, public_shape, entry.float32, path, repeat, expert, slice_shape, entry.transform)


def flatten(params: Variables, buffers: Variables) -> dict[Path_, Any]:
    """Merges params and buffers into one dict from path to leaf; no path is in both."""
    leaves = jax.tree_util.tree_flatten_with_path((params, buffers))[0]
    return {tuple(key.key for key in path[1:]): leaf for path, leaf in leaves}


def unflatten(like: Variables, leaves: Mapping[Path_, Any]) -> Variables:
    """Builds a tree like `like` (params or buffers) whose leaf at each path is that of `leaves`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[tuple(key.key for key in path)], like)
