"""From a public checkpoint to parameters: all is checked against the headers first, then each leaf is read in place."""

import collections
import concurrent.futures
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from kimi_jax.config.model import ModelConfig
from kimi_jax.data.json_files import read_json
from kimi_jax.errors import UserError
from kimi_jax.interop.files import CONFIG, INDEX, SINGLE
from kimi_jax.interop.hf_config import from_public
from kimi_jax.interop.keymap import Path_, PublicTensor, flatten, public_tensors, unflatten
from kimi_jax.interop.public_config import PublicConfig, read_public
from kimi_jax.interop.safetensors_file import NUMPY_DTYPES, SHOWN, StoredTensor, read_header
from kimi_jax.models.counts import count_parameters
from kimi_jax.models.decoder import abstract
from kimi_jax.types import PyTree, Variables

type Dtype = Literal["float32", "bfloat16"]
type MemoryDtype = Literal["float32", "bfloat16", "stored"]

READERS = 8  # tensors read and transposed at a time, each by a thread
ALIGNMENT = 64  # bytes: from there on JAX takes host memory over on a CPU instead of copying it

RESAVED = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.((?:gate|up|down)_proj\.weight)")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublicCheckpoint:
    """A public checkpoint whose files fit its config; no tensor has been read.

    Attributes:
      cfg: the model that config.json describes.
      params, buffers: its variables as float32 shapes.
      tensors: all public tensors, in layer order.
      stored: where each of them lies, by name.
    """

    folder: Path
    public: PublicConfig
    cfg: ModelConfig
    params: Variables
    buffers: Variables
    tensors: tuple[PublicTensor, ...]
    stored: Mapping[str, StoredTensor]

    def leaf_dtypes(self, dtype: MemoryDtype) -> dict[Path_, np.dtype]:
        """The dtype of each leaf in memory: gates' parameters and the router's bias stay float32."""
        wide = {t.path for t in self.tensors if t.float32}
        if dtype == "stored":
            wide |= {t.path for t in self.tensors if self.stored[t.name].spec.dtype == "F32"}
        return {t.path: NUMPY_DTYPES["F32" if t.path in wide or dtype == "float32" else "BF16"] for t in self.tensors}

    def read(
        self, *, dtype: MemoryDtype = "float32", shardings: Sharding | tuple[PyTree, PyTree] | None = None
    ) -> tuple[Variables, Variables]:
        """Reads the parameters onto their devices, one leaf after the other.

        Beyond the parameters, host memory holds up to `READERS` tensors of a leaf, and what the leaf has on devices
        other than CPUs while it is on its way. On CPUs the arrays take over the memory that the files were read into.

        Args:
          dtype: of the parameters in memory; those of gates and the router's bias are float32. "stored": bfloat16
            where all tensors of a leaf are, so that nothing is rounded.
          shardings: of all leaves, or trees like (params, buffers); None: the first device.

        Returns:
          (params, buffers), nested dicts of arrays.

        Raises:
          UserError: a file changed since it was opened, or a tensor holds what config.json rules out.
        """
        places = _place_leaves(self, shardings)
        dtypes, by_leaf = self.leaf_dtypes(dtype), {}
        for tensor in self.tensors:
            by_leaf.setdefault(tensor.path, []).append(tensor)
        shapes = flatten(self.params, self.buffers)
        leaves = {
            path: _read_leaf(shapes[path].shape, dtypes[path], places[path], inside, self.stored)
            for path, inside in by_leaf.items()
        }
        return unflatten(self.params, leaves), unflatten(self.buffers, leaves)


def open_checkpoint(folder: Path) -> PublicCheckpoint:
    """Reads config.json and the headers of a checkpoint in the layout of the released Kimi Linear.

    Args:
      folder: holds config.json and model.safetensors, or shards and their index.

    Raises:
      UserError: one line per problem: files that are missing or damaged, config values that are not supported, tensors
        that are missing, unexpected or of a wrong shape or dtype.
    """
    config_path = folder / CONFIG
    public = read_public(read_json(config_path), source=str(config_path))
    stored = find_tensors(folder)
    cfg = from_public(public)
    described = count_parameters(cfg).tensors
    if described > 2 * len(stored) + 1000:  # else the list of what is missing would be the largest thing in memory
        raise UserError(f"{config_path}: describes {described} tensors, but the files hold {len(stored)}")
    _, params, buffers = abstract(cfg)
    tensors = public_tensors(cfg, flatten(params, buffers))
    problems = list(compare(tensors, stored))
    if problems:
        raise UserError([f"{folder}: {problem}" for problem in problems])
    return PublicCheckpoint(folder, public, cfg, params, buffers, tensors, stored)


# ------------------------------------------------------------------ headers
def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Reads the headers of all files of a checkpoint; returns where each tensor lies, by its released name.

    Raises:
      UserError: the index or a file is missing or damaged, or they disagree.
    """
    found = _read_headers(folder)
    # save_pretrained of transformers 5 calls the feed-forward block of a dense layer as it calls that of an MoE layer.
    renamed = {name: RESAVED.sub(r"\1.mlp.\2", name) for name in found}
    return {name if renamed[name] in found else renamed[name]: tensor for name, tensor in found.items()}


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).exists() and any(folder.glob("model-*-of-*.safetensors")):
            raise UserError(f"{index}: no such file, but there are shards that it must name")
        return {tensor.spec.name: tensor for tensor in read_header(folder / SINGLE)}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
        raise UserError(f"{index}: weight_map must map tensor names to names of files beside it")
    found, problems = {}, []
    for name in sorted(set(weight_map.values())):
        try:
            inside = {tensor.spec.name: tensor for tensor in read_header(folder / name)}
        except UserError as error:
            problems += error.problems
            continue
        problems += summarize(
            f"{folder / name}: holds a tensor that {INDEX} places elsewhere",
            (tensor for tensor in inside if weight_map.get(tensor) != name),
        )
        found |= inside
    if not problems:
        lost = (name for name in weight_map if name not in found)
        problems += summarize(f"{index}: names a tensor that its file does not hold", lost)
    if problems:
        raise UserError(problems)
    return found


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors") and name.isprintable()


def compare(tensors: Iterable[PublicTensor], stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Yields every difference between the tensors that a model has and those that a checkpoint holds."""
    wanted = {tensor.name: tensor for tensor in tensors}
    both = [(tensor, stored[name].spec) for name, tensor in wanted.items() if name in stored]
    yield from summarize("missing tensor", (name for name in wanted if name not in stored))
    yield from summarize("unexpected tensor", (name for name in stored if name not in wanted))
    wrong_shape = ((tensor, spec) for tensor, spec in both if spec.shape != tensor.shape)
    yield from summarize(
        "wrong shape", (f"{t.name} has {list(spec.shape)}, must be {list(t.shape)}" for t, spec in wrong_shape)
    )
    wrong_dtype = ((tensor, spec) for tensor, spec in both if spec.dtype not in NUMPY_DTYPES)
    known = " or ".join(NUMPY_DTYPES)
    yield from summarize("wrong dtype", (f"{t.name} is {spec.dtype}, must be {known}" for t, spec in wrong_dtype))


def summarize(kind: str, names: Iterable[str]) -> Iterator[str]:
    """Yields a line for each of the first names, and one for how many there are more."""
    names = list(names)
    yield from (f"{kind}: {name if name.isprintable() else repr(name)}" for name in names[:SHOWN])
    if len(names) > SHOWN:
        yield f"{kind}: and {len(names) - SHOWN} more"


# ------------------------------------------------------------------ tensors
def _place_leaves(checkpoint: PublicCheckpoint, shardings: Any) -> Mapping[Path_, Sharding]:
    if isinstance(shardings, tuple):
        return flatten(*shardings)
    sharding = shardings or SingleDeviceSharding(jax.devices()[0])
    return dict.fromkeys(flatten(checkpoint.params, checkpoint.buffers), sharding)


def _read_leaf(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    tensors: Iterable[PublicTensor],
    stored: Mapping[str, StoredTensor],
) -> jax.Array:
    """Reads each tensor of a leaf once, into the pieces that this process's devices hold of it."""
    boxes = {
        device: tuple(slice(*cut.indices(size)[:2]) for cut, size in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    pieces = {box: _aligned([cut.stop - cut.start for cut in box], dtype) for box in set(boxes.values())}

    def fill(tensor: PublicTensor) -> None:
        inside = [box for box in pieces if tensor.lies_in(box)]
        if inside:
            value = stored[tensor.name].read()
            _check_values(tensor, value, stored[tensor.name].file)
            for box in inside:
                tensor.write(pieces[box], box, value)

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        collections.deque(pool.map(fill, tensors), maxlen=0)  # raises what the first of them raised
    on_devices = [jax.device_put(pieces[box], device) for device, box in boxes.items()]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(shape, sharding, on_devices))


def _aligned(shape: Iterable[int], dtype: np.dtype) -> np.ndarray:
    shape = tuple(shape)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _check_values(tensor: PublicTensor, value: np.ndarray, file: Path) -> None:
    problem = tensor.transform.refuse(value, tensor.slice_shape)
    if problem:
        raise UserError(f"{file}: {tensor.name}: {problem}")
    if not _is_finite(value):
        bad = value.size - np.count_nonzero(np.isfinite(value.astype(np.float32)))
        log.warning("%s: %s: %d of %d values are not finite", file, tensor.name, bad, value.size)


def _is_finite(value: np.ndarray) -> bool:
    if value.dtype == np.float32:
        with np.errstate(invalid="ignore"):
            return bool(np.isfinite(value.max(initial=0)) and np.isfinite(value.min(initial=0)))
    magnitude = value.view(np.uint16) & 0x7FFF
    return int(magnitude.max(initial=0)) < 0x7F80
