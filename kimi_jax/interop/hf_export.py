"""From parameters to a public checkpoint: files, shards and dtypes; all of it or nothing is written."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kimi_jax.config.model import ModelConfig
from kimi_jax.data.json_files import write_json
from kimi_jax.data.records import new_folder
from kimi_jax.errors import UserError
from kimi_jax.interop.files import CONFIG, GENERATION_CONFIG, INDEX, SINGLE
from kimi_jax.interop.hf_config import to_public
from kimi_jax.interop.hf_import import Dtype
from kimi_jax.interop.keymap import Path_, PublicTensor, flatten, public_tensors
from kimi_jax.interop.public_config import PublicConfig, json_fields
from kimi_jax.interop.safetensors_file import DTYPES, NUMPY_DTYPES, TensorSpec, in_file_order, write_file
from kimi_jax.interop.saved_model import SavedModel, load_model
from kimi_jax.interop.tokenizer_files import write_tokenizer

SHARD_BYTES = 5 * 10**9


def export_run(
    run_dir: str | Path,
    out_dir: str | Path,
    *,
    step: int | None = None,
    dtype: Dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Exports a checkpoint of a training run, or writes an imported or public one again.

    Args:
      run_dir: what `load_model` takes.
      out_dir: the new directory.
      step: of a run's checkpoint; None: the newest.
      dtype, shard_bytes: as in `export_model`.

    Returns:
      `out_dir`.

    Raises:
      UserError: no such checkpoint, a model without a public form, or `out_dir` exists.
    """
    refuse_existing(Path(out_dir))
    return export_model(load_model(run_dir, step=step), out_dir, dtype=dtype, shard_bytes=shard_bytes)


def export_model(
    model: SavedModel, out_dir: str | Path, *, dtype: Dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Writes a model as transformers, vLLM and SGLang read Kimi Linear.

    Args:
      model: parameters on any device, or in host memory.
      out_dir: the new directory; it appears when everything is written.
      dtype: of the tensors; gate parameters and the router's bias stay float32. None: the model's compute dtype.
      shard_bytes: largest data size of one file; a larger tensor has a file of its own.

    Returns:
      `out_dir`.

    Raises:
      UserError: a model without a public form (each config value named), or `out_dir` exists.
    """
    out_dir, dtype = Path(out_dir), dtype or model.cfg.dtype
    refuse_existing(out_dir)
    public = to_public(model.cfg, dtype=dtype, max_length=model.max_length, **_special_ids(model))
    with writing_to(out_dir), new_folder(out_dir) as folder:
        write_json(folder / CONFIG, json_fields(public))
        write_json(folder / GENERATION_CONFIG, {**model.generation, **_generation_fields(public)})
        if model.tokenizer:
            write_tokenizer(model.tokenizer, folder, max_length=model.max_length)
        _write_weights(folder, model.cfg, flatten(model.params, model.buffers), DTYPES[dtype], shard_bytes)
    return out_dir


def _special_ids(model: SavedModel) -> dict[str, Any]:
    stop, pad = model.stop_ids, model.pad_id
    if pad is None and model.tokenizer:
        pad = model.tokenizer.pad_id
    return {"bos": model.bos_id, "eos": stop[0] if len(stop) == 1 else (stop or None), "pad": pad}


@contextlib.contextmanager
def writing_to(out_dir: Path) -> Iterator[None]:
    """Turns what the disk refuses into a `UserError` that names the directory."""
    try:
        yield
    except FileExistsError:
        refuse_existing(out_dir)
        raise
    except OSError as error:
        raise UserError(f"{out_dir}: cannot be written: {error.strerror or error}") from error


def refuse_existing(out_dir: Path) -> None:
    """Raises `UserError` if the output directory exists, which is never overwritten."""
    if out_dir.exists():
        raise UserError(f"{out_dir}: exists already; remove it or name another directory")


def plan_shards(tensors: Sequence[PublicTensor], dtype: str, shard_bytes: int) -> list[list[PublicTensor]]:
    """Cuts the tensors, in layer order, into files of at most `shard_bytes`; orders each file's tensors."""
    shards: list[list[PublicTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor_spec(tensor, dtype).num_bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return [in_file_order(shard, lambda tensor: tensor_spec(tensor, dtype)) for shard in shards]


def tensor_spec(tensor: PublicTensor, dtype: str) -> TensorSpec:
    """How a tensor is stored in a checkpoint of `dtype`."""
    return TensorSpec(tensor.name, "F32" if tensor.float32 else dtype, tensor.shape)


def shard_name(index: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _write_weights(folder: Path, cfg: ModelConfig, leaves: Mapping[Path_, Any], dtype: str, shard_bytes: int) -> None:
    shards = plan_shards(public_tensors(cfg, leaves), dtype, shard_bytes)
    weight_map, total = {}, 0
    for index, shard in enumerate(shards):
        name = shard_name(index, len(shards))
        specs = [tensor_spec(tensor, dtype) for tensor in shard]
        write_file(folder / name, specs, _read_arrays(shard, specs, leaves))
        weight_map |= {spec.name: name for spec in specs}
        total += sum(spec.num_bytes for spec in specs)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _read_arrays(
    tensors: Sequence[PublicTensor], specs: Sequence[TensorSpec], leaves: Mapping[Path_, Any]
) -> Iterator[np.ndarray]:
    """Fetches each layer's leaf from the devices once: the tensors of its experts follow each other."""
    fetched, layer_leaf = None, None
    for tensor, spec in zip(tensors, specs, strict=True):
        if fetched != (tensor.path, tensor.repeat):
            layer_leaf = _fetch(leaves[tensor.path], tensor.repeat)
            fetched = (tensor.path, tensor.repeat)
        yield tensor.read(layer_leaf, NUMPY_DTYPES[spec.dtype])


def _fetch(leaf: Any, repeat: int | None) -> np.ndarray:
    """Brings one layer of a leaf to the host; on a CPU that is a view."""
    if repeat is None:
        return np.asarray(leaf)
    on_host = not isinstance(leaf, jax.Array) or (len(leaf.devices()) == 1 and leaf.device.platform == "cpu")
    return np.asarray(leaf)[repeat] if on_host else np.asarray(_take_layer(leaf, repeat))


@jax.jit
def _take_layer(leaf: jax.Array, repeat: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, repeat, keepdims=False)


def _generation_fields(public: PublicConfig) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(public, name) for name in names if getattr(public, name) is not None}
