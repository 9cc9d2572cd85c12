"""The safetensors format: a writer that holds one tensor at a time, and a reader that trusts no header."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from kimi_jax.errors import UserError

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
NUMPY_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
METADATA = {"format": "pt"}  # transformers refuses a file without it


class TensorSpec(NamedTuple):
    """A tensor as the header describes it."""

    name: str
    dtype: str
    """As in the format: "F32", "BF16", ..."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * NUMPY_DTYPES[self.dtype].itemsize


def in_file_order[T](tensors: Iterable[T], spec_of) -> list[T]:
    """Sorts wide dtypes first, so that every tensor of a file starts at a multiple of its item size."""
    return sorted(tensors, key=lambda tensor: -NUMPY_DTYPES[spec_of(tensor).dtype].itemsize)


def write_file(path: Path, specs: Sequence[TensorSpec], arrays: Iterable[np.ndarray]) -> None:
    """Writes a file; the arrays are taken one by one.

    Args:
      path: the new file.
      specs: in file order.
      arrays: one per spec, of its shape and dtype, in any memory layout.
    """
    with open(path, "xb") as file:
        file.write(_header(specs))
        for spec, array in zip(specs, arrays, strict=True):
            if array.shape != spec.shape or array.dtype != NUMPY_DTYPES[spec.dtype]:
                raise ValueError(f"write_file: {spec.name} is {array.dtype} {array.shape}, declared as {spec}")
            # A transposed view would otherwise be written in the order of its memory, not of its indices.
            file.write(np.ascontiguousarray(array).view(np.uint8).data)


def _header(specs: Sequence[TensorSpec]) -> bytes:
    header, end = {"__metadata__": METADATA}, 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_specs(path: Path) -> list[TensorSpec]:
    """Reads the header of a file; no tensor is read.

    Raises:
      UserError: no such file, or its header does not describe exactly the bytes that follow it.
    """
    with _opened(path) as file:
        slices = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118 - not a mapping
        return [TensorSpec(name, view.get_dtype(), tuple(view.get_shape())) for name, view in slices]


def read_tensors(path: Path, names: Iterable[str]) -> Iterator[np.ndarray]:
    """Yields tensors of a file in the order of `names`, one at a time."""
    with _opened(path) as file:
        for name in names:
            yield file.get_tensor(name)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())}") from None
