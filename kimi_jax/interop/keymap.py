"""Which public tensor is which parameter: one table, read in both directions."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from kimi_jax.config.mixer import KdaMixer, MlaMixer
from kimi_jax.config.model import DenseFfn, ModelConfig, MoeFfn
from kimi_jax.models.layout import layer_kinds, plan_layout
from kimi_jax.types import Variables

type Shape = tuple[int, ...]
type Path_ = tuple[str, ...]


# ------------------------------------------------------------------ transforms
@dataclass(frozen=True)
class Matrix:
    """[inputs..., outputs...] here, [outputs, inputs] there: heads are merged and the matrix is transposed.

    Args:
      inputs: number of leading axes that the product sums over.
    """

    inputs: int = 1

    def public_shape(self, shape: Shape) -> Shape:
        return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])

    def to_public(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(self.public_shape(x.shape)[::-1]).T

    def from_public(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        return x.T.reshape(shape)


@dataclass(frozen=True)
class Reshaped:
    """The same numbers in the same order.

    Args:
      template: the public shape; -1 takes what is left, None stands for the size of our last axis.
    """

    template: tuple[int | None, ...]

    def public_shape(self, shape: Shape) -> Shape:
        known = [shape[-1] if size is None else size for size in self.template]
        left = math.prod(shape) // math.prod(size for size in known if size != -1)
        return tuple(left if size == -1 else size for size in known)

    def to_public(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(self.public_shape(x.shape))

    def from_public(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        return x.reshape(shape)


VECTOR = Reshaped((-1,))
ROWS = Reshaped((-1, None))  # one row per token
TAPS = Reshaped((-1, 1, None))  # channels of a depthwise convolution, head-major
PER_HEAD = Reshaped((1, 1, -1, 1))


# ------------------------------------------------------------------ the table
class Entry(NamedTuple):
    """One line of the table. `{expert}` in the name: our array has a leading axis of experts, one tensor each there."""

    name: str
    path: Path_
    transform: Matrix | Reshaped = Matrix()
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
KDA = (
    Entry("self_attn.q_proj.weight", ("mixer", "qkv", "query")),
    Entry("self_attn.k_proj.weight", ("mixer", "qkv", "key")),
    Entry("self_attn.v_proj.weight", ("mixer", "qkv", "value")),
    Entry("self_attn.q_conv1d.weight", ("mixer", "qkv", "query_conv", "weight"), TAPS),
    Entry("self_attn.k_conv1d.weight", ("mixer", "qkv", "key_conv", "weight"), TAPS),
    Entry("self_attn.v_conv1d.weight", ("mixer", "qkv", "value_conv", "weight"), TAPS),
    Entry("self_attn.A_log", ("mixer", "decay", "gate", "a_log"), PER_HEAD, float32=True),
    Entry("self_attn.dt_bias", ("mixer", "decay", "gate", "dt_bias"), VECTOR, float32=True),
    Entry("self_attn.f_a_proj.weight", ("mixer", "decay", "down")),
    Entry("self_attn.f_b_proj.weight", ("mixer", "decay", "up")),
    Entry("self_attn.b_proj.weight", ("mixer", "beta", "weight")),
    Entry("self_attn.g_a_proj.weight", ("mixer", "output", "gate", "down")),
    Entry("self_attn.g_b_proj.weight", ("mixer", "output", "gate", "up")),
    Entry("self_attn.o_norm.weight", ("mixer", "output", "norm"), VECTOR),
    Entry("self_attn.o_proj.weight", ("mixer", "output", "weight"), Matrix(inputs=2)),
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
ENTRIES = {KdaMixer: KDA, MlaMixer: MLA, DenseFfn: DENSE, MoeFfn: MOE}


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
    transform: Matrix | Reshaped

    def read(self, layer_leaf: np.ndarray) -> np.ndarray:
        """Takes the tensor out of its leaf, already indexed by `repeat`; C-contiguous, in the dtype of the leaf."""
        ours = layer_leaf if self.expert is None else layer_leaf[self.expert]
        return np.ascontiguousarray(self.transform.to_public(ours)).reshape(self.shape)

    def write(self, leaf: np.ndarray, value: np.ndarray) -> None:
        """Puts the tensor into its leaf."""
        index = tuple(i for i in (self.repeat, self.expert) if i is not None)
        leaf[index] = self.transform.from_public(value, leaf.shape[len(index) :])


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
        for entry in (*NORMS, *ENTRIES[type(mixer)], *ENTRIES[type(ffn)]):
            yield from _expand(entry, f"model.layers.{layer}.", (place.part, place.index), place.repeat, shapes)
    for entry in rest:
        yield from _expand(entry, "", (), None, shapes)


def _expand(entry: Entry, prefix: str, at: Path_, repeat: int | None, shapes: Mapping) -> Iterator[PublicTensor]:
    path = (*at, *entry.path)
    shape = shapes[path] if repeat is None else shapes[path][1:]
    per_expert = "{expert}" in entry.name
    public_shape = entry.transform.public_shape(shape[per_expert:])
    for expert in range(shape[0]) if per_expert else [None]:
        name = prefix + entry.name.format(expert=expert)
        yield PublicTensor(name, public_shape, entry.float32, path, repeat, expert, entry.transform)


def flatten(params: Variables, buffers: Variables) -> dict[Path_, Any]:
    """Merges params and buffers into one dict from path to leaf; no path is in both."""
    leaves = jax.tree_util.tree_flatten_with_path((params, buffers))[0]
    return {tuple(key.key for key in path[1:]): leaf for path, leaf in leaves}


def unflatten(like: Variables, leaves: Mapping[Path_, Any]) -> Variables:
    """Builds a tree like `like` (params or buffers) whose leaf at each path is that of `leaves`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[tuple(key.key for key in path)], like)
