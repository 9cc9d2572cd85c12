"""From a public checkpoint to parameters: everything is checked against the headers before memory is taken."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kimi_jax.config.model import ModelConfig
from kimi_jax.errors import UserError
from kimi_jax.interop.files import CONFIG, INDEX, SINGLE, read_json
from kimi_jax.interop.hf_config import PublicConfig, from_public, read_public
from kimi_jax.interop.keymap import Path_, PublicTensor, flatten, public_tensors, unflatten
from kimi_jax.interop.safetensors_file import NUMPY_DTYPES, TensorSpec, read_specs, read_tensors
from kimi_jax.models.decoder import abstract
from kimi_jax.types import Variables

SHOWN = 8  # problems of one kind named before "and n more"


class PublicModel(NamedTuple):
    """A public checkpoint in memory; parameters and buffers are float32."""

    cfg: ModelConfig
    public: PublicConfig
    params: Variables
    buffers: Variables


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    spec: TensorSpec


def import_model(folder: Path) -> PublicModel:
    """Reads a checkpoint in the layout of the released Kimi Linear.

    Args:
      folder: holds config.json and model.safetensors, or shards and their index.

    Raises:
      UserError: one line per problem: files that are missing or damaged, config values that are not supported, tensors
        that are missing, unexpected or of a wrong shape or dtype.
    """
    config_path = folder / CONFIG
    public = read_public(read_json(config_path), source=str(config_path))
    cfg = from_public(public)
    stored = find_tensors(folder)
    _, params, buffers = abstract(cfg)
    shapes = flatten(params, buffers)
    tensors = public_tensors(cfg, shapes)
    problems = list(compare(tensors, stored))
    if problems:
        raise UserError([f"{folder}: {problem}" for problem in problems])
    leaves = _fill(tensors, stored, shapes)
    return PublicModel(cfg, public, unflatten(params, leaves), unflatten(buffers, leaves))


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Reads the headers of all files of a checkpoint; returns where each tensor lies.

    Raises:
      UserError: the index or a file is missing or damaged, or they disagree.
    """
    index = folder / INDEX
    if not index.is_file():
        return {spec.name: StoredTensor(folder / SINGLE, spec) for spec in read_specs(folder / SINGLE)}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
        raise UserError(f"{index}: weight_map must map tensor names to names of files beside it")
    found, problems = {}, []
    for name in sorted(set(weight_map.values())):
        try:
            specs = read_specs(folder / name)
        except UserError as error:
            problems += error.problems
            continue
        problems += _summarize(
            f"{folder / name}: holds a tensor that {INDEX} places elsewhere",
            (spec.name for spec in specs if weight_map.get(spec.name) != name),
        )
        found |= {spec.name: StoredTensor(folder / name, spec) for spec in specs}
    if not problems:
        lost = (name for name in weight_map if name not in found)
        problems += _summarize(f"{index}: names a tensor that its file does not hold", lost)
    if problems:
        raise UserError(problems)
    return found


def compare(tensors: Iterable[PublicTensor], stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Yields every difference between the tensors that a model has and those that a checkpoint holds."""
    wanted = {tensor.name: tensor for tensor in tensors}
    both = [(tensor, stored[name].spec) for name, tensor in wanted.items() if name in stored]
    yield from _summarize("missing tensor", (name for name in wanted if name not in stored))
    yield from _summarize("unexpected tensor", (name for name in stored if name not in wanted))
    wrong_shape = ((tensor, spec) for tensor, spec in both if spec.shape != tensor.shape)
    yield from _summarize(
        "wrong shape", (f"{t.name} has {list(spec.shape)}, must be {list(t.shape)}" for t, spec in wrong_shape)
    )
    wrong_dtype = ((tensor, spec) for tensor, spec in both if spec.dtype not in NUMPY_DTYPES)
    known = ", ".join(NUMPY_DTYPES)
    yield from _summarize(
        "wrong dtype", (f"{t.name} is {spec.dtype}, must be one of {known}" for t, spec in wrong_dtype)
    )


def _summarize(kind: str, names: Iterable[str]) -> Iterator[str]:
    names = list(names)
    yield from (f"{kind}: {name}" for name in names[:SHOWN])
    if len(names) > SHOWN:
        yield f"{kind}: and {len(names) - SHOWN} more"


def _fill(
    tensors: Iterable[PublicTensor], stored: Mapping[str, StoredTensor], shapes: Mapping[Path_, Any]
) -> dict[Path_, Any]:
    leaves = {path: np.empty(leaf.shape, np.float32) for path, leaf in shapes.items()}
    by_file: dict[Path, list[PublicTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(stored[tensor.name].file, []).append(tensor)
    for file, inside in by_file.items():
        for tensor, value in zip(inside, read_tensors(file, [t.name for t in inside]), strict=True):
            tensor.write(leaves[tensor.path], value)
    return {path: jnp.asarray(leaves.pop(path)) for path in list(leaves)}


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")
